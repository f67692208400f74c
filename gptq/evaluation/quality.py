"""Read and write quality.json, which keeps a model's measurements (perplexity, comparison) in its folder."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gptq.checkpoint.json_objects import Count, IfPresent, JsonObject, read_object
from gptq.checkpoint.small_files import exclusive, write_file
from gptq.checkpoint.untrusted import read_json
from gptq.output.results import QUALITY

Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]


class Measurement(JsonObject):
    """A perplexity on a text, or a comparison with the original; see `evaluate.Comparison` for the numbers."""

    data: str
    original: str | None = None
    perplexity: Number
    tokens: IfPresent[Count] = None
    windows: IfPresent[Count] = None
    seq_len: IfPresent[Count] = None
    original_perplexity: IfPresent[Number] = None
    gap: IfPresent[Number] = None
    kl: IfPresent[Number] = None
    top1_agreement: IfPresent[Number] = None
    intervals: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)]] | None = None

    def number(self, name: str) -> float | None:
        """Return the figure called `name` (perplexity, gap, kl ...); None if it was not measured."""
        found: float | None = getattr(self, name)
        return found

    @property
    def setting(self) -> tuple[Any, ...]:
        """Return the setting of a measurement: the text, its windows, and the original model."""
        return self.data, self.original, self.seq_len, self.windows


class _QualityFile(JsonObject):
    measurements: list[Measurement]


def read_measurements(folder: Path) -> list[Measurement]:
    """Read the measurements in the folder's quality.json; an empty list if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / QUALITY
    if not file.is_file():
        return []
    return read_object(_QualityFile, read_json(file), f"{file}, to be deleted,").measurements


def add_measurement(folder: Path, measured: Measurement) -> None:
    """Write a measurement into the folder's quality.json; it replaces an earlier measurement of the same setting."""
    with exclusive(folder):
        kept = [earlier for earlier in read_measurements(folder) if earlier.setting != measured.setting]
        content = {"measurements": [one.to_dict() for one in (*kept, measured)]}
        write_file(folder / QUALITY, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
