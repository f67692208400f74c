"""The solver's two inner loops as Triton kernels for GPUs; `inner_loops` defines what they compute.

Rows are independent, so each program owns PROGRAM_ROWS of them and keeps the changes of earlier columns in registers.
A block of columns then takes one launch, instead of several per column; a search of all grids also takes one. Sums run
in another order than on a CPU, so a code within rounding of a tie may differ between a CPU and a GPU.

Importing this module needs Triton, which comes with GPU builds of torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq.compute.device_profile import current_device
from gptq.solver.grids.grid import Grid

PROGRAM_ROWS = 16  # rows per program: with 128 columns they take 64 registers of each thread of a warp
# One warp sums its columns without a barrier. Without fused multiply-add, Q is rounded as in readers of the file.
LAUNCH_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
CHUNK_COLUMNS = 64  # columns of a group that the grid search loads at a time; a group may be a whole row


def choose_columns(
    base: Tensor, reference: Tensor, coupling: Tensor, scale: Tensor, shift: Tensor, groups: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """`gptq.solver.inner_loops.choose_columns` for tensors on a GPU."""
    columns, rows = base.shape
    t, Q = torch.empty_like(base), torch.empty_like(base)
    codes = torch.empty(base.shape, dtype=torch.uint8, device=base.device)
    inputs = [x.contiguous() for x in (base, reference, coupling.T, scale, shift, grid.levels(base), groups)]
    with current_device(base):
        _choose_columns_kernel[triton.cdiv(rows, PROGRAM_ROWS),](
            *inputs, codes, Q, t, rows, columns, grid.top,
            FORM=int(grid.form), COLUMNS=triton.next_power_of_2(columns), PROGRAM_ROWS=PROGRAM_ROWS, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return codes, Q, t


def best_grids(w: Tensor, importance: Tensor, scales: Tensor, shifts: Tensor, grid: Grid) -> Tensor:
    """`gptq.solver.inner_loops.best_grids` for tensors on a GPU."""
    groups, columns, rows = w.shape
    best = torch.empty(groups, rows, dtype=torch.int64, device=w.device)
    inputs = [x.contiguous() for x in (w, importance, scales, shifts, grid.levels(w))]
    with current_device(w):
        _best_grids_kernel[groups, triton.cdiv(rows, PROGRAM_ROWS)](
            *inputs, best, rows, columns, len(scales), grid.top,
            FORM=int(grid.form), CHUNK_COLUMNS=CHUNK_COLUMNS, PROGRAM_ROWS=PROGRAM_ROWS, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return best


@triton.jit
def _round(x, scale):
    """rint(x / scale), of quotients far beyond any code only something as far.

    Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, ties to even. Larger quotients are
    clamped first.
    """
    steps = tl.div_rn(x.to(tl.float32), scale.to(tl.float32))
    steps = tl.minimum(tl.maximum(steps, -1048576.0), 1048576.0)
    return (steps + 12582912.0) - 12582912.0


@triton.jit
def _nearest(x, scale, shift, levels, top, FORM: tl.constexpr):
    """The code of the point nearest to x, and the point, on a grid of the form FORM (`grids.grid.Form`)."""
    if FORM == 1:
        code = tl.minimum(tl.maximum(_round(x, scale) + shift.to(tl.float32), 0.0), top)
        point = scale * (code - shift)
    elif FORM == 2:
        code = tl.minimum(tl.maximum(_round(x - shift, scale), 0.0), top)
        point = scale * code + shift
    else:
        exact = tl.div_rn(x.to(tl.float32), scale.to(tl.float32))
        value = tl.zeros_like(exact) + tl.load(levels)
        code = tl.zeros_like(exact) + tl.load(levels + 2 * (top + 1))
        for j in range(1, top + 1):
            above = exact > tl.load(levels + (top + 1) + j)
            value = tl.where(above, tl.load(levels + j), value)
            code = tl.where(above, tl.load(levels + 2 * (top + 1) + j), code)
        point = scale * value
    return code, point


@triton.jit
def _choose_columns_kernel(
    base, reference, coupling_t, scale, shift, levels, groups, codes, Q, t_out, rows, columns, top,
    FORM: tl.constexpr, COLUMNS: tl.constexpr, PROGRAM_ROWS: tl.constexpr,
):  # fmt: skip
    """One program chooses the codes of PROGRAM_ROWS rows in all columns of a block, one column after another.

    coupling_t is transposed, (columns, columns); COLUMNS is the number of columns rounded up to a power of two.
    """
    row = tl.program_id(0) * PROGRAM_ROWS + tl.arange(0, PROGRAM_ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    change = tl.zeros((COLUMNS, PROGRAM_ROWS), dtype=tl.float32)
    for k in range(columns):
        c = tl.load(coupling_t + k * columns + column, mask=column < k, other=0.0)  # (COLUMNS,)
        t = tl.load(base + k * rows + row, mask=inside, other=0.0) + tl.sum(c[:, None] * change, axis=0)
        group = tl.load(groups + k)
        s = tl.load(scale + group * rows + row, mask=inside, other=1.0)
        z = tl.load(shift + group * rows + row, mask=inside, other=0.0)
        code, q = _nearest(t, s, z, levels, top, FORM)
        tl.store(codes + k * rows + row, code.to(tl.uint8), mask=inside)
        tl.store(Q + k * rows + row, q, mask=inside)
        tl.store(t_out + k * rows + row, t, mask=inside)
        moved = q - tl.load(reference + k * rows + row, mask=inside, other=0.0)
        change = tl.where((column == k)[:, None], moved[None, :], change)


@triton.jit
def _best_grids_kernel(
    w, importance, scales, shifts, levels, best, rows, columns, candidates, top,
    FORM: tl.constexpr, CHUNK_COLUMNS: tl.constexpr, PROGRAM_ROWS: tl.constexpr,
):  # fmt: skip
    """One program finds the best candidate grids of PROGRAM_ROWS rows of one group.

    error[c, row] = sum_j importance[j] * (w[j, row] - Q(w[j, row]; candidate c)) ** 2
    """
    row = tl.program_id(1) * PROGRAM_ROWS + tl.arange(0, PROGRAM_ROWS)
    inside = row < rows
    group, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lines, weights = w + group * columns * rows, importance + group * columns
    least = tl.full((PROGRAM_ROWS,), float("inf"), dtype=tl.float32)
    chosen = tl.zeros((PROGRAM_ROWS,), dtype=tl.int64)
    for c in range(candidates):
        grid = (c * groups + group) * rows + row
        s = tl.load(scales + grid, mask=inside, other=1.0)
        z = tl.load(shifts + grid, mask=inside, other=0.0)
        error = tl.zeros((PROGRAM_ROWS,), dtype=tl.float32)
        for start in range(0, columns, CHUNK_COLUMNS):
            column = start + tl.arange(0, CHUNK_COLUMNS)
            there = column < columns
            both = there[:, None] & inside[None, :]
            at = column[:, None] * rows + row[None, :]  # (CHUNK_COLUMNS, PROGRAM_ROWS)
            x = tl.load(lines + at, mask=both, other=0.0)
            h = tl.load(weights + column, mask=there, other=0.0)  # (CHUNK_COLUMNS,)
            _, point = _nearest(x, s[None, :], z[None, :], levels, top, FORM)
            d = x - point
            error += tl.sum(h[:, None] * d * d, axis=0)
        better = error < least
        chosen = tl.where(better, c, chosen)
        least = tl.where(better, error, least)
    tl.store(best + group * rows + row, chosen, mask=inside)
