"""What held-out windows tell is the same from their rows as from their sums, and both are the averages they claim."""

import pytest
import torch

from gptq.heldout import HeldOutAccumulator, Means, Rows


@pytest.mark.parametrize("tokens", [5, 40])
def test_power_and_agreement_are_the_averages_over_tokens(rng: torch.Generator, tokens: int) -> None:
    windows = [(torch.randn(1, tokens, 16, generator=rng), torch.randn(1, tokens, 16, generator=rng)) for _ in range(2)]
    W, A = torch.randn(600, 16, generator=rng), torch.randn(600, 16, generator=rng)
    held = HeldOutAccumulator(16, torch.device("cpu"))
    for x, original in windows:
        held.add(x, original)
    known = held.known()
    assert isinstance(known, Rows if 2 * tokens < 16 else Means)
    X = torch.cat([x[0] for x, _ in windows]).double()
    D = torch.cat([original[0] for _, original in windows]).double() - X
    y = X @ A.T.double()
    assert known.power(A) == pytest.approx(float(y.square().sum() / len(X)), rel=1e-5)
    assert known.agreement(W, A) == pytest.approx(float(((D @ W.T.double()) * y).sum() / len(X)), rel=1e-4, abs=1e-3)


def test_rows_and_sums_of_few_tokens_agree(rng: torch.Generator) -> None:
    x, A = torch.randn(7, 16, generator=rng), torch.randn(3, 16, generator=rng)
    rows, sums = (HeldOutAccumulator(16, torch.device("cpu")) for _ in range(2))
    for held in (rows, sums):
        held.add(x)
    sums.sums()
    few, many = rows.known(), sums.known()
    assert few is not None
    assert many is not None
    assert few.power(A) == pytest.approx(many.power(A), rel=1e-5)
    assert few.agreement(A, A) is None
    assert many.agreement(A, A) is None


def test_nothing_held_out_is_nothing_known() -> None:
    assert HeldOutAccumulator(16, torch.device("cpu")).known() is None
