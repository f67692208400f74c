"""ScaledLinear, a packed layer whose scales and offsets gradients may change while its codes stay."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gptq import formats
from gptq.inference.quant_linear import QuantLinear, round_to_int8
from gptq.solver import Grid
from gptq.solver.codes import Codes


class ScaledLinear(nn.Module):
    """y = x W^T + bias, W the weight of a packed layer with the scale s of each group changed to s (1 + `change`).

    A real-valued offset o, where the format has one, changes to o + s `shift`. Only the packed layer, `change` and
    `shift` (outputs, groups) are held; W is made in each forward, whose product keeps it for the backward.
    """

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that its buffers are not this module's
        scale = self.codes().scale
        self.grid: Grid = formats.FORMATS[layer.scheme.format].grid(layer.scheme, scale.dtype)
        self.change = nn.Parameter(torch.zeros(scale.shape, dtype=torch.float32, device=scale.device))
        self.shift = nn.Parameter(torch.zeros_like(self.change)) if self.grid.tunes_offsets else None
        self.out_features, self.in_features = layer.out_features, layer.in_features

    def codes(self) -> Codes:
        """Return the packed layer's codes and scales, as they are stored."""
        layer = self._layer[0]
        return formats.decode(layer.packed(), layer.scheme)

    @property
    def weight(self) -> Tensor:
        """Return W (outputs, inputs) in float32; gradients reach `change` and `shift`."""
        return self.weight_in(torch.float32)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return W (outputs, inputs) in `dtype`; gradients reach `change` and `shift`."""
        made: Tensor = _ScaledWeight.apply(self.change, self.shift, self, dtype)
        return made

    def forward(self, x: Tensor) -> Tensor:
        layer = self._layer[0]
        bias = layer._buffers["bias"]
        if layer.rounds_activations:
            x = x + (round_to_int8(x).to(x.dtype) - x).detach()  # rounding has gradient 1
        return nn.functional.linear(x, self.weight_in(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.no_grad()
    def round(self) -> Codes | None:
        """Round scales and offsets to what a file holds, and `change` and `shift` with them; return the codes.

        If a scale no longer fits the file, nothing changes, and there are no codes to return.
        """
        stored = self.codes()
        found = _changed(stored, self.change, self.shift)
        if not bool(self.grid.fits(found.scale).all()):
            self._set(stored, stored)
            return None
        scale = self.grid.round_scales(found.scale)
        rounded = replace(found, scale=scale.where(found.scale != 0, 0))  # only files of other tools have such scales
        if found.offset is not None and self.shift is not None:
            rounded = replace(rounded, offset=self.grid.round_offsets(found.offset))
        self._set(rounded, stored)
        return rounded

    def _set(self, codes: Codes, stored: Codes) -> None:
        """Set `change` and `shift` to what makes `codes` of the stored ones; a scale of 0 stays one."""
        scale = stored.scale.float()
        divisor = scale.where(scale != 0, 1)
        self.change.copy_((codes.scale.float() / divisor - 1).where(scale != 0, 0))
        if self.shift is not None and codes.offset is not None and stored.offset is not None:
            self.shift.copy_((codes.offset.float() - stored.offset.float()) / divisor)


def _changed(codes: Codes, change: Tensor, shift: Tensor | None) -> Codes:
    """Codes with scales s (1 + change) and offsets o + s shift, in float32."""
    scale = codes.scale.float()
    changed = replace(codes, scale=scale * (1 + change))
    if shift is None or codes.offset is None:
        return changed
    return replace(changed, offset=codes.offset.float() + scale * shift)


class _ScaledWeight(torch.autograd.Function):
    """The weight as a function of the relative changes of its scales and offsets.

    W = s (1 + change) u + o + s shift, with u = code - zero or table[code]. With G = dL/dW, dL/dchange of a group is
    the sum of G s u over the group, s u = (W - o - s shift) / (1 + change), and dL/dshift is s times the sum of G.
    """

    @staticmethod
    def forward(ctx: Any, change: Tensor, shift: Tensor | None, layer: ScaledLinear, dtype: torch.dtype) -> Tensor:
        codes = _changed(layer.codes(), change, shift)
        W = codes.weight().to(dtype)  # (outputs, inputs)
        ctx.save_for_backward(W, change)
        ctx.codes = replace(codes, codes=codes.codes.new_empty(0, codes.codes.shape[1]))  # without the largest part
        return W

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (W, change), codes = ctx.saved_tensors, ctx.codes  # (outputs, inputs), (outputs, groups)
        G = codes.by_group(gradients[0].float())
        of_change = codes.group_sums(G * codes.by_group(W))
        of_shift = None
        if codes.offset is not None:
            sums = codes.group_sums(G)  # (outputs, groups)
            of_change -= codes.offset * sums
            of_shift = sums * codes.scale / (1 + change) if ctx.needs_input_grad[1] else None
        return of_change / (1 + change), of_shift, None, None


@contextmanager
def scaled_layers(network: nn.Module) -> Iterator[dict[str, ScaledLinear]]:
    """Inside, each packed layer whose grid has scales that may change is a ScaledLinear; yields these by name."""
    found: dict[str, ScaledLinear] = {}
    before: dict[str, QuantLinear] = {}
    for name, layer in list(network.named_modules()):
        if isinstance(layer, QuantLinear) and (scaled := ScaledLinear(layer)).grid.tunes_scales:
            before[name], found[name] = layer, scaled
            network.set_submodule(name, scaled)
    try:
        yield found
    finally:
        for name, layer in before.items():
            network.set_submodule(name, layer)
