"""ScaledLinear, a packed layer whose scales gradients may change while its codes stay."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gptq import formats
from gptq.inference.quant_linear import QuantLinear, round_to_int8
from gptq.solver.codes import Codes


class ScaledLinear(nn.Module):
    """y = x W^T + bias, W the weight of a packed layer with each scale multiplied by 1 + `change` of its group.

    Only the packed layer and `change` (outputs, groups) are held; W is made in each forward and again in each backward.
    """

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that its buffers are not this module's
        scale = self.codes().scale
        self.change = nn.Parameter(torch.zeros(scale.shape, device=scale.device))
        self.out_features, self.in_features = layer.out_features, layer.in_features

    def codes(self) -> Codes:
        """Return the packed layer's codes and scales, as they are stored."""
        layer = self._layer[0]
        return formats.decode(layer.packed(), layer.scheme)

    @property
    def weight(self) -> Tensor:
        """Return W (outputs, inputs) in float32; gradients reach `change`."""
        return self.weight_in(torch.float32)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return W (outputs, inputs) in `dtype`; gradients reach `change`."""
        made: Tensor = _ScaledWeight.apply(self.change, self, dtype)
        return made

    def forward(self, x: Tensor) -> Tensor:
        layer = self._layer[0]
        bias = layer._buffers["bias"]
        if layer.rounds_activations:
            x = x + (round_to_int8(x).to(x.dtype) - x).detach()  # rounding has gradient 1
        return nn.functional.linear(x, self.weight_in(x.dtype), None if bias is None else bias.to(x.dtype))

    def rounded(self) -> Codes | None:
        """Return the codes with the changed scales as a file holds them; None if a scale no longer fits the file."""
        layer, codes = self._layer[0], self.codes()
        grid = formats.FORMATS[layer.scheme.format].grid(layer.scheme)
        scale = codes.scale.float() * (1 + self.change.detach())
        if not bool(grid.fits(scale).all()):
            return None
        return replace(codes, scale=grid.round_scales(scale))


class _ScaledWeight(torch.autograd.Function):
    """The weight as a function of the relative changes of its scales.

    W = s (1 + change) u + offset, with u = code - zero or table[code], so dL/dchange of a group is the sum of
    dL/dW * (W0 - offset) over the group, W0 being the stored weight.
    """

    @staticmethod
    def forward(ctx: Any, change: Tensor, layer: ScaledLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer = layer
        codes = layer.codes()
        return replace(codes, scale=codes.scale.float() * (1 + change)).weight().to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        codes = ctx.layer.codes()
        groups = codes.g_idx.long()  # (inputs,)
        unscaled = codes.weight() if codes.offset is None else replace(codes, offset=None).weight()
        products = unscaled.mul_(gradients[0].float())  # (outputs, inputs)
        sums = products.new_zeros(codes.scale.shape).index_add_(1, groups, products)  # (outputs, groups)
        return sums, None, None


@contextmanager
def scaled_layers(network: nn.Module) -> Iterator[dict[str, ScaledLinear]]:
    """Inside, each packed layer whose grid has scales that may change is a ScaledLinear; yields these by name."""
    found: dict[str, ScaledLinear] = {}
    before: dict[str, QuantLinear] = {}
    for name, layer in list(network.named_modules()):
        if isinstance(layer, QuantLinear) and formats.FORMATS[layer.scheme.format].grid(layer.scheme).tunes_scales:
            before[name], found[name] = layer, ScaledLinear(layer)
            network.set_submodule(name, found[name])
    try:
        yield found
    finally:
        for name, layer in before.items():
            network.set_submodule(name, layer)
