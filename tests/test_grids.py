"""Every kind of grid: what it promises of its scales, and the solve, the sweeps and the loops on it against oracles."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq import solver
from gptq.compute.number_formats import E2M1
from gptq.solver import Grid, IntegerGrid, inner_loops
from gptq.solver.coordinate_descent import refine
from gptq.solver.grids.affine import AffineGrid
from gptq.solver.grids.scales import Float8Scales, FloatScales, PowersOfTwo
from gptq.solver.grids.table import E4M3, IQ4_NL, NEAR, OCTAVE, TableGrid
from gptq.solver.grids.two_level import K_QUANTS, TwoLevelGrid, sub_scales
from gptq.solver.solve import SolvedLayer
from tests import oracle
from tests.test_refine import layer_error
from tests.test_solver import factor_of

FLOAT32, BFLOAT16 = FloatScales(torch.float32), FloatScales(torch.bfloat16)
GRIDS: dict[str, tuple[Grid, int]] = {  # with their group sizes
    "integer, bfloat16": (IntegerGrid(4, True, BFLOAT16), 32),
    "Q4_1": (AffineGrid(4), 32),
    "MLX 3": (AffineGrid(3, BFLOAT16), 64),
    "IQ4_NL": (TableGrid(4, IQ4_NL), 32),
    "NVFP4": (TableGrid(4, E2M1, Float8Scales(300.0)), 16),
    "MXFP4": (TableGrid(4, E2M1, PowersOfTwo(), NEAR), 32),
    "FP8": (TableGrid(8, E4M3, BFLOAT16, OCTAVE), 256),
    "FP8 blocks": (TableGrid(8, E4M3, FLOAT32, OCTAVE, block_rows=4), 128),
    **{f"Q{bits}_K": (grid, grid.columns) for bits, grid in K_QUANTS.items()},
}
EVERY = pytest.mark.parametrize("name", GRIDS)


def problem(seed: int, rows: int = 6, n: int = 256, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n // 4, n, generator=draw, dtype=dtype)
    X = torch.randn(3 * n, n // 4, generator=draw, dtype=dtype) @ mixing / 4
    X += torch.randn(3 * n, n, generator=draw, dtype=dtype)
    X *= torch.rand(n, generator=draw, dtype=dtype) + 0.2
    return torch.randn(rows, n, generator=draw, dtype=dtype) / 8, X.T @ X / len(X)


def points(name: str, solved: SolvedLayer) -> Tensor:
    """All points (rows, columns, codes) that the layer's groups have, by the formulas of the formats; float64."""
    grid, _ = GRIDS[name]
    codes = torch.arange(2**grid.bits, dtype=torch.float64)
    if solved.table is not None:
        steps = solved.table.double()[None, None]
    else:
        steps = codes[None, None] - solved.zero.double()[..., None]
    every = solved.scale.double()[..., None] * steps
    if solved.offset is not None:
        every = every + solved.offset.double()[..., None]
    return every[:, solved.g_idx.long()]


def nearest(every: Tensor, w: float) -> int:
    """The code whose point is nearest to w, of points (codes,) some of which may be NaN."""
    return int(torch.nan_to_num((every - w).abs(), nan=torch.inf).argmin())


@EVERY
def test_the_solve_chooses_what_optimal_brain_quantization_does(name: str) -> None:
    """An oracle with an explicit inverse for every column, and a search through all points of the grid."""
    grid, group_size = GRIDS[name]
    W, H = problem(1, rows=2)
    solved = solver.solve(W, factor_of(H), grid, group_size, search=True)
    every, W, Hd = points(name, solved), W.clone(), oracle.damped(H, 0.01)
    inverse = torch.linalg.inv(Hd)
    for k in range(W.shape[1]):
        for row in range(len(W)):
            code = nearest(every[row, k], float(W[row, k]))
            assert every[row, k, code] == every[row, k, int(solved.codes[row, k])], (row, k)
            W[row, k + 1 :] -= (W[row, k] - every[row, k, code]) / inverse[k, k] * inverse[k, k + 1 :]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]


@EVERY
def test_what_is_stored_can_be_stored(name: str) -> None:
    grid, group_size = GRIDS[name]
    W, H = problem(2, dtype=torch.float32)
    factor = solver.factorize(H, solver.act_order(H))
    found = solver.solve(W, factor, grid, group_size, search=True)
    for solved in (solver.round_to_nearest(W, grid, group_size), found, refine(W, found, factor, grid, 2)):
        assert set(solved.tensors()) == {"codes", "scale", "zero", "g_idx", "row_errors", *grid.stored}
        assert int(solved.codes.max()) < 2**grid.bits
        assert bool((solved.scale != 0).all())
        assert bool(torch.isfinite(solved.weight()).all())
        _check_scales(grid, solved)


