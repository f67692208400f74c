"""Time a whole run by stage in CPU seconds, against the floor that its arithmetic sets; beside another checkout too.

    python scripts/bench_quantize.py [--efforts plain,fast,balanced] [--width 1024 ...] [--json FILE] [--plot FILE.png]
    python scripts/bench_quantize.py --efforts fast --against ../old --repeat 3      # both packages in turns

The model is a Llama with random bfloat16 weights, one in a thousand of them large, so that scales and column order
matter; the calibration tokens are random too. The floor counts the necessary operations of each stage, at the rate of
large matrix products in the dtype that the stage can use (float32, or bfloat16 with float32 sums where forwards run in
bfloat16). The rate is measured before and after each run, and the better one counts:

    products    2 x parameters x tokens, once
    Hessian     tokens x n^2 for each distinct input of n values       a symmetric product, half of it computed
    factorize   n^3 / 3 for each
    solve       r n^2 for each layer of r outputs

`forward` is what the model's forwards take beside products of layers and attention; `correct` includes the division of
the drift. Each effort runs in its own process. Its peak resident memory (VmHWM) is reported beside that of importing
the packages alone. `plain` is GPTQ in natural order on the smallest grid that clips nothing; `default` has the default
order and grid search, but neither sweeps nor a second stream; the others are the package's own levels. Times are
exclusive: a stage's time does not include other stages that it calls. All times and rates are those of the CPU, of all
threads together, because other work on a machine changes the time on the clock; `clock` is that one. The script
measures by wrapping the package's functions; the package has no timers.
"""

import argparse
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product as product_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.compute.matmul import product

PLAIN = {"search": False, "desc_act": False, "sweeps": 0, "two_streams": False, "tune_steps": 0}
EFFORTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "default": PLAIN | {"search": True, "desc_act": True},
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
}
STAGES = ("start", "plan", "read", "products", "attention", "forward", "Hessian", "held out", "factorize", "correct",
          "solve", "sweep", "figures", "dequantize", "histograms", "pack", "checksums", "write", "other")  # fmt: skip
TIMED = {  # module -> function (or Class.method) -> the stage that its time counts for
    "torch.nn.functional": {"linear": "products", "scaled_dot_product_attention": "attention"},
    "gptq.compute.matmul": {"_onednn_linear": "products"},
    "gptq.pipeline.quantize": {"plan_checkpoint": "plan", "find_enough_windows": "plan", "write_files": "write"},
    "gptq.models.weights": {
        "WeightStream.read": "read", "WeightStream.weight": "read", "WeightStream.set_weight": "dequantize",
    },
    "gptq.models.forward": {"PausableForward.advance": "forward"},
    "gptq.models.attention": {"attend": "attention"},
    "gptq.solver.hessian": {
        "HessianAccumulator._add": "Hessian", "HessianAccumulator.take": "Hessian", "HeldOut.add": "held out",
        "HeldOut._known_means": "held out",
    },
    "gptq.pipeline.layer_inputs": {"blend_hessians": "Hessian", "_factorize": "factorize", "Drift.for_rows": "correct"},
    "gptq.pipeline.layer": {"weight_histogram": "histograms", "find_corrections": "correct", "_drift_of": "Hessian"},
    "gptq.pipeline.row_tiles": {"_solve_tile": "solve", "refine": "sweep", "_sum_errors": "figures"},
    "gptq.solver.codes": {"Codes.weight": "dequantize"},
    "gptq.pipeline.block": {"sha256": "checksums", "code_histogram": "histograms"},
    "gptq.formats": {"encode": "pack"},
    "gptq.checkpoint.writer": {"ShardWriter.write": "write", "ShardWriter.close": "write", "ShardWriter.sync": "write"},
}  # fmt: skip
CHECKOUT = Path(__file__).resolve().parents[1]
WINDOWS, TOKENS, GROUP, BITS, SEED = 32, 512, 128, 4, 0


class Clock:
    """Seconds by stage, each without the stages called inside it."""

    def __init__(
        self,
        timed: Mapping[str, Mapping[str, str]] = TIMED,
        stages: Sequence[str] = STAGES,
        now: Callable[[], float] = time.process_time,
    ) -> None:
        """`timed` maps modules and their functions to one of `stages`; `now` is the clock."""
        self.seconds: dict[str, float] = dict.fromkeys(stages, 0.0)
        self._timed, self._now = timed, now
        self._running = ["other"]
        self._since = now()

    def switch(self) -> None:
        now = self._now()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._running.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        return wrapper

    def wrap_package(self) -> None:
        """Time the functions from now on; another version of the package may lack some."""
        for module_name, functions in self._timed.items():
            module = sys.modules.get(module_name)
            for path, stage in functions.items():
                owner_name, _, name = path.rpartition(".")
                owner = getattr(module, owner_name, None) if owner_name else module
                if not hasattr(owner, name):
                    continue
                setattr(owner, name, self.timed(getattr(owner, name), stage))


