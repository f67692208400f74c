"""Weight-only quantization to 8, 4, 3 and 2 bits: max-abs per tensor, round-to-nearest per channel, GPTQ per channel.

Activations and biases stay float32. A convolution is a matrix product with unfolded patches, so the `gptq` solver
handles all layers. Layers are quantized in order; each Hessian is computed from the outputs of the GPTQ layers before.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptq.compute.matmul import exact_float32
from gptq.solver import IntegerGrid, act_order, factorize, round_to_nearest, solve
from gptq.solver.hessian import HessianAccumulator, mean_output_power
from lenet_baseline.maxabs import dequantize_weights, quantize_weights
from lenet_baseline.model import LeNet, run_layers, unfold

Method = Literal["max-abs", "rtn", "gptq"]
METHODS: tuple[Method, ...] = ("max-abs", "rtn", "gptq")
BITS = (8, 4, 3, 2)
BATCH_IMAGES = 250  # images whose unfolded patches are in memory at a time


@dataclass(frozen=True)
class Quantized:
    """A model quantized at one number of bits, by method."""

    models: dict[Method, LeNet]
    errors: dict[Method, dict[str, float]]  # by layer: tr(E H E^T) / tr(W H W^T), E = W - Q, with GPTQ's Hessian


@torch.no_grad()
def quantize_weight(W: Tensor, H: Tensor, method: Method, bits: int) -> Tensor:
    """Quantize a weight and dequantize it: (outputs, inputs) float32.

    Args:
        W: (outputs, inputs) float32.
        H: (inputs, inputs) float32, mean of x x^T over the layer's inputs; only GPTQ uses it.
    """
    if method == "max-abs":
        return dequantize_weights(*quantize_weights(W, bits))
    if method == "rtn":
        return round_to_nearest(W, IntegerGrid(bits, sym=True), W.shape[1]).weight()
    with exact_float32(W.device):
        return solve(W, factorize(H, act_order(H)), IntegerGrid(bits, sym=True), W.shape[1]).weight()


@torch.no_grad()
def quantize_model(model: LeNet, bits: int, images: Tensor) -> Quantized:
    """Quantize all layers to `bits` by every method, calibrated on images (n, 3, 32, 32)."""
    models = {method: _copy(model) for method in METHODS}
    errors: dict[Method, dict[str, float]] = {method: {} for method in METHODS}

    def layer(name: str, x: Tensor) -> Tensor:
        shape = model.weight(name).shape
        W = model.weight(name).flatten(1)  # (outputs, inputs)
        H = _hessian(x, model.weight(name))
        for method in METHODS:
            Q = quantize_weight(W, H, method, bits)
            errors[method][name] = mean_output_power(W - Q, H) / mean_output_power(W, H)
            models[method].weight(name).copy_(Q.view(shape))
        return models["gptq"].layer(name, x)

    run_layers(images, layer)
    return Quantized(models, errors)


def _copy(model: LeNet) -> LeNet:
    copy = LeNet(model.bias)
    copy.load_state_dict(model.state_dict())
    return copy


def _hessian(x: Tensor, weight: Tensor) -> Tensor:
    """H (inputs, inputs) of a layer's input, accumulated over batches of images."""
    accumulator = HessianAccumulator(weight[0].numel(), x.device)
    with exact_float32(x.device):
        for part in x.split(BATCH_IMAGES):
            accumulator.add(unfold(part, weight))
    return accumulator.mean()
