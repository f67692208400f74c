"""What is written beside the tensors: configuration, tokenizer, model card, and the record that `verify` compares with.

Nothing here holds a time or a path, so that the same run makes the same bytes.
"""

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq.checkpoint.atomic_folder import copy_files
from gptq.checkpoint.reader import sha256_file
from gptq.checkpoint.untrusted import Check, check_fields, dict_of, is_text, list_of, number, optional, read_json
from gptq.config import FORMATS, Format, QuantConfig
from gptq.errors import InputError, printable
from gptq.formats.codec import Scheme
from gptq.formats.compatibility import engines
from gptq.formats.quantization_config import (
    GPTQ_FORMATS,
    QUANTIZE_CONFIG,
    Layers,
    gptq_config,
    most_common,
    pack_quantized_config,
    quantization_of,
)
from gptq.models.blocks import LINEAR, Block
from gptq.models.tensor_names import Names
from gptq.planning.plan import LayerPlan, Plan
from gptq.version import __version__

RECORD = "quantization_record.json"
QUALITY = "quality.json"  # what `gptq eval --save` measured
WEIGHT_BINS, CODE_BINS = 40, 64  # at most, of histograms
CARD = "README.md"
COPIED_FILES = (".json", ".txt", ".model", ".jinja", ".py", ".md", "LICENSE", "NOTICE")
IMPORT, USE = "from transformers import AutoModelForCausalLM", 'AutoModelForCausalLM.from_pretrained("this repository")'
USAGE: dict[Format, tuple[str, ...]] = {
    "gptq": ("import gptq  # lets transformers load GPTQ files", IMPORT, "", f"model = {USE}"),
    "gptq_v2": ("import gptq  # lets transformers load GPTQ files", IMPORT, "", f"model = {USE}"),
    "pack-quantized": (f"{IMPORT}  # with compressed-tensors installed", "", f"model = {USE}"),
}
KEPT_METADATA = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the source's model card


@dataclass(frozen=True)
class LayerResult:
    """What came of one linear layer.

    `error` is the exact relative output error on the calibration tokens, ||(T - Q) X||^2 / ||W X||^2, `heldout_error`
    the same on windows that the solver has not seen, and `rtn_error` that of round-to-nearest on what it has seen. Of a
    layer with many rows, the last two are `error` times how much larger they are on a few hundred of the rows. T is W,
    or with two streams W and a `share` of what makes up for the layers before (see `solver.error_propagation`), and Q
    is what the solver chose, before any tuning of the block. Where no calibration token was used (method "rtn", or a
    layer that none reached), X is the identity. Of an expert that few tokens reached, X is the blend of
    `models.experts`, and `tokens` counts its own.
    """

    name: str
    bits: int
    group_size: int
    error: float
    rtn_error: float
    heldout_error: float | None
    share: float | None
    damp: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class BlockError:
    """How far a block's output is from the original's on held-out windows, relative to its power, around its tuning."""

    name: str
    solved: float
    tuned: float


@dataclass(frozen=True)
class Coverage:
    """How many of `all_tokens` each of a layer's experts saw; for those in `blended` it was too few."""

    name: str
    all_tokens: int
    tokens: list[int]
    blended: list[int]


@dataclass(frozen=True)
class Linears:
    """A model's linear layers by their names in the checkpoint: quantized, like these but kept; and all others."""

    layers: Layers
    kept: Collection[str]
    others: Collection[str]


def linears_of(plan: Plan) -> Linears:
    """The linear layers of a model that is planned."""
    return Linears(plan.stored_layers, *beside(plan.network, plan.names, plan.all_blocks, plan.layers))


