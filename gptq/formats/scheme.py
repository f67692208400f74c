"""How a layer's weight is stored: its scheme, and what a model's linear layers are stored as together."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq.config import Format


@dataclass(frozen=True)
class Scheme:
    """How one layer's weight is stored."""

    bits: int
    group_size: int  # -1: one group per row
    sym: bool
    format: Format = "gptq"
    scattered: bool = False  # groups are not runs of columns, so that g_idx has to be used
    by_gptqmodel: bool = False  # v1 with GPTQModel's own way of taking 1 off, which keeps a zero point of 0

    def columns(self, inputs: int) -> int:
        """Columns per group of a layer with so many inputs."""
        return inputs if self.group_size == -1 else min(self.group_size, inputs)

    def groups(self, inputs: int) -> int:
        """Groups per row of a layer with so many inputs; the last one may be short."""
        return -(-inputs // self.columns(inputs))


Layers = Mapping[str, tuple[Scheme, int]]  # scheme and inputs of quantized layers, by their names in the checkpoint


@dataclass(frozen=True)
class Linears:
    """A model's linear layers by their names in the checkpoint: the quantized ones, those of the same blocks that are
    kept as they are, and all others of the model."""

    layers: Layers
    kept: Collection[str]
    others: Collection[str]


def contiguous_groups(scheme: Scheme, inputs: int) -> Tensor:
    """Return the g_idx (inputs,) int32 of groups that are runs of adjacent columns, in order."""
    return torch.arange(inputs, dtype=torch.int32) // scheme.columns(inputs)


def normalized_scheme(scheme: Scheme, inputs: int) -> Scheme:
    """Return the scheme with group size -1 if a group is a whole row: schemes that store a layer alike are then equal."""
    return scheme if scheme.columns(inputs) < inputs else replace(scheme, group_size=-1, scattered=False)


def names_by_scheme(layers: Layers) -> dict[Scheme, list[str]]:
    """Group the names of layers by their normalized scheme: layers of one group are stored alike."""
    found: dict[Scheme, list[str]] = {}
    for name, (scheme, inputs) in layers.items():
        found.setdefault(normalized_scheme(scheme, inputs), []).append(name)
    return found


def most_common_scheme(layers: Layers) -> Scheme:
    """Return the normalized scheme of most layers; the first one if several are equally common."""
    names = names_by_scheme(layers)
    return max(names, key=lambda scheme: len(names[scheme]))
