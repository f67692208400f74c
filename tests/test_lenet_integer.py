"""The integer path equals the simulated one bit for bit, at every layer, and its file gives the same model back."""

from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq.errors import InputError
from lenet_baseline import integer
from lenet_baseline.activations import record_activations
from lenet_baseline.integer import IntegerLayer, IntegerLeNet, quantize_lenet, run_integers, simulate
from lenet_baseline.maxabs import RULES, Rule, quantize_input
from lenet_baseline.model import BIASED, LAYERS, METADATA_KEY, WEIGHT_SHAPES, Bias, LeNet, run_layers


def random_model(rng: torch.Generator, bias: Bias = "all") -> LeNet:
    model = LeNet(bias)
    model.initialize(rng)
    return model.requires_grad_(False)


def random_images(rng: torch.Generator, count: int = 20) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=rng) * 2 - 1


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", BIASED)
def test_every_layer_is_equal_bit_for_bit(bias: Bias, rule: Rule, per_channel: bool, rng: torch.Generator) -> None:
    model, images = random_model(rng, bias), random_images(rng)
    net = quantize_lenet(model, record_activations(model, images), rule, per_channel)
    seen: list[str] = []

    def both(name: str, x: Tensor) -> Tensor:
        y = integer.integer_layer(net.layers[name], x)
        assert y.dtype == torch.int8
        assert torch.equal(y.double(), integer.simulated_layer(net.layers[name], x.double()))
        assert y.abs().amax() > 30  # something came through: equality of zeros would say little
        seen.append(name)
        return y

    logits = run_layers(quantize_input(images, net.n_input), both)
    assert tuple(seen) == LAYERS
    assert torch.equal(logits, run_integers(net, images))
    assert torch.equal(logits.double(), simulate(net, images))
    assert net.layers["conv2"].multiplier.shape == ((16,) if per_channel else (1,))


@given(st.integers(-(2**31) + 128, 2**31 - 129), st.floats(2.0**-50, 1.0), st.booleans())
def test_rescaling_is_exact_over_all_of_int32(accumulator: int, scale: float, tie: bool) -> None:
    """Against decimal arithmetic; the accumulator comes in as a bias under an input of zero."""
    n_output = torch.tensor([2.0**-5 if tie else scale], dtype=torch.float64)
    multiplier, shift = integer.fixed_point(n_output)
    bias = torch.tensor([accumulator], dtype=torch.int32)
    layer = IntegerLayer(torch.zeros(1, 1, dtype=torch.int8), bias, multiplier, shift)
    exact = Decimal(accumulator) * int(multiplier) / 2 ** int(shift)
    expected = max(-128, min(127, int(exact.to_integral_value(ROUND_HALF_EVEN))))
    x = torch.zeros(1, 1, dtype=torch.int8)
    assert integer.integer_layer(layer, x).item() == expected
    assert integer.simulated_layer(layer, x.double()).item() == expected


@pytest.mark.parametrize("accumulator", range(-9, 10))
def test_ties_go_to_even(accumulator: int) -> None:
    multiplier, shift = integer.fixed_point(torch.tensor(0.5))
    bias = torch.tensor([accumulator], dtype=torch.int32)
    layer = IntegerLayer(torch.zeros(1, 1, dtype=torch.int8), bias, multiplier, shift)
    assert integer.integer_layer(layer, torch.zeros(1, 1, dtype=torch.int8)).item() == round(accumulator / 2)


@given(st.floats(2.0**-40, 2.0**20))
def test_fixed_point_keeps_22_bits(scale: float) -> None:
    multiplier, shift = integer.fixed_point(torch.tensor(scale, dtype=torch.float64))
    assert 2**21 <= int(multiplier) <= 2**22
    assert abs(int(multiplier) / 2 ** int(shift) / scale - 1) <= 2.0**-22


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 2.0**21])
def test_a_scale_that_fits_no_multiplier_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match="fc2"):
        integer.fixed_point(torch.tensor(scale), "fc2")


def test_int8_follows_the_float_model(rng: torch.Generator) -> None:
    """Logits divided by their cumulative scale are the float model's, to a few steps of the int8 grid."""
    model, images = random_model(rng), random_images(rng, 50)
    activations = record_activations(model, images)
    net = quantize_lenet(model, activations)
    step = float(activations.outputs["fc3"].abs().max()) / 127
    assert float((run_integers(net, images) * step - model(images)).abs().max()) < 8 * step


