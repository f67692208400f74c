"""How one layer is quantized."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gptq import formats
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format
from gptq.formats.scheme import Scheme
from gptq.solver import Grid


@dataclass(frozen=True)
class LayerPlan:
    """How one linear layer is quantized, after overrides."""

    name: str  # in the model
    stored: str  # the layer's name in the quantized checkpoint
    source: str  # name of the weight in the source checkpoint; another layer's if tied, `stored`.weight if a slice
    outputs: int
    inputs: int
    bits: int
    group_size: int  # columns per group, at most the number of inputs
    sym: bool
    transposed: bool = False  # the weight is stored as (inputs, outputs): a Conv1D of transformers
    format: Format = "gptq"
    scattered: bool = False  # groups are not contiguous columns
    scale_dtype: torch.dtype = formats.SCALE_DTYPE
    added_to: str = ""  # the module of the block to whose input the outputs are added; empty if none is known

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size, self.sym, self.format, self.scattered)

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return {**vars(self), "scale_dtype": str(self.scale_dtype).removeprefix("torch.")}

    def stored_as(self, chosen: Format) -> "LayerPlan":
        """Return the plan with another format, and the group size and symmetry that this has."""
        scheme = formats.FORMATS[chosen].adapt(replace(self, format=chosen).scheme)
        return replace(self, format=chosen, group_size=scheme.group_size, sym=scheme.sym)

    @property
    def replaces_source(self) -> bool:
        """Whether the result has the packed layer in place of the source's weight; not for an untied head."""
        return self.source == f"{self.stored}.weight"

    @property
    def layout(self) -> dict[str, TensorInfo]:
        """Dtype and shape of the layer's stored tensors, by key."""
        return formats.layout(self.scheme, self.outputs, self.inputs, self.scale_dtype)

    @property
    def grid(self) -> Grid:
        """What the layer's weights are rounded to."""
        return formats.FORMATS[self.format].grid(self.scheme, self.scale_dtype)


def drifts_by_output(fused: Sequence[LayerPlan]) -> bool:
    """Whether the drift of layers that engines fuse is one of their outputs (see `solver.error_propagation`).

    It is for a layer by itself that is added to the residual stream, or has fewer outputs than inputs.
    """
    return len(fused) == 1 and (bool(fused[0].added_to) or fused[0].outputs < fused[0].inputs)


def passes_at_once(fused: Sequence[LayerPlan]) -> bool:
    """Whether windows of the original stream pass layers that engines fuse as soon as their inputs are gathered.

    They do where no other layer can share the inputs, and the outputs, which then wait, are not wider.
    """
    return len(fused) == 1 and fused[0].outputs <= fused[0].inputs
