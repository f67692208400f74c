"""What is written beside the tensors: configuration, tokenizer, model card, and the record that `verify` compares with.

Nothing here holds a time or a path, so that the same run makes the same bytes.
"""

import json
import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from gptq.checkpoint.atomic_folder import copy_files
from gptq.checkpoint.tensors import sha256_file
from gptq.checkpoint.untrusted import Check, check_fields, dict_of, is_text, list_of, number, optional, read_json
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.formats import FORMATS
from gptq.formats.quantization_config import quantization_of
from gptq.formats.scheme import Layers, Linears
from gptq.models.blocks import LINEAR, Block
from gptq.models.tensor_names import Names
from gptq.output.model_card import card_metadata, model_card
from gptq.output.results import CARD, CODE_BINS, QUALITY, RECORD, WEIGHT_BINS, LayerResult
from gptq.planning.plan import LayerPlan, Plan
from gptq.version import __version__

COPIED_FILES = (".json", ".txt", ".model", ".jinja", ".py", ".md", "LICENSE", "NOTICE")


def linears_of(plan: Plan) -> Linears:
    """The linear layers of a model that is planned."""
    return Linears(plan.stored_layers, *unquantized_linears(plan.network, plan.names, plan.all_blocks, plan.layers))


def unquantized_linears(
    network: nn.Module, names: Names, blocks: list[Block], layers: Collection[str]
) -> tuple[list[str], list[str]]:
    """Of the linear layers that are not in `layers` (by their names in the model), those inside the blocks and others.

    Those inside by their names in the checkpoint; of those outside, no other than the model's is needed. Among these
    are routers that are linear layers and more, which readers of the file must not take for packed.
    """
    kept = [name for block in blocks for name in block.linears if name not in layers]
    others = [name for name, module in network.named_modules() if isinstance(module, LINEAR)]
    inside = {*layers, *kept}
    return [names.find_layer(name) for name in kept], [name for name in others if name not in inside]


def model_name(model: str | Path) -> str:
    """What the record calls a model: a Hub id, or the name of a folder."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def public_name(source: str) -> str:
    """A source of text as the record may show it: of a path on this machine only the name."""
    return Path(source).name if source.startswith(("/", ".", "~")) else source


def layer_entries(
    plans: dict[str, LayerPlan],
    results: list[LayerResult],
    weight_checksums: dict[str, str],
    spreads: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """What the record says of each layer."""
    entries = []
    for result in results:
        plan = plans[result.name]
        entry = {"stored": plan.stored, **asdict(result), "weight_sha256": weight_checksums[result.name]}
        del entry["seconds"]
        entry |= {"outputs": plan.outputs, "inputs": plan.inputs, **spreads[result.name]}
        entries.append(entry)
    return entries


def quantization_config(chosen: Format, linears: Linears, record: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a file in a format, from how its layers are stored and how they were made.

    A file of another tool keeps its own words where they are in that format.
    """
    origin, made, file_format = record.get("origin"), record["config"], FORMATS[chosen]
    if origin and origin["format"] == chosen:
        return dict(origin["quantization_config"])
    if origin and FORMATS[origin["format"]].quant_method == file_format.quant_method:
        return file_format.rename_config(origin["quantization_config"])
    return file_format.write_config(linears, None if made is None else QuantConfig.from_dict(made))


