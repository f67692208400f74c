"""Draw charts as SVG: an element that takes its colours from the page's style, or a file on white."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

HEIGHT = 250  # height of an SVG, in SVG units; a unit is a pixel unless the page is too narrow
MIN_POWER = -300  # lowest power of ten on an axis, still a normal float
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 30, 44  # margins
HALF_LETTER = 4  # half the width of a letter, or a little more
HEAD = 40  # height added above the chart if it is a separate file, for the title and the names of the series
ON_WHITE = (  # CSS of a chart in a separate file
    "text { font: 12px system-ui, sans-serif; fill: #5d656d } .grid { stroke: #d9dde1 } .paper { fill: #fff } "
    ".stem { stroke: #d9dde1; stroke-width: 2 } .c0 { fill: #1f6fc4 } .c1 { fill: #c2570c } .c2 { fill: #2b8a3e }"
)


@dataclass(frozen=True)
class Series:
    """A named row of numbers along the x axis; None at positions without a number."""

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
    names: list[str] = field(default_factory=list)  # names of the positions, shown as tooltips
    ticks: dict[float, str] = field(default_factory=dict)  # position -> label below it
    percent: bool = False
    width: int = 720  # width of the SVG

    def column_tops(self) -> list[float]:
        """Return the height of the drawing at each position: the highest number, or the sum of stacked bars."""
        columns = list(zip(*[s.values for s in self.series], strict=True))
        return [sum(v or 0.0 for v in c) if self.kind == "bars" else max(v or 0.0 for v in c) for c in columns]

    def is_log(self) -> bool:
        """Whether the y axis is logarithmic: for dots that span more than a factor of twenty."""
        found = [v for s in self.series for v in s.values if v]
        return self.kind == "dots" and bool(found) and max(found) > 20 * min(found)


def format_number(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def y_ticks(chart: Chart) -> list[float]:
    """Choose at least two round numbers, from the lower to the upper end of the y axis."""
    if chart.is_log():
        found = [v for s in chart.series for v in s.values if v]
        lowest = max(math.floor(math.log10(min(found))), MIN_POWER)
        decades = range(lowest, math.ceil(math.log10(max(found))) + 1)
        return [10.0**power for power in decades]
    top = max(chart.column_tops(), default=0.0) or 1.0
    step = 10.0 ** math.floor(math.log10(top / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 5)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def render_svg(chart: Chart) -> str:
    """Draw an <svg> element without colours: marks have the classes c0, c1, c2, lines `grid` and `stem`."""
    box = f'viewBox="0 0 {chart.width} {HEIGHT}" class="w{chart.width}"'
    return f'<svg {box} role="img" aria-label="{escape(chart.title)}">{_draw_marks(chart)}</svg>'


def render_svg_file(chart: Chart) -> str:
    """Draw the chart for a separate SVG file, on white, below its title and the names of its series."""
    height = HEIGHT + HEAD
    names = "".join(f'<tspan class="c{i}">\u25cf</tspan> {escape(one.name)}   ' for i, one in enumerate(chart.series))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-HEAD} {chart.width} {height}" width="{chart.width}" '
        f'height="{height}"><style>{ON_WHITE}</style><rect class="paper" y="{-HEAD}" width="100%" height="100%"/>'
        f"{_draw_text(2, 14 - HEAD, chart.title, 'start')}"
        f'<text x="2" y="{32 - HEAD}" xml:space="preserve">{names if len(chart.series) > 1 else ""}</text>'
        f"{_draw_marks(chart)}</svg>\n"
    )


def _draw_marks(chart: Chart) -> str:
    ticks, log = y_ticks(chart), chart.is_log()
    count = max(len(chart.column_tops()), 1)
    low, high = (math.log10(ticks[0]), math.log10(ticks[-1])) if log else (0.0, ticks[-1])

    def x(position: float) -> float:
        return LEFT + (chart.width - LEFT - RIGHT) * (position + 0.5) / count

    def y(value: float) -> float:
        height = ((math.log10(value) if log else value) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * height

    parts = [_draw_text(2, 12, chart.y_label, "start")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{chart.width - RIGHT}"/>')
        parts.append(_draw_text(LEFT - 6, y(tick) + 4, format_number(tick, chart.percent), "end"))
    for at, text in chart.ticks.items():
        inside = min(x(at), chart.width - HALF_LETTER * len(text))
        parts.append(_draw_text(inside, HEIGHT - BOTTOM + 17, text, "middle"))
    parts.append(_draw_text((chart.width + LEFT) / 2, HEIGHT - 6, chart.x_label, "middle"))
    parts += _draw_bars(chart, x, y, count) if chart.kind == "bars" else _draw_dots(chart, x, y)
    return "".join(parts)


def _draw_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _draw_bars(chart: Chart, x: Callable[[float], float], y: Callable[[float], float], count: int) -> list[str]:
    width = min(0.9 * (chart.width - LEFT - RIGHT) / count, 90.0)
    parts, base = [], [0.0] * count
    for i, series in enumerate(chart.series):
        shapes = []
        for at, value in enumerate(series.values):
            if not value:
                continue
            foot, base[at] = y(base[at]), base[at] + value
            path = f"M{x(at) - width / 2:.1f} {foot:.1f}V{y(base[at]):.1f}h{width:.1f}V{foot:.1f}z"
            shapes.append((path, _tooltip(chart, series, at, value)))
        if chart.names:
            parts += [f'<path class="c{i}" d="{path}">{tip}</path>' for path, tip in shapes]
        else:
            parts.append(f'<path class="c{i}" d="{"".join(path for path, _ in shapes)}"/>')
    return parts


def _draw_dots(chart: Chart, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    parts = []
    for at, values in enumerate(zip(*[s.values for s in chart.series], strict=True)):
        found = [y(v) for v in values if v]
        if len(found) > 1:
            parts.append(f'<path class="stem" d="M{x(at):.1f} {min(found):.1f}V{max(found):.1f}"/>')
    radius = 4 if len(chart.names) <= 80 else 2.5
    for i, series in enumerate(chart.series):
        own = radius * (1 - i / 4)  # smaller, so that what lies below is seen
        for at, value in enumerate(series.values):
            if value:
                tip = _tooltip(chart, series, at, value)
                circle = f'<circle class="c{i}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="{own:.1f}">'
                parts.append(f"{circle}{tip}</circle>")
    return parts


def _tooltip(chart: Chart, series: Series, at: int, value: float) -> str:
    name = chart.names[at] if at < len(chart.names) else str(at)
    return f"<title>{escape(f'{name}, {series.name}: {format_number(value, chart.percent)}')}</title>"
