"""Write the files beside the tensors: configuration, tokenizer, model card, record."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from gptq.checkpoint.assembled import INDEX_FILE, TensorIndex, open_source
from gptq.checkpoint.atomic_folder import SHARDS
from gptq.checkpoint.companions import copy_companions
from gptq.checkpoint.reader import Source, headers_of
from gptq.checkpoint.small_files import exclusive, write_file
from gptq.checkpoint.sources.decoded import FLOATS
from gptq.checkpoint.tensors import sha256, sha256_file
from gptq.checkpoint.untrusted import read_json
from gptq.config import Format, QuantConfig
from gptq.formats import FORMATS
from gptq.formats.quantization_config import COPIES, replace_quantization
from gptq.formats.scheme import Layers, Linears
from gptq.models.blocks import LINEAR, Block
from gptq.models.tensor_names import Names
from gptq.output.model_card import read_card_metadata, render_model_card
from gptq.output.record import PerplexityRecord, Record, read_record, write_json, write_record
from gptq.output.results import CARD, QUALITY, RECORD
from gptq.planning.plan import Plan
from gptq.version import __version__

ASSEMBLED = "assembled"  # name of the folder in which files for an engine are made


def linears_of(plan: Plan) -> Linears:
    """Return the linear layers of a planned model."""
    return Linears(plan.stored_layers, *unquantized_linears(plan.network, plan.names, plan.all_blocks, plan.layers))


def unquantized_linears(
    network: nn.Module, names: Names, blocks: list[Block], layers: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the linear layers of the model that are not quantized: (quantizable layers of the blocks, all others).

    `layers` are the quantized layers, by their names in the model. The first list has names in the checkpoint, the
    second names in the model. The second includes routers, which are linear layers for some engines, under the names of
    the checkpoint too; readers of the file must not take these for packed layers.
    """
    kept = [name for block in blocks for name in block.linears if name not in layers]
    others = [name for name, module in network.named_modules() if isinstance(module, LINEAR)]
    routers = [f"{b.name}.{n}" for b in blocks for n, module in b.module.named_modules() if _is_router(module)]
    others += dict.fromkeys(own for name in routers for own in (name, names.find_layer(name)))
    inside = {*layers, *kept}
    return [names.find_layer(name) for name in kept], list(dict.fromkeys(n for n in others if n not in inside))


