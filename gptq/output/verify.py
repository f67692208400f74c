"""List what a quantized checkpoint holds, and compare it with what was recorded when it was written."""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from gptq import formats
from gptq.checkpoint.assembled import open_source
from gptq.checkpoint.companions import ADAPTER, WEIGHTS
from gptq.checkpoint.reader import Source, headers_of, readable_tensors
from gptq.checkpoint.tensors import INDEX, sha256, sha256_file
from gptq.checkpoint.untrusted import check_files, check_folder, check_path, read_json
from gptq.compute.torch_state import fresh_torch_state
from gptq.config import Format
from gptq.errors import InputError
from gptq.formats.compatibility import Engine, engines
from gptq.formats.name_rules import Quantization
from gptq.formats.packed_layers import PackedLayer, is_variant, match_layers, packed_layers, read_packed
from gptq.formats.quantization_config import quantization_of, read_quantization
from gptq.models.build import OpenModel, open_model
from gptq.models.check_tensors import check_tensors
from gptq.output.files import add_perplexity, model_type_of
from gptq.output.record import (
    LayerRecord,
    PerplexityRecord,
    WrittenRecord,
    digest_of,
    json_text,
    mentions_record,
    read_record,
)
from gptq.output.results import QUALITY, RECORD, REPORT

MOST_FILES = 8  # that a note names
NO_RECORD = (
    f"{RECORD} is missing, though the folder says that gptq wrote it; save_pretrained drops it. There is nothing to "
    "compare the weights with"
)
CODE_NOT_RUN = (
    "the model has code of its own, which was not run, so that its tensors were not compared with what it describes; "
    "--trust-remote-code runs it"
)
NO_DIGEST = f"{RECORD} is an older one without a digest; its errors and counts of tokens are not checked"


@dataclass(frozen=True)
class LayerContent:
    """A quantized layer as it lies on disk; `error` and `rtn_error` are from the record."""

    name: str
    bits: int
    group_size: int
    sym: bool
    outputs: int
    inputs: int
    ordered_groups: bool  # every group is a run of neighbouring columns, so readers may ignore g_idx
    nbytes: int
    error: float | None
    rtn_error: float | None


@dataclass(frozen=True)
class Content:
    """Content of a quantized checkpoint; sizes in bytes."""

    format: Format
    bits_per_weight: float
    quantized_bytes: int
    other_bytes: int
    layers: list[LayerContent]
    other_tensors: dict[str, int]
    engines: list[Engine]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verification:
    """Counts of what `verify` checked, and a sentence for each difference, which names the layer or file.

    If there is no record, because another tool wrote the file, `recorded` is false. Then every tensor was read, every
    layer unpacked, and all of them compared with the model that config.json describes.

    `notes` say what was not looked into, and `checked`, for each engine that `inspect` promises, what was.
    """

    recorded: bool
    layers: int
    tensors: int
    files: int
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    checked: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


@fresh_torch_state()
def inspect(folder: str | Path) -> Content:
    """Read a quantized checkpoint layer by layer, whichever tool wrote it.

    Raises:
        InputError: the checkpoint is not quantized, or its tensors do not fit each other.
    """
    folder = Path(folder)
    source, quantization = _open_checkpoint(folder)
    recorded: dict[str, LayerRecord] = {}
    if (folder / RECORD).is_file():
        recorded = {layer.stored: layer for layer in read_record(folder).layers}
    packed = packed_layers(source, quantization)
    layers = [_describe_layer(source, name, layer, recorded.get(name)) for name, layer in packed.items()]
    of_layers = {f"{name}.{suffix}" for name, layer in packed.items() for suffix in layer.suffixes}
    quantized = sum(layer.nbytes for layer in layers)
    return Content(
        format=quantization.format,
        bits_per_weight=8 * quantized / sum(layer.outputs * layer.inputs for layer in layers),
        quantized_bytes=quantized,
        other_bytes=source.nbytes - quantized,
        layers=layers,
        other_tensors={name: info.nbytes for name, info in source.tensors.items() if name not in of_layers},
        engines=engines(
            {name: (layer.scheme, layer.inputs) for name, layer in packed.items()},
            model_type_of(folder),
            is_variant(quantization_of(folder) or {}, packed),
        ),
    )