def write_files(
    source: Path,
    out: Path,
    chosen: Format,
    linears: Linears,
    record: dict[str, Any],
    checksums: dict[str, str],
    changes: dict[str, Any] | None = None,
) -> None:
    """Write config.json, quantize_config.json (GPTQ), the source's small files, the model card, and the record.

    Args:
        record: `config`, `calibration`, `layers` and what else is known of how the layers were made.
        checksums: of the tensors, by name.
        changes: in config.json, section by section.
    """
    of_formats = {name for known in FORMATS.values() for name in known.config_files}
    written = {"config.json", *of_formats, RECORD, CARD, QUALITY}  # the source's quality is not the result's
    copy_files(source, out, lambda n: n.endswith(COPIED_FILES) and n not in written and not n.endswith(".index.json"))
    quantization = quantization_config(chosen, linears, record)
    hf_config = read_json(source / "config.json")
    _write_json(out / "config.json", _merged(hf_config, changes or {}) | {"quantization_config": quantization})
    for name in FORMATS[chosen].config_files:
        _write_json(out / name, quantization)
    metadata = card_metadata(source / CARD)
    described = {**record, "card_metadata": metadata} if metadata else record
    (out / CARD).write_text(model_card(chosen, linears.layers, described), encoding="utf-8")
    files = {p.name: sha256_file(p) for p in sorted(out.iterdir()) if p.suffix != ".safetensors"}
    whole = {
        "quantizer": f"gptq {__version__}",
        **described,
        "tensors": dict(sorted(checksums.items())),
        "files": files,
    }
    _write_json(out / RECORD, whole)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, section by section; sections that `values` lacks are left out."""
    merged = dict(values)
    for key, change in changes.items():
        if not isinstance(change, dict):
            merged[key] = change
        elif isinstance(values.get(key), dict):
            merged[key] = _merged(values[key], change)
    return merged


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = re.sub(r"\[[-\d,.\se]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # histograms on one line
    path.write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Raises InputError if the folder has no record, or a damaged one."""
    file = folder / RECORD
    if not file.is_file():
        raise InputError(f"{folder} has no {RECORD}, so there is nothing to go by; another tool wrote it")
    record = read_json(file)
    check_fields(record, RECORDED, ("files", "tensors", "config", "calibration", "layers"), str(file))
    for entry in record["layers"]:
        check_fields(entry, OF_LAYER, ("stored", "weight_sha256", "error", "rtn_error"), str(file))
    if len({entry["stored"] for entry in record["layers"]}) < max(len(record["layers"]), 1):
        raise InputError(f"{file} is damaged: it has no layers, or two entries for one")
    return record


def is_claimed(folder: Path) -> bool:
    """Whether a folder's own words say that there is a record: the model card's, or those of a GPTQ file."""
    card, quantization = folder / CARD, quantization_of(folder) or {}
    mentioned = card.is_file() and RECORD in card.read_text(encoding="utf-8", errors="replace")
    meta = quantization.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, dict) else None
    return mentioned or (isinstance(makers, list) and any(str(maker).startswith("gptq:") for maker in makers))


def _plain(name: Any) -> bool:
    """Whether a name is that of a file in the folder itself, which can be printed."""
    return is_text(name) and name.isprintable() and Path(name).name == name


def _anything(_: Any) -> bool:
    return True


def _named(name: Any) -> bool:
    return is_text(name) and name.isprintable()


SIZES = {
    "bits_per_weight", "quantized_bytes_before", "quantized_bytes_after", "file_bytes_before", "file_bytes_after",
}  # fmt: skip
COUNT, ERROR = number(0, 2**60, int), number(0, 1e30)
OF_LAYER: dict[str, Check] = {
    "stored": _named, "name": _named, "weight_sha256": is_text, "bits": number(1, 8, int), "group_size": COUNT,
    "error": optional(ERROR), "rtn_error": optional(ERROR), "heldout_error": optional(ERROR),
    "share": optional(number(-1e30, 1e30)), "damp": optional(ERROR), "tokens": optional(COUNT), "outputs": COUNT,
    "inputs": COUNT, "weight_range": ERROR, "weight_histogram": list_of(COUNT, WEIGHT_BINS),
    "code_histogram": list_of(COUNT, CODE_BINS),
}  # fmt: skip
RECORDED: dict[str, Check] = {
    "files": dict_of(is_text, _plain), "tensors": dict_of(is_text, _named), "config": optional(dict_of(_anything)),
    "layers": list_of(_anything), "model": optional(is_text), "calibration": optional(is_text), "quantizer": is_text,
    "made_by": optional(is_text), "card_metadata": dict_of(is_text),
    "sizes": lambda sizes: dict_of(number(0, 2**60))(sizes) and sizes.keys() >= SIZES,
    "perplexity": list_of(lambda entry: isinstance(entry, dict) and all(
        check(entry.get(key)) for key, check in MEASURED.items())),
    "origin": lambda origin: isinstance(origin, dict) and origin.get("format") in tuple(FORMATS)
    and isinstance(origin.get("quantization_config"), dict),
}  # fmt: skip
MEASURED: dict[str, Check] = {"perplexity": ERROR, "data": is_text, "tokens": COUNT, "seq_len": COUNT}


# --- the model card ---------------------------------------------------------------------------------------------------


def add_perplexity(folder: Path, entry: dict[str, Any], chosen: Format, layers: Layers) -> None:
    """Write a measured perplexity into a folder's record and model card."""
    record = read_record(folder)
    if record["config"] is not None:
        QuantConfig.from_dict(record["config"])  # the card lists its options
    record["perplexity"] = [*record.get("perplexity", []), entry]
    (folder / CARD).write_text(model_card(chosen, layers, record), encoding="utf-8")
    record["files"][CARD] = sha256_file(folder / CARD)
    _write_json(folder / RECORD, record)