def make_model(folder: Path, width: int, blocks: int, intermediate: int, vocabulary: int) -> None:
    """Write a random Llama with four query heads per key head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(width // 64, 4)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(SEED)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            values = torch.randn(parameter.shape, generator=draw) / parameter.shape[1] ** 0.5
            if "embed" not in name:
                values *= 1 + 9 * (torch.rand(parameter.shape, generator=draw) < 1e-3)
        else:  # norms with some channels much larger than others, as in trained models
            values = torch.exp(torch.randn(parameter.shape, generator=draw))
        parameter.data.copy_(values)
    model.bfloat16().save_pretrained(folder)


def calibration_tokens(windows: int, tokens: int, vocabulary: int) -> Tensor:
    """Random tokens (windows, tokens); low numbers are more frequent, as common words are in text."""
    draw = torch.Generator().manual_seed(SEED + 1)
    return (torch.rand(windows, tokens, generator=draw) ** 3 * (vocabulary - 3)).long() + 3


def work(shapes: dict[str, tuple[int, int]], tokens: int) -> dict[str, float]:
    """FLOPs by stage for a model's layers, shapes (outputs, inputs) by name."""
    inputs = {}  # size of each distinct input: q, k and v share one, and so do gate and up
    for name, (_, columns) in shapes.items():
        block, _, own = name.rpartition(".")
        same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(own, own)
        inputs[f"{block}.{same}"] = columns
    return {
        "products": 2.0 * tokens * sum(rows * columns for rows, columns in shapes.values()),
        "Hessian": float(tokens * sum(n**2 for n in inputs.values())),
        "factorize": sum(n**3 / 3 for n in inputs.values()),
        "solve": float(sum(rows * columns**2 for rows, columns in shapes.values())),
    }


def peak_memory() -> float:
    """The peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024.0 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def run_child(model: Path, effort: str, windows: int, tokens: int, batch_size: int | None) -> None:
    """Quantize in this process; print the measurements as JSON on the last line."""
    from gptq import QuantConfig
    from gptq.checkpoint.reader import Source
    from gptq.pipeline import quantize as quantize_module

    base = peak_memory()
    clock = Clock()
    clock.seconds["start"] = time.process_time()
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    given = calibration_tokens(windows, tokens, vocabulary)
    stored = Source(model).tensors
    config = QuantConfig(bits=BITS, group_size=GROUP, format="pack-quantized", **EFFORTS[effort])
    with tempfile.TemporaryDirectory() as work_folder:
        clock.wrap_package()
        clock.switch()
        clock.seconds["other"] = 0.0
        start, used = time.perf_counter(), time.process_time()
        result = quantize_module.quantize(
            model, Path(work_folder) / "out", config, calibration=given, batch_size=batch_size
        )
        seconds, used = time.perf_counter() - start, time.process_time() - used
        clock.switch()
        digest = hashlib.sha256()
        for file in sorted((Path(work_folder) / "out").glob("*.safetensors")):
            digest.update(file.read_bytes())
    layers = [layer.name for layer in result.layers]
    print(
        json.dumps(
            {
                "effort": effort,
                "seconds": used,
                "clock": seconds,
                "bytes": digest.hexdigest(),
                "stages": clock.seconds,
                "peak": peak_memory(),
                "imports": base,
                "error": sum(layer.error for layer in result.layers) / len(layers),
                "shapes": {name: stored[f"{name}.weight"].shape for name in layers},
                "threads": torch.get_num_threads(),
            }
        )
    )


def product_rate(kind: torch.dtype) -> float:
    """Floating-point operations per CPU second of large products: the best of a second's repetitions."""
    A, B, n = torch.ones(1536, 1536, dtype=kind), torch.ones(1536, 1536, dtype=kind), 1536
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < 1:
        start = time.process_time()
        product(A, B)
        best = min(best, time.process_time() - start)
    return 2 * n**3 / best


def measure(model: Path, effort: str, args: argparse.Namespace, checkout: Path = CHECKOUT) -> dict[str, Any]:
    """Run an effort in its own process, between two measurements of the product rate; add the floor."""
    from transformers import AutoConfig

    from gptq.__main__ import ENVIRONMENT
    from gptq.models.hf_config import choose_dtype

    dtype = choose_dtype("auto", AutoConfig.from_pretrained(model), torch.device("cpu"))
    rates: dict[torch.dtype, float] = {}
    command = [sys.executable, __file__, "--child", effort, "--model", str(model)]
    command += ["--windows", str(args.windows), "--tokens", str(args.tokens)]
    command += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    environment = ENVIRONMENT | os.environ | {"PYTHONPATH": str(checkout)}  # as the command sets it
    for turn in (0, 1):
        for kind in {dtype, torch.float32}:
            rates[kind] = max(rates.get(kind, 0.0), product_rate(kind))
        if not turn:
            printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    flops = work({name: tuple(shape) for name, shape in found.pop("shapes").items()}, args.windows * args.tokens)
    rate_of = {"products": rates[dtype], "Hessian": rates[dtype]}
    floor = {stage: count / rate_of.get(stage, rates[torch.float32]) for stage, count in flops.items()}
    found |= {"flops": flops, "floor": floor, "rates": {str(kind): rate for kind, rate in rates.items()}}
    return found