def _is_router(module: nn.Module) -> bool:
    """Whether a module inside a block is no linear layer and computes with a matrix called `weight`."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, (*LINEAR, nn.Embedding))


def quantization_config(chosen: Format, linears: Linears, record: Record) -> dict[str, Any]:
    """Return the `quantization_config` of a file in the format `chosen`, from its layers and from the record.

    The configuration that another tool wrote is kept if it is in that format.
    """
    origin, file_format = record.origin, FORMATS[chosen]
    if origin and origin.format == chosen:
        return dict(origin.quantization_config)
    if origin and FORMATS[origin.format].quant_method == file_format.quant_method:
        renamed = file_format.rename_config(origin.quantization_config)
        if renamed is not None:
            return renamed
    return file_format.write_config(linears, None if record.config is None else QuantConfig.from_dict(record.config))


def write_files(
    source: Path,
    out: Path,
    chosen: Format,
    linears: Linears,
    record: Record,
    checksums: dict[str, str],
    changes: dict[str, Any] | None = None,
) -> int:
    """Complete a folder that holds the finished safetensors files; return the bytes of the files with tensors.

    Writes config.json, quantize_config.json (GPTQ), the source's small files, the model card, and the record; and
    turns the safetensors files into those that the format's engine reads, if these are others.

    Args:
        record: how the layers were quantized.
        checksums: SHA-256 of the tensors, by name.
        changes: values to replace in config.json, section by section.
    """
    of_formats = {name for known in FORMATS.values() for name in known.config_files}
    written = {
        "config.json",
        *of_formats,
        *COPIES,
        RECORD,
        CARD,
        QUALITY,
        INDEX_FILE,
    }  # quality.json is not copied: it holds measurements of the source, not of this result
    copy_companions(source, out, lambda name: name not in written)
    quantization = quantization_config(chosen, linears, record)
    hf_config = read_json(source / "config.json")
    for known in FORMATS.values():
        hf_config = known.plain_model_config(hf_config)
    if not _names_dtype(hf_config) and (dtype := _first_float(out)):
        hf_config["dtype"] = dtype
    described_model = replace_quantization(_merge(hf_config, changes or {}), quantization)
    write_json(out / "config.json", FORMATS[chosen].complete_model_config(described_model))
    for name in FORMATS[chosen].config_files:
        write_json(out / name, quantization)
    index = _assemble(out, chosen)
    written_tensors = open_source(out)
    if index is not None:
        checksums = {name: sha256(written_tensors.read_unchecked(name)) for name in written_tensors.tensors}
    metadata = read_card_metadata(source / CARD)
    described = record.model_copy(update={"card_metadata": metadata}) if metadata else record
    if described.sizes is not None:
        sizes = described.sizes.model_copy(update=_sizes(written_tensors, linears.layers, record))
        described = described.model_copy(update={"sizes": sizes})
    card = render_model_card(chosen, linears.layers, described, str(hf_config.get("model_type", "")))
    write_file(out / CARD, card)
    whole = {
        "quantizer": f"gptq {__version__}",
        **described.to_dict(),
        "tensors": dict(sorted(checksums.items())),
        "layout": {name: str(info) for name, info in sorted(written_tensors.tensors.items())},
        "headers": headers_of(written_tensors),
        "files": {p.relative_to(out).as_posix(): sha256_file(p) for p in _files_below(out, written_tensors.files)},
    }
    write_record(out, whole)
    return written_tensors.file_bytes


def _sizes(written: Source, layers: Layers, record: Record) -> dict[str, float]:
    """Return those sizes of a record that depend on the format."""
    nbytes = sum(
        written.tensors[name].nbytes
        for layer, (scheme, _) in layers.items()
        for key in FORMATS[scheme.format].layout(scheme, 32, 32)  # of any shape, for the names
        if (name := f"{layer}.{key}") in written.tensors
    )
    sizes: dict[str, float] = {"quantized_bytes_after": nbytes, "file_bytes_after": written.file_bytes}
    if weights := sum((layer.outputs or 0) * (layer.inputs or 0) for layer in record.layers):
        sizes["bits_per_weight"] = 8 * nbytes / weights
    return sizes


def _names_dtype(hf_config: dict[str, Any]) -> bool:
    """Whether a config.json says in which dtype the model is loaded; it may do so for a part alone."""
    parts = [hf_config, *(part for part in hf_config.values() if isinstance(part, dict))]
    return any(part.get(key) for part in parts for key in ("dtype", "torch_dtype"))


def _first_float(folder: Path) -> str | None:
    """Return the dtype of the first tensor that is not packed, which counts where config.json names none.

    In the result, transformers would find the packed layers' scales first, which are float16.
    """
    keys = frozenset().union(*(known.keys for known in FORMATS.values()))
    plain = (i.dtype for n, i in open_source(folder).tensors.items() if n.rpartition(".")[2] not in keys)
    return next((str(dtype).removeprefix("torch.") for dtype in plain if dtype in FLOATS.values()), None)


def _files_below(out: Path, tensors: list[Path]) -> list[Path]:
    """Return the files of a result except those with tensors; the files at the top come first.

    A record and hidden files can only be another run's here, which writes on though its folder was taken away.
    """
    others = (path for path in out.rglob("*") if path.name != RECORD and not path.name.startswith("."))
    found = [path for path in others if path.is_file() and path not in tensors]
    return sorted(found, key=lambda path: (path.parent != out, path))


def _assemble(folder: Path, chosen: Format) -> TensorIndex | None:
    """Replace the folder's safetensors files by those that the format's engine reads; None if it reads these.

    The replaced files stay in a folder beside it until the result is complete, because a stopped run goes on from them.
    """
    made = folder.with_name(ASSEMBLED)  # beside `folder` in the partial folder, which a later run empties
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    index = FORMATS[chosen].assemble(folder, made)
    if index is None:
        made.rmdir()
        return None
    replaced = {*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")}
    for file in folder.iterdir():
        if file not in replaced:
            file.rename(made / file.name)
    folder.rename(folder.with_name(SHARDS))
    made.rename(folder)
    write_json(folder / INDEX_FILE, index.to_dict())
    return index


def model_type_of(folder: Path) -> str:
    """Return the model_type that a folder's config.json gives; "" if it gives none."""
    return str(read_json(folder / "config.json").get("model_type", ""))


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes`, section by section; changes to sections that `values` lacks are left out."""
    merged = dict(values)
    for key, change in changes.items():
        if not isinstance(change, dict):
            merged[key] = change
        elif isinstance(values.get(key), dict):
            merged[key] = _merge(values[key], change)
    return merged


def add_perplexity(folder: Path, measured: PerplexityRecord, chosen: Format, layers: Layers) -> None:
    """Write a measured perplexity into a folder's record and model card."""
    with exclusive(folder):
        record = read_record(folder)
        if record.config is not None:
            QuantConfig.from_dict(record.config)  # the card lists its options
        measurements = [*(record.perplexity or []), measured]
        without = record.model_copy(update={"files": {name: sha for name, sha in record.files.items() if name != CARD}})
        record = record.model_copy(update={"perplexity": measurements})
        card = render_model_card(chosen, layers, record, model_type_of(folder))
        # A kill between two of these steps leaves a card that the record is silent about, not one that contradicts it.
        write_record(folder, without.to_dict())
        write_file(folder / CARD, card)
        files = _in_order({**record.files, CARD: sha256_file(folder / CARD)})
        write_record(folder, record.model_copy(update={"files": files}).to_dict())


def _in_order(files: dict[str, str]) -> dict[str, str]:
    """Sort names of files: those at the top come first."""
    return dict(sorted(files.items(), key=lambda item: ("/" in item[0], Path(item[0]))))
