"""Write the model card, README.md: how a checkpoint was quantized, what was measured, how to load it."""

import re
from pathlib import Path

from gptq import formats
from gptq.config import Format
from gptq.errors import printable
from gptq.formats.compatibility import engines
from gptq.formats.scheme import Layers
from gptq.output.record import Record
from gptq.output.results import RECORD
from gptq.version import __version__

KEPT_METADATA = ("license", "license_name", "license_link", "language", "pipeline_tag")  # copied from the source


def read_card_metadata(card: Path) -> dict[str, str]:
    """Return the lines of a model card's front matter that hold for the quantized model too, such as the license."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    front = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    entries = re.findall(r"^(\w+):((?: .*)?(?:\n[ -].*)*)", front[1], re.MULTILINE) if front else []
    return {key: value for key, value in entries if key in KEPT_METADATA}


def render_model_card(chosen: Format, layers: Layers, record: Record, model_type: str) -> str:
    """Return the README.md of a checkpoint: what it is, how it was quantized, what was measured, how to load it."""
    name = record.model
    front = {"library_name": " transformers", **(record.card_metadata or {})}
    if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        front |= {"base_model": f" {name}", "base_model_relation": " quantized"}
    widths = sorted({scheme.bits for scheme, _ in layers.values()})
    tags = [formats.FORMATS[chosen].quant_method, *(f"{bits}-bit" for bits in widths)]
    lines = ["---", *(f"{key}:{value}" for key, value in front.items()), "tags:", *(f"- {tag}" for tag in tags), "---"]
    lines += ["", f"# {_escape_inline(name or 'A model')}, {' and '.join(map(str, widths))} bits", ""]
    lines += [
        f"{len(layers)} linear layers are quantized, in the `{chosen}` format; {_describe_rest(record)}.",
        f"Written by `gptq` {__version__}; `gptq verify` compares the files with `{RECORD}`.",
        "",
    ]
    lines += ["## How it was made", "", *_list_options(record), ""]
    lines += _list_measurements(record)
    usage = formats.FORMATS[chosen].usage
    needs_import = "from transformers" in "".join(usage) and "import gptq" not in "".join(usage)
    if record.experts and needs_import:  # transformers fuses experts, and by itself has no layers for them
        usage = ("import gptq  # lets transformers load experts", *usage)
    lines += ["## How to load it", "", "```python", *usage, "```", "", "## What loads it", ""]
    lines += [
        f"- {engine.name}: {'yes' if engine.takes else 'no'}, {engine.why}" for engine in engines(layers, model_type)
    ]
    return "\n".join(lines) + "\n"


def _describe_rest(record: Record) -> str:
    """Say what happened to the tensors that are not quantized."""
    changes = []
    made_in = formats.FORMATS.get(record.config["format"]) if record.config else None
    if made_in is not None and made_in.embedding_types:
        changes.append("embeddings and the output head are rounded")
    if any(block.tuned < block.solved for block in record.blocks or []):
        changes.append("norms and biases of their blocks were tuned with them")
    if record.polish and record.polish.steps:
        changes.append("scales, norms, biases and embeddings were polished")
    return ", ".join(changes) if changes else "everything else is as it was"


def _list_options(record: Record) -> list[str]:
    made = record.config
    if made is None:
        return [f"By another tool ({_escape_inline(record.made_by or 'which did not say its name')}), and converted."]
    rows = {**made, "calibration": record.calibration or "none"}
    own = [(pattern, ", ".join(f"{k} {v}" for k, v in options.items())) for pattern, options in made["overrides"]]
    rows["overrides"] = "; ".join(f"`{pattern}`: {options}" for pattern, options in own).replace("|", "\\|") or "none"
    return [
        "| option | value |",
        "| --- | --- |",
        *(f"| {key} | {_escape_inline(value)} |" for key, value in rows.items()),
    ]


def _escape_inline(value: object) -> str:
    """Escape a value for a line of Markdown, whatever a file said: no HTML, no line end, no code span.

    Underscores and stars stay, as names are full of the first and expressions of the second.
    """
    return printable(str(value)).translate({ord("<"): "&lt;", ord(">"): "&gt;"})


def _list_measurements(record: Record) -> list[str]:
    lines = [
        f"- perplexity {measured.perplexity:.4f} on `{_escape_inline(measured.data)}` "
        f"({measured.tokens} tokens in windows of {measured.seq_len})"
        for measured in record.perplexity or []
    ]
    if record.polish and record.polish.steps:
        told = f"{record.polish.kl_before:.4g} nats per token, after {record.polish.steps} steps of polishing"
        lines.append(f"- KL divergence from the original on held-out text: {told} {record.polish.kl_after:.4g}")
    errors = [(layer.error, layer.name or layer.stored) for layer in record.layers if layer.error is not None]
    if errors:
        worst, name = max(errors, key=lambda entry: entry[0])
        mean = sum(error for error, _ in errors) / len(errors)
        what = "output on the calibration text" if record.calibration else "weight"
        lines.append(
            f"- relative error of a layer's {what}: {mean:.2%} on average, {worst:.2%} at `{_escape_inline(name)}`"
        )
    return ["## Measured", "", *lines, ""] if lines else []
