"""Read and write quantization_record.json: how each layer was quantized, and checksums of all written files.

The record holds no time and no path, so that the same run writes the same bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from gptq.checkpoint.json_objects import Count, IfPresent, JsonObject, Printable, read_object
from gptq.checkpoint.small_files import write_file
from gptq.checkpoint.untrusted import read_json
from gptq.config import FORMATS, Format
from gptq.errors import InputError, printable
from gptq.formats.quantization_config import quantization_of
from gptq.output.results import CARD, CODE_BINS, RECORD, WEIGHT_BINS, LayerResult
from gptq.planning.layer_plan import LayerPlan


def _require_path_inside(name: str) -> str:
    if name != PurePosixPath(name).as_posix() or name.startswith("/") or not {".", ".."}.isdisjoint(name.split("/")):
        raise ValueError("a path that leads out of the folder")
    return name


def _require_known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError("format")
    return name


Error = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Bytes = Annotated[float, Field(ge=0, le=2**60, allow_inf_nan=False)]
FileName = Annotated[Printable, AfterValidator(_require_path_inside)]


OF_THE_FILES = ("quantizer", "tensors", "layout", "headers", "files", "digest")  # fields of `WrittenRecord`


class LayerRecord(JsonObject):
    """How one layer was quantized; see `LayerResult`."""

    stored: Printable  # the layer's name in the checkpoint
    name: IfPresent[Printable] = None  # the layer's name in the model
    bits: IfPresent[Annotated[int, Field(ge=1, le=8)]] = None
    group_size: IfPresent[Count] = None
    error: Error | None
    rtn_error: Error | None
    heldout_error: Error | None = None
    share: Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)] | None = None
    damp: Error | None = None
    tokens: Count | None = None
    weight_sha256: str
    outputs: IfPresent[Count] = None
    inputs: IfPresent[Count] = None
    weight_range: IfPresent[Error] = None
    weight_histogram: IfPresent[Annotated[list[Count], Field(max_length=WEIGHT_BINS)]] = None
    code_histogram: IfPresent[Annotated[list[Count], Field(max_length=CODE_BINS)]] = None


class SizesRecord(JsonObject):
    """Bytes of the quantized layers and of all safetensors files, before and after quantization."""

    __pydantic_extra__: dict[str, Annotated[int | float, Field(ge=0, le=2**60)]]
    bits_per_weight: Bytes
    quantized_bytes_before: Count
    quantized_bytes_after: Count
    file_bytes_before: Count
    file_bytes_after: Count
    calibration_tokens: IfPresent[Count] = None


class BlockRecord(JsonObject):
    """Error of a block's output before and after the block was tuned; see `BlockError`."""

    name: str
    solved: float
    tuned: float


class ExpertsRecord(JsonObject):
    """How many calibration tokens each of a layer's experts saw; see `Coverage`."""

    name: str
    all_tokens: Count
    tokens: list[Count]
    blended: list[Count]


class PerplexityRecord(JsonObject):
    """A perplexity that was measured later."""

    perplexity: Error
    data: str
    tokens: Count
    seq_len: Count


class PolishRecord(JsonObject):
    """What `polish` did; KL(original || quantized) in nats per token on held-out windows."""

    original: Printable
    calibration: str
    config: dict[str, Any]
    steps: Annotated[int, Field(ge=0)]
    kl_before: Error
    kl_after: Error


class OriginRecord(JsonObject):
    """What the file of another tool said of itself before it was converted."""

    format: Annotated[Format, AfterValidator(_require_known_format)]
    quantization_config: dict[str, Any]


class Record(JsonObject):
    """How a checkpoint was quantized; `config` holds `QuantConfig.to_dict`, or None if another tool did."""

    model: str | None = None
    config: dict[str, Any] | None
    calibration: str | None
    sizes: IfPresent[SizesRecord] = None
    layers: list[LayerRecord]
    blocks: IfPresent[list[BlockRecord]] = None
    experts: IfPresent[list[ExpertsRecord]] = None
    made_by: str | None = None
    origin: IfPresent[OriginRecord] = None
    polish: IfPresent[PolishRecord] = None
    perplexity: IfPresent[list[PerplexityRecord]] = None
    card_metadata: IfPresent[dict[str, str]] = None

    def without_perplexity(self) -> "Record":
        """Return the record for other numbers than those whose perplexity was measured."""
        return self._without(("perplexity",))

    def _without(self, keys: Collection[str]) -> "Record":
        return Record(**{key: value for key, value in self.to_dict().items() if key not in keys})

    @property
    def is_rounded(self) -> bool:
        """Whether the layers were rounded to nearest, without calibration."""
        return bool((self.config or {}).get("method") == "rtn")


class WrittenRecord(Record):
    """A record as it is stored in a folder, with the checksums of the other files and of the tensors."""

    quantizer: IfPresent[str] = None
    tensors: dict[Printable, str]
    layout: IfPresent[dict[Printable, Printable]] = None  # dtype and shape of each tensor; older records lack it
    headers: IfPresent[dict[FileName, str]] = None  # of what lies before the tensors in each file
    files: dict[FileName, str]
    digest: IfPresent[str] = None  # of all other fields, see `digest_of`; older records lack it

    def without_checksums(self) -> Record:
        """Return the record of how the checkpoint was quantized, without checksums of tensors and files."""
        return self._without(OF_THE_FILES)


def layer_records(
    plans: dict[str, LayerPlan],
    results: list[LayerResult],
    weight_checksums: dict[str, str],
    spreads: dict[str, dict[str, Any]],
) -> list[LayerRecord]:
    """Make the record of each layer."""
    records = []
    for result in results:
        plan = plans[result.name]
        values = {"stored": plan.stored, **asdict(result), "weight_sha256": weight_checksums[result.name]}
        del values["seconds"]
        values |= {"outputs": plan.outputs, "inputs": plan.inputs, **spreads[result.name]}
        records.append(LayerRecord(**values))
    return records


def model_name(model: str | Path) -> str:
    """Return the name of a model in the record: a Hub id, or the last part of a folder's path."""
    return printable(Path(model).resolve().name if Path(model).is_dir() else str(model))


def public_name(source: str) -> str:
    """Return a source of text as the record may show it: of a path on this machine only the last part."""
    return printable(Path(source).name if source.startswith(("/", ".", "~")) else source)


def read_record(folder: Path) -> WrittenRecord:
    """Read the record of a folder; raises InputError if there is none, or if it is damaged."""
    file = folder / RECORD
    if not os.path.lexists(file):
        raise InputError(f"{folder} has no {RECORD} to go by; another tool wrote it, or it is not quantized")
    record = read_object(WrittenRecord, read_json(file), str(file))
    if len({layer.stored for layer in record.layers}) < max(len(record.layers), 1):
        raise InputError(f"{file} is damaged: it has no layers, or two entries for one")
    return record


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record's values but for their digest, in an order that does not depend on the file's."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a folder's record, with the digest of `values`."""
    write_json(folder / RECORD, {**values, "digest": digest_of(values)})


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """Return what a file with this content holds."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\n[-\d,.\se]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # histograms on one line
    return text + "\n"


def mentions_record(folder: Path) -> bool:
    """Whether a folder's files say that it had a record: its model card, or the `meta` of its quantization_config."""
    card, quantization = folder / CARD, quantization_of(folder) or {}
    mentioned = card.is_file() and RECORD in card.read_text(encoding="utf-8", errors="replace")
    meta = quantization.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, dict) else None
    return mentioned or (isinstance(makers, list) and any(str(maker).startswith("gptq:") for maker in makers))