def negative_logits_net() -> IntegerLeNet:
    """Black-box weights of zero: the biases of fc3 alone are the logits, all negative, class 3 the largest."""
    layers = {}
    for name, shape in WEIGHT_SHAPES.items():
        multiplier, shift = integer.fixed_point(torch.tensor(1.0))
        bias = torch.full((shape[0],), -9 if name == "fc3" else 0, dtype=torch.int32)
        if name == "fc3":
            bias[3] = -2
        layers[name] = IntegerLayer(torch.zeros(shape, dtype=torch.int8), bias, multiplier, shift)
    return IntegerLeNet("all", "max-abs", 127.0, layers)


def test_logits_keep_their_sign(rng: torch.Generator) -> None:
    """A ReLU behind fc3 would make all of them 0 and class 0 the answer."""
    net, image = negative_logits_net(), random_images(rng, 1)
    for logits in (simulate(net, image), run_integers(net, image)):
        assert logits.tolist() == [[-9, -9, -9, -2, -9, -9, -9, -9, -9, -9]]
        assert logits.argmax(1).item() == 3
        assert torch.relu(logits).argmax(1).item() == 0


def test_an_accumulator_that_could_leave_int32_is_refused() -> None:
    ones = torch.ones(1, dtype=torch.int32)
    weight = torch.tensor([[127, -128]], dtype=torch.int8)  # reaches 255 * 128 = 32640
    bias = torch.tensor([2**31 - 1 - 32640], dtype=torch.int32)
    integer.check_accumulator(IntegerLayer(weight, bias, ones, ones), "fc1")
    with pytest.raises(InputError, match="fc1: output 0 can reach 2147483648"):
        integer.check_accumulator(IntegerLayer(weight, bias + 1, ones, ones), "fc1")


def test_a_bias_too_large_for_its_scale_names_its_layer(rng: torch.Generator) -> None:
    model, images = random_model(rng, "fc3"), random_images(rng)
    activations = record_activations(model, images)
    model.get_parameter("fc3.bias")[4] = 1e9
    with pytest.raises(InputError, match=r"fc3\.bias holds \d+, outside int32"):
        quantize_lenet(model, activations)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASED)
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_file_gives_the_model_back_and_the_same_bytes(
    bias: Bias, per_channel: bool, rng: torch.Generator, tmp_path: Path
) -> None:
    model, images = random_model(rng, bias), random_images(rng)
    net = quantize_lenet(model, record_activations(model, images), "percentile", per_channel)
    integer.save_integers(net, tmp_path / "a.safetensors")
    again = integer.load_integers(tmp_path / "a.safetensors")
    integer.save_integers(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (again.bias, again.rule, again.n_input) == (bias, "percentile", net.n_input)
    assert torch.equal(run_integers(again, images), run_integers(net, images))
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {name for name, t in stored.items() if t.is_floating_point()} == {"n_input"}
    assert stored["fc1.weight"].dtype == torch.int8
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc1.weight", torch.zeros(120, 400), "fc1.weight is torch.float32"),
        ("fc1.weight", torch.zeros(400, 120, dtype=torch.int8), "fc1.weight is"),
        ("fc2.multiplier", torch.tensor([-1], dtype=torch.int32), "fc2.multiplier"),
        ("fc2.shift", torch.tensor([63], dtype=torch.int32), "fc2.shift"),
        ("fc3.bias", torch.full((10,), 2**31 - 1, dtype=torch.int32), "fc3: output"),
        ("n_input", torch.tensor([float("nan")], dtype=torch.float64), "n_input"),
        ("extra", torch.zeros(1), "'extra'"),
        ("conv1.weight", None, "'conv1.weight'"),
    ],
)
def test_a_file_that_is_no_int8_lenet_names_the_tensor(
    name: str, value: Tensor | None, message: str, rng: torch.Generator, tmp_path: Path
) -> None:
    model = random_model(rng)
    path = tmp_path / "int8.safetensors"
    integer.save_integers(quantize_lenet(model, record_activations(model, random_images(rng))), path)
    tensors = {key: tensor for key, tensor in safetensors.torch.load_file(path).items() if key != name}
    if value is not None:
        tensors[name] = value
    safetensors.torch.save_file(tensors, path, {METADATA_KEY: '{"bias": "all", "rule": "max-abs"}'})
    with pytest.raises(InputError, match=message):
        integer.load_integers(path)


def test_a_file_without_its_settings_or_cut_short_is_refused(rng: torch.Generator, tmp_path: Path) -> None:
    path = tmp_path / "int8.safetensors"
    with pytest.raises(InputError, match="no such file"):
        integer.load_integers(path)
    safetensors.torch.save_file({"n_input": torch.ones(1, dtype=torch.float64)}, path)
    with pytest.raises(InputError, match="not an int8 LeNet"):
        integer.load_integers(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        integer.load_integers(path)
