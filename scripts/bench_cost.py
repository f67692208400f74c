"""Measure how the time of GPTQ's solve grows with the width of a layer, compared with a naive order of the same steps.

    python scripts/bench_cost.py --plot cost.png

Three things are timed in float32 on a layer of R rows and n columns, with one symmetric 4-bit grid per row:

    factorize   the LDL of the Hessian, once per layer                               n^3 / 3    slope 3
    solve       all rows together, with that factor                                  R n^2      slope 2
    naive       each row by itself, a full n x n H^-1 downdated after each column    R n^3      slope 3

A slope is the exponent of n at fixed R, fitted to the upper half of the widths; `--rows 0` makes layers square, which
adds 1 to the last two. Theory counts arithmetic. A measured slope below it means that work of lower order, such as the
overhead per column, still takes most of the time. The naive order is that of OBQ with its columns in a fixed order. It
is timed on 4 rows and extrapolated to R, at widths whose time is below --naive-budget, and starts from H^-1, whose
inversion is not timed. The fraction of codes in those rows that equal the solver's is printed. Set OMP_NUM_THREADS to
the number of free cores: waiting for a busy core distorts the times at small widths.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from gptq import solver
from gptq.solver import IntegerGrid

GRID, SEED = IntegerGrid(bits=4, sym=True), 0
WARM_UPS, RUNS, NAIVE_ROWS = 1, 3, 4
LABELS = {"factorize": "factorize", "solve": "solve", "naive": f"naive order, extrapolated from {NAIVE_ROWS} rows"}
STYLES = {"factorize": "C2s", "solve": "C0o", "naive": "C3^"}  # colour and marker

Point = dict[str, float]  # one width: "width", "rows", seconds by the keys of LABELS, "equal"; the naive ones optional


def width_list(text: str) -> list[int]:
    """Parse at least three widths; return them in ascending order."""
    widths = sorted({int(width) for width in text.split(",")})
    if len(widths) < 3 or widths[0] < 8:
        raise argparse.ArgumentTypeError("takes at least three different widths, of 8 or more")
    return widths


def random_layer(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Random weights (rows, width), and the Hessian (width, width) of inputs that are correlated by common factors."""
    draw = torch.Generator().manual_seed(SEED)
    tokens, causes = 2 * width, width // 8
    mixing = torch.randn(causes, width, generator=draw) / causes**0.5
    X = torch.randn(tokens, causes, generator=draw) @ mixing + torch.randn(tokens, width, generator=draw)
    return torch.randn(rows, width, generator=draw), X.T @ X / tokens


def solve_naively(W: Tensor, inverse_H: Tensor) -> Tensor:
    """Codes of W (rows, columns), solved row by row; inverse_H is (columns, columns)."""
    scales, zeros = solver.fit_groups(W, GRID, W.shape[1])  # (rows, 1)
    codes = torch.empty_like(W)
    for i, w in enumerate(W.clone()):  # (columns,)
        inverse = inverse_H.clone()  # each row eliminates all columns again, which costs the extra factor of n
        scale, zero = scales[i, 0], zeros[i, 0]
        for j in range(len(w)):
            h, pivot = inverse[j].clone(), inverse[j, j].clone()
            codes[i, j] = GRID.quantize(w[j], scale, zero)
            error = (w[j] - GRID.dequantize(codes[i, j], scale, zero)) / pivot
            w[j + 1 :] -= error * h[j + 1 :]
            inverse.addr_(h, h / pivot, alpha=-1)
    return codes


