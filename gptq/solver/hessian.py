"""The input Hessian of a linear layer, H = X^T X / N over N calibration tokens.

The paper's H is 2 X X^T with tokens as columns (section 3.1); a positive factor changes no code, so the mean over
tokens is used: tr((W - Q) H (W - Q)^T) is then the mean squared output error of a token, summed over outputs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gptq.compute.cpu_features import has_amx, has_avx512_bf16
from gptq.compute.device_profile import profile_of
from gptq.compute.distributed import ALONE, Ranks
from gptq.compute.matmul import allow_bfloat16_matmul, product
from gptq.compute.matrices import IN_MEMORY, Matrices, is_wide, release

PORTION_ROWS = 2048  # of a wide H that are written at a time, where a step writes few columns of all rows


class HessianAccumulator:
    """Sums x x^T over the tokens of one layer input x in float32, in the order in which windows arrive.

    A product of two bfloat16 (or float16) numbers is exact in float32, so only the sums round. If a drift d of k
    numbers is passed beside x (see `error_propagation`), d x^T is summed as well. Every call adds one whole window, so
    the result depends on the windows and their order alone. Windows are kept until they have `hessian_tokens` tokens
    together (see `DeviceProfile`); the caller must not modify them.
    """

    def __init__(
        self, num_inputs: int, device: torch.device, ranks: Ranks = ALONE, matrices: Matrices = IN_MEMORY
    ) -> None:
        """With several `ranks`, each process sums its own panels; all must make the same calls on the same windows."""
        self._matrices = matrices
        self._sum = matrices.zeros(num_inputs, num_inputs, device)  # valid right of the diagonal
        self._ranks = ranks
        self._profile = profile_of(device, ranks.size)
        self._drifts = torch.zeros((), dtype=torch.bool, device=device)  # whether a drift was ever not 0
        self._drift_sum: Tensor | None = None  # d x^T (k, num_inputs), once there is a drift
        self._waiting: list[tuple[Tensor, Tensor | None]] = []  # (x, d) of windows to add; d in all or in none
        self.num_tokens = 0

    def add(self, x: Tensor, drift: Tensor | None = None) -> None:
        """Add the input of one window, (..., num_inputs), and its drift, (..., k); leading dimensions count tokens."""
        x, drift = flatten_tokens(x), None if drift is None else flatten_tokens(drift)
        if drift is not None and not self._profile.compares_windows:
            self._drifts |= drift.any()
        if self._waiting and (self._waiting[0][1] is None) != (drift is None):
            self._add_waiting()
        self._waiting.append((x, drift))
        self.num_tokens += len(x)
        if sum(len(rows) for rows, _ in self._waiting) >= self._profile.hessian_tokens:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Add the tokens of all waiting windows, `hessian_tokens` at a time."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        x, drifts = torch.cat([rows for rows, _ in waiting]), [rows for _, rows in waiting if rows is not None]
        drift = torch.cat(drifts) if drifts else None
        if drift is not None and self._drift_sum is None:
            self._drift_sum = self._matrices.zeros(drift.shape[1], x.shape[1], x.device)
        step = self._profile.hessian_tokens
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            self._add(x[rows], None if drift is None else drift[rows])

    def _add(self, x: Tensor, drift: Tensor | None) -> None:
        """Add the products of x (tokens, num_inputs) and its drift (tokens, k) to this process's panels."""
        x, drift, add_products = _prepare_factors(x, drift)
        self._add_to(self._sum, add_products, x, x, upper=True)
        if drift is not None and self._drift_sum is not None:
            self._add_to(self._drift_sum, add_products, drift, x, upper=False)

    def _add_to(self, sums: Tensor, add_products: Callable[..., None], a: Tensor, b: Tensor, upper: bool) -> None:
        panels = enumerate(_panels(len(sums), self._panel_rows))
        own = [panel for number, panel in panels if self._ranks.owns(number)]
        for some in [[panel] for panel in own] if is_wide(sums) else [own]:
            add_products(sums, a, b, some, upper=upper)
            release(sums)

    def mean(self) -> Tensor:
        """Return H, (num_inputs, num_inputs) float32; zero without tokens."""
        self._add_waiting()
        return _symmetrize(self._complete(self._sum) / max(self.num_tokens, 1), self._panel_rows)

    def drift_mean(self) -> Tensor | None:
        """Return C, the mean of d x^T, (k, num_inputs) float32; None if there was no drift."""
        self._add_waiting()
        self._drop_zeros()
        return None if self._drift_sum is None else self._complete(self._drift_sum) / max(self.num_tokens, 1)

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Return (`mean`, `drift_mean`), computed in place in the sums; the accumulator cannot be used afterwards."""
        self._add_waiting()
        self._drop_zeros()
        drift = None if self._drift_sum is None else self._complete(self._drift_sum)
        found = _symmetrize(self._complete(self._sum), self._panel_rows), drift
        for sums in found:
            if sums is not None:
                for panel in _panels(len(sums), self._panel_rows):
                    sums[panel].div_(max(self.num_tokens, 1))
                    release(sums)
        return found

    def _drop_zeros(self) -> None:
        """Drop the sum of drifts that were all 0, where the windows' drifts were not looked at one by one."""
        if self._drift_sum is not None and not self._profile.compares_windows and not bool(self._drifts):
            self._drift_sum = None

    @property
    def _panel_rows(self) -> int:
        return self._profile.hessian_rows

    def complete(self) -> None:
        """Fill in what other processes have summed, so that no later call has to be made by all of them together."""
        self._add_waiting()
        for sums in (self._sum, self._drift_sum):
            if sums is not None:
                self._complete(sums)
        self._ranks = ALONE

    def _complete(self, sums: Tensor) -> Tensor:
        """Fill in the panels that other processes have summed."""
        for number, rows in enumerate(_panels(len(sums), self._panel_rows)) if self._ranks.size > 1 else ():
            panel = sums[rows]
            found = self._ranks.broadcast_piece(panel if self._ranks.owns(number) else None, number)
            if found is not None and found.data_ptr() != panel.data_ptr():
                panel.copy_(found)
            release(sums)
        return sums


