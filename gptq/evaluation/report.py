"""Show a quantized checkpoint's record as one HTML page that needs no network, and write its charts as SVG files."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from gptq.checkpoint.small_files import write_folder
from gptq.checkpoint.untrusted import check_folder
from gptq.errors import printable
from gptq.evaluation import charts
from gptq.evaluation.charts import Chart, Series
from gptq.evaluation.quality import Measurement, read_measurements
from gptq.output.record import LayerRecord, Record, WrittenRecord, read_record
from gptq.output.results import QUALITY, REPORT

PAGE = "index.html"
MAX_TICKS = 12  # on the x axis

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #5d656d; --line: #d9dde1; --card: #f4f6f8;
  --c0: #1f6fc4; --c1: #c2570c; --c2: #2b8a3e }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --ink: #e6e9ec; --soft: #a0a8b0; --line: #363c42;
  --card: #1f2428; --c0: #6db1f7; --c1: #f29a52; --c2: #66cc7d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem }
p { margin: .3rem 0 .6rem; overflow-wrap: break-word }
.soft, figcaption { color: var(--soft); font-size: .9rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; margin: 1.1rem 0 }
.card { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; font-size: .95rem }
.card b { display: block; font-size: 1.3rem }
.wide { overflow-x: auto }
figure { margin: .4rem 0 }
svg { display: block; width: 100% }
.w720 { min-width: 38rem }
.w440 { max-width: 32rem }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem }
text { font-size: 12px; fill: var(--soft) }
.grid { stroke: var(--line) }
.stem { stroke: var(--line); stroke-width: 2 }
.c0 { fill: var(--c0) } .c1 { fill: var(--c1) } .c2 { fill: var(--c2) }
.key span { margin-right: 1.2rem; white-space: nowrap }
.key svg { display: inline; width: .8rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td small { color: var(--soft); white-space: nowrap }
details { border-bottom: 1px solid var(--line) }
summary { cursor: pointer; padding: .35rem 0; overflow-wrap: anywhere }
summary span { color: var(--soft); margin-left: .6rem; font-size: .9rem }
"""


def write_report(folder: Path, to: Path | None = None) -> tuple[Path, list[Path]]:
    """Write the page; write its charts and the histograms of the worst layer as SVG files. Returns (page, SVG files).

    The page shows only quantization_record.json, and quality.json if `gptq eval --save` has written it. Parts that the
    record of an earlier version lacks are left out.

    Args:
        to: folder to write into, by default `report` in the checkpoint's folder; existing files are replaced.
    Raises:
        InputError: the folder has no record, or the record is damaged.
    """
    check_folder(folder)
    record, measurements = read_record(folder), read_measurements(folder)
    figures = {name: draw(record) for name, draw in FIGURES.items()}
    drawn = {name: chart for name, chart in figures.items() if chart}
    to = to or folder / REPORT
    worst = max(record.layers, key=lambda layer: layer.error or 0.0)
    pictures = {
        f"{name}.svg": charts.render_svg_file(chart) for name, chart in {**drawn, **_draw_histograms(worst)}.items()
    }
    page = _render_page(printable(folder.resolve().name), record, measurements, drawn)
    write_folder(to, {PAGE: page, **pictures})
    return to / PAGE, [to / name for name in pictures]


# --- the record as charts ---------------------------------------------------------------------------------------------


def draw_errors(record: Record) -> Chart | None:
    layers = record.layers
    if not _known_errors(layers):
        return None
    if record.is_rounded:
        series = [Series("round to nearest", [layer.error for layer in layers])]
        return _chart_by_layer(record, "Relative weight error", series, percent=True)
    series = [
        Series("as quantized, calibration data", [layer.error for layer in layers]),
        Series("round to nearest, calibration data", [layer.rtn_error for layer in layers]),
    ]
    if any(layer.heldout_error is not None for layer in layers):
        series.append(Series("as quantized, held-out data", [layer.heldout_error for layer in layers]))
    return _chart_by_layer(record, "Relative output error", series, percent=True)


def draw_bits(record: Record) -> Chart | None:
    if not any(layer.bits for layer in record.layers):
        return None
    return _chart_by_layer(record, "Bits of a code", [Series("bits", [layer.bits for layer in record.layers])], "bars")


def draw_coverage(record: Record) -> Chart | None:
    layers = record.layers
    if record.is_rounded or not any(layer.tokens for layer in layers):
        return None
    return _chart_by_layer(record, "Calibration tokens", [Series("tokens", [layer.tokens for layer in layers])], "bars")


def draw_size(record: Record) -> Chart | None:
    sizes = record.sizes
    if not sizes:
        return None
    quantized = [sizes.quantized_bytes_before, sizes.quantized_bytes_after]
    files = [sizes.file_bytes_before, sizes.file_bytes_after]
    others = [max(file - part, 0) for file, part in zip(files, quantized, strict=True)]
    series = [Series("quantized layers", quantized), Series("everything else", others)]
    names = ["before", "after"]
    ticks = {float(i): f"{name}: {charts.format_number(files[i], False)}B" for i, name in enumerate(names)}
    return Chart("Size of the weight files", "", "bytes", series, "bars", names, ticks, width=440)


