"""Show the tensors that transformers divides when it loads a checkpoint (a fused q/k/v, say) as its parts.

transformers' table has conversions of one stored tensor into several of the model. Each piece is shown under its name
in the model, so that a linear layer has a weight of its own. The stored tensor is read and converted for each of them.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.checkpoint.derived import Derived, DerivedSource
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.models.stored_forms import Division
from gptq.models.tensor_names import Names


@dataclass(frozen=True)
class Piece(Derived):
    """One of the tensors that transformers makes of the stored tensor `parts[0]`, called `name` in the model."""

    name: str
    division: Division
    network: PreTrainedModel

    def compute(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        whole = stored.read(self.parts[0])
        yield rows, divide(self.division, whole, self.network)[self.name][rows.start : rows.stop]


class DividedSource(DerivedSource):
    """A checkpoint that shows pieces of fused tensors, and knows the tensors that they are pieces of."""

    def undivided(self, name: str) -> tuple[str, TensorInfo]:
        own = self._derived.get(name)
        return (name, self.tensors[name]) if own is None else (own.parts[0], self._stored.tensors[own.parts[0]])


def show_divided(source: Source, network: PreTrainedModel, names: Names) -> Source:
    """Return the checkpoint with the pieces of fused tensors in place of these, where the model has all the pieces."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    pieces: dict[str, Derived] = {}
    for stored, division in names.divisions.items():
        made = _shapes_of_pieces(division, source.tensors[stored], network)
        if made and all(expected.get(name) == shape for name, shape in made.items()):
            pieces |= {name: Piece((stored,), shape, name, division, network) for name, shape in made.items()}
    return DividedSource(source, pieces) if pieces else source


def divide(division: Division, whole: Tensor, network: PreTrainedModel) -> dict[str, Tensor]:
    """Return the pieces of a fused tensor by their names in the model."""
    converter = copy.deepcopy(division.converter)
    converter.add_tensor(division.first, division.stored, division.pattern, partial(_same, whole))
    made: Mapping[str, Any] = converter.convert(division.first, model=network, config=network.config)
    return {name: piece[0] if isinstance(piece, list) else piece for name, piece in made.items()}


def _same(whole: Tensor) -> Tensor:
    return whole


def _shapes_of_pieces(division: Division, info: TensorInfo, network: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the pieces of a fused tensor; empty if transformers cannot divide it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = divide(division, torch.empty(info.shape, dtype=info.dtype, device="meta"), network)
    except Exception:  # any type, depending on the operation; the missing pieces are named later
        return {}
    return {name: tuple(piece.shape) for name, piece in made.items()}