def record_perplexity(folder: str | Path, measured: PerplexityRecord) -> None:
    """Write a measured perplexity into the record and the model card of a folder that this package wrote.

    Raises:
        InputError: the folder has no record.
    """
    folder = Path(folder)
    source, quantization = _open_checkpoint(folder)
    packed = packed_layers(source, quantization)
    described = {name: (layer.scheme, layer.inputs) for name, layer in packed.items()}
    add_perplexity(folder, measured, quantization.format, described)


def _open_checkpoint(folder: Path) -> tuple[Source, Quantization]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    check_folder(folder)
    quantization = quantization_of(folder)  # not through transformers, which would need the code of some models
    if quantization is None:
        raise InputError(f"{folder} is not a quantized checkpoint: its config.json has no quantization_config")
    return open_source(folder), read_quantization(folder / "config.json", quantization)


def _describe_layer(source: Source, name: str, layer: PackedLayer, recorded: LayerRecord | None) -> LayerContent:
    scheme = layer.scheme
    g_idx = formats.decode_groups(read_packed(source, name, layer, with_codes=False), scheme, layer.inputs)
    group_size = int(torch.bincount(g_idx).max())
    return LayerContent(
        name=name,
        bits=scheme.bits,
        group_size=group_size,
        sym=scheme.sym,
        outputs=layer.outputs,
        inputs=layer.inputs,
        ordered_groups=bool((g_idx == torch.arange(layer.inputs) // group_size).all()),
        nbytes=layer.nbytes,
        error=recorded.error if recorded else None,
        rtn_error=recorded.rtn_error if recorded else None,
    )


@fresh_torch_state()
def verify(folder: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Reopen a checkpoint and compare it with what was recorded when it was written.

    Compares the checksum of every tensor and file. For every quantized layer, the weight is unpacked to float32, and
    its checksum is compared with that of the weight that the solver chose and that the forward passes continued with.

    This finds damage, not forgery: whoever changes a file on purpose can also change the record.

    Args:
        trust_remote_code: run the checkpoint's own code, if it has some and no record; its model is then compared too.
    Raises:
        InputError: the record cannot be read, or there is none and the checkpoint cannot be opened; or the path is not
            UTF-8.
    """
    folder = Path(folder)
    check_path(folder)
    if not os.path.lexists(folder / RECORD):
        source, quantization = _open_checkpoint(folder)
        packed = packed_layers(source, quantization)
        notes = [NO_RECORD] if mentions_record(folder) else []
        problems, against = [*_find_unreadable(source, packed)], ""
        try:
            opened = open_model(open_source(folder), trust_remote_code)
        except InputError as error:
            values = read_json(folder / "config.json")
            is_own = not trust_remote_code and values.get("auto_map") and values.get("model_type") not in CONFIG_MAPPING
            (notes if is_own else problems).append(CODE_NOT_RUN if is_own else str(error))
        else:
            problems += _find_misfits(opened, packed)
            against = "; every tensor compared with the model that config.json describes"
        notes += _note_on_others(folder, source, None)
        checked = _checks_by_engine(folder, packed, against)
        return Verification(False, len(packed), len(source.tensors), 0, problems, notes, checked)
    check_folder(folder)
    record = read_record(folder)
    check_files(folder, (name for name in record.files if (folder / name).exists()))
    problems = [*_find_changed_record(folder, record), *_find_changed_files(folder, record.files)]
    problems += _find_changed_schemes(folder, record.layers)
    notes, checked = [] if record.digest else [NO_DIGEST], {}
    try:
        source, quantization = _open_checkpoint(folder)
        packed = packed_layers(source, quantization)
    except InputError as error:
        problems += [str(error), *_find_lost(folder, record)]
    else:
        problems += [*(changed := [*_find_changed_tensors(source, record)])]
        problems += [] if changed else [*_find_changed_headers(source, record.headers or {})]
        problems += _find_changed_weights(source, packed, record.layers)
        problems += [] if changed else [*_find_wrong_numbers(source, packed, record)]
        notes += _note_on_others(folder, source, record.files)
        checked = _checks_by_engine(folder, packed, "; every tensor compared with the record")
    return Verification(True, len(record.layers), len(record.tensors), len(record.files), problems, notes, checked)


def _checks_by_engine(folder: Path, packed: dict[str, PackedLayer], against: str) -> dict[str, str]:
    """Return, for each engine that takes the file, what is checked of what it reads."""
    own, *others = engines(
        {name: (layer.scheme, layer.inputs) for name, layer in packed.items()},
        model_type_of(folder),
        is_variant(quantization_of(folder) or {}, packed),
    )
    rule = "names, bits, groups and shapes are such as its source reads; it was not run"
    return {own.name: f"every layer unpacked{against}", **{engine.name: rule for engine in others if engine.takes}}


def _note_on_others(folder: Path, source: Source, recorded: Collection[str] | None) -> list[str]:
    """Return a note on files of the folder that nothing here is about: of code and weights, if there is no record."""
    known = {*(recorded or ()), *(file.name for file in source.files), RECORD, QUALITY, INDEX}
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    others = [
        file.as_posix()
        for file in files
        if file.as_posix() not in known
        and file.parts[0] != REPORT
        and not any(part.startswith(".") for part in file.parts)
        and (recorded is not None or file.name == ADAPTER or file.name.lower().endswith((".py", *WEIGHTS)))
    ]
    if not others:
        return []
    more = f" and {len(others) - MOST_FILES} more" if len(others) > MOST_FILES else ""
    adapter = f"; transformers adds the adapter of {ADAPTER} to the model" if ADAPTER in others else ""
    return [f"not looked into, because no record is about it: {', '.join(others[:MOST_FILES])}{more}{adapter}"]


def _find_misfits(opened: OpenModel, packed: dict[str, PackedLayer]) -> Iterator[str]:
    """Find tensors that do not fit the model that config.json describes."""
    source, network, names = opened.source, opened.network, opened.names
    known = {f"{name}.{suffix}" for name, layer in packed.items() for suffix in (*layer.suffixes, "bias")}
    try:
        stored = match_layers(network, names, source, packed)
        for extra in check_tensors(network, names, source.tensors, stored):
            if extra not in known:
                yield f"the tensor {extra} belongs to nothing in the model that config.json describes"
    except InputError as error:
        yield str(error)


def _find_unreadable(source: Source, packed: dict[str, PackedLayer]) -> Iterator[str]:
    """Find layers and tensors that cannot be read, in a checkpoint without a record."""
    for name, layer in packed.items():
        yield from _catch_complaint(partial(_decode, source, name, layer))
    of_layers = {f"{name}.{suffix}" for name, layer in packed.items() for suffix in layer.suffixes}
    for name in sorted(source.tensors.keys() - of_layers):
        yield from _catch_complaint(partial(source.read, name))


def _decode(source: Source, name: str, layer: PackedLayer) -> formats.Codes:
    return formats.decode(read_packed(source, name, layer), layer.scheme)


def _catch_complaint(read: Callable[[], object]) -> Iterator[str]:
    """Call `read`; yield the message of its error if it fails."""
    try:
        read()
    except (InputError, ValueError) as error:
        yield str(error)


def _find_changed_record(folder: Path, record: WrittenRecord) -> Iterator[str]:
    if not record.digest:
        return
    content, stored = read_json(folder / RECORD), (folder / RECORD).read_bytes()
    if digest_of(content) != record.digest or stored != json_text(content).encode("utf-8", "backslashreplace"):
        yield f"{RECORD} was changed after it was written"


def _find_wrong_numbers(source: Source, packed: dict[str, PackedLayer], record: WrittenRecord) -> Iterator[str]:
    """Find numbers of the record that are not those of the files; errors, tokens and sizes before are not in these."""
    for one in record.layers:
        layer = packed.get(one.stored)
        if layer is None:
            continue  # reported already
        for name, said, found in (("outputs", one.outputs, layer.outputs), ("inputs", one.inputs, layer.inputs)):
            if said not in (None, found):
                yield f"{RECORD} says that {one.stored} has {said} {name}, but it has {found}"
    if record.sizes is None:
        return
    nbytes = sum(layer.nbytes for layer in packed.values())
    sizes = {
        "bits_per_weight": 8 * nbytes / sum(layer.outputs * layer.inputs for layer in packed.values()),
        "quantized_bytes_after": nbytes,
    }
    if headers_of(source) == record.headers:  # else the tensors may have been put into other files
        sizes["file_bytes_after"] = source.file_bytes
    for name, size in sizes.items():
        if (said := getattr(record.sizes, name)) != size:
            yield f"{RECORD} says {name} {said}, but it is {size}"


def _find_changed_files(folder: Path, recorded: dict[str, str]) -> Iterator[str]:
    for name, expected in recorded.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif sha256_file(folder / name) != expected:
            yield f"{name} was changed after it was written"


def _find_changed_schemes(folder: Path, recorded: list[LayerRecord]) -> Iterator[str]:
    """Find layers for which the folder's configuration gives another width or group size than the record."""
    try:
        quantization = read_quantization(folder / "config.json", quantization_of(folder) or {})
        schemes = quantization.schemes(layer.stored for layer in recorded)
    except InputError:
        return  # the caller reports this error when it opens the checkpoint
    for layer in recorded:
        if layer.bits is None or layer.group_size is None or layer.inputs is None:
            continue
        scheme, was = schemes[layer.stored], f"{layer.bits} bits in groups of {layer.group_size}"
        now = f"{scheme.bits} bits in groups of {scheme.columns(layer.inputs)}" if scheme else "not quantized"
        if now != was:
            yield f"{layer.stored} was written with {was}, but its configuration says {now}"


def _find_lost(folder: Path, record: WrittenRecord) -> Iterator[str]:
    """Find recorded tensors that are in no file that can be opened, named by their layer where they have one."""
    missing = record.tensors.keys() - readable_tensors(folder)
    layers = {name.rpartition(".")[0] for name in missing} & {layer.stored for layer in record.layers}
    for layer in sorted(layers):
        yield f"{layer} cannot be read, wholly or in part: a file that it was in is gone or damaged"
    for name in sorted(missing):
        if name.rpartition(".")[0] not in layers:
            yield f"the tensor {name} cannot be read: the file that it was in is gone or damaged"


def _find_changed_headers(source: Source, recorded: dict[str, str]) -> Iterator[str]:
    """Find files whose tensors are as they were written, but not what the file says before they begin.

    Tensors that were put into other files are no difference.
    """
    found = headers_of(source)
    for name in sorted(found.keys() & recorded.keys() if len(found) == len(recorded) else ()):
        if found[name] != recorded[name]:
            yield f"the header of {name} was changed after it was written"


def _find_changed_tensors(source: Source, record: WrittenRecord) -> Iterator[str]:
    recorded, layout = record.tensors, record.layout or {}
    for name in sorted(source.tensors.keys() | recorded.keys()):
        if name not in source.tensors:
            yield f"the tensor {name} is missing"
        elif name not in recorded:
            yield f"the tensor {name} was added"
        elif layout.get(name, now := str(source.tensors[name])) != now:
            yield f"the tensor {name} was written as {layout[name]} and is now said to be {now}"
        elif sha256(source.read_unchecked(name)) != recorded[name]:
            yield f"the tensor {name} was changed after it was written"


def _find_changed_weights(source: Source, packed: dict[str, PackedLayer], recorded: list[LayerRecord]) -> Iterator[str]:
    for name in sorted(packed.keys() ^ {layer.stored for layer in recorded}):
        yield f"{name} is {'packed but not recorded' if name in packed else 'recorded but not packed'}"
    for layer in recorded:
        stored = layer.stored
        if stored not in packed:
            continue  # reported by the loop above
        try:
            weight = _decode(source, stored, packed[stored]).weight()
        except (InputError, ValueError) as error:
            yield f"{stored} cannot be unpacked: {error}"
            continue
        if sha256(weight) != layer.weight_sha256:
            yield f"{stored} does not unpack to the weight that was chosen for it"