def _panels(inputs: int, rows: int) -> list[slice]:
    """Return slices of at most `rows` of H's rows."""
    return [slice(start, min(start + rows, inputs)) for start in range(0, inputs, rows)]


def flatten_tokens(x: Tensor) -> Tensor:
    """Reshape x (..., features) to (tokens, features)."""
    return x.reshape(-1, x.shape[-1])


def _prepare_factors(x: Tensor, drift: Tensor | None) -> tuple[Tensor, Tensor | None, Callable[..., None]]:
    """Choose the function that adds up the products of x (tokens, num_inputs) and of its drift (tokens, k) with x.

    Returns:
        x and the drift in that function's layout, and the function f(sums, a, b, panels, upper), which adds
        a[:, panel]^T b to sums[panel] for each panel; with `upper` only the result right of the diagonal is valid.
    """
    if _has_mixed_precision_mm(x):
        return x, drift, _add_half_products
    if _has_bf16_kernel(x) and (drift is None or _has_bf16_kernel(drift)):
        from gptq.solver import gram_bf16

        return (
            gram_bf16.pair_tokens(x),
            None if drift is None else gram_bf16.pair_tokens(drift),
            gram_bf16.add_products,
        )
    return x.float(), None if drift is None else drift.float(), partial(_add_float_products, x.dtype)


def _has_mixed_precision_mm(x: Tensor) -> bool:
    """Whether torch can multiply matrices of x's dtype, 16 bits, and return float32 (torch.mm with out_dtype)."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.mm, "dtype")


def _has_bf16_kernel(x: Tensor) -> bool:
    """Whether `gram_bf16` handles x and is the fastest: with AMX, oneDNN is faster."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or has_amx() or not has_avx512_bf16():
        return False
    from gptq.compute import simd

    return x.shape[1] % simd.WIDE == 0