def beside(
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


def weight_histogram(W: Tensor) -> dict[str, Any]:
    """How a layer's weights (outputs, inputs) are spread before quantization: counts in 40 equal bins over
    [-weight_range, weight_range], the last one closed."""
    largest = max(abs(float(end)) for end in W.aminmax())
    half = WEIGHT_BINS / 2
    counts = torch.zeros(WEIGHT_BINS, dtype=torch.int64, device=W.device)
    for part in W.split(512):  # as a layer can be large
        bin_of = (part * (half / (largest or 1.0)) + half).clamp_(0, WEIGHT_BINS - 1).to(torch.uint8)  # rounds down
        counts += torch.bincount(bin_of.flatten(), minlength=WEIGHT_BINS)
    return {"weight_range": largest, "weight_histogram": counts.tolist()}


def code_histogram(codes: Tensor, bits: int) -> dict[str, Any]:
    """Counts of a layer's codes, each by itself, of more than 64 kinds several neighbours together."""
    code_bins = min(2**bits, CODE_BINS)
    return {"code_histogram": torch.bincount(codes.flatten() // (2**bits // code_bins), minlength=code_bins).tolist()}


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


def describe(chosen: Format, linears: Linears, record: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a file in a format, from how its layers are stored and how they were made.

    A file of another tool keeps its own words where they are in that format.
    """
    origin, made = record.get("origin"), record["config"]
    if origin and origin["format"] == chosen:
        return dict(origin["quantization_config"])
    if origin and {origin["format"], chosen} <= {*GPTQ_FORMATS}:
        kinds = {key: chosen for key in ("checkpoint_format", "format") if key in origin["quantization_config"]}
        return {**origin["quantization_config"], "checkpoint_format": chosen, **kinds}
    if chosen == "pack-quantized":
        return pack_quantized_config(linears.layers, linears.kept, linears.others)
    if made is None:
        return gptq_config(
            most_common(linears.layers), linears.layers, linears.kept, {}, {"quantizer": [f"gptq:{__version__}"]}
        )
    config = QuantConfig.from_dict(made)
    shuffled = (
        config.method == "gptq" and bool(config.desc_act) and not config.static_groups and config.group_size != -1
    )
    everywhere = Scheme(config.bits, config.group_size, config.sym, chosen, shuffled)
    extra = {
        "true_sequential": True,
        "static_groups": config.static_groups,
        "damp_percent": config.damp_percent,
    }
    meta = {"quantizer": [f"gptq:{__version__}"], "method": config.method, "act_order": config.desc_act}
    return gptq_config(everywhere, linears.layers, linears.kept, extra, meta)


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
    written = {"config.json", QUANTIZE_CONFIG, RECORD, CARD, QUALITY}  # the source's quality is not the result's
    copy_files(source, out, lambda n: n.endswith(COPIED_FILES) and n not in written and not n.endswith(".index.json"))
    quantization = describe(chosen, linears, record)
    hf_config = read_json(source / "config.json")
    _write_json(out / "config.json", _merged(hf_config, changes or {}) | {"quantization_config": quantization})
    if chosen != "pack-quantized":
        _write_json(out / QUANTIZE_CONFIG, quantization)
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
    "origin": lambda origin: isinstance(origin, dict) and origin.get("format") in FORMATS
    and isinstance(origin.get("quantization_config"), dict),
}  # fmt: skip
MEASURED: dict[str, Check] = {"perplexity": ERROR, "data": is_text, "tokens": COUNT, "seq_len": COUNT}


# --- the model card ---------------------------------------------------------------------------------------------------


def card_metadata(card: Path) -> dict[str, str]:
    """The lines of a model card's front matter that hold for the quantized model too, license for one."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    entries = re.findall(r"^(\w+):((?: .*)?(?:\n[ -].*)*)", front[1], re.MULTILINE) if front else []
    return {key: value for key, value in entries if key in KEPT_METADATA}


def model_card(chosen: Format, layers: Layers, record: dict[str, Any]) -> str:
    """README.md of a model repository: what this is, how it was made, what was measured, how to load it."""
    name, made = record.get("model"), record["config"]
    front = {"library_name": " transformers", **record.get("card_metadata", {})}
    if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        front |= {"base_model": f" {name}", "base_model_relation": " quantized"}
    widths = sorted({scheme.bits for scheme, _ in layers.values()})
    tags = ["gptq" if chosen != "pack-quantized" else "compressed-tensors", *(f"{bits}-bit" for bits in widths)]
    lines = ["---", *(f"{key}:{value}" for key, value in front.items()), "tags:", *(f"- {tag}" for tag in tags), "---"]
    lines += ["", f"# {_inline(name or 'A model')}, {' and '.join(map(str, widths))} bits", ""]
    lines += [
        f"{len(layers)} linear layers are quantized, in the `{chosen}` format; everything else is as it was.",
        f"Written by `gptq` {__version__}; `gptq verify` compares the files with `{RECORD}`.",
        "",
    ]
    lines += ["## How it was made", "", *_options(made, record), ""]
    lines += _measured(record)
    apart = record.get("experts")  # transformers fuses experts when it loads, and then has no layers for them
    usage = ("import gptq", "", 'model = gptq.load("this folder")') if apart else USAGE[chosen]
    lines += ["## How to load it", "", "```python", *usage, "```", "", "## What loads it", ""]
    lines += [f"- {engine.name}: {'yes' if engine.takes else 'no'}, {engine.why}" for engine in engines(layers)]
    return "\n".join(lines) + "\n"


def _options(made: dict[str, Any] | None, record: dict[str, Any]) -> list[str]:
    if made is None:
        return [f"By another tool ({_inline(record.get('made_by') or 'which did not say its name')}), and converted."]
    rows = {**made, "calibration": record["calibration"] or "none"}
    own = [(pattern, ", ".join(f"{k} {v}" for k, v in options.items())) for pattern, options in made["overrides"]]
    rows["overrides"] = "; ".join(f"`{pattern}`: {options}" for pattern, options in own).replace("|", "\\|") or "none"
    return ["| option | value |", "| --- | --- |", *(f"| {key} | {_inline(value)} |" for key, value in rows.items())]


def _inline(value: object) -> str:
    """A value as plain words of a line of Markdown, whatever a file said: no HTML, no end of the line, no code span.

    Underscores and stars stay, as names are full of the first and expressions of the second.
    """
    return printable(str(value)).translate({ord("<"): "&lt;", ord(">"): "&gt;"})


def _measured(record: dict[str, Any]) -> list[str]:
    errors = [entry for entry in record["layers"] if entry["error"] is not None]
    found = [
        f"- perplexity {entry['perplexity']:.4f} on `{_inline(entry['data'])}` ({entry['tokens']} tokens in windows of "
        f"{entry['seq_len']})"
        for entry in record.get("perplexity", [])
    ]
    if errors:
        worst = max(errors, key=lambda entry: entry["error"])
        mean = sum(entry["error"] for entry in errors) / len(errors)
        what = "output on the calibration text" if record["calibration"] else "weight"
        found.append(
            f"- relative error of a layer's {what}: {mean:.2%} on average, "
            f"{worst['error']:.2%} at `{_inline(worst.get('name', worst['stored']))}`"
        )
    return ["## Measured", "", *found, ""] if found else []


def add_perplexity(folder: Path, entry: dict[str, Any], chosen: Format, layers: Layers) -> None:
    """Write a measured perplexity into a folder's record and model card."""
    record = read_record(folder)
    if record["config"] is not None:
        QuantConfig.from_dict(record["config"])  # the card lists its options
    record["perplexity"] = [*record.get("perplexity", []), entry]
    (folder / CARD).write_text(model_card(chosen, layers, record), encoding="utf-8")
    record["files"][CARD] = sha256_file(folder / CARD)
    _write_json(folder / RECORD, record)
