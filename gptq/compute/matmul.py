"""Matrix products: float32 that is float32 whatever the process has set, and as quick as the machine can."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq.compute.cpu_features import native_bfloat16

ROWS = 1024  # of a product whose left factor has to be copied, that are made at a time: bounds the memory


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B, (m, k) times (k, n), without autograd.

    oneDNN uses all of a CPU's vectors, where the library behind `@` (MKL) takes half of AVX-512's on some CPUs (AMD's).
    It copies B into an order of its own, and A first where that is not contiguous.
    """
    on_cpu = A.device.type == "cpu" and A.dtype == B.dtype == torch.float32
    if not (on_cpu and _prefers_onednn() and A.numel() and B.numel()):
        return A @ B
    if not (B.is_contiguous() or B.mT.is_contiguous()):
        B = B.contiguous()  # oneDNN crawls along other strides
    if A.is_contiguous() or len(A) <= ROWS:
        return _by_onednn(A, B)
    found = torch.empty(len(A), B.shape[1])
    for start in range(0, len(A), ROWS):
        found[start : start + ROWS] = _by_onednn(A[start : start + ROWS], B)
    return found


def _by_onednn(A: Tensor, B: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(A, B.mT, None, "none", [], "")
    return found


@cache
def _prefers_onednn() -> bool:
    """Whether oneDNN is there and not slower: on vectors of AVX2, MKL is quicker by a tenth."""
    by_mkl = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not by_mkl


@contextmanager
def quick_linears(module: nn.Module) -> Iterator[None]:
    """Inside, linear layers within `module` compute by oneDNN on CPUs that prefer it, on weights it reorders once.

    Torch has a weight reordered for each input anew, which for 512 rows takes a seventh of the time, and multiplies
    float32 by MKL (see `product`). Where gradients are wanted, and on other devices, layers compute as ever.
    """
    linears = [layer for layer in module.modules() if type(layer) is nn.Linear and "forward" not in layer.__dict__]
    linears = linears if _prefers_onednn() else []
    reordered = _Reordered()
    for layer in linears:
        layer.forward = partial(_linear, layer, reordered)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in linears:
            del layer.forward  # the class's own shows again


class _Reordered:
    """The weight that was last asked for, in oneDNN's order for so many rows; windows come to a layer in turn.

    It is forgotten when the weight itself is.
    """

    def __init__(self) -> None:
        self._of: tuple[weakref.ref[Tensor], int, int] | None = None
        self._reordered: Tensor | None = None

    def __call__(self, weight: Tensor, rows: int) -> Tensor:
        known = self._of
        if self._reordered is None or known is None or known[0]() is not weight or known[1:] != (weight._version, rows):
            self._reordered = None  # the last one's memory
            self._reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            self._of = weakref.ref(weight, self._forget), weight._version, rows
        return self._reordered

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._of is not None and self._of[0] is gone:
            self._of = self._reordered = None


def _linear(layer: nn.Linear, reordered: _Reordered, x: Tensor) -> Tensor:
    weight = layer.weight
    alike = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype
    quick = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and native_bfloat16())
    if torch.is_grad_enabled() or not (alike and quick and x.numel()):
        return nn.functional.linear(x, weight, layer.bias)
    rows = x.numel() // x.shape[-1]
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, reordered(weight, rows), layer.bias, "none", [], "")
    return y


@contextmanager
def products_of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices on a CPU may take the factors for values of `dtype`.

    Where those are bfloat16 values and the CPU has products of these with sums in float32, nothing is lost by them.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if matmul is None or dtype != torch.bfloat16 or device.type != "cpu" or not native_bfloat16():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices are float32 products, whatever the process has set.

    TF32, bfloat16 modes and autocast round factors to 11 or 8 bits, which neither H nor the solve survives unharmed.
    """
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9 there was one setting for all
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        products: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
        settings = [product.fp32_precision for product in products]
        for product in products:
            product.fp32_precision = "ieee"
        try:
            yield
        finally:
            for product, setting in zip(products, settings, strict=True):
                product.fp32_precision = setting
