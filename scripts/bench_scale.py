"""Measure each stage's time and a run's memory against width, depth, tokens, experts and vocabulary, beside theory.

    python scripts/bench_scale.py --json scale.json --plot scale.png
    python scripts/bench_scale.py --vary experts vocabulary

One of them is varied while the others stay at the middle of their list. Where the number of experts or the vocabulary
is varied, the model has SMALL_WIDTH. `plan` is the time to plan a checkpoint. Models, tokens and the other stages are
those of bench_quantize.py; each run has its own process. A slope is the exponent of the varied size, fitted to the
upper half of its values; the theoretical slope counts arithmetic and bytes:

    plan                 layers                          width^0   depth^1   tokens^0
    read, pack, write    bytes of the weights            width^2   depth^1   tokens^0
    products             2 x weights x tokens            width^2   depth^1   tokens^1
    Hessian              tokens x inputs^2               width^2   depth^1   tokens^1
    factorize            inputs^3                        width^3   depth^1   tokens^0
    solve, sweep         outputs x inputs^2              width^3   depth^1   tokens^0
    memory               one block, all activations      between   depth^0   between 0 and 1

Against the number of experts, of which a token takes two, all are linear but the forward, whose work is the same.
Against the vocabulary, only the embedding grows, which is read and copied.

A measured slope below theory means that work of lower order still takes most of the time: attention, overhead per
column, fixed costs. Memory is the peak minus that of importing the packages.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_quantize import EFFORTS, GROUP, SEED, STAGES, make_model, measure
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gptq.config import QuantConfig
from gptq.planning.plan import plan_checkpoint

SHOWN = STAGES[1:-1]
SMALL_WIDTH, SMALL_INTERMEDIATE, EXPERTS_PER_TOKEN = 128, 128, 2
THEORY: dict[str, dict[str, float]] = {
    "width": dict.fromkeys(SHOWN, 2.0) | {"plan": 0.0, "factorize": 3.0, "solve": 3.0, "sweep": 3.0},
    "depth": dict.fromkeys(SHOWN, 1.0) | {"memory": 0.0},
    "tokens": dict.fromkeys(SHOWN, 0.0) | dict.fromkeys(("products", "attention", "forward", "Hessian"), 1.0),
    "experts": dict.fromkeys(SHOWN, 1.0) | dict.fromkeys(("products", "attention", "forward"), 0.0),
    "vocabulary": dict.fromkeys(SHOWN, 0.0) | {"read": 1.0, "write": 1.0},
}


def make_mixture(folder: Path, blocks: int, experts: int, vocabulary: int) -> None:
    """Write a random mixture of SMALL_WIDTH; without experts a Llama."""
    if not experts:
        make_model(folder, SMALL_WIDTH, blocks, SMALL_INTERMEDIATE, vocabulary)
        return
    config = Qwen3MoeConfig(
        hidden_size=SMALL_WIDTH, moe_intermediate_size=SMALL_INTERMEDIATE, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=4, num_experts=experts, num_experts_per_tok=EXPERTS_PER_TOKEN,
        vocab_size=vocabulary, max_position_embeddings=4096,
    )  # fmt: skip
    config.update({"head_dim": SMALL_WIDTH // 4})
    torch.manual_seed(SEED)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)


def time_plan(folder: Path) -> float:
    """Return the CPU seconds of planning a checkpoint."""
    began = time.process_time()
    plan_checkpoint(str(folder), QuantConfig(), None, trust_remote_code=False)
    return time.process_time() - began


def slope(values: list[float], figures: list[float]) -> float:
    """Fit the exponent by least squares in logarithms, over the upper half of the values but at least three."""
    upper = max(len(values) // 2, min(len(values), 3))
    x, y = [math.log(v) for v in values[-upper:]], [math.log(max(f, 1e-9)) for f in figures[-upper:]]
    mean_x, mean_y = sum(x) / upper, sum(y) / upper
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def run_one(vary: str, shape: dict[str, int], args: argparse.Namespace) -> dict[str, float]:
    """Run one configuration; return seconds by stage, and memory in bytes."""
    width, depth, tokens = shape["width"], shape["depth"], shape["tokens"]
    own = argparse.Namespace(windows=tokens // args.window, tokens=args.window, batch_size=None)
    with tempfile.TemporaryDirectory() as folder:
        if vary in ("experts", "vocabulary"):
            make_mixture(Path(folder), depth, shape["experts"] if vary == "experts" else 0, shape["vocabulary"])
        else:
            intermediate = -(-width * 23 // (8 * GROUP)) * GROUP  # about Llama's ratio, a multiple of the group size
            make_model(Path(folder), width, depth, intermediate, shape["vocabulary"])
        planned = time_plan(Path(folder))
        found = measure(Path(folder), args.effort, own)
    return {stage: found["stages"][stage] for stage in SHOWN} | {
        "plan": planned,
        "run": found["seconds"],
        "memory": found["peak"] - found["imports"],
    }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every size of the lists that are varied, the others at the middle of theirs."""
    lists = {
        "width": args.widths, "depth": args.depths, "tokens": args.tokens, "experts": args.experts,
        "vocabulary": args.vocabularies,
    }  # fmt: skip
    middle = {name: values[len(values) // 2] for name, values in lists.items()}
    found = []
    for vary in args.vary:
        for value in lists[vary]:
            figures = run_one(vary, middle | {vary: value}, args)
            found.append({"vary": vary, "value": value, **figures})
            print(f"{vary} {value}: {figures['run']:.2f} s, {figures['memory'] / 1e6:.0f} MB", flush=True)
    return found


def columns(runs: list[dict[str, Any]], vary: str) -> tuple[list[float], dict[str, list[float]]]:
    own = [one for one in runs if one["vary"] == vary]
    return [one["value"] for one in own], {key: [one[key] for one in own] for key in (*SHOWN, "run", "memory")}


def print_slopes(runs: list[dict[str, Any]]) -> None:
    theories = {vary: theory for vary, theory in THEORY.items() if any(one["vary"] == vary for one in runs)}
    print(f"{'slope':12}" + "".join(f"{vary + ' (theory)':>20}" for vary in theories))
    for key in (*SHOWN, "memory"):
        cells = []
        for vary, theory in theories.items():
            values, figures = columns(runs, vary)
            expected = f"({theory[key]:g})" if key in theory else ""
            cells.append(f"{slope(values, figures[key]):.2f} {expected:>5}")
        print(f"{key:12}" + "".join(f"{cell:>20}" for cell in cells))


def draw(runs: list[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    theories = {vary: theory for vary, theory in THEORY.items() if any(one["vary"] == vary for one in runs)}
    figure = Figure(figsize=(6 * len(theories), 8), layout="constrained")
    figure.suptitle(title)
    times, memories = figure.subplots(2, len(theories), height_ratios=[2, 1], squeeze=False)
    for (vary, theory), upper, lower in zip(theories.items(), times, memories, strict=True):
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
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128, 256], help="default: %(default)s")
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[2048, 8192, 32768, 131072], help="default: %(default)s"
    )
    parser.add_argument("--vary", nargs="+", choices=THEORY, default=[*THEORY], help="default: all")
    parser.add_argument("--effort", default="balanced", choices=sorted(EFFORTS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    if (
        min(args.widths) % 256
        or min(args.tokens) < args.window
        or min(map(len, (args.widths, args.depths, args.tokens, args.experts, args.vocabularies))) < 3
    ):
        parser.error("widths are multiples of 256, tokens are at least a window, and each list has at least three")
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
