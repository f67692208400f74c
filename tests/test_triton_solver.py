"""The Triton kernels, run by Triton's interpreter on a CPU, against the same arithmetic in whole-tensor operations."""

from typing import Any

import pytest
import torch

from gptq import solver
from gptq.solver import IntegerGrid, inner_loops
from gptq.solver.grids import integer as grid


@pytest.fixture(scope="module")
def inner_loops_triton() -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    from gptq.solver import inner_loops_triton

    return inner_loops_triton


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "sym"), [(2, False), (3, True), (4, True), (8, False)])
@pytest.mark.parametrize(("columns", "rows"), [(8, 16), (13, 37)])
def test_columns_are_chosen_as_in_whole_tensor_operations(
    inner_loops_triton: Any, bits: int, sym: bool, columns: int, rows: int
) -> None:
    base, reference = normal(columns, rows), normal(columns, rows, seed=1)
    coupling = 0.3 * normal(columns, columns, seed=2)
    half = columns // 2
    scale, zero = solver.fit_groups(reference.T.contiguous(), IntegerGrid(bits, sym), half)
    groups = torch.tensor([min(k // half, scale.shape[1] - 1) for k in range(columns)])
    arguments = (base, reference, coupling, scale.T.contiguous(), zero.T.contiguous(), groups, IntegerGrid(bits, sym))
    codes, Q, t = inner_loops_triton.choose_columns(*arguments)
    expected = inner_loops.choose_columns_reference(*arguments)
    assert torch.equal(codes, expected[0])
    torch.testing.assert_close(Q, expected[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(t, expected[2], rtol=0, atol=1e-5)


def test_ties_round_to_even_and_codes_stay_within_their_bits(inner_loops_triton: Any) -> None:
    base = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, 3.49999]])
    scale, zero = torch.ones(1, 8), torch.full((1, 8), 8.0)
    four = IntegerGrid(4, sym=True)
    codes, Q, _ = inner_loops_triton.choose_columns(
        base, base, torch.zeros(1, 1), scale, zero, torch.zeros(1, dtype=torch.int64), four
    )
    assert codes.tolist() == [[8, 10, 10, 8, 6, 15, 0, 11]]
    assert Q.tolist() == [[0, 2, 2, 0, -2, 7, -8, 3]]


@pytest.mark.parametrize(("bits", "sym"), [(2, False), (3, True)])
@pytest.mark.parametrize("columns", [10, 70])  # one chunk, and one and a rest
def test_the_search_finds_the_grids_that_err_least(inner_loops_triton: Any, bits: int, sym: bool, columns: int) -> None:
    w, importance = normal(3, columns, 19), normal(3, columns, seed=3).square()
    scales, zeros = (t[::6].contiguous() for t in grid.candidates(w.mT, bits, sym))  # (candidates, groups, rows)
    found = inner_loops_triton.best_grids(w, importance, scales, zeros, IntegerGrid(bits, sym))
    s, z = scales[:, :, None], zeros[:, :, None]
    Q = grid.dequantize(grid.quantize(w, s, z, bits), s, z)  # (candidates, groups, columns, rows)
    errors = (importance.double()[:, :, None] * (w.double() - Q).square()).sum(2)
    torch.testing.assert_close(errors.gather(0, found[None])[0], errors.amin(0), rtol=1e-5, atol=0)


def test_a_solve_made_of_them_has_the_error_of_the_plain_one(
    inner_loops_triton: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, X = normal(16, 24), normal(90, 24, seed=5)
    H = X.T @ X / len(X)
    factor = solver.factorize(H, solver.act_order(H))
    plain = solver.solve(W, factor, IntegerGrid(3, sym=True), 12, block_size=8)
    monkeypatch.setattr(inner_loops, "choose_columns", inner_loops_triton.choose_columns)
    made = solver.solve(W, factor, IntegerGrid(3, sym=True), 12, block_size=8)
    assert torch.equal(made.scale, plain.scale)
    assert (made.codes != plain.codes).float().mean() < 0.01  # those within rounding of a tie, and what follows them
    assert made.error == pytest.approx(plain.error, rel=1e-3)
