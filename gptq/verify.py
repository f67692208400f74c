"""What a quantized checkpoint holds, and whether it is still what was written."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptq import formats
from gptq.checkpoint import Source, sha256, sha256_file
from gptq.errors import InputError
from gptq.linear import packed_layers, read_packed, read_quantization
from gptq.record import RECORD, read_record


@dataclass(frozen=True)
class LayerContent:
    """A quantized layer as it lies on disk; `error` and `rtn_error` are those recorded when it was written."""

    name: str
    bits: int
    group_size: int
    outputs: int
    inputs: int
    ordered_groups: bool  # every group is a run of neighbouring columns, so readers may ignore g_idx
    nbytes: int
    error: float | None
    rtn_error: float | None


@dataclass(frozen=True)
class Content:
    """What `inspect` finds; sizes in bytes."""

    bits_per_weight: float
    quantized_bytes: int
    other_bytes: int
    layers: list[LayerContent]
    other_tensors: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verification:
    """What `verify` checked, and each difference as a sentence that names the layer or file."""

    layers: int
    tensors: int
    files: int
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


def inspect(folder: str | Path) -> Content:
    """Read a quantized checkpoint layer by layer.

    Raises:
        InputError: it is not one, or its tensors do not fit each other.
    """
    folder = Path(folder)
    source, (bits, group_size) = _open(folder)
    errors: dict[str, dict[str, Any]] = {}
    if (folder / RECORD).is_file():
        errors = {layer["stored"]: layer for layer in read_record(folder)["layers"]}
    layers = [
        _layer_content(source, name, bits, errors.get(name, {})) for name in packed_layers(source, bits, group_size)
    ]
    packed = {f"{layer.name}.{suffix}" for layer in layers for suffix in formats.SUFFIXES}
    quantized = sum(layer.nbytes for layer in layers)
    return Content(
        bits_per_weight=8 * quantized / sum(layer.outputs * layer.inputs for layer in layers),
        quantized_bytes=quantized,
        other_bytes=source.nbytes - quantized,
        layers=layers,
        other_tensors={name: info.nbytes for name, info in source.tensors.items() if name not in packed},
    )


def _open(folder: Path) -> tuple[Source, tuple[int, int]]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    try:  # not through transformers, which would need the code of models that bring their own
        quantization = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} could not be read: {error}") from error
    if not isinstance(quantization, dict):
        raise InputError(f"{folder} is not a quantized checkpoint: its config.json has no quantization_config")
    return Source(folder), read_quantization(folder, quantization)


def _layer_content(source: Source, name: str, bits: int, recorded: dict[str, Any]) -> LayerContent:
    infos = {suffix: source.tensors[f"{name}.{suffix}"] for suffix in formats.SUFFIXES}
    outputs, inputs = infos["scales"].shape[1], infos["g_idx"].shape[0]
    g_idx = read_packed(source, name, ("g_idx",))["g_idx"]
    group_size = int(torch.bincount(g_idx).max())
    return LayerContent(
        name=name,
        bits=bits,
        group_size=group_size,
        outputs=outputs,
        inputs=inputs,
        ordered_groups=bool((g_idx == torch.arange(inputs) // group_size).all()),
        nbytes=sum(info.nbytes for info in infos.values()),
        error=recorded.get("error"),
        rtn_error=recorded.get("rtn_error"),
    )


def verify(folder: str | Path) -> Verification:
    """Reopen a checkpoint and compare it with what was recorded when it was written.

    Every tensor's and file's checksum, and for every quantized layer the checksum of the float32 weight that unpacking
    gives, against that of the weight which the solver chose and the forward passes went on with.

    Raises:
        InputError: the checkpoint cannot be opened, or has no record.
    """
    folder = Path(folder)
    source, (bits, group_size) = _open(folder)
    record = read_record(folder)
    packed = packed_layers(source, bits, group_size)
    problems = [*_changed_files(folder, record["files"]), *_changed_tensors(source, record["tensors"])]
    problems += _changed_weights(source, bits, packed, record["layers"])
    return Verification(len(record["layers"]), len(record["tensors"]), len(record["files"]), problems)


def _changed_files(folder: Path, recorded: dict[str, str]) -> Iterator[str]:
    for name, expected in recorded.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif sha256_file(folder / name) != expected:
            yield f"{name} was changed after it was written"


def _changed_tensors(source: Source, recorded: dict[str, str]) -> Iterator[str]:
    for name in sorted(source.tensors.keys() | recorded.keys()):
        if name not in source.tensors:
            yield f"the tensor {name} is missing"
        elif name not in recorded:
            yield f"the tensor {name} was added"
        elif sha256(source.read_unchecked(name)) != recorded[name]:
            yield f"the tensor {name} was changed after it was written"


def _changed_weights(source: Source, bits: int, packed: list[str], recorded: list[dict[str, Any]]) -> Iterator[str]:
    for name in sorted(set(packed) ^ {layer["stored"] for layer in recorded}):
        yield f"{name} is {'packed but not recorded' if name in packed else 'recorded but not packed'}"
    for layer in recorded:
        stored = layer["stored"]
        if stored not in packed:
            continue  # reported above
        try:
            weight = formats.dequantize(**read_packed(source, stored), bits=bits)
        except (InputError, ValueError) as error:
            yield f"{stored} cannot be unpacked: {error}"
            continue
        if sha256(weight) != layer["weight_sha256"]:
            yield f"{stored} does not unpack to the weight that was chosen for it"
