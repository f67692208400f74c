"""The grid of a group: what it covers, what is stored, and what happens at its edges."""

import pytest
import torch

from gptq import solver
from gptq.solver import IntegerGrid
from gptq.solver.grids import integer as grid

ALL_BITS = [2, 3, 4, 8]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_scales_are_float16_and_zeros_fit_gptq_v1(bits: int, sym: bool, rng: torch.Generator) -> None:
    w = torch.randn(200, 32, generator=rng) + torch.linspace(-3, 3, 200)[:, None]
    scale, zero = grid.fit(w, bits, sym)
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(zero, zero.round())
    assert 1 <= float(zero.min()) <= float(zero.max()) <= 2**bits - 1
    if sym:
        assert (zero == 2 ** (bits - 1)).all()


def test_scales_by_hand() -> None:
    w = torch.tensor([[-1.5, 0.25, 3.0], [-6.0, 0.0, 1.5]])
    scale, zero = grid.fit(w, 2, sym=True)  # 2 max|w| / 3
    assert (scale.tolist(), zero.tolist()) == ([2.0, 4.0], [2.0, 2.0])
    assert grid.quantize(w, scale[:, None], zero[:, None], 2).tolist() == [[1, 2, 3], [0, 2, 2]]
    scale, zero = grid.fit(w, 4, sym=False)  # (max - min) / 15
    assert torch.allclose(scale, torch.tensor([0.3, 0.5]), rtol=2**-11)
    assert zero.tolist() == [5.0, 12.0]
    scale, zero = grid.fit(torch.tensor([[0.0, 7.0, 14.0]]), 4, sym=False)  # all positive: zero 1, top code 14 steps up
    assert (scale.tolist(), zero.tolist()) == ([1.0], [1.0])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_weight_is_within_half_a_step_on_the_asymmetric_grid(bits: int, rng: torch.Generator) -> None:
    """Also where all weights have one sign, where a zero point of 0 would be the natural but forbidden choice."""
    spread = torch.randn(300, 64, generator=rng)
    for w in (spread, spread.abs(), -spread.abs(), spread.abs() + 1):
        scale, zero = grid.fit(w, bits, sym=False)
        q = grid.dequantize(grid.quantize(w, scale[:, None], zero[:, None], bits), scale[:, None], zero[:, None])
        # The zero point is an integer and the scale a float16, so each end may stand out by half a step and a bit.
        assert ((w - q).abs() <= (0.5 + 2**bits * 2**-11) * scale[:, None] * 1.01).all()


def test_dequantizing_is_exact_in_float32(rng: torch.Generator) -> None:
    scale = torch.rand(1000, generator=rng).half().float()
    codes = torch.randint(0, 256, (1000,), generator=rng).float()
    zero = torch.randint(1, 256, (1000,), generator=rng).float()
    exact = scale.double() * (codes.double() - zero.double())
    assert torch.equal(grid.dequantize(codes, scale, zero).double(), exact)


def test_zero_and_tiny_groups_stay_finite_and_huge_ones_are_refused() -> None:
    scale, zero = grid.fit(torch.zeros(3, 8), 4, sym=True)
    assert scale.tolist() == [1.0] * 3
    assert grid.quantize(torch.zeros(3, 8), scale[:, None], zero[:, None], 4).unique().tolist() == [8.0]
    scale, _ = grid.fit(torch.full((1, 8), 1e-9), 4, sym=False)
    assert float(scale) == 2.0**-24
    with pytest.raises(ValueError, match="does not fit float16"):
        grid.fit(torch.full((1, 8), 1e7), 4, sym=True)


def test_a_short_last_group_has_its_own_grid(rng: torch.Generator) -> None:
    W = torch.randn(5, 20, generator=rng)
    scale, zero = solver.fit_groups(W, IntegerGrid(4, sym=False), 8)
    assert scale.shape == zero.shape == (5, 3)
    assert torch.equal(scale[:, 2], grid.fit(W[:, 16:], 4, sym=False)[0])
