"""BlockResult: all that quantizing one block yields, and its entry in the journal."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from gptq.output.results import BlockError, Coverage, LayerResult


@dataclass(frozen=True)
class BlockResult:
    """What quantizing a block yields. The journal holds all of it but the tensors, which are in the output shards.

    Maps without another key are by the layers' names in the model.
    """

    name: str
    layers: tuple[LayerResult, ...]
    weight_checksums: Mapping[str, str]  # SHA-256 of each dequantized weight
    histograms: Mapping[str, Mapping[str, Any]]  # of weights and codes
    tuned: Mapping[str, str] = field(default_factory=dict)  # tuned parameter in the model -> tensor in the checkpoint
    errors: tuple[BlockError, ...] = ()  # around tuning
    coverage: tuple[Coverage, ...] = ()  # of each list of experts
    notes: tuple[str, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)  # SHA-256 by stored name, of what is on disk
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # by stored name, until they are on disk

    def on_disk(self, checksums: Mapping[str, str]) -> "BlockResult":
        """The same, its tensors written; `checksums` holds at least theirs."""
        return replace(self, checksums={name: checksums[name] for name in self.tensors}, tensors={})

    def to_entry(self) -> dict[str, Any]:
        """The journal's entry, JSON's values."""
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
        """The inverse of `to_entry`."""
        return cls(
            name=entry["name"],
            layers=tuple(LayerResult(**layer) for layer in entry["layers"]),
            weight_checksums=entry["weights"],
            histograms=entry["spreads"],
            tuned=entry["tuned"],
            errors=tuple(BlockError(**error) for error in entry["errors"]),
            coverage=tuple(Coverage(**seen) for seen in entry["coverage"]),
            notes=tuple(entry["notes"]),
            checksums=entry["tensors"],
        )
