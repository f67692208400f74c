"""The solver's two inner loops: choose the codes of a block column by column, and search the grids of groups.

`choose_columns_reference` and `best_grid_reference` define the results; the compiled loops (`inner_loops_cpu`) and the
Triton kernels (`inner_loops_triton`) compute the same. On a CPU the compiled loops run, each thread on its own rows; on
a GPU the Triton kernels if Triton is installed; otherwise the reference itself.
Weights are transposed here, (columns, rows): a column of W is contiguous.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq.compute.threads import run_loop
from gptq.solver.grids.grid import Grid


def choose_columns(
    base: Tensor, reference: Tensor, coupling: Tensor, scale: Tensor, shift: Tensor, groups: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns one after another, each moved by the changes of the columns before it.

        t_k = base_k + sum_{j<k} coupling[j, k] (Q_j - reference_j)          Q_k = the grid point nearest to t_k

    Args:
        base, reference: (columns, rows).
        coupling: (columns, columns), read above the diagonal.
        scale, shift: (groups, rows), see `Groups`.
        groups: (columns,) int64, the group of each column; on the device, so that nothing waits for it.
    Returns:
        codes (columns, rows) uint8, Q and t (columns, rows).
    """
    if base.device.type != "cpu":
        chosen = _triton_kernels().choose_columns if _has_triton_kernel(base) else choose_columns_reference
        found: tuple[Tensor, Tensor, Tensor] = chosen(base, reference, coupling, scale, shift, groups, grid)
        return found
    from gptq.solver import inner_loops_cpu

    rows, padded_rows = base.shape[1], max(base.shape[1], inner_loops_cpu.TILE_ROWS)
    by_rows = [_pad_rows(x, padded_rows) for x in (base, reference, scale, shift)]
    codes = torch.empty(len(base), padded_rows, dtype=torch.uint8)
    Q, t = base.new_empty(len(base), padded_rows), base.new_empty(len(base), padded_rows)
    levels = grid.levels(base)
    given = (*by_rows[:2], coupling.T.contiguous(), *by_rows[2:], levels, groups.contiguous(), codes, Q, t)
    loop = inner_loops_cpu.choose_columns(grid.form, base.dtype == torch.float64)
    run_loop(loop, padded_rows, inner_loops_cpu.TILE_ROWS, *given, len(base), padded_rows, levels.shape[1], grid.top)
    return codes[:, :rows], Q[:, :rows], t[:, :rows]


def choose_columns_reference(
    base: Tensor, reference: Tensor, coupling: Tensor, scale: Tensor, shift: Tensor, groups: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """The readable reference, for any device: the compiled and the Triton loop compute this."""
    t, scales, shifts = base.clone(), scale[groups], shift[groups]  # (columns, rows) each
    codes = torch.empty(base.shape, dtype=torch.uint8, device=base.device)
    Q, change = torch.empty_like(base), torch.empty_like(base)
    for k in range(len(base)):
        t[k] += coupling[:k, k] @ change[:k]
        code = grid.quantize(t[k], scales[k], shifts[k])
        codes[k] = code
        Q[k] = grid.dequantize(code, scales[k], shifts[k])
        change[k] = Q[k] - reference[k]
    return codes, Q, t


def best_grids(w: Tensor, importance: Tensor, scales: Tensor, shifts: Tensor, grid: Grid) -> Tensor:
    """For each group of each row find the candidate grid with the least error, sum_j importance_j (w_j - Q_j)^2.

    Args:
        w: (groups, columns of a group, rows).
        importance: (groups, columns of a group), not negative.
        scales, shifts: (candidates, groups, rows), see `Groups`.
    Returns:
        (groups, rows) index of the best candidate, the first of equal ones.
    """
    if w.device.type != "cpu":
        if _has_triton_kernel(w):
            found: Tensor = _triton_kernels().best_grids(w, importance, scales, shifts, grid)
            return found
        groups = zip(w, importance, scales.unbind(1), shifts.unbind(1), strict=True)
        return torch.stack([best_grid_reference(*group, grid) for group in groups])
    from gptq.solver import inner_loops_cpu

    rows, padded_rows = w.shape[2], max(w.shape[2], inner_loops_cpu.TILE_ROWS)
    best = torch.empty(len(w), padded_rows, dtype=torch.int64)
    by_rows = [_pad_rows(x, padded_rows) for x in (w, scales, shifts)]
    levels = grid.levels(w)
    given = (best, by_rows[0], importance.contiguous(), *by_rows[1:], levels)
    sizes = len(w), w.shape[1], padded_rows, len(scales), levels.shape[1], grid.top
    loop = inner_loops_cpu.best_grids(grid.form, w.dtype == torch.float64)
    run_loop(loop, padded_rows, inner_loops_cpu.TILE_ROWS, *given, *sizes)
    return best[:, :rows]


def best_grid_reference(w: Tensor, importance: Tensor, scales: Tensor, shifts: Tensor, grid: Grid) -> Tensor:
    """The readable reference for one group, for any device: the compiled and the Triton loop compute this."""
    errors = []
    for scale, shift in zip(scales, shifts, strict=True):
        Q = grid.dequantize(grid.quantize(w, scale, shift), scale, shift)
        errors.append(importance @ (w - Q).square())
    return torch.stack(errors).argmin(0)


def _has_triton_kernel(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.float32 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _triton_kernels() -> Any:
    from gptq.solver import inner_loops_triton  # only GPU builds of torch bring Triton

    return inner_loops_triton


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """Make x contiguous and pad its last dimension to `rows`, the least number that compiled loops take."""
    return x.contiguous() if x.shape[-1] >= rows else pad(x, (0, rows - x.shape[-1]), value=1.0)
