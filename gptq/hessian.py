"""The input Hessian of a linear layer, H = X^T X / N over N calibration tokens.

The paper's H is 2 X X^T with tokens as columns (section 3.1); a positive factor changes no code, so the mean over
tokens is used: tr((W - Q) H (W - Q)^T) is then the mean squared output error of a token, summed over outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptq.ranks import Ranks

ALONE = Ranks()
PANEL = 256  # rows of a symmetric sum that one product computes, from the diagonal on


class HessianAccumulator:
    """Sums x^T x of one layer input in float32, in the order in which windows arrive.

    A product of two bfloat16 (or float16) numbers is exact in float32, so only the sums round. Where the original
    model's input x~ is given beside x, (x~ - x)^T x is summed as well. Windows are added one by one, whole, so what
    comes out depends on them and their order and on nothing else.
    """

    def __init__(self, num_inputs: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        """With several `ranks` each sums its own panels, so all have to be given the same windows and to ask alike."""
        self.sum = torch.zeros(num_inputs, num_inputs, dtype=torch.float32, device=device)  # right of the diagonal
        self._ranks = ranks
        self.cross_sum: Tensor | None = None
        self.num_tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add the input of one window, (..., num_inputs); every leading dimension counts tokens.

        An `original` of another shape (an expert that other tokens reached, say) tells nothing of the drift of these.
        """
        self._add(*_rows(x, original), x.dtype)

    def _add(self, x: Tensor, drift: Tensor | None, dtype: torch.dtype) -> None:
        """Rows (tokens, num_inputs) in float32, whose values `dtype` holds, and their drift."""
        panels = [slice(start, start + PANEL) for start in range(0, x.shape[1], PANEL)]
        own = [panel for number, panel in enumerate(panels) if self._ranks.owns(number)]
        with products_of(dtype, x.device):
            for panel in own:
                self.sum[panel, panel.start :].addmm_(x[:, panel].T, x[:, panel.start :])
        if drift is not None:
            self.cross_sum = torch.zeros_like(self.sum) if self.cross_sum is None else self.cross_sum
            for panel in own:
                self.cross_sum[panel].addmm_(drift[:, panel].T, x)
        self.num_tokens += x.shape[0]

    def mean(self) -> Tensor:
        """H, (num_inputs, num_inputs) float32; zero where no token came."""
        self._complete(self.sum)
        return _filled(self.sum / max(self.num_tokens, 1))

    def take(self) -> tuple[Tensor, Tensor | None]:
        """What `mean` and `cross_mean` give, in the memory of the sums, which end with this."""
        H, C, tokens = self._complete(self.sum), self.cross_sum, max(self.num_tokens, 1)
        if C is not None:
            self._complete(C)
        return _filled(H.div_(tokens)), None if C is None else C.div_(tokens)

    def cross_mean(self) -> Tensor | None:
        """C, the mean of (x~ - x) x^T, (num_inputs, num_inputs) float32; None where no original was given."""
        return None if self.cross_sum is None else self._complete(self.cross_sum) / max(self.num_tokens, 1)

    def _complete(self, sums: Tensor) -> Tensor:
        """The sums with the panels that other processes have."""
        for number, start in enumerate(range(0, len(sums), PANEL)) if self._ranks.size > 1 else ():
            panel = sums[start : start + PANEL]
            found = self._ranks.piece(panel if self._ranks.owns(number) else None, number)
            if found is not None and found.data_ptr() != panel.data_ptr():
                panel.copy_(found)
        return sums


def _filled(H: Tensor) -> Tensor:
    """H in place, symmetric, when only what is right of the diagonal was computed."""
    for start in range(0, len(H), PANEL):
        stop = min(start + PANEL, len(H))
        H[stop:, start:stop] = H[start:stop, stop:].T
        square = H[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
    return H


class HeldOut:
    """Inputs that measure what was learned from others: as rows while these are fewer than the inputs, then as sums."""

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self.num_tokens = 0
        self._num_inputs, self._device = num_inputs, device
        self._rows: list[tuple[Tensor, Tensor | None, torch.dtype]] = []  # as HessianAccumulator._add takes them
        self._sums: HessianAccumulator | None = None
        self._means: tuple[Tensor, Tensor | None] | None = None

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """As HessianAccumulator.add, until it is first asked."""
        if self._means is not None:
            raise RuntimeError("inputs come after what they measure")
        self._rows.append((*_rows(x, original), x.dtype))
        self.num_tokens += len(self._rows[-1][0])
        if self.num_tokens > self._num_inputs:
            self._sums = self._sums or HessianAccumulator(self._num_inputs, self._device)
            for rows in self._rows:
                self._sums._add(*rows)
            self._rows = []

    def powers(self, A: Tensor) -> Tensor:
        """Mean squared output of a token for each output of A (outputs, inputs), (outputs,) float64."""
        if means := self._known_means():
            return quadratic(A, means[0])
        found = torch.zeros(len(A), dtype=torch.float64, device=A.device)
        for x, _, _ in self._rows:
            found += (x.to(A.dtype) @ A.T).square().sum(0, dtype=torch.float64)
        return found / max(self.num_tokens, 1)

    def agreements(self, W: Tensor, A: Tensor) -> Tensor | None:
        """Mean over tokens of (W d)(A x) for each output, d = x~ - x; (outputs,) float64, None without originals."""
        if means := self._known_means():
            C = means[1]
            return None if C is None else ((W @ C) * A).sum(1, dtype=torch.float64)
        known = [(x, drift) for x, drift, _ in self._rows if drift is not None]
        if not known:
            return None
        found = torch.zeros(len(W), dtype=torch.float64, device=W.device)
        for x, drift in known:
            found += ((drift.to(W.dtype) @ W.T) * (x.to(A.dtype) @ A.T)).sum(0, dtype=torch.float64)
        return found / max(self.num_tokens, 1)

    def _known_means(self) -> tuple[Tensor, Tensor | None] | None:
        if self._sums is not None:
            self._means, self._sums = self._sums.take(), None
        return self._means


def _rows(x: Tensor, original: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and original - x, (tokens, num_inputs) float32."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if original is None or original.shape != x.shape:
        return rows, None
    return rows, original.reshape(-1, x.shape[-1]).float() - rows


def quadratic(A: Tensor, H: Tensor) -> Tensor:
    """a H a^T for each row a of A (rows, n) and a symmetric H (n, n); (rows,) float64.

    Of H only what is left of the diagonal or in a panel around it is multiplied, in half the work of A H.
    """
    found = torch.zeros(len(A), dtype=torch.float64, device=A.device)
    for start in range(0, len(H), PANEL):
        stop = min(start + PANEL, len(H))
        inside = A[:, start:stop]
        product = inside @ H[start:stop, start:stop]
        if start:
            product.addmm_(A[:, :start], H[:start, start:stop], alpha=2)
        found += (product * inside).sum(1, dtype=torch.float64)
    return found


def native_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported())


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
