"""Measure each stage's time and a run's memory against width, depth and calibration tokens; compare with theory.

    python scripts/bench_scale.py --json scale.json --plot scale.png

One of the three is varied while the others stay at the middle of their list. Models, tokens and stages are those of
bench_quantize.py; each run has its own process. A slope is the exponent of the varied size, fitted to the upper half of
its values; the theoretical slope counts arithmetic and bytes:

    read, pack, write    bytes of the weights            width^2   depth^1   tokens^0
    forward              2 x weights x tokens            width^2   depth^1   tokens^1
    Hessian              tokens x inputs^2               width^2   depth^1   tokens^1
    factorize            inputs^3                        width^3   depth^1   tokens^0
    solve                outputs x inputs^2              width^3   depth^1   tokens^0
    memory               one block, all activations      between   depth^0   between 0 and 1

A measured slope below theory means that work of lower order still takes most of the time: attention, overhead per
column, fixed costs. Memory is the peak minus that of importing the packages.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_quantize import EFFORTS, GROUP, STAGES, make_model, measure

SHOWN = STAGES[1:-1]
THEORY: dict[str, dict[str, float]] = {
    "width": dict.fromkeys(SHOWN, 2.0) | {"factorize": 3.0, "solve": 3.0},
    "depth": dict.fromkeys(SHOWN, 1.0) | {"memory": 0.0},
    "tokens": dict.fromkeys(SHOWN, 0.0) | {"forward": 1.0, "Hessian": 1.0},
}


def slope(values: list[float], figures: list[float]) -> float:
    """Fit the exponent by least squares in logarithms, over the upper half of the values but at least three."""
    upper = max(len(values) // 2, min(len(values), 3))
    x, y = [math.log(v) for v in values[-upper:]], [math.log(max(f, 1e-9)) for f in figures[-upper:]]
    mean_x, mean_y = sum(x) / upper, sum(y) / upper
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def run_one(width: int, depth: int, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Run one configuration; return seconds by stage, and memory in bytes."""
    own = argparse.Namespace(windows=tokens // args.window, tokens=args.window, batch_size=None)
    with tempfile.TemporaryDirectory() as folder:
        intermediate = -(-width * 23 // (8 * GROUP)) * GROUP  # about Llama's ratio, a multiple of the group size
        make_model(Path(folder), width, depth, intermediate, args.vocabulary)
        found = measure(Path(folder), args.effort, own)
    return {stage: found["stages"][stage] for stage in SHOWN} | {
        "run": found["seconds"],
        "memory": found["peak"] - found["imports"],
    }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every size of every list, the other two at the middle of theirs."""
    lists = {"width": args.widths, "depth": args.depths, "tokens": args.tokens}
    middle = {name: values[len(values) // 2] for name, values in lists.items()}
    found = []
    for vary, values in lists.items():
        for value in values:
            shape = middle | {vary: value}
            figures = run_one(shape["width"], shape["depth"], shape["tokens"], args)
            found.append({"vary": vary, "value": value, **figures})
            print(f"{vary} {value}: {figures['run']:.2f} s, {figures['memory'] / 1e6:.0f} MB", flush=True)
    return found


def columns(runs: list[dict[str, Any]], vary: str) -> tuple[list[float], dict[str, list[float]]]:
    own = [one for one in runs if one["vary"] == vary]
    return [one["value"] for one in own], {key: [one[key] for one in own] for key in (*SHOWN, "run", "memory")}


def print_slopes(runs: list[dict[str, Any]]) -> None:
    print(f"{'slope':12}" + "".join(f"{vary + ' (theory)':>20}" for vary in THEORY))
    for key in (*SHOWN, "memory"):
        cells = []
        for vary, theory in THEORY.items():
            values, figures = columns(runs, vary)
            expected = f"({theory[key]:g})" if key in theory else ""
            cells.append(f"{slope(values, figures[key]):.2f} {expected:>5}")
        print(f"{key:12}" + "".join(f"{cell:>20}" for cell in cells))


def draw(runs: list[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 8), layout="constrained")
    figure.suptitle(title)
    times, memories = figure.subplots(2, 3, height_ratios=[2, 1])
    for (vary, theory), upper, lower in zip(THEORY.items(), times, memories, strict=True):
        values, figures = columns(runs, vary)
        for number, key in enumerate(SHOWN):
            label = f"{key} {slope(values, figures[key]):.1f} ({theory[key]:g})"
            upper.plot(values, figures[key], "o-", color=f"C{number}", label=label)
        lower.plot(values, [size / 1e6 for size in figures["memory"]], "ks-")
        lower.set_ylim(0, 1.1 * max(figures["memory"]) / 1e6)
        for axes in (upper, lower):
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.grid(alpha=0.3)
        upper.set_yscale("log")
        upper.set_title(f"against {vary}")
        upper.legend(title="slope (theory)", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        lower.set_xlabel(vary)
    times[0].set_ylabel("seconds")
    memories[0].set_ylabel("MB above the imports")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048], help="default: %(default)s")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8], help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="default: %(default)s"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--effort", default="balanced", choices=sorted(EFFORTS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    if (
        min(args.widths) % 256
        or min(args.tokens) < args.window
        or min(map(len, (args.widths, args.depths, args.tokens))) < 3
    ):
        parser.error("widths are multiples of 256, tokens are at least a window, and of each there are at least three")
    runs = run(args)
    print_slopes(runs)
    threads = torch.get_num_threads()
    if args.json:
        facts = {"torch": torch.__version__, "cores": os.cpu_count(), "threads": threads, "effort": args.effort}
        args.json.write_text(json.dumps(facts | {"runs": runs}, indent=1), encoding="utf-8")
    if args.plot:
        draw(runs, args.plot, f"One run at 4 bits, effort {args.effort}, {threads} CPU threads")


if __name__ == "__main__":
    main()
