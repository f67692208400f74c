"""The input Hessian of a linear layer, H = X^T X / N over N calibration tokens.

The paper's H is 2 X X^T with tokens as columns (section 3.1); a positive factor changes no code, so the mean over
tokens is used: tr((W - Q) H (W - Q)^T) is then the mean squared output error of a token, summed over outputs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gptq.compute.cpu_features import has_pairs, has_tiles
from gptq.compute.distributed import ALONE, Ranks
from gptq.compute.matmul import product, products_of

PANEL = 256  # rows of a symmetric sum that one product computes, from the diagonal on
TOKENS = 1024  # that are added at a time: with fewer the sums are read and written too often, more take memory


class HessianAccumulator:
    """Sums x x^T of one layer input in float32, in the order in which windows arrive.

    A product of two bfloat16 (or float16) numbers is exact in float32, so only the sums round. Where the original
    model's input x~ is given beside x, x~ x^T is summed as well. Windows come one by one, whole, so what comes out
    depends on them and their order and on nothing else. Until there are TOKENS they wait, and must not be changed.
    """

    def __init__(self, num_inputs: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        """With several `ranks` each sums its own panels, so all have to be given the same windows and to ask alike."""
        self._sum = torch.zeros(num_inputs, num_inputs, dtype=torch.float32, device=device)  # right of the diagonal
        self._ranks = ranks
        self._original_sum: Tensor | None = None  # x~ x^T, once x~ differs from x
        self._waiting: list[tuple[Tensor, Tensor | None]] = []  # x and x~, all with one or all without
        self.num_tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add the input of one window, (..., num_inputs); every leading dimension counts tokens.

        An `original` of another shape (an expert that other tokens reached, say) tells nothing of the drift of these.
        """
        x, original = as_rows(x, original)
        if self._waiting and (self._waiting[0][1] is None) != (original is None):
            self._add_waiting()
        self._waiting.append((x, original))
        self.num_tokens += len(x)
        if sum(len(rows) for rows, _ in self._waiting) >= TOKENS:
            self._add_waiting()

    def _add_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        x, originals = torch.cat([rows for rows, _ in waiting]), [rows for _, rows in waiting if rows is not None]
        original = torch.cat(originals) if originals else None
        if original is not None and self._original_sum is None:
            self._original_sum = _filled(self._sum.clone())  # until now nothing had drifted
        for start in range(0, len(x), TOKENS):
            rows = slice(start, start + TOKENS)
            self._add(x[rows], None if original is None else original[rows])

    def _add(self, x: Tensor, original: Tensor | None) -> None:
        panels = [slice(start, min(start + PANEL, x.shape[1])) for start in range(0, x.shape[1], PANEL)]
        own = [panel for number, panel in enumerate(panels) if self._ranks.owns(number)]
        x, original, add_products = _prepared(x, original)
        add_products(self._sum, x, x, own, upper=True)
        if self._original_sum is not None:
            add_products(self._original_sum, x if original is None else original, x, own, upper=False)

    def mean(self) -> Tensor:
        """H, (num_inputs, num_inputs) float32; zero where no token came."""
        self._add_waiting()
        return _filled(self._complete(self._sum) / max(self.num_tokens, 1))

    def drift_mean(self) -> Tensor | None:
        """C, the mean of (x~ - x) x^T, (num_inputs, num_inputs) float32; None where nothing has drifted."""
        self._add_waiting()
        if self._original_sum is None:
            return None
        drift = self._complete(self._original_sum) - _filled(self._complete(self._sum))
        return drift.div_(max(self.num_tokens, 1))

    def take(self) -> tuple[Tensor, Tensor | None]:
        """What `mean` and `drift_mean` give, in the memory of the sums, which end with this."""
        self._add_waiting()
        H, C, tokens = _filled(self._complete(self._sum)), self._original_sum, max(self.num_tokens, 1)
        if C is not None:
            C = self._complete(C).sub_(H).div_(tokens)
        return H.div_(tokens), C

    def _complete(self, sums: Tensor) -> Tensor:
        """The sums with the panels that other processes have."""
        for number, start in enumerate(range(0, len(sums), PANEL)) if self._ranks.size > 1 else ():
            panel = sums[start : start + PANEL]
            found = self._ranks.piece(panel if self._ranks.owns(number) else None, number)
            if found is not None and found.data_ptr() != panel.data_ptr():
                panel.copy_(found)
        return sums


