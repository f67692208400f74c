"""The solver's two inner loops as Triton kernels for a GPU: one launch for a block of columns, one for all grids.

Each program owns some rows, which never meet: what the columns before did to them stays in its registers, so that a
block costs one launch instead of several for every column. They compute what `inner_loops` describes; sums are made
in another order there, so a code that lies within rounding of a tie may differ between a CPU and a GPU.

Importing this needs Triton, which comes with builds of torch for GPUs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # that a program owns: 128 columns of them are 64 registers in each thread of a warp
LAUNCH = {
    "num_warps": 1,
    "enable_fp_fusion": False,
}  # one warp sums its columns without a barrier; Q as readers round it
CHUNK = 64  # columns of a group that the search holds at a time; a group may be a whole row


def choose_columns(
    base: Tensor, reference: Tensor, coupling: Tensor, scale: Tensor, zero: Tensor, groups: list[int], bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gptq.solver.inner_loops.choose_columns`, on tensors of a GPU."""
    columns, rows = base.shape
    t, Q = torch.empty_like(base), torch.empty_like(base)
    codes = torch.empty(base.shape, dtype=torch.uint8, device=base.device)
    group_of = torch.tensor(groups, dtype=torch.int32, device=base.device)  # (columns,)
    inputs = [x.contiguous() for x in (base, reference, coupling.T, scale, zero)]
    _columns[triton.cdiv(rows, ROWS),](
        *inputs, group_of, codes, Q, t, rows, columns, 2**bits - 1,
        COLUMNS=triton.next_power_of_2(columns), ROWS=ROWS, **LAUNCH,
    )  # fmt: skip
    return codes, Q, t


def best_grids(w: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """As `gptq.solver.inner_loops.best_grids`, on tensors of a GPU."""
    groups, columns, rows = w.shape
    best = torch.empty(groups, rows, dtype=torch.int64, device=w.device)
    inputs = [x.contiguous() for x in (w, importance, scales, zeros)]
    _grids[groups, triton.cdiv(rows, ROWS)](
        *inputs, best, rows, columns, len(scales), 2**bits - 1, CHUNK=CHUNK, ROWS=ROWS, **LAUNCH
    )
    return best


@triton.jit
def _code(x, scale, zero, maxq):
    """round(x / scale) + zero, ties to even, within 0 and maxq.

    Adding and taking away 1.5 * 2^23 rounds a number below 2^22 as rint does, and no code reaches as far.
    """
    steps = tl.div_rn(x.to(tl.float32), scale.to(tl.float32))
    steps = tl.minimum(tl.maximum(steps, -1048576.0), 1048576.0)
    steps = (steps + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(steps + zero.to(tl.float32), 0.0), maxq)


@triton.jit
def _columns(
    base, reference, coupling_t, scale, zero, groups, codes, Q, t_out, rows, columns, maxq,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    change = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for k in range(columns):
        c = tl.load(coupling_t + k * columns + column, mask=column < k, other=0.0)  # (COLUMNS,)
        t = tl.load(base + k * rows + row, mask=inside, other=0.0) + tl.sum(c[:, None] * change, axis=0)
        group = tl.load(groups + k)
        s = tl.load(scale + group * rows + row, mask=inside, other=1.0)
        z = tl.load(zero + group * rows + row, mask=inside, other=0.0)
        code = _code(t, s, z, maxq)
        q = s * (code - z)
        tl.store(codes + k * rows + row, code.to(tl.uint8), mask=inside)
        tl.store(Q + k * rows + row, q, mask=inside)
        tl.store(t_out + k * rows + row, t, mask=inside)
        moved = q - tl.load(reference + k * rows + row, mask=inside, other=0.0)
        change = tl.where((column == k)[:, None], moved[None, :], change)


@triton.jit
def _grids(
    w, importance, scales, zeros, best, rows, columns, candidates, maxq, CHUNK: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    group, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lines, weights = w + group * columns * rows, importance + group * columns
    least = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    chosen = tl.zeros((ROWS,), dtype=tl.int64)
    for c in range(candidates):
        grid = (c * groups + group) * rows + row
        s = tl.load(scales + grid, mask=inside, other=1.0)
        z = tl.load(zeros + grid, mask=inside, other=0.0)
        error = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, columns, CHUNK):
            column = start + tl.arange(0, CHUNK)
            there = column < columns
            both = there[:, None] & inside[None, :]
            x = tl.load(lines + column[:, None] * rows + row[None, :], mask=both, other=0.0)  # (CHUNK, ROWS)
            h = tl.load(weights + column, mask=there, other=0.0)  # (CHUNK,)
            d = x - s[None, :] * (_code(x, s[None, :], z[None, :], maxq) - z[None, :])
            error += tl.sum(h[:, None] * d * d, axis=0)
        better = error < least
        chosen = tl.where(better, c, chosen)
        least = tl.where(better, error, least)
    tl.store(best + group * rows + row, chosen, mask=inside)
