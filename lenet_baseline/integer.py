"""The int8 LeNet: int8 weights and activations, int32 biases and accumulators, one multiplication and shift per layer.

    y = clamp(round(n_output * (W x + b)), -128, 127)              W, x int8; b and the accumulator int32

n_output is stored as multiplier * 2^-shift with a multiplier of 22 bits. The product with a 31-bit accumulator has at
most 53 bits, which float64 represents exactly. So the simulated path (float64 tensors with integer values) and the
integer path (no floats after the image is quantized) are equal bit for bit, ties included. Rounding to 22 bits changes
a scale by less than one part in 4 million.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from gptq.errors import InputError
from lenet_baseline.activations import Activations
from lenet_baseline.maxabs import (
    INT8,
    INT32,
    RULES,
    Rule,
    input_scale,
    output_scale,
    quantize_bias,
    quantize_input,
    quantize_weights,
)
from lenet_baseline.model import (
    BIASED,
    LAYERS,
    WEIGHT_SHAPES,
    Bias,
    LeNet,
    read,
    require_tensors,
    run_layers,
    save,
    unfold,
)

MULTIPLIER_BITS = 22  # bits of the fixed-point multiplier of an output scale
MAX_SHIFT = 62  # largest shift of an int64; only scales below 2^-40 reach it, and their outputs are all 0
BATCH_IMAGES = 50  # images that run together; their unfolded patches take 12 MB in int32


@dataclass(frozen=True)
class IntegerLayer:
    """The integers of one layer."""

    weight: Tensor  # (outputs, ...) int8
    bias: Tensor | None  # (outputs,) int32
    multiplier: Tensor  # (1,) or (outputs,) int32, per tensor or per channel
    shift: Tensor  # like multiplier; n_output = multiplier * 2^-shift


@dataclass(frozen=True)
class IntegerLeNet:
    """The int8 model: the scale of its input, and its layers by name."""

    bias: Bias
    rule: Rule
    n_input: float
    layers: dict[str, IntegerLayer]


def quantize_lenet(
    model: LeNet, activations: Activations, rule: Rule = "max-abs", per_channel: bool = False
) -> IntegerLeNet:
    """Quantize weights, activations and biases of the float model, with scales from recorded activations."""
    n_input = input_scale(activations.inputs["conv1"], rule)
    before: list[tuple[Tensor, Tensor]] = []
    layers: dict[str, IntegerLayer] = {}
    for name in LAYERS:
        weight, n_weight = quantize_weights(model.weight(name), 8, rule, per_channel)
        bias = model.layer_bias(name)
        if bias is not None:
            bias = quantize_bias(bias, n_weight, n_input, before, f"{name}.bias")
        n_output = output_scale(activations.outputs[name], n_weight, n_input, before, rule)
        layers[name] = IntegerLayer(weight, bias, *fixed_point(n_output, name))
        check_accumulator(layers[name], name)
        before.append((n_weight, n_output))
    return IntegerLeNet(model.bias, rule, float(n_input), layers)


def fixed_point(scale: Tensor, name: str = "layer") -> tuple[Tensor, Tensor]:
    """Multiplier and shift, both int32 (1,) or (outputs,): multiplier * 2^-shift is the scale rounded to 22 bits.

    Raises:
        InputError: a scale is not positive or not below 2^21.
    """
    scale = scale.double().reshape(-1)
    bad = scale[~((scale > 0) & (scale < 2.0 ** (MULTIPLIER_BITS - 1)))]
    if bad.numel():
        raise InputError(f"{name}: an output scale of {float(bad[0]):.3g} is no fixed-point number; are weights tiny?")
    _, exponent = torch.frexp(scale)  # scale in [2^(exponent - 1), 2^exponent)
    shift = (MULTIPLIER_BITS - exponent).clamp(max=MAX_SHIFT)  # at least 1
    return torch.round(torch.ldexp(scale, shift)).to(torch.int32), shift.to(torch.int32)


def check_accumulator(layer: IntegerLayer, name: str) -> None:
    """Raises InputError if an accumulator could overflow int32 for some int8 input."""
    largest = layer.weight.long().abs().flatten(1).sum(1) * -INT8[0]  # (outputs,)
    if layer.bias is not None:
        largest += layer.bias.long().abs()
    if int(largest.max()) > INT32[1]:
        raise InputError(
            f"{name}: output {int(largest.argmax())} can reach {int(largest.max())}, beyond int32's {INT32[1]}; "
            f"its bias is too large beside its weights and inputs"
        )


# --- forward ----------------------------------------------------------------------------------------------------------


def simulated_layer(layer: IntegerLayer, x: Tensor) -> Tensor:
    """One layer of the simulated path: torch's own operations on float64 tensors with integer values."""
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    multiply = functional.conv2d if weight.ndim == 4 else functional.linear
    y = multiply(x, weight, bias)  # exact: every sum is below 2^53
    n_output = torch.ldexp(layer.multiplier.double(), -layer.shift).reshape(-1, *[1] * (y.ndim - 2))
    return torch.round(y * n_output).clamp(*INT8)