def _check_scales(grid: Grid, solved: SolvedLayer) -> None:
    if isinstance(grid, TwoLevelGrid):
        _check_super_blocks(grid, solved)
        return
    scales = grid.scales  # type: ignore[attr-defined]
    if isinstance(scales, FloatScales):
        assert torch.equal(solved.scale.to(scales.dtype).float(), solved.scale)
        if solved.offset is not None:
            assert torch.equal(solved.offset.to(scales.dtype).float(), solved.offset)
    elif isinstance(scales, PowersOfTwo):
        assert bool((torch.frexp(solved.scale).mantissa == 0.5).all())
    else:
        assert solved.super_scale is not None
        assert torch.equal(solved.scale, scales.stored(solved.scale).float() / solved.super_scale)
    block = getattr(grid, "block_rows", 1)
    for rows in solved.scale.split(block):
        assert torch.equal(rows, rows[:1].expand_as(rows))


def _check_super_blocks(grid: TwoLevelGrid, solved: SolvedLayer) -> None:
    assert solved.super_scale is not None
    d = solved.super_scale.half()
    sc = sub_scales(solved.scale, d.float())
    low, high = (
        (-(2 ** (grid.scale_bits - 1)), 2 ** (grid.scale_bits - 1) - 1) if grid.sym else (0, 2**grid.scale_bits - 1)
    )
    per_block = solved.scale.shape[1] // d.shape[1]
    assert low <= int(sc.min()) <= int(sc.max()) <= high
    effective = d.float().repeat_interleave(per_block, 1) * sc.float()
    codes = solved.codes.float().unflatten(1, (-1, grid.columns))
    if solved.offset is None:
        read = effective[..., None] * (codes - 2 ** (grid.bits - 1))
    else:
        assert solved.super_offset is not None
        dmin = solved.super_offset.half()
        m = sub_scales(-solved.offset, dmin.float())
        assert 0 <= int(m.min()) <= int(m.max()) <= high
        read = effective[..., None] * codes - (dmin.float().repeat_interleave(per_block, 1) * m.float())[..., None]
    assert torch.equal(read.flatten(1), solved.weight())  # what ggml computes from d, dmin, sc, m and the codes


@EVERY
def test_what_lies_on_a_grid_is_found_there_again(name: str) -> None:
    """A weight that was read from a file is rounded to itself on its own grids."""
    grid, group_size = GRIDS[name]
    W, _ = problem(3, dtype=torch.float32)
    solved = solver.round_to_nearest(W, grid, group_size)
    scale, shift = (solved.scale, solved.zero.float() if solved.offset is None else solved.offset)
    s, o = (x.repeat_interleave(group_size, 1) for x in (scale, shift))
    Q = solved.weight()
    codes = grid.quantize(Q, s, o)
    assert torch.equal(grid.dequantize(codes, s, o), Q)


