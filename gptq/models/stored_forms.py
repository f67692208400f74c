"""How a checkpoint may store a tensor of the model: divided, in parts, or with those of other experts."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gptq.models.experts import ExpertForm


@dataclass(frozen=True)
class Division:
    """A stored tensor that transformers divides into several of the model (see `models.divided_tensors`)."""

    stored: str  # name in the checkpoint
    first: str  # name in the model of the first piece
    pattern: str  # of the converter, that matches the stored name
    converter: Any  # transformers' WeightConverter


@dataclass(frozen=True)
class SplitTensor:
    """A tensor of the model that the checkpoint stores in parts, one per expert, say; transformers joins the parts."""

    name: str  # in the model
    parts: tuple[tuple[str, str], ...]  # for each part: (converter pattern that matches, name in the checkpoint)
    converter: Any  # transformers' WeightConverter
    config: PreTrainedConfig  # the model's configuration
    shape: tuple[int, ...] | None  # in the model; some conversions depend on it

    def assemble(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the whole tensor; `read` returns a part by its name in the checkpoint."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            converter.add_tensor(self.name, stored, pattern, partial(read, stored))
        (made,) = converter.convert(self.name, model=_ModelOfOne(self.shape), config=self.config).values()
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole


@dataclass(frozen=True)
class _ModelOfOne:
    """Stands for the model in a conversion that looks up the shape of its result."""

    shape: tuple[int, ...] | None

    def get_parameter(self, name: str) -> Tensor:
        if self.shape is None:
            raise AttributeError(name)
        return torch.empty(self.shape, device="meta")


@dataclass(frozen=True)
class FusedTensor:
    """A tensor of all experts of a layer, as the checkpoint stores it: whole, or in a way that `split` undoes."""

    name: str  # in transformers' model
    shape: tuple[int, ...]  # there; the first dimension is the expert
    stored: str
    split: SplitTensor | None

    @property
    def stored_names(self) -> tuple[str, ...]:
        return tuple(stored for _, stored in self.split.parts) if self.split else (self.stored,)

    def read_expert(self, number: int, read: Callable[[str, int], Tensor]) -> Tensor:
        """Return one expert's slice; `read` returns an entry of a stored tensor."""
        if self.split is None:
            return read(self.stored, number)
        one = replace(self.split, shape=(1, *self.shape[1:]))
        return one.assemble(lambda stored: read(stored, number)[None])[0]


@dataclass(frozen=True)
class ExpertSlice:
    """A parameter of one expert, which the checkpoint stores in a tensor with those of the other experts."""

    stored: str  # the name that it gets in a checkpoint of its own
    fused: FusedTensor
    number: int
    part: str  # the linear layer: gate_proj, up_proj or down_proj
    key: str  # weight or bias
    form: ExpertForm

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter as its linear layer holds it."""
        whole = torch.empty(self.fused.shape[1:], device="meta")
        return tuple(self.form.take(self.part, self.key, whole).shape)

    def read(self, read: Callable[[str, int], Tensor]) -> Tensor:
        """Return the parameter as its linear layer holds it; `read` returns an entry of a stored tensor."""
        return self.form.take(self.part, self.key, self.fused.read_expert(self.number, read))