def integer_layer(layer: IntegerLayer, x: Tensor) -> Tensor:
    """One layer of the integer path, (n, ...) int8 to (n, outputs, ...) int8. Ties round to even, as in torch.round."""
    rows, *kernel = layer.weight.shape
    patches = unfold(x, layer.weight).to(torch.int32)  # (n * positions, inputs)
    accumulator = patches @ layer.weight.to(torch.int32).flatten(1).T  # (n * positions, outputs) int32
    if layer.bias is not None:
        accumulator += layer.bias
    product = accumulator.long() * layer.multiplier  # below 2^53
    half_down = (1 << (layer.shift.long() - 1)) - 1  # one less than a half, so that a tie rounds up only if `odd`
    odd = (product >> layer.shift) & 1
    y = ((product + half_down + odd) >> layer.shift).clamp(*INT8).to(torch.int8)
    if len(kernel) == 3:
        height, width = x.shape[2] - kernel[1] + 1, x.shape[3] - kernel[2] + 1
        y = y.reshape(len(x), height, width, rows).permute(0, 3, 1, 2)
    return y


@torch.no_grad()
def simulate(net: IntegerLeNet, images: Tensor) -> Tensor:
    """Run float images (n, 3, 32, 32) on the simulated path; logits (n, 10) are float64 with integer values."""
    return _run(net, images, lambda name, x: simulated_layer(net.layers[name], x.double()))


@torch.no_grad()
def run_integers(net: IntegerLeNet, images: Tensor) -> Tensor:
    """Run float images (n, 3, 32, 32) on the integer path; logits (n, 10) are int8."""
    return _run(net, images, lambda name, x: integer_layer(net.layers[name], x))


def _run(net: IntegerLeNet, images: Tensor, layer: Callable[[str, Tensor], Tensor]) -> Tensor:
    return torch.cat([run_layers(quantize_input(part, net.n_input), layer) for part in images.split(BATCH_IMAGES)])


# --- files ------------------------------------------------------------------------------------------------------------


def save_integers(net: IntegerLeNet, path: Path) -> None:
    """Write int8 weights, int32 biases, multipliers and shifts, and float64 n_input as safetensors."""
    tensors = {"n_input": torch.tensor([net.n_input], dtype=torch.float64)}
    for name, layer in net.layers.items():
        for field, tensor in vars(layer).items():
            if tensor is not None:
                tensors[f"{name}.{field}"] = tensor
    save(tensors, {"bias": net.bias, "rule": net.rule}, path)


def load_integers(path: Path) -> IntegerLeNet:
    """Load an int8 model.

    Raises:
        InputError: the file is missing, corrupt, or not an int8 LeNet, or an accumulator could overflow int32.
    """
    tensors, settings = read(path)
    bias, rule = cast(Bias, str(settings.get("bias"))), cast(Rule, str(settings.get("rule")))
    if bias not in BIASED or rule not in RULES:
        raise InputError(f"{path} is not an int8 LeNet of this package: it does not say its biases and ranges")
    channels = len(tensors.get("conv1.multiplier", torch.empty(1, dtype=torch.float32)))
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"n_input": ((1,), torch.float64)}
    for name, shape in WEIGHT_SHAPES.items():
        scales = (1,) if channels == 1 else shape[:1]
        expected |= {f"{name}.weight": (shape, torch.int8)}
        expected |= {f"{name}.multiplier": (scales, torch.int32), f"{name}.shift": (scales, torch.int32)}
        if name in BIASED[bias]:
            expected[f"{name}.bias"] = (shape[:1], torch.int32)
    require_tensors(tensors, expected, path)
    layers = {
        name: IntegerLayer(
            tensors[f"{name}.weight"],
            tensors.get(f"{name}.bias"),
            tensors[f"{name}.multiplier"],
            tensors[f"{name}.shift"],
        )
        for name in LAYERS
    }
    for name, layer in layers.items():
        _check_fixed_point(layer, f"{path}: {name}")
        check_accumulator(layer, f"{path}: {name}")
    return IntegerLeNet(bias, rule, float(tensors["n_input"]), layers)


def _check_fixed_point(layer: IntegerLayer, name: str) -> None:
    """Raises InputError if a multiplier or shift of a file is out of range."""
    multiplier, shift = layer.multiplier, layer.shift
    if bool(((multiplier < 0) | (multiplier > 2**MULTIPLIER_BITS)).any()):
        raise InputError(f"{name}.multiplier leaves 0 to 2^{MULTIPLIER_BITS}; delete the file and run again")
    if bool(((shift < 1) | (shift > MAX_SHIFT)).any()):
        raise InputError(f"{name}.shift leaves 1 to {MAX_SHIFT}; delete the file and run again")