FIGURES: dict[str, Callable[[Record], Chart | None]] = {
    "errors": draw_errors, "bits": draw_bits, "size": draw_size, "coverage": draw_coverage,
}  # fmt: skip


def _known_errors(layers: list[LayerRecord]) -> list[tuple[float, float]]:
    """List (error, round-to-nearest error) of the layers for which both are known; other tools record none."""
    return [
        (layer.error, layer.rtn_error) for layer in layers if layer.error is not None and layer.rtn_error is not None
    ]


def _chart_by_layer(record: Record, title: str, series: list[Series], kind: str = "dots", **options: Any) -> Chart:
    """Make a chart with one position per layer, and ticks where blocks begin."""
    names = [layer.stored for layer in record.layers]
    starts = [
        (i, number)
        for i, number in enumerate(map(_block_number, names))
        if i == 0 or number != _block_number(names[i - 1])
    ]
    every = -(-len(starts) // MAX_TICKS)
    ticks: dict[float, str] = {float(i): number for i, number in starts[::every]}
    return Chart(f"{title}, layer by layer", "layers, by block", title.lower(), series, kind, names, ticks, **options)


def _block_number(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), "")


def _draw_histograms(layer: LayerRecord) -> dict[str, Chart]:
    """Draw the histograms of one layer's weights and codes that were recorded."""
    found = {}
    if layer.weight_histogram and layer.weight_range is not None:
        counts, largest = layer.weight_histogram, layer.weight_range
        ends = {-0.5: -largest, len(counts) / 2 - 0.5: 0.0, len(counts) - 0.5: largest}
        ticks = {at: f"{value:.3g}" for at, value in ends.items()}
        title = f"Weights of {layer.stored} before quantization"
        found["weights"] = Chart(title, "weight", "how many", [Series("weights", counts)], "bars", [], ticks, width=440)
    if layer.code_histogram and layer.bits is not None:
        counts = layer.code_histogram
        width, every = 2**layer.bits // len(counts), max(1, len(counts) // 16)
        ticks = {float(i): str(i * width) for i in range(0, len(counts), every)}
        title = f"Codes of {layer.stored}"
        found["codes"] = Chart(title, "code", "how many", [Series("codes", counts)], "bars", [], ticks, width=440)
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def _render_page(name: str, record: WrittenRecord, measurements: list[Measurement], drawn: dict[str, Chart]) -> str:
    body = "".join(
        [
            f"<h1>{escape(name)}</h1>",
            f'<p class="soft">{escape(_describe_settings(record))}</p>',
            f'<div class="cards">{"".join(_render_cards(record, measurements))}</div>',
            _render_quality(measurements),
            *(_render_section(key, chart, record) for key, chart in drawn.items()),
            _render_layers(record),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}, quantized</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _describe_settings(record: WrittenRecord) -> str:
    config = record.config or {}
    shown = [f"{key} {value}" for key, value in config.items()]
    calibrated = f"calibrated on {record.calibration}" if record.calibration else "no calibration"
    return f"Written by {record.quantizer or 'an unknown version'}; {calibrated}; {', '.join(shown)}."


def _render_cards(record: Record, measurements: list[Measurement]) -> Iterator[str]:
    layers, sizes = record.layers, record.sizes
    yield _render_card(str(len(layers)), "quantized layers")
    if sizes:
        yield _render_card(f"{sizes.bits_per_weight:.2f}", "bits per weight in them, everything stored counted")
        before, after = (
            f"{charts.format_number(size, False)}B" for size in (sizes.file_bytes_before, sizes.file_bytes_after)
        )
        yield _render_card(after, f"on disk, {before} before")
    errors = _known_errors(layers)
    if errors and not record.is_rounded:
        kept = sum(error for error, _ in errors) / max(sum(rtn_error for _, rtn_error in errors), 1e-30)
        yield _render_card(f"{kept:.0%}", "of round-to-nearest's layer errors remain")
    if measurements:
        last = measurements[-1]
        text = last.data.rpartition("/")[2]
        original = "" if last.original_perplexity is None else f"; the original's is {last.original_perplexity:.3f}"
        yield _render_card(f"{last.perplexity:.3f}", f"perplexity on {text}{original}")
        if last.kl is not None:
            yield _render_card(f"{last.kl:.4f}", "KL divergence from the original, nats per token")


def _render_card(number: str, what: str) -> str:
    return f'<div class="card"><b>{escape(number)}</b>{escape(what)}</div>'


def _render_quality(measurements: list[Measurement]) -> str:
    if not measurements:
        return (
            '<h2>Perplexity and KL divergence</h2><p class="soft">Not measured yet: <code>gptq eval OUT --against '
            f"ORIGINAL --data TEXT --save</code> keeps them in {QUALITY}, and this page shows them then.</p>"
        )
    known_columns = (
        ("perplexity", "perplexity", "{:.3f}"),
        ("original_perplexity", "original's", "{:.3f}"),
        ("gap", "above it", "{:+.2%}"),
        ("kl", "KL, nats per token", "{:.4f}"),
        ("top1_agreement", "top-1 agreement", "{:.2%}"),
    )
    columns = [
        column for column in known_columns if any(measured.number(column[0]) is not None for measured in measurements)
    ]
    head = "".join(f"<th>{title}</th>" for _, title, _ in columns)
    rows = []
    for measured in measurements:
        cells = [f"{escape(measured.data)}<br><small>{escape(_describe_windows(measured))}</small>"]
        for key, _, form in columns:
            number, ends = measured.number(key), (measured.intervals or {}).get(key)
            interval = f"<br><small>{form.format(ends[0])} to {form.format(ends[1])}</small>" if ends else ""
            cells.append("" if number is None else form.format(number) + interval)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    known = any(measured.intervals for measured in measurements)
    note = '<p class="soft">Small: 95 % paired bootstrap intervals over windows.</p>' if known else ""
    return (
        '<h2>Perplexity and KL divergence</h2><div class="wide">'
        f"<table><tr><th>text</th>{head}</tr>{''.join(rows)}</table></div>{note}"
    )


def _describe_windows(measured: Measurement) -> str:
    if measured.windows is None or measured.seq_len is None:
        return ""
    return f"{measured.windows} windows of {measured.seq_len} tokens"


def _render_section(key: str, chart: Chart, record: Record) -> str:
    marks = [
        f'<span><svg viewBox="0 0 10 10"><circle class="c{i}" cx="5" cy="5" r="5"/></svg> {escape(series.name)}</span>'
        for i, series in enumerate(chart.series)
    ]
    key_line = f'<div class="key soft">{"".join(marks)}</div>' if len(marks) > 1 else ""
    return (
        f"<h2>{escape(chart.title)}</h2><p>{escape(_explain_chart(key, record))}</p>{key_line}"
        f'<figure class="wide">{charts.render_svg(chart)}</figure>'
    )


def _explain_chart(key: str, record: Record) -> str:
    layers = record.layers
    if key == "errors" and record.is_rounded:
        return "||W - Q||² / ||W||² of each layer's weight W and what is stored for it, Q."
    if key == "coverage":
        fewest = min(layers, key=lambda layer: (layer.tokens or 0) / (layer.inputs or 1))
        tokens = fewest.tokens or 0
        ratio = f", {tokens / fewest.inputs:.0f} per input" if fewest.inputs else ""
        total = record.sizes.calibration_tokens if record.sizes else None
        which = f"Of {total} calibration tokens those" if total else "Calibration tokens"
        return (
            f"{which} that reached each layer. They choose its codes: with few per input, a layer is fitted to chance. "
            f"Fewest: {fewest.stored} with {tokens}{ratio}."
        )
    return {
        "errors": "||(W - Q) X||² / ||W X||² of each layer, for inputs X that went through the quantized layers before "
        "it. Round-to-nearest is measured on the same inputs.",
        "bits": "Width of the codes alone; scales, zero points and g_idx come on top.",
        "size": "Of the safetensors files. Everything else is embeddings, norms and whatever was not quantized.",
    }[key]


def _render_layers(record: Record) -> str:
    rows = "".join(_render_layer(layer, record) for layer in record.layers)
    return f"<h2>Every layer</h2><p>A layer opens to the histograms of its weights and codes.</p>{rows}"


def _render_layer(layer: LayerRecord, record: Record) -> str:
    facts = [] if layer.bits is None else [f"{layer.bits} bits"]
    if layer.group_size is not None:
        facts.append(f"groups of {layer.group_size}")
    if layer.inputs is not None and layer.outputs is not None:
        facts.append(f"{layer.outputs} x {layer.inputs}")
    if layer.error is not None:
        facts.append(f"error {charts.format_number(layer.error, True)}")
    if layer.rtn_error is not None and not record.is_rounded:
        facts.append(f"round-to-nearest {charts.format_number(layer.rtn_error, True)}")
    if layer.heldout_error is not None:
        facts.append(f"held-out {charts.format_number(layer.heldout_error, True)}")
    pictures = "".join(
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{charts.render_svg(replace(chart, title=key))}</figure>"
        for key, chart in _draw_histograms(layer).items()
    )
    content = f'<div class="pair">{pictures}</div>' if pictures else "<p>This record holds no histograms.</p>"
    summary = f"<summary>{escape(layer.stored)} <span>{escape(', '.join(facts))}</span></summary>"
    return f"<details>{summary}{content}</details>"
