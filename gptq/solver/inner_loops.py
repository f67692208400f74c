"""The two inner loops of the solver: choosing a block's codes column by column, and searching groups' grids.

On a CPU they are compiled (`inner_loops_cpu`), each thread with its own rows. On a GPU they are Triton kernels
(`inner_loops_triton`) where Triton is installed; elsewhere the same arithmetic is written in whole-tensor operations.
Weights are transposed here: a column of W is one contiguous line, (columns, rows).
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq.compute.threads import Shares, run_shares, shares_of
from gptq.solver import grid


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
    from gptq.solver import inner_loops_cpu

    rows, made = base.shape[1], max(base.shape[1], inner_loops_cpu.ROWS)
    by_rows = [_lengthened(x, made) for x in (base, reference, scale, zero)]
    codes = torch.empty(len(base), made, dtype=torch.uint8)
    Q, t = base.new_empty(len(base), made), base.new_empty(len(base), made)
    given = (*by_rows[:2], coupling.T.contiguous(), *by_rows[2:], torch.tensor(groups), codes, Q, t)
    _over_rows(inner_loops_cpu.columns, given, bits, shares_of(made, inner_loops_cpu.ROWS))
    return codes[:, :rows], Q[:, :rows], t[:, :rows]


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


def best_grids(w: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """For each group of each row the candidate whose rounding of w errs least, sum_j importance_j (w_j - Q_j)^2.

    Args:
        w: (groups, columns of a group, rows).
        importance: (groups, columns of a group) not negative.
        scales, zeros: (candidates, groups, rows).
    Returns:
        (groups, rows) number of the best candidate, the first of equal ones.
    """
    if w.device.type != "cpu":
        if _is_fused(w):
            found: Tensor = _fused().best_grids(w, importance, scales, zeros, bits)
            return found
        groups = zip(w, importance, scales.unbind(1), zeros.unbind(1), strict=True)
        return torch.stack([best_grid_plainly(*group, bits) for group in groups])
    from gptq.solver import inner_loops_cpu

    rows, made = w.shape[2], max(w.shape[2], inner_loops_cpu.ROWS)
    best = torch.empty(len(w), made, dtype=torch.int64)
    by_rows = [_lengthened(x, made) for x in (w, scales, zeros)]
    given = (best, by_rows[0], importance.contiguous(), *by_rows[1:])
    _over_rows(inner_loops_cpu.grids, given, bits, shares_of(made, inner_loops_cpu.ROWS))
    return best[:, :rows]


def best_grid_plainly(w: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """`best_grids` of one group in whole-tensor operations, for any device."""
    errors = []
    for scale, zero in zip(scales, zeros, strict=True):
        Q = grid.dequantize(grid.quantize(w, scale, zero, bits), scale, zero)
        errors.append(importance @ (w - Q).square())
    return torch.stack(errors).argmin(0)


def _is_fused(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.float32 and find_spec("triton") is not None


def _fused() -> Any:
    from gptq.solver import inner_loops_triton  # Triton comes with builds of torch for GPUs only

    return inner_loops_triton


def _lengthened(x: Tensor, rows: int) -> Tensor:
    """Contiguous, with more rows (the last dimension) where compiled loops want them; what they hold does not count."""
    return x.contiguous() if x.shape[-1] >= rows else pad(x, (0, rows - x.shape[-1]), value=1.0)


def _over_rows(loop: Any, given: tuple[Tensor, ...], bits: int, shares: Shares) -> None:
    """Run a compiled loop on all rows, shared out among the threads; rows do not know of each other."""
    maxq = given[1].new_tensor(2**bits - 1).numpy()[()]
    run_shares(loop, (*(x.numpy() for x in given), maxq), shares)