def rows_of(run: dict[str, Any]) -> Iterator[str]:
    """Lines of the table: CPU seconds of each stage beside its floor, total and memory."""
    floor = run["floor"]
    for stage in STAGES:
        least = f"{floor[stage]:8.2f}" if stage in floor else " " * 8
        yield f"  {stage:10}{run['stages'][stage]:8.2f} s{least}"
    total, least_total = run["seconds"], sum(floor.values())
    yield f"  {'run':10}{total:8.2f} s{least_total:8.2f}   {total / least_total:.2f} x the floor"
    yield f"  {'clock':10}{run['clock']:8.2f} s"
    yield f"  peak memory {run['peak'] / 1e6:.0f} MB, of which imports {run['imports'] / 1e6:.0f} MB"


def compare(runs: list[dict[str, Any]], effort: str) -> Iterator[str]:
    """Lines that set both checkouts' runs of an effort side by side: medians, and the ratio of each pair."""
    now, old = ([one for one in runs if (one["effort"], one["old"]) == (effort, which)] for which in (False, True))
    for stage in STAGES[1:]:
        new, before = (statistics.median(one["stages"][stage] for one in both) for both in (now, old))
        yield f"  {stage:10}{new:8.2f} s{before:8.2f}"
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(now, old, strict=True)]
    new, before = (statistics.median(one["seconds"] for one in both) for both in (now, old))
    alike = "equal" if len({one["bytes"] for one in now + old}) == 1 else "not equal"
    yield f"  {'run':10}{new:8.2f} s{before:8.2f}   ratio of pairs {', '.join(f'{x:.3f}' for x in sorted(ratios))}"
    yield f"  the bytes are {alike}"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.8 * len(runs)), layout="constrained")
    axes = figure.subplots()
    labels = [name for run in runs for name in (run["effort"], "its floor")]
    left = [0.0] * len(labels)
    for number, stage in enumerate(STAGES[1:]):
        widths = [source.get(stage, 0.0) for run in runs for source in (run["stages"], run["floor"])]
        axes.barh(labels if len(set(labels)) == len(labels) else range(len(labels)), widths, left=left, label=stage,
                  color=f"C{number}")  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds, start of the process not counted")
    axes.set_title(f"Time of a run by stage, CPU threads: {runs[0]['threads']}")
    figure.legend(ncols=len(STAGES) - 1, fontsize="small", loc="outside lower center")
    figure.savefig(path, dpi=150)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options for the model and its tokens; shared with bench_peers.py and bench_ranks.py."""
    parser.add_argument("--width", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--intermediate", type=int, default=2944, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=32000, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="per window (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--efforts", default="plain,default,fast,balanced", help="default: %(default)s")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint instead of the random one")
    parser.add_argument("--child", choices=sorted(EFFORTS), help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, metavar="WINDOWS", help="windows in flight (default: all)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each effort, in turns (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the first run of each")
    add_model_options(parser)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this package, in turns")
    args = parser.parse_args()
    if args.child:
        run_child(args.model, args.child, args.windows, args.tokens, args.batch_size)
        return
    efforts = args.efforts.split(",")
    if unknown := set(efforts) - set(EFFORTS):
        parser.error(f"no effort is called {min(unknown)}; there are {', '.join(EFFORTS)}")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        if not args.model:
            make_model(model, args.width, args.blocks, args.intermediate, args.vocabulary)
        checkouts = [CHECKOUT, args.against.resolve()] if args.against else [CHECKOUT]
        runs = []
        for turn, effort in product_of(range(args.repeat), efforts):
            for checkout in checkouts[:: -1 if turn % 2 else 1]:
                runs.append(measure(model, effort, args, checkout) | {"old": checkout != CHECKOUT})
                rates = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in runs[-1]["rates"].items())
                title = (
                    f"{effort}{' of ' + checkout.name if args.against else ''} ({rates}); beside each stage its floor"
                )
                print(title, *rows_of(runs[-1]), sep="\n", flush=True)
        for effort in efforts if args.against else ():
            print(f"{effort}, medians of this checkout and of {args.against.name}", *compare(runs, effort), sep="\n")
    if args.json:
        facts = {"torch": torch.__version__, "cores": os.cpu_count(), "windows": args.windows, "tokens": args.tokens}
        args.json.write_text(json.dumps(facts | {"runs": runs}, indent=1), encoding="utf-8")
    if args.plot:
        draw([run for run in runs if not run["old"]][: len(efforts)], args.plot)


if __name__ == "__main__":
    main()
