"""The solver against independent float64 versions of GPTQ, and the identities it has to keep."""

import pytest
import torch
from torch import Tensor

from gptq import solver
from gptq.solver import IntegerGrid
from gptq.solver.grids import integer as grid
from gptq.solver.hessian import mean_output_power
from tests import oracle


def problem(
    rng: torch.Generator, rows: int = 12, n: int = 40, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs of very different sizes."""
    mix = torch.randn(n, n, generator=rng, dtype=torch.float64) + 2 * torch.eye(n, dtype=torch.float64)
    X = torch.randn(4 * n, n, generator=rng, dtype=torch.float64) @ mix * torch.logspace(-1, 1, n, dtype=torch.float64)
    W = torch.randn(rows, n, generator=rng, dtype=torch.float64)
    return W.to(dtype), (X.T @ X / len(X)).to(dtype)


def factor_of(H: Tensor, damp: float = 0.01) -> solver.Factor:
    return solver.factorize(H, solver.natural_order(H), damp)


def expanded_grid(W: Tensor, bits: int, group_size: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of every weight, (rows, n)."""
    scale, zero = solver.fit_groups(W, IntegerGrid(bits, sym), group_size)
    g_idx = torch.arange(W.shape[1]) // group_size
    return scale[:, g_idx], zero[:, g_idx]


def test_worked_example_of_the_docstring() -> None:
    H = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    factor = solver.factorize(H, solver.natural_order(H), damp_percent=1e-12)
    assert torch.allclose(factor.U, torch.tensor([[1, 0.5], [0, 1]], dtype=torch.float64))
    assert torch.allclose(factor.D, torch.tensor([0.75, 1], dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [8, 40, 16])
def test_codes_are_those_of_the_paper_and_of_obq_in_fixed_order(
    bits: int, sym: bool, group_size: int, rng: torch.Generator
) -> None:
    W, H = problem(rng)
    scale, zero = expanded_grid(W, bits, group_size, sym)
    Hd = oracle.damped(H, 0.01)
    by_inverse, reached = oracle.gptq_by_inverse(W, Hd, scale, zero, bits)
    assert torch.equal(oracle.gptq_by_downdating(W, Hd, scale, zero, bits), by_inverse)
    for block in (1, 7, 16, 40):
        assert torch.equal(oracle.gptq_by_cholesky(W, Hd, scale, zero, bits, block), by_inverse)
        solved = solver.solve(W, factor_of(H), IntegerGrid(bits, sym), group_size, block_size=block)
        assert torch.equal(solved.codes.double(), by_inverse)
    residual = reached - scale * (by_inverse - zero)
    D = factor_of(H).D
    assert solved.error == pytest.approx(float((D * residual.square()).sum()), rel=1e-9)


@pytest.mark.parametrize("group_size", [8, 16, 40])
def test_dynamic_groups_are_fitted_to_compensated_weights_whatever_the_block(
    group_size: int, rng: torch.Generator
) -> None:
    """An oracle for --dynamic-groups: when a group is reached, its grid is fitted to what the columns have become."""
    W, H = problem(rng)
    Hd, current = oracle.damped(H, 0.01), W.clone()
    scale, zero = torch.zeros_like(W), torch.zeros_like(W)
    for j in range(W.shape[1]):
        if j % group_size == 0:
            s, z = grid.fit(current[:, j : j + group_size], 3, sym=False)
            scale[:, j : j + group_size], zero[:, j : j + group_size] = s[:, None], z[:, None]
        inverse = torch.linalg.inv(Hd[j:, j:])
        code = grid.quantize(current[:, j], scale[:, j], zero[:, j], 3)
        error = (current[:, j] - grid.dequantize(code, scale[:, j], zero[:, j])) / inverse[0, 0]
        current[:, j:] -= torch.outer(error, inverse[0])
    expected, _ = oracle.gptq_by_inverse(W, Hd, scale, zero, 3)
    for block in (5, 16, 128):
        solved = solver.solve(
            W, factor_of(H), IntegerGrid(3, sym=False), group_size, static_groups=False, block_size=block
        )
        assert torch.equal(solved.codes.double(), expected)


@pytest.mark.parametrize("static_groups", [True, False])
def test_error_is_the_layer_error_and_beats_round_to_nearest(static_groups: bool, rng: torch.Generator) -> None:
    W, H = problem(rng)
    factor = solver.factorize(H, solver.act_order(H))
    solved = solver.solve(W, factor, IntegerGrid(3, sym=True), 8, static_groups=static_groups)
    E = W - solved.weight().double()
    assert solved.error == pytest.approx(float(torch.trace(E @ oracle.damped(H, 0.01) @ E.T)), rel=1e-9)
    assert mean_output_power(E, H) == pytest.approx(float(torch.trace(E @ H @ E.T)), rel=1e-9)
    nearest = W - solver.round_to_nearest(W, IntegerGrid(3, sym=True), 8).weight().double()
    assert mean_output_power(E, H) < mean_output_power(nearest, H)


def test_factor_is_ldl_of_the_damped_hessian_in_solving_order(rng: torch.Generator) -> None:
    _, H = problem(rng)
    perm = torch.randperm(len(H), generator=rng)
    factor = solver.factorize(H, perm, 0.01)
    assert torch.equal(factor.U, factor.U.triu())
    assert torch.equal(factor.U.diagonal(), torch.ones(len(H), dtype=H.dtype))
    again = factor.U @ torch.diag(factor.D) @ factor.U.T
    assert torch.allclose(again, oracle.damped(H, 0.01)[perm][:, perm], rtol=1e-10)
    inverse_factor = torch.linalg.cholesky(torch.linalg.inv(again), upper=True)
    assert torch.allclose(factor.D, inverse_factor.diagonal() ** -2)  # D_i = 1 / R_ii^2
    assert float(factor.D.log().sum()) == pytest.approx(float(torch.logdet(again)))


def test_a_hessian_in_any_layout_has_the_same_factor(rng: torch.Generator) -> None:
    _, H = problem(rng)
    perm = solver.act_order(H)
    one, other = (solver.factorize(x, perm, 0.01) for x in (H, H.T.contiguous().T))
    assert torch.equal(one.U, other.U)


@pytest.mark.parametrize("static_groups", [True, False])
def test_act_order_is_the_solve_of_permuted_columns(static_groups: bool, rng: torch.Generator) -> None:
    W, H = problem(rng)
    perm = solver.act_order(H)
    assert (H.diagonal()[perm].diff() <= 0).all()
    ordered = solver.solve(W, solver.factorize(H, perm), IntegerGrid(4, sym=True), 8, static_groups=static_groups)
    if static_groups:
        assert torch.equal(ordered.g_idx, (torch.arange(40) // 8).int())
        scale, zero = expanded_grid(W, 4, 8, True)
        expected, _ = oracle.gptq_by_inverse(
            W[:, perm], oracle.damped(H, 0.01)[perm][:, perm], scale[:, perm], zero[:, perm], 4
        )
        assert torch.equal(ordered.codes[:, perm].double(), expected)
    else:
        permuted = solver.solve(
            W[:, perm], factor_of(H[perm][:, perm]), IntegerGrid(4, sym=True), 8, static_groups=False
        )
        assert torch.equal(ordered.codes[:, perm], permuted.codes)
        assert torch.equal(ordered.g_idx[perm], permuted.g_idx)
        assert not torch.equal(ordered.g_idx, permuted.g_idx)  # a non-trivial g_idx
        assert torch.equal(ordered.weight()[:, perm], permuted.weight())


def test_diagonal_hessian_is_round_to_nearest(rng: torch.Generator) -> None:
    W, _ = problem(rng, dtype=torch.float32)
    H = torch.diag(torch.rand(40, generator=rng) + 0.1)
    solved = solver.solve(W, factor_of(H), IntegerGrid(4, sym=False), 8)
    nearest = solver.round_to_nearest(W, IntegerGrid(4, sym=False), 8)
    assert torch.equal(solved.codes, nearest.codes)
    assert torch.equal(solved.weight(), nearest.weight())


def test_weights_on_the_grid_stay(rng: torch.Generator) -> None:
    W, H = problem(rng, dtype=torch.float32)
    codes = torch.randint(0, 16, W.shape, generator=rng).float()
    codes[:, ::8], codes[:, 1::8] = 0, 15  # every group uses its whole range, so that the same grid is found again
    scale = torch.rand(12, 5, generator=rng).half().float().repeat_interleave(8, 1)
    on_grid = grid.dequantize(codes, scale, torch.full_like(codes, 7))
    solved = solver.solve(on_grid, factor_of(H), IntegerGrid(4, sym=False), 8)
    assert torch.equal(solved.weight(), on_grid)
    assert solved.error == 0


@pytest.mark.parametrize("factor", [0.25, 3.7, 1e4])
def test_scaling_the_hessian_changes_no_code(factor: float, rng: torch.Generator) -> None:
    W, H = problem(rng)
    assert torch.equal(
        solver.solve(W, factor_of(H), IntegerGrid(3, sym=True), 8).codes,
        solver.solve(W, factor_of(factor * H), IntegerGrid(3, sym=True), 8).codes,
    )


def test_rows_are_independent(rng: torch.Generator) -> None:
    W, H = problem(rng)
    whole = solver.solve(W, factor_of(H), IntegerGrid(3, sym=True), 8)
    for rows in (slice(0, 1), slice(3, 7), slice(11, 12)):
        part = solver.solve(W[rows], factor_of(H), IntegerGrid(3, sym=True), 8)
        assert torch.equal(part.codes, whole.codes[rows])
        assert torch.equal(part.scale, whole.scale[rows])


def test_dead_columns_keep_their_weights_to_the_nearest_code(rng: torch.Generator) -> None:
    W, H = problem(rng, dtype=torch.float32)
    H[:, 5] = H[5] = 0
    solved = solver.solve(W, factor_of(H), IntegerGrid(4, sym=True), 8)
    assert torch.equal(solved.codes[:, 5], solver.round_to_nearest(W, IntegerGrid(4, sym=True), 8).codes[:, 5])
    nothing = solver.solve(W, factor_of(torch.zeros_like(H)), IntegerGrid(4, sym=True), 8)
    assert torch.equal(nothing.codes, solver.round_to_nearest(W, IntegerGrid(4, sym=True), 8).codes)


def test_damping_grows_until_the_hessian_factors_and_no_further(rng: torch.Generator) -> None:
    x = torch.randn(1, 64, generator=rng)
    rank_one = 1e4 * x.T @ x
    indefinite = rank_one - 0.05 * rank_one.diagonal().mean() * torch.eye(64)
    assert factor_of(rank_one, 0.01).damp == 0.01
    assert factor_of(indefinite, 0.01).damp == pytest.approx(0.1)
    with pytest.raises(solver.NotPositiveDefiniteError):
        factor_of(-torch.eye(4) + 2 * torch.ones(4, 4), 0.01)
    with pytest.raises(solver.NotPositiveDefiniteError):
        factor_of(torch.full((4, 4), float("nan")), 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1024, 1536])
def test_float32_solves_like_float64_at_real_widths(n: int, rng: torch.Generator) -> None:
    W, H = problem(rng, rows=64, n=n)
    double = solver.solve(W, factor_of(H), IntegerGrid(4, sym=True), 128)
    single = solver.solve(W.float(), factor_of(H.float()), IntegerGrid(4, sym=True), 128)
    assert (double.codes == single.codes).float().mean() >= 0.999
    assert single.error == pytest.approx(double.error, rel=1e-3)
