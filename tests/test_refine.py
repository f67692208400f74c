"""Searched grids, and sweeps after the solve: what they promise is that the error never rises."""

from itertools import product

import pytest
import torch
from torch import Tensor

from gptq import solver
from gptq.solver import IntegerGrid, inner_loops
from gptq.solver.coordinate_descent import refine
from gptq.solver.grids import integer as grid
from tests import oracle
from tests.conftest import threads
from tests.test_solver import factor_of, problem


def layer_error(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    E = W - Q.to(W.dtype)
    return ((E @ H) * E).sum(1)  # (rows,)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [8, 12, 40])
def test_no_sweep_raises_the_error_of_any_row(bits: int, sym: bool, group_size: int, rng: torch.Generator) -> None:
    W, H = problem(rng)
    factor, Hd = factor_of(H), oracle.damped(H, 0.01)
    solved = solver.solve(W, factor, IntegerGrid(bits, sym), group_size, search=True)
    before = layer_error(W, solved.weight(), Hd)
    for _ in range(4):
        solved = refine(W, solved, factor, IntegerGrid(bits, sym), sweeps=1)
        after = layer_error(W, solved.weight(), Hd)
        assert (after <= before * (1 + 1e-9)).all()
        assert solved.error == pytest.approx(float(after.sum()), rel=1e-9)
        before = after
    assert torch.equal(solved.scale, solved.scale.half().float())
    assert int(solved.codes.max()) < 2**bits


def test_at_the_end_no_single_code_can_be_improved(rng: torch.Generator) -> None:
    """An oracle that tries every other code of every weight."""
    W, H = problem(rng, rows=3, n=12)
    factor, Hd, coarse = factor_of(H), oracle.damped(H, 0.01), IntegerGrid(2, sym=False)
    solved = refine(W, solver.solve(W, factor, coarse, 4), factor, coarse, sweeps=30)
    least = layer_error(W, solved.weight(), Hd)
    for row, column, code in product(range(3), range(12), range(4)):
        Q = solved.weight().double()
        group = int(solved.g_idx[column])
        Q[row, column] = float(solved.scale[row, group]) * (code - int(solved.zero[row, group]))
        assert float(layer_error(W, Q, Hd)[row]) >= float(least[row]) * (1 - 1e-12)


def test_sweeps_of_dynamic_groups_in_act_order(rng: torch.Generator) -> None:
    W, H = problem(rng)
    factor = solver.factorize(H, solver.act_order(H))
    solved = solver.solve(W, factor, IntegerGrid(3, sym=True), 8, static_groups=False, search=True)
    refined = refine(W, solved, factor, IntegerGrid(3, sym=True), sweeps=2)
    assert torch.equal(refined.g_idx, solved.g_idx)
    assert refined.error < solved.error
    exact = layer_error(W, refined.weight(), oracle.damped(H, 0.01)).sum()
    assert refined.error == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_scales_stay_within_float16_and_the_factor_stays_as_it_was(seed: int) -> None:
    """Scales begin near float16's largest number, 65504; the refit would move some of them beyond it."""
    W, H = problem(torch.Generator().manual_seed(seed), rows=16, n=32)
    W *= 65400 * 1.5 / W.abs().amax(1, keepdim=True)  # at 2 bits a scale is 2/3 of the largest weight
    factor = factor_of(H)
    solved = solver.solve(W, factor, IntegerGrid(2, sym=True), 32)
    before = factor.H.clone()
    refined = refine(W, solved, factor, IntegerGrid(2, sym=True), sweeps=3)
    assert torch.equal(factor.H, before)
    assert float(solved.scale.min()) > 65000
    assert bool(torch.isfinite(refined.scale.half()).all())
    assert refined.error < solved.error


def test_the_factor_stays_as_it_was_when_a_sweep_fails(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(rng)
    factor = factor_of(H)
    solved, before = solver.solve(W, factor, IntegerGrid(4, sym=True), 8), factor.H.clone()
    monkeypatch.setattr(inner_loops, "choose_columns", lambda *_: [][0])
    with pytest.raises(IndexError):
        refine(W, solved, factor, IntegerGrid(4, sym=True), sweeps=1)
    assert torch.equal(factor.H, before)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_the_search_takes_the_best_of_its_candidates(bits: int, sym: bool, rng: torch.Generator) -> None:
    w = torch.randn(70, 16, generator=rng, dtype=torch.float64)
    importance = torch.rand(16, generator=rng, dtype=torch.float64)
    scale, zero = (t[:, 0] for t in solver.fit_groups(w, IntegerGrid(bits, sym), 16, importance))

    def error(s: Tensor, z: Tensor) -> Tensor:
        Q = grid.dequantize(grid.quantize(w, s[:, None], z[:, None], bits), s[:, None], z[:, None])
        return (w - Q).square() @ importance

    scales, zeros = grid.candidates(w, bits, sym)
    every = torch.stack([error(s, z) for s, z in zip(scales, zeros, strict=True)])
    assert torch.allclose(error(scale, zero), every.amin(0), rtol=1e-12)
    assert (error(scale, zero) <= error(*grid.fit(w, bits, sym)) * (1 + 1e-12)).all() or sym
    assert torch.equal(scale, scale.half().double())
    assert (scale < 0).any() == sym


def test_a_negative_scale_turns_the_grid_over() -> None:
    """2 bits, points -2 -1 0 1: the row whose largest weight is positive needs them the other way round."""
    w = torch.tensor([[-2.0, 1.0, 0.0, -1.0], [2.0, -1.0, 0.0, 1.0]])
    scale, zero = solver.fit_groups(w, IntegerGrid(2, sym=True), 4, torch.ones(4))
    assert (scale[:, 0].tolist(), zero[:, 0].tolist()) == ([1.0, -1.0], [2.0, 2.0])
    assert torch.equal(
        solver.round_to_nearest(w[:1], IntegerGrid(2, sym=True), 4).g_idx, torch.zeros(4, dtype=torch.int32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 64, 150])
def test_compiled_loops_compute_what_whole_tensor_operations_do(
    dtype: torch.dtype, rows: int, rng: torch.Generator
) -> None:
    base, reference = (torch.randn(33, rows, generator=rng, dtype=dtype) for _ in range(2))
    coupling = torch.randn(33, 33, generator=rng, dtype=dtype) / 8
    scale = torch.rand(2, rows, generator=rng, dtype=dtype) + 0.1
    zero = torch.full((2, rows), 4.0, dtype=dtype)
    groups, three = torch.tensor([0] * 20 + [1] * 13), IntegerGrid(3, sym=False)
    codes, Q, t = inner_loops.choose_columns(base, reference, coupling, scale, zero, groups, three)
    plain = inner_loops.choose_columns_reference(base, reference, coupling, scale, zero, groups, three)
    for compiled, whole in zip((codes, Q, t), plain, strict=True):
        assert torch.allclose(compiled.to(dtype), whole.to(dtype), rtol=1e-5, atol=1e-5)
    w = torch.stack([base, reference])  # (groups, columns, rows)
    scales, zeros = grid.candidates(w.mT, 3, sym=False)
    importance = torch.rand(2, 33, generator=rng, dtype=dtype)
    best = inner_loops.best_grids(w, importance, scales, zeros, three)
    for group in range(2):
        plain_best = inner_loops.best_grid_reference(
            w[group], importance[group], scales[:, group], zeros[:, group], three
        )
        assert torch.equal(best[group], plain_best)


def test_rows_are_the_same_whatever_the_number_of_threads(rng: torch.Generator) -> None:
    W, H = problem(rng, rows=200, dtype=torch.float32)
    solved = []
    for count in (1, 2, 3):
        with threads(count):
            solved.append(solver.solve(W, factor_of(H), IntegerGrid(3, sym=True), 8, search=True))
    assert all(torch.equal(s.codes, solved[0].codes) and torch.equal(s.scale, solved[0].scale) for s in solved)
