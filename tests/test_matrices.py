"""Wide matrices: by panels the same factor and products, in files the same bytes, and few pages in memory."""

import sys
from pathlib import Path

import pytest
import torch

from gptq import solver
from gptq.compute import matrices
from gptq.compute.matrices import IN_MEMORY, Matrices
from gptq.planning.memory import resident_bytes
from gptq.solver import IntegerGrid, wide_factor
from gptq.solver.coordinate_descent import refine
from gptq.solver.error_propagation import divide_by_hessian, full_correction, product_by_panels
from gptq.solver.hessian import HeldOut, HessianAccumulator, mean_output_power
from tests.test_solver import problem

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident pages are counted in Linux's /proc")
CPU = torch.device("cpu")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything of more than 32 columns wide, in panels of 16."""
    monkeypatch.setattr(matrices, "WIDE", 32)
    monkeypatch.setattr(matrices, "DIAGONAL_ROWS", 7)
    monkeypatch.setattr(wide_factor, "PANEL_COLUMNS", 16)
    monkeypatch.setattr("gptq.solver.hessian.PORTION_ROWS", 9)
    monkeypatch.setattr("gptq.solver.error_propagation.PANEL_ROWS", 11)


@linux
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("order", [solver.natural_order, solver.act_order])
@pytest.mark.parametrize("n", [33, 48, 75])
def test_a_factor_by_panels_is_the_factor(n: int, order: object, tmp_path: Path, rng: torch.Generator) -> None:
    _, H = problem(rng, n=n)
    perm = order(H)  # type: ignore[operator]
    factor, filed = solver.factorize(H, perm), solver.factorize(H, perm, matrices=Matrices(tmp_path))
    assert torch.equal(factor.U, filed.U)
    assert torch.equal(factor.D, filed.D)
    assert torch.equal(factor.U, factor.U.triu())
    assert torch.equal(factor.U.diagonal(), torch.ones(n, dtype=torch.float64))
    damped = H[perm][:, perm] + factor.ridge * torch.eye(n, dtype=torch.float64)
    assert torch.allclose(factor.U @ factor.D.diag() @ factor.U.T, damped, rtol=1e-12, atol=1e-12 * float(damped.max()))
    assert factor.ridge == pytest.approx(0.01 * float(H.diagonal().mean()))
    A = torch.randn(5, n, generator=rng, dtype=torch.float64)
    back = torch.argsort(perm)
    right = torch.linalg.solve(damped[back][:, back], A.T).T
    assert torch.allclose(divide_by_hessian(A.clone(), filed), right, rtol=1e-9, atol=1e-9 * float(right.abs().max()))
    assert torch.allclose(product_by_panels(A, H), A @ H, rtol=1e-12, atol=1e-12 * float((A @ H).abs().max()))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("wide")
def test_damping_grows_by_panels_as_it_does_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    H = torch.eye(40, dtype=torch.float64)
    H[20, 20] = -0.05  # positive with a damping of 0.1
    by_panels = solver.factorize(H, solver.natural_order(H))
    bad = [torch.full_like(H, torch.nan), -torch.eye(40)]
    for one in bad:
        with pytest.raises(solver.NotPositiveDefiniteError):
            solver.factorize(one, solver.natural_order(one))
    monkeypatch.setattr(matrices, "WIDE", 40)
    at_once = solver.factorize(H, solver.natural_order(H))
    assert by_panels.damp == at_once.damp == pytest.approx(0.1)
    assert torch.allclose(by_panels.D, at_once.D, rtol=1e-12)


@linux
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("group_size", [16, 96])
def test_in_files_every_number_is_the_same(group_size: int, tmp_path: Path, rng: torch.Generator) -> None:
    n, rows = 96, 12
    x = [torch.randn(70, n, generator=rng) for _ in range(4)]
    W = torch.randn(rows, n, generator=rng)

    def numbers(made_by: Matrices) -> list[torch.Tensor]:
        sums, held = HessianAccumulator(n, CPU, matrices=made_by), HeldOut(n, CPU, matrices=made_by)
        for number, one in enumerate(x):
            sums.add(one, None if number == 0 else 0.1 * one.roll(1, 1))
            held.add(one.flip(1), one - one.flip(1))
        H, C = sums.take()
        assert C is not None
        factor = solver.factorize(H, solver.act_order(H), matrices=made_by)
        correction = full_correction(W, C, factor)
        solved = solver.solve(W, factor, IntegerGrid(4, sym=True), group_size, search=True)
        better = refine(W, solved, factor, IntegerGrid(4, sym=True), sweeps=2)
        figures = [mean_output_power(W, H), held.power(W), held.agreement(W, correction, slice(None)) or 0.0]
        found = [H, C, factor.U, factor.D, correction, solved.codes, better.codes, better.scale, torch.tensor(figures)]
        return [one.clone() for one in found] + [divide_by_hessian(C, factor).clone()]

    for here, there in zip(numbers(IN_MEMORY), numbers(Matrices(tmp_path)), strict=True):
        assert torch.equal(here, there)


@linux
def test_released_pages_leave_memory_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "WIDE", 2**11)
    n = 2**12
    before = resident_bytes()
    A = Matrices(tmp_path).zeros(n, n, CPU)
    assert torch.equal(A[:5], torch.zeros(5, n))
    A.fill_(3.0)
    assert resident_bytes() - before > 0.8 * A.nbytes
    matrices.release(A[7:9].T)  # of a view
    assert resident_bytes() - before < 0.2 * A.nbytes
    matrices.set_diagonal(A, torch.arange(float(n)))
    assert torch.equal(matrices.diagonal_of(A), torch.arange(float(n)))
    assert resident_bytes() - before < 0.2 * A.nbytes
    assert float(A[-1, 0]) == 3.0
    matrices.release(A)
    address = A.data_ptr()
    del A
    assert address not in matrices._mapped
    matrices.release(kept := torch.ones(n, n))  # in memory: nothing happens
    assert bool((kept == 1).all())
