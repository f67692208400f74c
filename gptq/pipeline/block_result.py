"""BlockResult: all that quantizing one block yields, and its entry in the journal."""

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gptq.output.results import BlockError, Coverage, LayerResult


class BlockEntry(BaseModel):
    """What the journal says of a block; see `BlockResult`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    tensors: dict[str, str]
    tuned: dict[str, str]
    layers: list[LayerResult]
    weights: dict[str, str]
    spreads: dict[str, dict[str, Any]]
    errors: list[BlockError]
    coverage: list[Coverage]
    notes: list[str]


@dataclass(frozen=True)
class BlockResult:
    """Everything that quantizing a block yields. Tensors go to the output shards, the rest to the journal.

    Unless said otherwise, the key of a mapping is a layer's name in the model. Of several processes, each has the
    checksums, histograms and tensors of the layers that it packs, until `BlockStore.commit` brings them together.
    """

    name: str
    layers: tuple[LayerResult, ...]
    weight_checksums: Mapping[str, str]  # SHA-256 of each dequantized weight
    histograms: Mapping[str, Mapping[str, Any]]  # histograms of weights and of codes
    tuned: Mapping[str, str] = field(
        default_factory=dict
    )  # name of a tuned parameter in the model -> in the checkpoint
    errors: tuple[BlockError, ...] = ()  # before and after tuning
    coverage: tuple[Coverage, ...] = ()  # one for each list of experts
    notes: tuple[str, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the tensors on disk, by stored name
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # tensors not yet on disk, by stored name

    def mark_written(self, checksums: Mapping[str, str]) -> "BlockResult":
        """Return the result without its tensors, once they are on disk with these SHA-256."""
        return replace(self, checksums=dict(checksums), tensors={})

    def is_whole(self, layers: Set[str], tensors: Set[str]) -> bool:
        """Whether the result, once it is written, is about these layers, and tells of each of these tensors."""
        about = ({one.name for one in self.layers}, self.weight_checksums.keys(), self.histograms.keys())
        return (
            bool(layers)
            and all(names == layers for names in about)
            and self.checksums.keys() >= (tensors | {*self.tuned.values()})
        )

    def to_entry(self) -> dict[str, Any]:
        """Return the journal's entry, as values that JSON can hold."""
        return {
            "name": self.name,
            "tensors": dict(self.checksums),
            "tuned": dict(self.tuned),
            "layers": [asdict(layer) for layer in self.layers],
            "weights": dict(self.weight_checksums),
            "spreads": {name: dict(histogram) for name, histogram in self.histograms.items()},
            "errors": [asdict(error) for error in self.errors],
            "coverage": [asdict(seen) for seen in self.coverage],
            "notes": list(self.notes),
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "BlockResult":
        """Read what `to_entry` returned, a `BlockEntry`."""
        read = BlockEntry.model_validate(entry)
        return cls(
            name=read.name,
            layers=tuple(read.layers),
            weight_checksums=read.weights,
            histograms=read.spreads,
            tuned=read.tuned,
            errors=tuple(read.errors),
            coverage=tuple(read.coverage),
            notes=tuple(read.notes),
            checksums=read.tensors,
        )
