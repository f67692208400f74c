"""Fast matrix products, and contexts that fix the precision of float32 products whatever the process has set."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq.compute.cpu_features import has_native_bfloat16

KEPT_BYTES = 2**24  # of weights that are kept in oneDNN's order
CHUNK_ROWS = 1024  # rows of a non-contiguous left factor that are copied and multiplied at a time; bounds the memory


def product(A: Tensor, B: Tensor) -> Tensor:
    """Return the product A B, (m, k) times (k, n), without autograd.

    Prefer oneDNN on CPUs: MKL, the library behind `@`, uses only half the vector width of AVX-512 on AMD's CPUs.
    oneDNN copies B into its own blocked order; if A is not contiguous, A is copied first.
    """
    on_cpu = A.device.type == "cpu" and A.dtype == B.dtype == torch.float32
    if not (on_cpu and _prefers_onednn() and A.numel() and B.numel()):
        return A @ B
    if not (B.is_contiguous() or B.mT.is_contiguous()):
        B = B.contiguous()  # oneDNN is very slow on other strides
    if A.is_contiguous() or len(A) <= CHUNK_ROWS:
        return _onednn_matmul(A, B)
    found = torch.empty(len(A), B.shape[1], dtype=torch.float32)
    for start in range(0, len(A), CHUNK_ROWS):
        found[start : start + CHUNK_ROWS] = _onednn_matmul(A[start : start + CHUNK_ROWS], B)
    return found


def _onednn_matmul(A: Tensor, B: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(A, B.mT, None, "none", [], "")
    return found


@cache
def _prefers_onednn() -> bool:
    """Whether oneDNN is available and not slower than MKL; on CPUs with only AVX2, MKL is faster by a tenth."""
    by_mkl = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not by_mkl


@contextmanager
def onednn_linears(module: nn.Module) -> Iterator[None]:
    """Inside, linear layers of `module` multiply by oneDNN on CPUs where it is faster, with weights reordered once.

    torch lets oneDNN reorder the weight for every input, which for 512 rows takes a seventh of the time, and multiplies
    float32 by MKL (see `product`). With gradients enabled, or on other devices, layers compute as usual.
    """
    linears = [layer for layer in module.modules() if type(layer) is nn.Linear and "forward" not in layer.__dict__]
    linears = linears if _prefers_onednn() else []
    reordered = _ReorderedWeights()
    for layer in linears:
        layer.forward = partial(_onednn_linear, layer, reordered)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in linears:
            del layer.forward  # makes the method of the class visible again
        reordered.clear()


class _ReorderedWeights:
    """The last weights that were used in oneDNN's blocked order, as many as KEPT_BYTES hold, at least one.

    All windows of a stream pass a layer before the next; a second stream passes a few layers with some windows at a
    time, so that small weights come again. The order depends on the number of input rows. An entry is dropped when its
    weight is freed.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Reordered] = {}  # by id of the weight, the last one used at the end

    def __call__(self, weight: Tensor, rows: int) -> Tensor:
        kept = self._kept.pop(id(weight), None)
        if kept is None or kept.of() is not weight or (kept.version, kept.rows) != (weight._version, rows):
            kept = None  # free the old one before the new one is made
            self._make_room(weight.nbytes)
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            kept = _Reordered(weakref.ref(weight, partial(self._forget, id(weight))), weight._version, rows, reordered)
        self._kept[id(weight)] = kept
        return kept.tensor

    def clear(self) -> None:
        """Free all; the callbacks of weak references would keep them until a garbage collection."""
        self._kept.clear()

    def _make_room(self, nbytes: int) -> None:
        while self._kept and nbytes + sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            del self._kept[next(iter(self._kept))]

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        if key in self._kept and self._kept[key].of is gone:
            del self._kept[key]


@dataclass(frozen=True)
class _Reordered:
    """A weight in oneDNN's order for some number of rows."""

    of: weakref.ref[Tensor]
    version: int  # of the weight when it was reordered
    rows: int
    tensor: Tensor

    @property
    def nbytes(self) -> int:
        weight = self.of()
        return 0 if weight is None else weight.nbytes


def _onednn_linear(layer: nn.Linear, reordered: _ReorderedWeights, x: Tensor) -> Tensor:
    """Compute the forward of a linear layer by oneDNN, or by torch if oneDNN is not faster."""
    weight = layer.weight
    alike = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype
    quick = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_native_bfloat16())
    if torch.is_grad_enabled() or not (alike and quick and x.numel()):
        return nn.functional.linear(x, weight, layer.bias)
    rows = x.numel() // x.shape[-1]
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, reordered(weight, rows), layer.bias, "none", [], "")
    return y


@contextmanager
def allow_bfloat16_matmul(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, float32 matrix products on a CPU may convert their factors to bfloat16, if `dtype` is bfloat16.

    Use it for factors whose values all are bfloat16: the conversion is then exact, and sums stay float32. Do nothing
    where the CPU has no bfloat16 products.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if matmul is None or dtype != torch.bfloat16 or device.type != "cpu" or not has_native_bfloat16():
        yield
        return
    with _CPU_PRECISION.set_to("bf16"):
        yield


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside, float32 matrix products keep full float32 precision, whatever the process has set.

    TF32, bfloat16 modes and autocast round the factors to 11 or 8 significant bits, too few for H and the solve.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if hasattr(torch.backends.mkldnn, "matmul"):  # torch before 2.9 has one setting for all backends
            stack.enter_context(_CPU_PRECISION.set_to("ieee"))
            stack.enter_context(_GPU_PRECISION.set_to("ieee"))
        stack.enter_context(_OLDER_PRECISION.set_to("highest"))  # `allow_tf32` raises if the two kinds differ
        yield


class _SharedSetting:
    """A setting of the process that several threads change for a time: the last of those inside decides.

    When none is inside, it is as it was before. A thread that saved and restored it alone could restore what another
    thread had set, for good.
    """

    def __init__(self, read: Callable[[], str], write: Callable[[str], None]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._inside: dict[object, str] = {}  # what each caller wants, in the order in which they came
        self._before = ""

    @contextmanager
    def set_to(self, value: str) -> Iterator[None]:
        caller = object()
        with self._lock:
            if not self._inside:
                self._before = self._read()
            self._inside[caller] = value
            self._write(value)
        try:
            yield
        finally:
            with self._lock:
                del self._inside[caller]
                self._write(next(reversed(self._inside.values()), self._before))


def _older_precision() -> str:
    """Return the older setting of float32 products; the default where the process has used the newer settings."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


def _precision_of(product: Any) -> _SharedSetting:
    return _SharedSetting(lambda: product().fp32_precision, lambda value: setattr(product(), "fp32_precision", value))


_CPU_PRECISION = _precision_of(lambda: getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009 (torch has no type for it)
_GPU_PRECISION = _precision_of(lambda: torch.backends.cuda.matmul)
_OLDER_PRECISION = _SharedSetting(_older_precision, torch.set_float32_matmul_precision)  # changes the others, too