def as_rows(x: Tensor, original: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as (tokens, num_inputs); None for an original that tells of no drift."""
    rows = x.reshape(-1, x.shape[-1])
    if original is None or original.shape != x.shape or torch.equal(original, x):
        return rows, None
    return rows, original.reshape(-1, x.shape[-1])


def _prepared(x: Tensor, original: Tensor | None) -> tuple[Tensor, Tensor | None, Callable[..., None]]:
    """x and x~ (tokens, num_inputs) as what adds up their products wants them, and that.

    It is called with sums, a, b, panels and upper: sums[panel] += a[:, panel]^T b for each panel, or at least what is
    right of the diagonal if `upper`.
    """
    if _sums_in_float32(x):
        return x, original, _add_half_products
    if _goes_in_pairs(x):
        from gptq.solver import gram_bf16  # compiles its loops

        return gram_bf16.in_pairs(x), None if original is None else gram_bf16.in_pairs(original), gram_bf16.add_products
    floats = None if original is None else original.float()
    return x.float(), floats, partial(_add_float_products, x.dtype)


def _sums_in_float32(x: Tensor) -> bool:
    """Whether torch can leave the product of x, of 16 bits, with its like in float32."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.mm, "dtype")


def _goes_in_pairs(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or has_tiles() or not has_pairs():
        return False
    from gptq.compute import simd

    return x.shape[1] % simd.WIDE == 0


def _add_half_products(sums: Tensor, a: Tensor, b: Tensor, panels: list[slice], upper: bool) -> None:
    """On a GPU: factors of 16 bits, sums of 32."""
    for panel in panels:
        right = slice(panel.start if upper else 0, None)
        sums[panel, right] += torch.mm(a[:, panel].T, b[:, right], out_dtype=torch.float32)


def _add_float_products(
    held: torch.dtype, sums: Tensor, a: Tensor, b: Tensor, panels: list[slice], upper: bool
) -> None:
    """Anywhere, on float32 numbers that `held` can hold."""
    with products_of(held, a.device):
        for panel in panels:
            right = slice(panel.start if upper else 0, None)
            sums[panel, right].addmm_(a[:, panel].T, b[:, right])


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
        self._rows: list[tuple[Tensor, Tensor | None]] = []  # x and, where it differs, x~
        self._sums: HessianAccumulator | None = None
        self._means: tuple[Tensor, Tensor | None] | None = None

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """As HessianAccumulator.add, until it is first asked."""
        if self._means is not None:
            raise RuntimeError("inputs come after what they measure")
        self._rows.append(as_rows(x, original))
        self.num_tokens += len(self._rows[-1][0])
        if self.num_tokens > self._num_inputs:
            self._sums = self._sums or HessianAccumulator(self._num_inputs, self._device)
            for rows in self._rows:
                self._sums.add(*rows)
            self._rows = []

    def power(self, A: Tensor) -> float:
        """Mean squared output of a token that the weight A (outputs, inputs) makes, summed over outputs."""
        if means := self._known_means():
            return output_power(A, means[0])
        found = sum(float(_outputs(A, x).square_().sum(dtype=torch.float64)) for x, _ in self._rows)
        return found / max(self.num_tokens, 1)

    def agreement(self, W: Tensor, A: Tensor) -> float | None:
        """Mean over tokens of (W d) . (A x), d = x~ - x; None where none drifted."""
        if means := self._known_means():
            C = means[1]
            return None if C is None else _weighed_product(W, A, C)
        known = [(x, original) for x, original in self._rows if original is not None]
        if not known:
            return None
        found = 0.0
        for x, original in known:
            drift = (original.float() - x.float()).to(x.dtype)
            found += float(_outputs(W, drift).mul_(_outputs(A, x)).sum(dtype=torch.float64))
        return found / max(self.num_tokens, 1)

    def _known_means(self) -> tuple[Tensor, Tensor | None] | None:
        if self._sums is not None:
            self._means, self._sums = self._sums.take(), None
        return self._means


def _outputs(A: Tensor, x: Tensor) -> Tensor:
    """x A^T (tokens, outputs) in float32 or better, as exact as the dtype of x (tokens, inputs), for measuring alone.

    A forward rounds its weights to that dtype too, and a mean over many numbers does not tell the difference.
    """
    if x.dtype != torch.bfloat16:
        return product(x.to(A.dtype), A.T)
    return (x @ A.to(x.dtype).T).to(A.dtype)


def output_power(A: Tensor, H: Tensor) -> float:
    """tr(A H A^T) of a weight A (rows, n) and a symmetric H (n, n): a token's mean squared output, summed over outputs.

    It is <A^T A, H>, for which half of A^T A will do. Where the machine multiplies bfloat16 in a fraction of the time,
    A is rounded to it: in a sum over so many numbers the roundings cancel, to three digits and more.
    """
    found = 0.0
    for start, sums in _panels_of_product(A, A, upper=True):
        weighed = sums.mul_(H[start : start + PANEL, start:])  # (panel, n - start)
        found += float(2 * weighed.sum(dtype=torch.float64) - weighed[:, :PANEL].sum(dtype=torch.float64))
    return found


def _weighed_product(A: Tensor, B: Tensor, C: Tensor) -> float:
    """<A^T B, C> of A, B (rows, n) and C (n, n), as exact as `output_power`."""
    panels = _panels_of_product(A, B, upper=False)
    return sum(float(sums.mul_(C[start : start + PANEL]).sum(dtype=torch.float64)) for start, sums in panels)


def _panels_of_product(A: Tensor, B: Tensor, upper: bool) -> Iterator[tuple[int, Tensor]]:
    """A^T B (n, n) of A, B (rows, n), PANEL rows at a time, and where they begin; if `upper` from the diagonal on."""
    n, multiply = A.shape[1], _multiplier(A, B)
    for start in range(0, n, PANEL):
        yield start, multiply(slice(start, min(start + PANEL, n)), start if upper else 0)


def _multiplier(A: Tensor, B: Tensor) -> Callable[[slice, int], Tensor]:
    """A function of a panel and a start that gives A[:, panel]^T B[:, start:], as exact as `output_power` says."""
    none = A[:0].bfloat16()  # shows which way such numbers go
    if A.dtype != torch.float32 or not (_sums_in_float32(none) or _goes_in_pairs(none)):
        return lambda panel, start: A[:, panel].T @ B[:, start:]  # strides that `product` would copy each time
    a = A.bfloat16()
    b = a if B is A else B.bfloat16()
    if _sums_in_float32(none):
        return lambda panel, start: torch.mm(a[:, panel].T, b[:, start:], out_dtype=torch.float32)

    from gptq.solver import gram_bf16

    left = gram_bf16.in_pairs(a)
    return partial(gram_bf16.product_of_panel, left, left if b is a else gram_bf16.in_pairs(b))
