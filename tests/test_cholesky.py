"""The factorization by blocks: its definition in float64, at the edges of blocks; what is not positive definite."""

import pytest
import torch
from torch import Tensor

from gptq.compute import device_profile
from gptq.solver.cholesky import cholesky_upper

BLOCK = device_profile.CPU.triangle_columns or 0


def positive_definite(n: int, rng: torch.Generator) -> Tensor:
    X = torch.randn(2 * n, n, generator=rng, dtype=torch.float64)
    return X.T @ X / len(X) + 0.01 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 90])
def test_it_is_the_upper_triangle_whose_square_is_the_matrix(n: int, rng: torch.Generator) -> None:
    A = positive_definite(n, rng)
    R = A.clone()
    assert cholesky_upper(R)
    assert torch.equal(R, R.triu())
    assert float(R.diagonal().min()) > 0
    assert torch.allclose(R.T @ R, A, rtol=0, atol=1e-13)
    single = A.float()
    assert cholesky_upper(single)
    assert float((single - R).abs().max()) < 2e-6


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_what_is_not_positive_definite_is_told_in_whichever_block_it_is(
    at: int, value: float, rng: torch.Generator
) -> None:
    A = positive_definite(2 * BLOCK + 10, rng)
    A[at, at] = value
    assert not cholesky_upper(A)
