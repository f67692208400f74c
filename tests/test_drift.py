"""The target of a layer whose input has drifted: identities in float64, and the published methods as special cases."""

import pytest
import torch
from torch import Tensor

from gptq import solver
from gptq.solver import IntegerGrid
from gptq.solver.error_propagation import (
    best_correction_share,
    divide_by_hessian,
    full_correction,
    input_drift,
    output_drift,
)
from tests import oracle
from tests.test_solver import problem


def drifted(rng: torch.Generator, n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """W (6, n), X (tokens, n) and the original input (tokens, n)."""
    mix = torch.randn(n, n, generator=rng, dtype=torch.float64)
    X = torch.randn(200, n, generator=rng, dtype=torch.float64) @ mix
    drift = X @ torch.randn(n, n, generator=rng, dtype=torch.float64) * 0.02
    noise = torch.randn(200, n, generator=rng, dtype=torch.float64) * 0.1
    return torch.randn(6, n, generator=rng, dtype=torch.float64), X, X + drift + noise


def means(X: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    return X.T @ X / len(X), (original - X).T @ X / len(X)


def test_the_error_against_the_original_output_differs_from_that_against_the_target_by_a_constant(
    rng: torch.Generator,
) -> None:
    W, X, original = drifted(rng)
    H, C = means(X, original)
    factor = solver.factorize(H, solver.act_order(H), 1e-12)
    target = W + full_correction(W, C, factor)
    differences = []
    for _ in range(3):
        Q = W + torch.randn(W.shape, generator=rng, dtype=torch.float64)
        wanted = (original @ W.T - X @ Q.T).square().sum() / len(X)
        differences.append(float(wanted - torch.trace((target - Q) @ H @ (target - Q).T)))
    assert differences[1:] == pytest.approx(differences[:1] * 2, rel=1e-6)


def test_no_drift_is_plain_gptq(rng: torch.Generator) -> None:
    W, H = problem(rng)
    factor = solver.factorize(H, solver.natural_order(H))
    nothing = full_correction(W, torch.zeros_like(H), factor)
    assert torch.equal(nothing, torch.zeros_like(W))
    assert best_correction_share(0.0, 0.0) == 0


@pytest.mark.parametrize("n", [24, 600])
def test_a_correction_is_the_damped_least_squares_solution(n: int, rng: torch.Generator) -> None:
    W, X, original = drifted(rng, n)
    H, C = means(X, original)
    factor = solver.factorize(H, solver.act_order(H), 0.01)
    exact = W @ C @ torch.linalg.inv(H + factor.ridge * torch.eye(n, dtype=H.dtype))
    assert torch.allclose(full_correction(W, C, factor), exact, rtol=1e-8, atol=1e-10 * float(exact.abs().max()))
    assert torch.allclose(
        W @ divide_by_hessian(C.clone(), factor), exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max())
    )
    single = solver.factorize(H.float(), factor.perm, 0.01)
    assert (full_correction(W.float(), C.float(), single) - exact).norm() < 1e-3 * exact.norm()


def test_the_share_is_the_best_on_unseen_tokens(rng: torch.Generator) -> None:
    W, X, original = drifted(rng)
    original = original + torch.randn(X.shape, generator=rng, dtype=torch.float64)  # noise that C learns and should not
    H, C = means(X[:60], original[:60])
    correction = full_correction(W, C, solver.factorize(H, solver.natural_order(H)))
    unseen = X[60:], original[60:]
    H, C = means(*unseen)
    power, agreement = float(((correction @ H) * correction).sum()), float(((W @ C) * correction).sum())
    share = best_correction_share(power, agreement)
    assert 0 < share < 1

    def error(part: float) -> float:
        return float(((unseen[1] - unseen[0]) @ W.T - part * unseen[0] @ correction.T).square().sum())

    assert error(share) <= min(error(share - 1e-3), error(share + 1e-3), error(0), error(1))


def test_from_its_second_column_on_qronos_takes_the_same_codes(rng: torch.Generator) -> None:
    """Given the first column, Qronos refits all others against the original output and solves them as GPTQ does."""
    W, X, original = drifted(rng)
    H, C = means(X, original)
    G = C + H  # mean of original x^T
    factor = solver.factorize(H, solver.natural_order(H), 1e-12)
    ours = solver.solve(W + full_correction(W, C, factor), factor, IntegerGrid(4, sym=True), 24)
    first = ours.weight()[:, :1].double()
    rest = torch.linalg.solve(H[1:, 1:], (W @ G[:, 1:] - first * H[0, 1:]).T).T
    scale, zero = (t.double().expand_as(rest) for t in (ours.scale, ours.zero))
    codes, _ = oracle.gptq_by_inverse(rest, H[1:, 1:], scale, zero, 4)
    assert torch.equal(codes, ours.codes[:, 1:].double())


def test_gptaq_comes_close_to_the_target_and_not_below_it(rng: torch.Generator) -> None:
    """GPTAQ, column by column from its paper with its strength at 1, on the same grid and order."""
    W, X, original = drifted(rng)
    H, C = means(X, original)
    factor = solver.factorize(H, solver.natural_order(H), 1e-12)
    ours = solver.solve(W + full_correction(W, C, factor), factor, IntegerGrid(4, sym=True), 24)
    plain = solver.solve(W, factor, IntegerGrid(4, sym=True), 24)
    R = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    P = (C @ R.T).triu(1) @ R
    current, scale, zero = W.clone(), plain.scale[:, 0].double(), plain.zero[:, 0].double()
    Q = torch.zeros_like(W)
    for i in range(W.shape[1]):
        w = current[:, i].clone()
        Q[:, i] = scale * ((w / scale).round() + zero).clamp(0, 15).sub(zero)
        current[:, i:] -= torch.outer((w - Q[:, i]) / R[i, i], R[i, i:]) - torch.outer(w, P[i, i:])

    def error(Q: Tensor) -> float:
        return float((original @ W.T - X @ Q.T).square().sum())

    assert error(ours.weight().double()) < error(Q) < error(plain.weight().double())


def test_an_output_drift_is_what_the_sums_of_both_streams_differ_by(rng: torch.Generator) -> None:
    """Codes that come closest to W + S H^-1 come closest to the original's sum, up to a constant; and None is zero."""
    W, X, original = drifted(rng)
    r, r_original = (torch.randn(200, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    t = output_drift(W, input_drift(X, original), input_drift(r, r_original))
    assert t is not None
    H, S = X.T @ X / len(X), t.T @ X / len(X)
    target = W + divide_by_hessian(S, solver.factorize(H, solver.act_order(H), 1e-12))
    differences = []
    for _ in range(3):
        Q = W + torch.randn(W.shape, generator=rng, dtype=torch.float64)
        wanted = (original @ W.T + r_original - (X @ Q.T + r)).square().sum() / len(X)
        differences.append(float(wanted - torch.trace((target - Q) @ H @ (target - Q).T)))
    assert differences[1:] == pytest.approx(differences[:1] * 2, rel=1e-6)
    of_inputs, nothing = output_drift(W, input_drift(X, original), None), torch.zeros_like(X)
    assert of_inputs is not None
    torch.testing.assert_close(of_inputs, (original - X) @ W.T)
    torch.testing.assert_close(output_drift(W, None, r), output_drift(W, nothing, r.clone()))
    assert output_drift(W, None, None) is None
    assert input_drift(X, X.clone()) is None
    uncompared = input_drift(X, X.clone(), compare=False)
    assert uncompared is not None
    assert not uncompared.any()
    assert input_drift(X, original[:-1]) is None
