"""The two inner loops of the solver: choosing a block's codes column by column, and searching a group's grid.

On a CPU they are compiled (numba), each thread with its own rows and a few rows as vector lanes, so that a block stays
in the first-level cache. On a GPU they are Triton kernels (`gptq.triton_solver`) where Triton is installed; elsewhere
the same arithmetic is written in whole-tensor operations. Weights are transposed
here: a column of W is one contiguous line, (columns, rows).
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptq import grid
from gptq.threads import run_shares, shares_of

LANES = 64  # rows that a compiled loop takes at a time: 128 columns of them are 32 KB


def choose_columns(
    base: Tensor, reference: Tensor, coupling: Tensor, scale: Tensor, zero: Tensor, groups: list[int], bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns one after another, each where the changes of those before it leave it.

        t_k = base_k + sum_{j<k} coupling[j, k] (Q_j - reference_j)          Q_k = the point of the grid next to t_k

    Args:
        base, reference: (columns, rows).
        coupling: (columns, columns), read above the diagonal.
        scale, zero: (groups, rows); column k belongs to groups[k].
    Returns:
        codes (columns, rows) uint8, Q and t (columns, rows).
    """
    if base.device.type != "cpu":
        chosen = _fused().choose_columns if _is_fused(base) else choose_columns_plainly
        found: tuple[Tensor, Tensor, Tensor] = chosen(base, reference, coupling, scale, zero, groups, bits)
        return found
    t = base.clone()
    codes = torch.empty(base.shape, dtype=torch.uint8)
    Q = torch.empty_like(base)
    arguments = (reference, coupling, scale, zero, torch.tensor(groups), codes, Q)
    _over_rows(_compiled().columns, t, arguments, base.new_tensor(2**bits - 1))
    return codes, Q, t


def choose_columns_plainly(
    base: Tensor, reference: Tensor, coupling: Tensor, scale: Tensor, zero: Tensor, groups: list[int], bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`choose_columns` in whole-tensor operations, for any device."""
    t = base.clone()
    codes = torch.empty(base.shape, dtype=torch.uint8, device=base.device)
    Q, change = torch.empty_like(base), torch.empty_like(base)
    for k, group in enumerate(groups):
        t[k] += coupling[:k, k] @ change[:k]
        code = grid.quantize(t[k], scale[group], zero[group], bits)
        codes[k] = code
        Q[k] = grid.dequantize(code, scale[group], zero[group])
        change[k] = Q[k] - reference[k]
    return codes, Q, t


def best_grid(w: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """For each row the candidate whose rounding of w errs least, sum_j importance_j (w_j - Q_j)^2.

    Args:
        w: (columns, rows) of one group.
        importance: (columns,) not negative.
        scales, zeros: (candidates, rows).
    Returns:
        (rows,) number of the best candidate, the first of equal ones.
    """
    if w.device.type != "cpu":
        found: Tensor = (_fused().best_grid if _is_fused(w) else best_grid_plainly)(w, importance, scales, zeros, bits)
        return found
    best = torch.zeros(w.shape[1], dtype=torch.int64)
    _over_rows(_compiled().grids, best, (w, importance, scales, zeros), w.new_tensor(2**bits - 1))
    return best


def best_grid_plainly(w: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """`best_grid` in whole-tensor operations, for any device."""
    errors = []
    for scale, zero in zip(scales, zeros, strict=True):
        Q = grid.dequantize(grid.quantize(w, scale, zero, bits), scale, zero)
        errors.append(importance @ (w - Q).square())
    return torch.stack(errors).argmin(0)


def _is_fused(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.float32 and find_spec("triton") is not None


def _fused() -> Any:
    from gptq import triton_solver  # Triton comes with builds of torch for GPUs only

    return triton_solver


def _over_rows(kernel: Callable[..., None], written: Tensor, arguments: tuple[Tensor, ...], maxq: Tensor) -> None:
    """Run a compiled loop on all rows, shared out among the threads; rows do not know of each other."""
    arrays = [tensor.contiguous().numpy() for tensor in (written, *arguments)]
    run_shares(kernel, (*arrays, maxq.numpy()[()]), shares_of(written.shape[-1], LANES))


class _Kernels:
    """The compiled loops; numba is imported, and they are compiled, when the first layer is solved."""

    def __init__(self) -> None:
        import numba

        compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
        self.columns: Callable[..., None] = compiled(_columns)
        self.grids: Callable[..., None] = compiled(_grids)


@cache
def _compiled() -> _Kernels:
    return _Kernels()


def _columns(  # type: ignore[no-untyped-def]
    t, reference, coupling, scale, zero, groups, codes, Q, maxq, start, stop
) -> None:
    columns, nil = t.shape[0], maxq - maxq  # a literal would be float64
    change = np.zeros((columns, LANES), t.dtype)
    line, s, z = np.zeros(LANES, t.dtype), np.ones(LANES, t.dtype), np.zeros(LANES, t.dtype)
    for low in range(start, stop, LANES):
        width = min(LANES, stop - low)
        for k in range(columns):
            line[:width] = t[k, low : low + width]
            j = 0
            while j + 4 <= k:  # four at a time, in order: the line is loaded and stored once for them
                c0, c1, c2, c3 = coupling[j, k], coupling[j + 1, k], coupling[j + 2, k], coupling[j + 3, k]
                for i in range(LANES):
                    line[i] = (((line[i] + c0 * change[j, i]) + c1 * change[j + 1, i]) + c2 * change[j + 2, i]) + (
                        c3 * change[j + 3, i]
                    )
                j += 4
            while j < k:
                c0 = coupling[j, k]
                for i in range(LANES):
                    line[i] += c0 * change[j, i]
                j += 1
            s[:width] = scale[groups[k], low : low + width]
            z[:width] = zero[groups[k], low : low + width]
            for i in range(width):
                code = min(max(np.rint(line[i] / s[i]) + z[i], nil), maxq)
                q = s[i] * (code - z[i])
                t[k, low + i] = line[i]
                codes[k, low + i] = np.uint8(code)
                Q[k, low + i] = q
                change[k, i] = q - reference[k, low + i]


def _grids(best, w, importance, scales, zeros, maxq, start, stop) -> None:  # type: ignore[no-untyped-def]
    columns, candidates, nil = w.shape[0], scales.shape[0], maxq - maxq
    least, error = np.zeros(LANES, w.dtype), np.zeros(LANES, w.dtype)
    s, inverse = np.ones(LANES, w.dtype), np.ones(LANES, w.dtype)
    lowest, highest = np.zeros(LANES, w.dtype), np.zeros(LANES, w.dtype)
    line = np.zeros((columns, LANES), w.dtype)
    for low in range(start, stop, LANES):
        width = min(LANES, stop - low)
        line[:, :width] = w[:, low : low + width]
        for c in range(candidates):
            for i in range(width):  # code - zero is clamped instead of the code
                s[i] = scales[c, low + i]
                lowest[i], highest[i] = nil - zeros[c, low + i], maxq - zeros[c, low + i]
                # A quotient and this product round apart at a tie alone, where both neighbours err alike.
                inverse[i] = w.dtype.type(1) / s[i]
            error[:] = nil
            for k in range(columns):
                h = importance[k]
                for i in range(LANES):
                    level = np.rint(line[k, i] * inverse[i])
                    level = lowest[i] if level < lowest[i] else level
                    level = highest[i] if level > highest[i] else level
                    d = line[k, i] - s[i] * level
                    error[i] += h * d * d
            for i in range(width):
                if c == 0 or error[i] < least[i]:
                    least[i] = error[i]
                    best[low + i] = c