def median_seconds(tasks: dict[str, Callable[[], object]], progress: "tqdm[None]") -> Point:
    """Median seconds of each task; tasks run in turns, so that a slow phase of the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(WARM_UPS + RUNS):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
        progress.update()
    return {name: statistics.median(runs[WARM_UPS:]) for name, runs in seconds.items()}


def measure(rows: int, width: int, with_naive: bool, progress: "tqdm[None]") -> Point:
    """Time the tasks at one width; with_naive also times and checks the naive order."""
    W, H = random_layer(rows, width)
    order = solver.natural_order(H)
    factor = solver.factorize(H, order)
    tasks: dict[str, Callable[[], object]] = {
        "factorize": lambda: solver.factorize(H, order),
        "solve": lambda: solver.solve(W, factor, GRID, group_size=width),
    }
    point: Point = {"width": width, "rows": rows}
    if not with_naive:
        return point | median_seconds(tasks, progress)
    few = W[:NAIVE_ROWS]
    inverse_H = torch.cholesky_inverse(torch.linalg.cholesky(H + factor.ridge * torch.eye(width)))
    point |= median_seconds(tasks | {"naive": lambda: solve_naively(few, inverse_H)}, progress)
    point["naive"] *= rows / NAIVE_ROWS
    codes = solver.solve(W, factor, GRID, group_size=width).codes[:NAIVE_ROWS]
    return point | {"equal": float((solve_naively(few, inverse_H) == codes).float().mean())}


def measure_all(widths: list[int], fixed_rows: int, naive_budget: float) -> list[Point]:
    """Measure all widths; skip the naive order where its expected time exceeds the budget."""
    points: list[Point] = []
    naive_seconds = 0.0  # time of all naive runs at the last width, including the one that compares codes
    with tqdm(total=len(widths) * (WARM_UPS + RUNS), unit="round") as progress:
        for last, width in zip([widths[0], *widths], widths, strict=False):
            progress.set_description(f"width {width}")
            affordable = naive_seconds * (width / last) ** 3 <= naive_budget
            point = measure(fixed_rows or width, width, affordable, progress)
            naive_seconds = point.get("naive", math.inf) * NAIVE_ROWS / point["rows"] * (WARM_UPS + RUNS + 1)
            points.append(point)
    return points


def slope(points: list[Point], name: str) -> float:
    """The exponent fitted to the upper half of the widths, at least three; NaN if fewer were measured."""
    logs = [(math.log(point["width"]), math.log(point[name])) for point in points if name in point]
    logs = logs[-max(3, math.ceil(len(logs) / 2)) :]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope if len(logs) >= 3 else math.nan


def print_table(points: list[Point]) -> None:
    print(" width   rows  factorize s    solve s   naive s *  naive/solve    equal")
    for point in points:
        line = f"{point['width']:>6} {point['rows']:>6} {point['factorize']:>12.4f} {point['solve']:>10.4f} "
        if "naive" in point:
            line += f"{point['naive']:>11.2f} {point['naive'] / point['solve']:>12.0f} {point['equal']:>8.2%}"
        print(line)
    print(f"* extrapolated from {NAIVE_ROWS} rows; equal: the share of codes in those rows that the solver chose too")


def draw(points: list[Point], captions: dict[str, str], theory: dict[str, int], path: Path) -> None:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, style in STYLES.items():
        x, y = zip(*[(point["width"], point[name]) for point in points if name in point], strict=True)
        axes.loglog(x, y, style + "-", label=captions[name])
        axes.loglog(x, [y[-1] * (width / x[-1]) ** theory[name] for width in x], style[:2] + "--", alpha=0.6)
    axes.plot([], [], "--", color="gray", label="theory, through the last point")
    widths = [point["width"] for point in points]
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    rows = "as many rows" if points[0]["rows"] != points[-1]["rows"] else f"{points[0]['rows']} rows"
    axes.set(xlabel="width of the layer (columns)", ylabel="time (seconds)")
    axes.set_title(f"Time to solve a layer of {rows}, float32, CPU threads: {torch.get_num_threads()}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=width_list, default="256,512,1024,2048,4096", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=256, help="of every layer; 0 for square (default: %(default)s)")
    help_text = "skip the naive order where its runs are expected to take longer (default: %(default)s)"
    parser.add_argument("--naive-budget", type=float, default=120, metavar="SECONDS", help=help_text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    if args.rows != 0 and args.rows < NAIVE_ROWS:
        parser.error(f"--rows is 0 or at least {NAIVE_ROWS}")

    points = measure_all(args.widths, args.rows, args.naive_budget)
    square = int(args.rows == 0)
    theory = {"factorize": 3, "solve": 2 + square, "naive": 3 + square}
    slopes = {name: slope(points, name) for name in theory}
    captions = {name: f"{LABELS[name]}: slope {slopes[name]:.2f} (theory {theory[name]})" for name in theory}
    captions = {name: text.replace("slope nan", "too few widths for a slope") for name, text in captions.items()}
    print_table(points)
    print(f"threads: {torch.get_num_threads()}", *captions.values(), sep="\n")
    if args.json:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "naive_rows_timed": NAIVE_ROWS}
        known = {name: value for name, value in slopes.items() if math.isfinite(value)}  # JSON has no NaN
        args.json.write_text(json.dumps(facts | {"points": points, "slopes": known, "theory": theory}, indent=1))
    if args.plot:
        draw(points, captions, theory, args.plot)


if __name__ == "__main__":
    main()
