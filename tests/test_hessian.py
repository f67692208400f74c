"""H is the closed form, summed in float32, and does not depend on how the tokens arrive."""

import pytest
import torch

from gptq.hessian import HessianAccumulator
from gptq.matmul import exact_float32


def hessian(*parts: torch.Tensor) -> torch.Tensor:
    accumulator = HessianAccumulator(parts[0].shape[-1], torch.device("cpu"))
    for part in parts:
        accumulator.add(part)
    assert accumulator.num_tokens == sum(part.numel() // part.shape[-1] for part in parts)
    return accumulator.mean()


def test_closed_form_over_windows_of_different_shapes(rng: torch.Generator) -> None:
    X = torch.randn(50, 12, generator=rng)
    H = hessian(X[:10], X[10:30].view(2, 10, 12), X[30:])
    assert torch.allclose(H.double(), X.double().T @ X.double() / 50, atol=1e-6)
    assert torch.equal(H, H.T)


def test_bfloat16_inputs_are_exact(rng: torch.Generator) -> None:
    """Small integers times a power of two: every product and sum is a float32, so H has to be exact to the bit."""
    X = (torch.randint(-15, 16, (256, 8), generator=rng) * 2.0**-5).bfloat16()
    assert torch.equal(hessian(X).double(), X.double().T @ X.double() / 256)


def test_half_precision_does_not_overflow_the_sum() -> None:
    X = torch.full((1000, 2), 200.0, dtype=torch.float16)  # 200^2 * 1000 is far above float16's 65504
    assert torch.equal(hessian(X), torch.full((2, 2), 40000.0))


def test_no_tokens_is_zero_not_nan() -> None:
    assert torch.equal(HessianAccumulator(3, torch.device("cpu")).mean(), torch.zeros(3, 3))


def test_reduced_precision_modes_are_off_inside_and_come_back() -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this torch has one precision setting for all backends")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # the setting of old
        with torch.autocast("cpu", torch.bfloat16), exact_float32(torch.device("cpu")):
            assert (x @ x).dtype == torch.float32
            assert matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    own = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"  # the newer one
        with exact_float32(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = own
