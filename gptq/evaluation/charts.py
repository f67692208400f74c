"""One description of a chart, drawn twice: as SVG for a page, whose colours the page's style decides, and as PNG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

HEIGHT = 250  # of an SVG, in its own units, which are pixels where there is room
MIN_POWER = -300  # of ten, on an axis: smaller ones are no normal numbers
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 30, 44  # margins
LIGHT = ("#1f6fc4", "#c2570c", "#2b8a3e")  # a page's --c0, --c1, --c2 on white, which PNGs are drawn on


@dataclass(frozen=True)
class Series:
    """Numbers along the x axis; None where there is none."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """Several series over the same positions 0, 1, 2, ...: bars stacked on each other, or dots joined by a line."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    kind: str  # "bars" or "dots"
    names: list[str] = field(default_factory=list)  # of positions, shown where the pointer rests
    ticks: dict[float, str] = field(default_factory=dict)  # position -> what stands below it
    percent: bool = False
    width: int = 720  # of its SVG

    def tops(self) -> list[float]:
        """The highest number at each position."""
        columns = list(zip(*[s.values for s in self.series], strict=True))
        return [sum(v or 0.0 for v in c) if self.kind == "bars" else max(v or 0.0 for v in c) for c in columns]

    def is_log(self) -> bool:
        """Dots that span more than a factor of twenty."""
        found = [v for s in self.series for v in s.values if v]
        return self.kind == "dots" and bool(found) and max(found) > 20 * min(found)


def label(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def y_ticks(chart: Chart) -> list[float]:
    """Round numbers from the lowest to the highest that the axis shows; at least two."""
    if chart.is_log():
        found = [v for s in chart.series for v in s.values if v]
        lowest = max(math.floor(math.log10(min(found))), MIN_POWER)
        decades = range(lowest, math.ceil(math.log10(max(found))) + 1)
        return [10.0**power for power in decades]
    top = max(chart.tops(), default=0.0) or 1.0
    step = 10.0 ** math.floor(math.log10(top / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 5)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def svg(chart: Chart) -> str:
    """An <svg> element without colours: marks have the classes c0, c1, c2, lines `grid` and `stem`."""
    ticks, log = y_ticks(chart), chart.is_log()
    count = max(len(chart.tops()), 1)
    low, high = (math.log10(ticks[0]), math.log10(ticks[-1])) if log else (0.0, ticks[-1])

    def x(position: float) -> float:
        return LEFT + (chart.width - LEFT - RIGHT) * (position + 0.5) / count

    def y(value: float) -> float:
        height = ((math.log10(value) if log else value) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * height

    box = f'viewBox="0 0 {chart.width} {HEIGHT}" class="w{chart.width}"'
    parts = [f'<svg {box} role="img" aria-label="{escape(chart.title)}">', _text(2, 12, chart.y_label, "start")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{chart.width - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y(tick) + 4, label(tick, chart.percent), "end"))
    parts += [_text(x(at), HEIGHT - BOTTOM + 17, text, "middle") for at, text in chart.ticks.items()]
    parts.append(_text((chart.width + LEFT) / 2, HEIGHT - 6, chart.x_label, "middle"))
    parts += _bars(chart, x, y, count) if chart.kind == "bars" else _dots(chart, x, y)
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bars(chart: Chart, x: Callable[[float], float], y: Callable[[float], float], count: int) -> list[str]:
    width = min(0.9 * (chart.width - LEFT - RIGHT) / count, 90.0)
    parts, base = [], [0.0] * count
    for i, series in enumerate(chart.series):
        shapes = []
        for at, value in enumerate(series.values):
            if not value:
                continue
            foot, base[at] = y(base[at]), base[at] + value
            path = f"M{x(at) - width / 2:.1f} {foot:.1f}V{y(base[at]):.1f}h{width:.1f}V{foot:.1f}z"
            shapes.append((path, _tip(chart, series, at, value)))
        if chart.names:
            parts += [f'<path class="c{i}" d="{path}">{tip}</path>' for path, tip in shapes]
        else:
            parts.append(f'<path class="c{i}" d="{"".join(path for path, _ in shapes)}"/>')
    return parts


def _dots(chart: Chart, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    parts = []
    for at, values in enumerate(zip(*[s.values for s in chart.series], strict=True)):
        found = [y(v) for v in values if v]
        if len(found) > 1:
            parts.append(f'<path class="stem" d="M{x(at):.1f} {min(found):.1f}V{max(found):.1f}"/>')
    radius = 4 if len(chart.names) <= 80 else 2.5
    for i, series in enumerate(chart.series):
        for at, value in enumerate(series.values):
            if value:
                tip = _tip(chart, series, at, value)
                circle = f'<circle class="c{i}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="{radius}">'
                parts.append(f"{circle}{tip}</circle>")
    return parts


def _tip(chart: Chart, series: Series, at: int, value: float) -> str:
    name = chart.names[at] if at < len(chart.names) else str(at)
    return f"<title>{escape(f'{name}, {series.name}: {label(value, chart.percent)}')}</title>"


def png(chart: Chart, path: Path) -> None:
    """The same chart as a picture on white; needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # a name may hold dollars
        _draw(chart, Figure(figsize=(9, 4), layout="constrained"), path)


def _draw(chart: Chart, figure: Any, path: Path) -> None:
    axes = figure.subplots()
    positions = range(len(chart.tops()))
    base = [0.0] * len(positions)
    for colour, series in zip(LIGHT, chart.series, strict=False):
        if chart.kind == "bars":
            heights = [value or 0.0 for value in series.values]
            axes.bar(positions, heights, 0.9 if len(base) > 2 else 0.4, base, color=colour, label=series.name)
            base = [a + b for a, b in zip(base, heights, strict=True)]
        else:
            dots, size = [v or math.nan for v in series.values], 6 if len(positions) <= 80 else 3
            axes.plot(positions, dots, "o", color=colour, markersize=size, label=series.name)
    if chart.kind == "dots":
        columns = [[v for v in c if v] for c in zip(*[s.values for s in chart.series], strict=True)]
        spans = [(at, min(c), max(c)) for at, c in enumerate(columns) if c]
        axes.vlines([s[0] for s in spans], [s[1] for s in spans], [s[2] for s in spans], color="0.8", zorder=0)
    if chart.is_log():
        axes.set_yscale("log")
    ticks = y_ticks(chart)
    axes.set_yticks(ticks, [label(tick, chart.percent) for tick in ticks])
    axes.set_ylim(ticks[0], ticks[-1])
    axes.minorticks_off()
    axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    if len(chart.series) > 1:
        figure.legend(loc="outside lower center", ncols=len(chart.series), frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
