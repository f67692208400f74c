"""How a layer's weight is stored (`Scheme`), and how all linear layers of a model are stored (`Linears`)."""

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
    by_gptqmodel: bool = False  # GPTQ v1 with 1 subtracted as GPTQModel does, which keeps a zero point of 0

    def columns(self, inputs: int) -> int:
        """Return the columns per group of a layer with this many inputs."""
        return inputs if self.group_size == -1 else min(self.group_size, inputs)

    def groups(self, inputs: int) -> int:
        """Return the groups per row of a layer with this many inputs; the last group may be short."""
        return -(-inputs // self.columns(inputs))


Layers = Mapping[str, tuple[Scheme, int]]  # scheme and inputs of quantized layers, by their names in the checkpoint


@dataclass(frozen=True)
class Linears:
    """A model's linear layers, by their names in the checkpoint."""

    layers: Layers  # the quantized layers
    kept: Collection[str]  # layers inside the blocks that are not quantized
    others: Collection[str]  # all other linear layers of the model


def contiguous_groups(scheme: Scheme, inputs: int) -> Tensor:
    """Return the g_idx (inputs,) int32 of groups that are runs of adjacent columns, in order."""
    return torch.arange(inputs, dtype=torch.int32) // scheme.columns(inputs)


def normalized_scheme(scheme: Scheme, inputs: int) -> Scheme:
    """Return the scheme with group size -1 if a group is a whole row, so that equal storage means equal schemes."""
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