def _add_half_products(sums: Tensor, a: Tensor, b: Tensor, panels: list[slice], upper: bool) -> None:
    """Add a[:, panel]^T b to sums[panel], on a GPU: factors of 16 bits, products summed in float32."""
    for panel in panels:
        right = slice(panel.start if upper else 0, None)
        sums[panel, right] += torch.mm(a[:, panel].T, b[:, right], out_dtype=torch.float32)


def _add_float_products(
    held: torch.dtype, sums: Tensor, a: Tensor, b: Tensor, panels: list[slice], upper: bool
) -> None:
    """Add a[:, panel]^T b to sums[panel], on any device: float32 factors, exact in the dtype `held`."""
    with allow_bfloat16_matmul(held, a.device):
        for panel in panels:
            right = slice(panel.start if upper else 0, None)
            sums[panel, right].addmm_(a[:, panel].T, b[:, right])


def _symmetrize(H: Tensor, panel_rows: int) -> Tensor:
    """Copy the part of H right of the diagonal to the left of it, in place."""
    for panel in _panels(len(H), panel_rows):
        below = range(panel.stop, len(H), PORTION_ROWS if is_wide(H) else len(H))
        for rows in (slice(start, start + below.step) for start in below):
            H[rows, panel] = H[panel, rows].T
            release(H)
        square = H[panel, panel]
        square.copy_(square.triu() + square.triu(1).T)
        release(H)
    return H


class HeldOut:
    """Held-out inputs of a layer, which measure the error on windows that the solver has not seen.

    The rows of x and of its drift are kept until there are more tokens than inputs; from then on only H and C are kept.
    """

    def __init__(
        self, num_inputs: int, device: torch.device, ranks: Ranks = ALONE, matrices: Matrices = IN_MEMORY
    ) -> None:
        """With several `ranks`, all must make the same calls of `add` and `complete`."""
        self.num_tokens = 0
        self._num_inputs, self._device, self._ranks, self._matrices = num_inputs, device, ranks, matrices
        self._rows: list[tuple[Tensor, Tensor | None]] = []  # (x, drift) of each window
        self._sums: HessianAccumulator | None = None
        self._means: tuple[Tensor, Tensor | None] | None = None

    def add(self, x: Tensor, drift: Tensor | None = None) -> None:
        """Add the input of one window, as HessianAccumulator.add does; only allowed before the first measurement."""
        if self._means is not None:
            raise RuntimeError("inputs come after what they measure")
        self._rows.append((flatten_tokens(x), None if drift is None else flatten_tokens(drift)))
        self.num_tokens += len(self._rows[-1][0])
        if self.num_tokens > self._num_inputs:
            self._sums = self._sums or HessianAccumulator(self._num_inputs, self._device, self._ranks, self._matrices)
            for rows in self._rows:
                self._sums.add(*rows)
            self._rows = []

    def complete(self) -> None:
        """End adding; with several processes, to be called before the first measurement."""
        self._known_means()

    def power(self, A: Tensor) -> float:
        """Return the mean squared output: ||A x||^2 of a weight A (outputs, inputs), averaged over the inputs x."""
        if means := self._known_means():
            return mean_output_power(A, means[0])
        found = torch.zeros((), dtype=torch.float64, device=A.device)
        for x, _ in self._rows:
            found += _layer_outputs(A, x).square_().sum(dtype=torch.float64)
        return float(found) / max(self.num_tokens, 1)

    def agreement(self, W: Tensor | None, A: Tensor, rows: slice) -> float | None:
        """Return the mean over tokens of t . (A x), t the drift of a layer's outputs; None if there is no drift.

        Args:
            W: (outputs, inputs) the weight, where the drift d is one of inputs, and so t = W d; None where it is one of
                outputs, t = d[rows].
            A: (outputs, inputs) a correction of W, which is multiplied by the layer's input x in the quantized model.
        """
        if means := self._known_means():
            C = means[1]
            if C is None:
                return None
            return float((A * C[rows]).sum(dtype=torch.float64)) if W is None else _gram_dot(W, A, C)
        known = [(x, drift) for x, drift in self._rows if drift is not None]
        if not known:
            return None
        found = torch.zeros((), dtype=torch.float64, device=A.device)
        for x, drift in known:
            target = drift[:, rows].to(A.dtype) if W is None else _layer_outputs(W, drift)
            found += _layer_outputs(A, x).mul_(target).sum(dtype=torch.float64)
        return float(found) / max(self.num_tokens, 1)

    def _known_means(self) -> tuple[Tensor, Tensor | None] | None:
        if self._sums is not None:
            self._means, self._sums = self._sums.take(), None
        return self._means


