"""Max-abs int8: each formula against numbers worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq.errors import InputError
from lenet_baseline import maxabs


def test_weights_are_scaled_by_127_over_the_largest() -> None:
    w = torch.tensor([[0.5, -0.25, 0.1], [0.0, 0.3, -0.4]])
    integers, scale = maxabs.quantize_weights(w)
    assert float(scale) == 254.0
    # 0.25 * 254 = 63.5, a tie that goes to the even 64; 25.4, 76.2, 101.6
    assert integers.tolist() == [[127, -64, 25], [0, 76, -102]]
    assert integers.dtype == torch.int8


def test_each_output_may_have_its_own_scale() -> None:
    w = torch.tensor([[0.5, -0.25], [0.0, 0.0], [-2.0, 1.0]])
    integers, scale = maxabs.quantize_weights(w, per_channel=True)
    assert scale.tolist() == [254.0, 1.0, 63.5]
    assert integers.tolist() == [[127, -64], [0, 0], [-127, 64]]
    assert maxabs.dequantize_weights(integers, scale)[2].tolist() == [-2.0, pytest.approx(64 / 63.5)]


def test_all_zero_weights_have_scale_one() -> None:
    integers, scale = maxabs.quantize_weights(torch.zeros(2, 3))
    assert float(scale) == 1.0
    assert not integers.any()


def test_narrow_weights_keep_their_range() -> None:
    integers, scale = maxabs.quantize_weights(torch.tensor([[1.0, -1.0, 0.4]]), bits=2)
    assert float(scale) == 1.0
    assert integers.tolist() == [[1, -1, 0]]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30))
def test_no_weight_moves_by_more_than_half_a_step(values: list[float]) -> None:
    w = torch.tensor([values])
    integers, scale = maxabs.quantize_weights(w)
    assert float((integers.double() / scale - w.double()).abs().max()) <= 0.5 / float(scale) * (1 + 1e-9)


def test_ranges_beside_max_abs() -> None:
    values = torch.cat([torch.ones(500), -torch.ones(499), torch.tensor([50.0])])
    mean, std = 51 / 1000, (3499 / 1000 - 0.051**2) ** 0.5
    assert float(maxabs.largest_magnitude(values)) == 50
    assert float(maxabs.largest_magnitude(values, "3-sigma")) == pytest.approx(mean + 3 * std)
    assert float(maxabs.largest_magnitude(values, "percentile")) == 1  # 999 of 1000 do not exceed it
    assert maxabs.three_sigma_range(values) == pytest.approx((mean - 3 * std, mean + 3 * std))
    assert maxabs.full_range(values) == (-1, 50)


def test_three_sigma_never_widens_the_range() -> None:
    values = torch.tensor([-1.0, 1.0])
    assert float(maxabs.largest_magnitude(values, "3-sigma")) == 1
    assert maxabs.three_sigma_range(values) == (-3, 3)


def test_what_leaves_a_narrower_range_is_clamped() -> None:
    w = torch.cat([torch.ones(999), torch.tensor([50.0])])[None]
    integers, scale = maxabs.quantize_weights(w, rule="percentile")
    assert float(scale) == 127
    assert integers[0, -1] == 127
    assert maxabs.quantize_weights(-w, rule="percentile")[0][0, -1] == -128


def test_a_percentile_of_zero_falls_back_to_the_largest() -> None:
    assert float(maxabs.largest_magnitude(torch.tensor([0.0] * 2000 + [3.0]), "percentile")) == 3


def test_input_scale_and_integers() -> None:
    pixels = torch.tensor([-1.0, 0.5, 2.0])
    assert float(maxabs.input_scale(pixels)) == 63.5
    assert maxabs.quantize_input(pixels, 63.5).tolist() == [-64, 32, 127]  # -63.5 and 31.75
    assert maxabs.quantize_input(torch.tensor([-9.0, 9.0]), 63.5).tolist() == [-128, 127]


def test_output_scale_divides_by_every_scale_before() -> None:
    activations = torch.tensor([4.0, -8.0])
    before = [(2.0, 0.5), (10.0, 0.25)]
    by_hand = 127 / (8 * 3 * (2 * 0.5) * (10 * 0.25) * 5)
    assert by_hand == 127 / 300
    assert float(maxabs.output_scale(activations, 5.0, 3.0, before)) == pytest.approx(by_hand)
    assert float(maxabs.cumulative_scale(3.0, before)) == 7.5


def test_the_cumulative_scale_behind_a_layer_is_127_over_its_largest_activation() -> None:
    """For per-tensor and per-channel weights alike: n_output is what makes that true."""
    activations = torch.tensor([4.0, -8.0])
    for n_weight in (torch.tensor(5.0), torch.tensor([5.0, 0.3, 71.0])):
        n_output = maxabs.output_scale(activations, n_weight, 3.0, [(2.0, 0.5)])
        assert n_output.shape == n_weight.shape
        after = maxabs.cumulative_scale(3.0, [(2.0, 0.5), (n_weight, n_output)])
        assert float(after) == pytest.approx(127 / 8)


def test_bias_takes_the_scale_of_its_accumulator() -> None:
    bias = maxabs.quantize_bias(torch.tensor([0.5, -0.25]), 10.0, 3.0, [(2.0, 0.5)])  # scale 10 * 3 * 1 = 30
    assert bias.tolist() == [15, -8]  # -7.5 is a tie
    assert bias.dtype == torch.int32
    per_channel = maxabs.quantize_bias(torch.tensor([0.5, -0.25]), torch.tensor([10.0, 20.0]), 3.0)
    assert per_channel.tolist() == [15, -15]


def test_bias_reaches_the_ends_of_int32_and_no_further() -> None:
    ends = torch.tensor([2147483647.0, -2147483648.0], dtype=torch.float64)
    assert maxabs.quantize_bias(ends, 1.0, 1.0).tolist() == [2147483647, -2147483648]
    for beyond in (2147483648.0, -2147483649.0):
        with pytest.raises(InputError, match=r"fc3\.bias holds -?214748364\d, outside int32"):
            maxabs.quantize_bias(torch.tensor([0.0, beyond], dtype=torch.float64), 1.0, 1.0, name="fc3.bias")


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_a_bias_that_is_no_integer_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="fc1"):
        maxabs.check_bias(torch.tensor([1.0, value]), "fc1.bias")
    maxabs.check_bias(torch.tensor([1.0, -3.0]))
    with pytest.raises(InputError, match="outside int32"):
        maxabs.check_bias(torch.tensor([2**31]))
