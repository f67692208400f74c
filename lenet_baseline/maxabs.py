"""Max-abs quantization of weights, activations and biases: one function for each formula of the int8 baseline.

A scale n multiplies: integer = round(n * real). n_input is the scale of the image, n_weight and n_output are the scales
of a layer. The integers that leave layer k carry the cumulative scale

    S_k = n_input * product over layers i <= k of (n_weight_i * n_output_i),        integer = S_k * real

so n_output_k = 127 / (max|activation_k| * S_(k-1) * n_weight_k) maps the largest activation to 127. This is the method
of Jacob et al. 2018 (arXiv 1712.05877, section 2) with zero points of 0. Scales are float64; ties round to even.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gptq.errors import InputError

Rule = Literal["max-abs", "3-sigma", "percentile"]
RULES: tuple[Rule, ...] = ("max-abs", "3-sigma", "percentile")
PERCENTILE_PARTS = 1000  # the percentile rule leaves out one value in 1000: it takes the 99.9th percentile
INT8 = (-128, 127)
INT32 = (-2147483648, 2147483647)

Scales = Sequence[tuple[Tensor | float, Tensor | float]]  # (n_weight, n_output) of each earlier layer


def full_range(values: Tensor) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def three_sigma_range(values: Tensor) -> tuple[float, float]:
    """mean -+ 3 population standard deviations; may exceed the full range."""
    wide = values.double()
    mean, std = float(wide.mean()), float(wide.std(correction=0))
    return mean - 3 * std, mean + 3 * std


def largest_magnitude(values: Tensor, rule: Rule = "max-abs", per_channel: bool = False) -> Tensor:
    """The absolute value that maps to the largest integer, () or (channels,) float64; larger values are clamped.

    max-abs: max|v|. 3-sigma: the end of mean -+ 3 std farther from 0, at most max|v|. percentile: the 99.9th percentile
    of |v|, or max|v| if that percentile is 0.
    """
    rows = values.double().reshape(values.shape[0] if per_channel else 1, -1)  # (channels or 1, n)
    whole = rows.abs().amax(1)
    if rule == "max-abs":
        found = whole
    elif rule == "3-sigma":
        found = torch.minimum(rows.mean(1).abs() + 3 * rows.std(1, correction=0), whole)
    else:
        found = rows.abs().kthvalue(rows.shape[1] - rows.shape[1] // PERCENTILE_PARTS, dim=1).values
        found = found.where(found > 0, whole)
    return found if per_channel else found[0]


def scale_for(span: Tensor, bits: int = 8) -> Tensor:
    """Return (2^(bits-1) - 1) / span, the scale that maps `span` to the largest integer; 1.0 if the span is 0."""
    return torch.where(span > 0, (2 ** (bits - 1) - 1) / span, 1.0)


def _round(real: Tensor, scale: Tensor | float, bits: int = 8) -> Tensor:
    return torch.round(real.double() * scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def quantize_weights(
    w: Tensor, bits: int = 8, rule: Rule = "max-abs", per_channel: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize a weight by the scale n_weight = 127 / max|w|, or 1.0 if all weights are zero.

    Args:
        w: (outputs, ...).
        bits: 2 to 8; the largest weight becomes 2^(bits-1) - 1.
        per_channel: each output has its own scale.
    Returns:
        integers int8 (outputs, ...), and the scale, () or (outputs,) float64.
    """
    scale = scale_for(largest_magnitude(w, rule, per_channel), bits)
    return _round(w, _broadcast_scale(scale, w), bits).to(torch.int8), scale


def dequantize_weights(integers: Tensor, scale: Tensor) -> Tensor:
    """integers / n_weight, float32."""
    return (integers.double() / _broadcast_scale(scale, integers)).float()


def _broadcast_scale(scale: Tensor, w: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (w.ndim - 1)) if scale.ndim else scale


def input_scale(pixels: Tensor, rule: Rule = "max-abs") -> Tensor:
    """n_input = 127 / max|pixel|, () float64."""
    return scale_for(largest_magnitude(pixels, rule))


def quantize_input(pixels: Tensor, n_input: Tensor | float) -> Tensor:
    """Quantize images: scale, round and clamp to int8."""
    return _round(pixels, n_input).to(torch.int8)


def cumulative_scale(n_input: Tensor | float, before: Scales) -> Tensor:
    """S = n_input * product of n_weight * n_output over the earlier layers, () float64.

    With scales per channel, n_weight * n_output is still the same for all channels, because n_output contains
    1 / n_weight.
    """
    S = torch.as_tensor(n_input, dtype=torch.float64)
    for n_weight, n_output in before:
        S = S * (torch.as_tensor(n_weight, dtype=torch.float64) * n_output).mean()
    return S


def output_scale(
    activations: Tensor,
    n_weight: Tensor | float,
    n_input: Tensor | float,
    before: Scales = (),
    rule: Rule = "max-abs",
) -> Tensor:
    """n_output = 127 / (max|activation| * n_input * product of earlier (n_weight * n_output) * n_weight).

    Args:
        activations: outputs of the float layer over training images, before ReLU.
        n_weight: () or (outputs,); the result has its shape.
        before: (n_weight, n_output) of the earlier layers, in any order.
    """
    return scale_for(largest_magnitude(activations, rule)) / (cumulative_scale(n_input, before) * n_weight)


def quantize_bias(
    bias: Tensor, n_weight: Tensor | float, n_input: Tensor | float, before: Scales = (), name: str = "bias"
) -> Tensor:
    """A bias in the units of its layer's accumulator: round(bias * n_weight * S), int32 (outputs,).

    Raises:
        InputError: a value leaves [-2147483648, 2147483647].
    """
    scaled = torch.round(bias.double() * (cumulative_scale(n_input, before) * n_weight))
    check_bias(scaled, name)
    return scaled.to(torch.int32)


def check_bias(bias: Tensor, name: str = "bias") -> None:
    """Raises InputError if a value is not an integer or does not fit int32."""
    low, high = INT32
    if bias.is_floating_point():
        fractions = bias[bias != bias.round()]  # includes NaN; infinities are caught below
        if fractions.numel():
            raise InputError(f"{name} holds {float(fractions[0])}, which is no integer; quantize_bias makes one")
    outside = bias[(bias < low) | (bias > high)]
    if outside.numel():
        raise InputError(
            f"{name} holds {outside[0].item():.0f}, outside int32's [{low}, {high}]: the bias is too large beside the "
            f"layer's weights and inputs for their scale"
        )