def _layer_outputs(A: Tensor, x: Tensor) -> Tensor:
    """Return x A^T (tokens, outputs) in A's dtype, computed in the precision of x's dtype; only for measuring errors.

    For bfloat16 x (tokens, inputs) the weight A is rounded to bfloat16, as in the model's own forward; in a mean over
    many tokens the roundings cancel.
    """
    if x.dtype != torch.bfloat16:
        return product(x.to(A.dtype), A.T)
    return (x @ A.to(x.dtype).T).to(A.dtype)


def mean_output_power(A: Tensor, H: Tensor) -> float:
    """Return tr(A H A^T), A (rows, n) a weight, H (n, n) symmetric: the mean of ||A x||^2 over the tokens x of H.

    Computed as <A^T A, H>, for which half of A^T A suffices. Where the machine multiplies bfloat16 much faster, A is
    rounded to bfloat16: over n^2 terms the roundings cancel, which leaves three correct digits or more.
    """
    found = torch.zeros((), dtype=torch.float64, device=A.device)
    for panel, sums in _gram_panels(A, A, upper=True):
        weighed = sums.mul_(H[panel, panel.start :])  # (panel, n - start)
        square = weighed[:, : panel.stop - panel.start]
        found += 2 * weighed.sum(dtype=torch.float64) - square.sum(dtype=torch.float64)
        release(H)
    return float(found)


def _gram_dot(A: Tensor, B: Tensor, C: Tensor) -> float:
    """Return the inner product <A^T B, C> of A, B (rows, n) and C (n, n), as precise as `mean_output_power`."""
    found = torch.zeros((), dtype=torch.float64, device=A.device)
    for panel, sums in _gram_panels(A, B, upper=False):
        found += sums.mul_(C[panel]).sum(dtype=torch.float64)
        release(C)
    return float(found)


def _gram_panels(A: Tensor, B: Tensor, upper: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield A^T B (n, n) of A, B (rows, n) panel by panel, as (rows, these); with `upper` from the diagonal on."""
    multiply = _gram_panel_function(A, B)
    for panel in _panels(A.shape[1], profile_of(A.device).hessian_rows):
        yield panel, multiply(panel, panel.start if upper else 0)


def _gram_panel_function(A: Tensor, B: Tensor) -> Callable[[slice, int], Tensor]:
    """Return the fastest f(panel, start) = A[:, panel]^T B[:, start:]; as precise as `mean_output_power` says."""
    sample = A[:0].bfloat16()  # empty, to look up which kernel bfloat16 values of A's device and width would take
    if A.dtype != torch.float32 or not (_has_mixed_precision_mm(sample) or _has_bf16_kernel(sample)):
        return lambda panel, start: A[:, panel].T @ B[:, start:]  # `product` would copy these strides each time
    a = A.bfloat16()
    b = a if B is A else B.bfloat16()
    if _has_mixed_precision_mm(sample):
        return lambda panel, start: torch.mm(a[:, panel].T, b[:, start:], out_dtype=torch.float32)

    from gptq.solver import gram_bf16

    left = gram_bf16.pair_tokens(a)
    return partial(gram_bf16.panel_product, left, left if b is a else gram_bf16.pair_tokens(b))