@EVERY
def test_no_sweep_raises_the_error_of_any_row(name: str) -> None:
    grid, group_size = GRIDS[name]
    W, H = problem(4)
    factor = solver.factorize(H, solver.act_order(H))
    Hd = oracle.damped(H, 0.01)
    solved = solver.solve(W, factor, grid, group_size, search=True)
    first = before = layer_error(W, solved.weight(), Hd)
    for _ in range(2):
        solved = refine(W, solved, factor, grid, sweeps=1)
        after = layer_error(W, solved.weight(), Hd)
        assert (after <= before * (1 + 1e-6)).all()
        assert solved.error == pytest.approx(float(after.sum()), rel=1e-5)
        before = after
    assert float(before.sum()) < float(first.sum())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_loops_compute_what_whole_tensor_operations_do(name: str, dtype: torch.dtype) -> None:
    grid, group_size = GRIDS[name]
    W, _ = problem(5, rows=70, dtype=dtype)
    draw = torch.Generator().manual_seed(6)
    scale, shift = (x.T.contiguous() for x in solver.fit_groups(W, grid, group_size, torch.ones(256, dtype=dtype)))
    columns = min(24, group_size)
    base, reference = W.T[:columns].contiguous(), W.T[:columns].flip(0).contiguous()
    coupling = torch.randn(columns, columns, generator=draw, dtype=dtype) / 8
    arguments = (base, reference, coupling, scale, shift, torch.zeros(columns, dtype=torch.int64), grid)
    for compiled, whole in zip(
        inner_loops.choose_columns(*arguments), inner_loops.choose_columns_reference(*arguments), strict=True
    ):
        different = (compiled.to(dtype) - whole.to(dtype)).abs() > 1e-5
        assert float(different.float().mean()) < (0.02 if dtype == torch.float32 else 1e-9)  # next to a tie, and after
    w = W.T.unflatten(0, (-1, group_size)).contiguous()
    importance = torch.rand(w.shape[:2], generator=draw, dtype=dtype)
    scales, shifts = torch.stack([scale, 0.8 * scale, 1.3 * scale]), torch.stack([shift] * 3)
    best = inner_loops.best_grids(w, importance, scales, shifts, grid)
    errors = torch.stack([grid.weighted_error(w, importance, s, o) for s, o in zip(scales, shifts, strict=True)])
    torch.testing.assert_close(errors.gather(0, best[None])[0], errors.amin(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["Q4_1", "NVFP4", "Q4_K", "Q6_K"])
def test_triton_kernels_compute_the_same(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from gptq.solver import inner_loops_triton

    grid, group_size = GRIDS[name]
    W, _ = problem(7, rows=9, dtype=torch.float32)
    scale, shift = (x.T.contiguous() for x in solver.fit_groups(W, grid, group_size))
    base = W.T[:6].contiguous()
    arguments = (base, base, torch.full((6, 6), 0.1), scale, shift, torch.zeros(6, dtype=torch.int64), grid)
    triton, plain = (f(*arguments) for f in (inner_loops_triton.choose_columns, inner_loops.choose_columns_reference))
    assert torch.equal(triton[0], plain[0])
    torch.testing.assert_close(triton[1], plain[1], rtol=0, atol=1e-6)
    w = W.T.unflatten(0, (-1, group_size)).contiguous()
    candidates = torch.stack([scale, 1.2 * scale]), torch.stack([shift] * 2)
    found = inner_loops_triton.best_grids(w, torch.ones(w.shape[:2]), *candidates, grid)
    assert torch.equal(found, inner_loops.best_grids(w, torch.ones(w.shape[:2]), *candidates, grid))


# --- single kinds -----------------------------------------------------------------------------------------------------


def test_scale_and_offset_are_about_as_good_as_any() -> None:
    """Brute force over scales and offsets of groups of 8; and better than integer zero points, which are among them."""
    draw = torch.Generator().manual_seed(8)
    W = torch.randn(20, 8, generator=draw, dtype=torch.float64) + 0.3
    h = torch.rand(8, generator=draw, dtype=torch.float64) + 0.1
    grid = AffineGrid(2, FLOAT32)

    def error(scale: Tensor, offset: Tensor, kind: Grid) -> Tensor:
        return kind.weighted_error(W.T[None].contiguous(), h[None], scale.T, offset.T)[0]  # (rows,)

    ours = error(*solver.fit_groups(W, grid, 8, h), grid)
    widest = W.amax(1) - W.amin(1)
    least = torch.full_like(ours, torch.inf)
    for i, j in product(range(60), range(60)):
        scale = widest / 3 * (0.4 + 0.7 * i / 59)
        offset = W.amin(1) + widest * (0.6 * j / 59 - 0.1)
        least = torch.minimum(least, error(scale[:, None], offset[:, None], grid))
    assert float((ours / least).mean()) < 1.15
    zeros = IntegerGrid(2, False, FLOAT32)
    assert float(ours.sum()) < 0.9 * float(error(*solver.fit_groups(W, zeros, 8, h), zeros).sum())


def test_the_offset_is_a_weighted_mean_in_closed_form() -> None:
    """No other offset of the grid that was found has a smaller error for its own codes."""
    W, H = problem(9)
    grid, h = AffineGrid(3, FLOAT32), H.diagonal()
    scale, offset = solver.fit_groups(W, grid, 64, h)
    for group in range(4):
        inside = slice(64 * group, 64 * group + 64)
        codes = grid.quantize(W[:, inside], scale[:, group, None], offset[:, group, None])
        best = ((W[:, inside] - scale[:, group, None] * codes) * h[inside]).sum(1) / h[inside].sum()
        assert float((best - offset[:, group]).abs().max()) < 0.05 * float(scale.max())


@pytest.mark.parametrize("bits", K_QUANTS)
def test_a_super_block_is_fitted_better_than_group_by_group(bits: int) -> None:
    """The plain way: fit each group alone, then round its scale and offset to multiples of the largest ones."""
    W, H = problem(10, rows=30)
    grid, h = K_QUANTS[bits], H.diagonal()
    alone: Grid = IntegerGrid(bits, True, FLOAT32) if grid.sym else AffineGrid(bits, FLOAT32)
    scale, shift = solver.fit_groups(W, alone, grid.columns, h)
    largest = 2 ** (grid.scale_bits - grid.sym) - 1
    d = (scale.abs().amax(1, keepdim=True) / largest).half().double()
    scale = d * torch.round(scale / d).clamp(-largest, largest)
    scale = scale.where(scale != 0, d)
    if not grid.sym:
        dmin = ((-shift).amax(1, keepdim=True) / largest).half().double()
        shift = -dmin * torch.round(-shift / dmin).clamp(0, largest)
    w = W.T.unflatten(0, (-1, grid.columns)).contiguous()
    weights = h.view(-1, grid.columns)
    plain = grid.weighted_error(w, weights, scale.T, shift.T).sum()
    ours = grid.weighted_error(w, weights, *(x.T for x in solver.fit_groups(W, grid, grid.columns, h))).sum()
    assert float(ours) < float(plain)


def test_super_blocks_want_whole_ones_and_static_groups() -> None:
    W, H = problem(11, n=128)
    with pytest.raises(ValueError, match="no super-blocks of 256"):
        solver.fit_groups(W, K_QUANTS[4], 32)
    with pytest.raises(ValueError, match="fitted together"):
        solver.solve(W, factor_of(H), K_QUANTS[4], 32, static_groups=False)


def test_tables_are_those_of_the_formats() -> None:
    assert E2M1[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert E2M1[8:] == tuple(-x for x in E2M1[:8])
    assert max(x for x in E4M3 if x == x) == 448
    assert (E4M3[0x38], E4M3[0x01], E4M3[0xB8]) == (1.0, 2.0**-9, -1.0)


def test_floats_are_rounded_as_the_hardware_does() -> None:
    x = torch.cat([torch.linspace(-460, 460, 5001), torch.linspace(-1, 1, 4097) / 4])
    grid = TableGrid(8, E4M3, FLOAT32)
    one, nothing = torch.ones(()), torch.zeros(())
    codes = grid.quantize(x, one, nothing)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(grid.dequantize(codes, one, nothing), expected)
    half_way = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    four = TableGrid(4, E2M1, FLOAT32)
    even = four.dequantize(four.quantize(half_way, one, nothing), one, nothing)
    assert even.tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_a_plain_power_of_two_leaves_the_largest_weight_below_seven_eighths_of_an_octave() -> None:
    grid = TableGrid(4, E2M1, PowersOfTwo(), NEAR)
    W = torch.tensor([[4.0], [6.9], [7.0], [8.0], [0.0]]).expand(5, 32)
    scale, _ = solver.fit_groups(W.contiguous(), grid, 32)
    assert scale[:4, 0].tolist() == [1, 1, 2, 2]
    assert float(scale[4, 0]) > 0


def test_layers_that_are_fused_share_the_divisor_of_their_scales() -> None:
    grid = TableGrid(4, E2M1, Float8Scales(1.0))
    own = grid.for_layers([torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0, 0.25]])])
    assert own == TableGrid(4, E2M1, Float8Scales(448 * 6 / 2.0))
    assert grid.for_layers([torch.zeros(1, 2)]) == grid


@EVERY
def test_ranks_ascend_with_the_values(name: str) -> None:
    grid, _ = GRIDS[name]
    ranks = torch.arange(grid.top + 1, dtype=torch.float32)
    codes = grid.codes_of(ranks)
    values: Any = grid.steps(codes, torch.zeros(()))
    assert bool((values.diff() > 0).all())
    assert torch.equal(grid.ranks(codes), ranks)


def test_a_group_of_zeros_stays_one_in_a_table_without_a_zero(rng: torch.Generator) -> None:
    grid = TableGrid(4, IQ4_NL)
    W = torch.randn(6, 64, generator=rng)
    W[1] = 0
    W[4, :32] = 0
    for importance in (None, torch.rand(64, generator=rng)):
        scale, shift = solver.fit_groups(W, grid, 32, importance)
        spread = scale.repeat_interleave(32, dim=1)
        codes = grid.quantize(W, spread, shift.repeat_interleave(32, dim=1))
        Q = torch.tensor(IQ4_NL)[codes.long()] * spread
        assert float(Q[W == 0].abs().max()) < 1e-6
        assert float((Q - W).abs().max()) < 0.5
