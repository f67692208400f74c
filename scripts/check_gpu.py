#!/usr/bin/env python
"""Check gptq on a GPU, in under eight minutes: does it agree with the CPU, and where does the time go?

    scripts/check_gpu.py --out DIR                    on a machine with a GPU
    scripts/check_gpu.py --out DIR --device cpu --toy a dry run of the script itself

Nothing is downloaded: models have random weights. Each part runs in a process of its own within a time limit, so that
a part that fails, hangs or breaks the GPU's context leaves the others alone; what it has found by then is kept. The
parts are

    kernels    the Triton loops of the solver beside whole-tensor operations, a solve and a correction beside the CPU's
    products   packed layers of every format and width beside float64, and their time beside a bfloat16 product
    agreement  a small model from file to file on the CPU and twice on the GPU: equal codes, equal bytes, perplexity
    stages     a model with the shape of Llama-3.1-8B, some blocks of it: seconds by stage, and memory
    decode     that model and its quantized form: tokens per second, seconds per evaluated window, memory

DIR/check_gpu.json has all results. It is printed at the end too, after a table. The exit code is 1 if a part failed or
a result is outside its bound.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

PARTS = {"kernels": 60, "products": 90, "agreement": 120, "stages": 210, "decode": 90}  # seconds at most
LLAMA_8B = {"hidden": 4096, "inter": 14336, "heads": 32, "kv": 8, "vocab": 32000, "windows": 128, "tokens": 2048}
TOY = {"hidden": 64, "inter": 96, "heads": 2, "kv": 1, "vocab": 320, "windows": 8, "tokens": 32}
SHAPES = {False: LLAMA_8B, True: TOY}
BOUNDS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of a product's error, relative to its largest output
LEAST_EQUAL = {"float32": 0.97, "bfloat16": 0.9}  # fraction of codes that are equal on a CPU and on a GPU


class Report:
    """Results of one part, which are written to a file one by one, so that a kill loses none."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, Any] = {"found": {}, "outside": []}

    def add(self, name: str, value: Any) -> None:
        self.values["found"][name] = value
        print(f"    {name}: {_short(value)}", flush=True)
        self.save()

    def check(self, name: str, value: float, at_most: float) -> None:
        self.add(name, value)
        if not value <= at_most:  # NaN is outside too
            self.values["outside"].append(f"{name} is {_short(value)}, the bound {_short(at_most)}")
            self.save()

    def save(self) -> None:
        self._file.write_text(json.dumps(self.values, default=str))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- what parts share -------------------------------------------------------------------------------------------------


def make_llama(folder: Path, shape: dict[str, int], blocks: int, dtype: Any) -> Path:
    """Write a Llama of this shape with random weights; it is made once."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    if (folder / "model.safetensors").is_file():
        return folder
    hidden, inter = shape["hidden"], shape["inter"]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inter, num_attention_heads=shape["heads"], vocab_size=shape["vocab"],
        num_key_value_heads=shape["kv"], num_hidden_layers=blocks, max_position_embeddings=8192,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder)
    few, draw = shape["kv"] * hidden // shape["heads"], torch.Generator().manual_seed(0)
    of_block = {
        "self_attn.q": (hidden, hidden), "self_attn.k": (few, hidden), "self_attn.v": (few, hidden),
        "self_attn.o": (hidden, hidden), "mlp.gate": (inter, hidden), "mlp.up": (inter, hidden),
        "mlp.down": (hidden, inter),
    }  # fmt: skip

    def normal(rows: int, columns: int, size: float = 0.7) -> Any:
        return (torch.randn(rows, columns, generator=draw) * size * columns**-0.5).to(dtype)

    tensors = {
        "model.embed_tokens.weight": normal(shape["vocab"], hidden, 20.0),
        "lm_head.weight": normal(shape["vocab"], hidden, 2.0),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
    }
    for i in range(blocks):
        own = {f"model.layers.{i}.{name}_proj.weight": normal(*size) for name, size in of_block.items()}
        norms = (f"model.layers.{i}.{name}_layernorm.weight" for name in ("input", "post_attention"))
        tensors |= own | {name: torch.ones(hidden, dtype=dtype) for name in norms}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens(count: int, length: int, vocabulary: int, seed: int = 1) -> Any:
    import torch

    return torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gigabytes(device: str) -> dict[str, float]:
    """Peak memory of this process on the GPU and on the host."""
    import torch

    gpu = torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else 0.0
    return {"gpu_gb": gpu, "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def microseconds(work: Callable[[], object], device: str, seconds: float) -> float:
    """Mean time of `work` over about `seconds`, after one time that compiles."""
    work()
    synchronize(device)
    began, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - began < seconds:
        for _ in range(1 if count < 4 else 10):
            work()
            count += 1
        synchronize(device)
    return (time.perf_counter() - began) / count * 1e6


def random_codes(bits: int, outputs: int, inputs: int, columns: int, sym: bool, scattered: bool = False) -> Any:
    """A layer of random codes."""
    import torch

    from gptq.solver import Codes

    rng = torch.Generator().manual_seed(bits)
    shape, g_idx = (outputs, -(-inputs // columns)), (torch.arange(inputs) // columns).int()
    zero = torch.randint(1, 2**bits, shape, generator=rng).to(torch.uint8)
    return Codes(
        codes=torch.randint(2**bits, (outputs, inputs), generator=rng).to(torch.uint8),
        scale=(0.01 * torch.rand(shape, generator=rng) + 0.01).half(),
        zero=torch.full_like(zero, 2 ** (bits - 1)) if sym else zero,
        g_idx=g_idx[torch.randperm(inputs, generator=rng)] if scattered else g_idx,
    )


# --- the parts --------------------------------------------------------------------------------------------------------


def kernels(args: argparse.Namespace, report: Report) -> None:
    import torch

    from gptq import solver
    from gptq.solver import IntegerGrid, inner_loops
    from gptq.solver.error_propagation import divide_by_hessian
    from gptq.solver.grids.affine import AffineGrid
    from gptq.solver.grids.table import IQ4_NL, TableGrid

    rows, columns = (40, 64) if args.toy else (512, 1024)
    rng = torch.Generator().manual_seed(0)
    w, change = torch.randn(columns, rows, generator=rng).to(args.device), 0.05 * torch.randn(128, 128, generator=rng)
    for grid in (
        IntegerGrid(2, False),
        IntegerGrid(3, True),
        IntegerGrid(4, True),
        AffineGrid(4),
        TableGrid(4, IQ4_NL),
    ):
        scale, shift = (x.T.contiguous() for x in solver.fit_groups(w.T.contiguous(), grid, 32))
        size, groups = min(columns, 64), torch.zeros(min(columns, 64), dtype=torch.int64, device=args.device)
        given = w[:size], w[-size:], change[:size, :size].to(args.device), scale, shift, groups, grid
        got, expected = inner_loops.choose_columns(*given), inner_loops.choose_columns_reference(*given)
        report.check(
            f"columns, {type(grid).__name__} of {grid.bits} bits: codes that differ",
            float((got[0] != expected[0]).float().mean()),
            1e-3,
        )
    X, W = torch.randn(3 * columns, columns, generator=rng), torch.randn(rows, columns, generator=rng)
    solved, errors, divided = [], [], []
    for device in ("cpu", args.device):
        H = (X.T @ X / len(X)).to(device)
        factor = solver.factorize(H, solver.act_order(H))
        found = solver.solve(W.to(device), factor, IntegerGrid(4, True), 32, search=True)
        solved.append(found.codes.cpu())
        errors.append(found.error)
        divided.append(divide_by_hessian(W.clone().to(device), factor).cpu())
    report.check("solve: codes that differ from the CPU's", float((solved[0] != solved[1]).float().mean()), 0.03)
    report.check("solve: error above the CPU's", errors[1] / errors[0] - 1, 1e-2)
    off = (divided[1] - divided[0]).norm() / divided[0].norm()
    report.check("correction: difference from the CPU's", float(off), 1e-3)


def products(args: argparse.Namespace, report: Report) -> None:
    import torch

    from gptq import formats
    from gptq.formats import Scheme
    from gptq.inference.quant_linear import QuantLinear

    outputs, inputs = (40, 96) if args.toy else (384, 512)
    cases = [("gptq", bits, sym, False) for bits in (2, 3, 4, 8) for sym in (True, False)]
    cases += [("gptq_v2", 4, False, True)]
    cases += [("pack-quantized", bits, bits != 4, False) for bits in (2, 3, 4, 5, 6, 7, 8)]
    rng = torch.Generator().manual_seed(0)
    for name, bits, sym, scattered in cases:
        layer, scheme = random_codes(bits, outputs, inputs, 32, sym, scattered), Scheme(bits, 32, sym, name, scattered)  # type: ignore[arg-type]
        packed = QuantLinear(formats.encode(layer, scheme), None, scheme, (outputs, inputs)).to(args.device)
        packed.prepare()
        weight = layer.weight().double()
        for dtype, bound in BOUNDS.items():
            worst = 0.0
            for rows in (1, 5, 40, 200):
                x = torch.randn(rows, inputs, generator=rng).to(getattr(torch, dtype))
                exact = x.double() @ weight.T
                with torch.no_grad():
                    got = packed(x.to(args.device)).cpu().double()
                worst = max(worst, float((got - exact).abs().max() / exact.abs().max()))
            kind = f"{name} {bits} bits{'' if sym else ' asym'}{' act-order' if scattered else ''}"
            report.check(f"{kind}, {dtype}: error", worst, bound)
    shape, budget = SHAPES[args.toy], 0.01 if args.toy else 0.1
    sizes = {"q": (shape["hidden"], shape["hidden"]), "up": (shape["inter"], shape["hidden"])}
    sizes["down"] = shape["hidden"], shape["inter"]
    for layer_name, (outputs, inputs) in sizes.items():
        dense = torch.zeros(outputs, inputs, dtype=torch.bfloat16, device=args.device)
        for name, bits in (("gptq", 4), ("pack-quantized", 4), ("pack-quantized", 3)):
            scheme = Scheme(bits, 32, True, name)  # type: ignore[arg-type]
            layer = random_codes(bits, outputs, inputs, 32, True)
            packed = QuantLinear(formats.encode(layer, scheme), None, scheme, (outputs, inputs)).to(args.device)
            packed.prepare()
            for rows in (1, 8, 64, shape["tokens"]):
                x = torch.zeros(rows, inputs, dtype=torch.bfloat16, device=args.device)
                with torch.no_grad():
                    times = {
                        "packed": microseconds(lambda: packed(x), args.device, budget),  # noqa: B023
                        "bfloat16": microseconds(lambda: x @ dense.T, args.device, budget),  # noqa: B023
                    }
                report.add(f"{layer_name} {name} {bits} bits, {rows} rows: microseconds", times)


def agreement(args: argparse.Namespace, report: Report) -> None:
    import torch

    import gptq

    shape = TOY if args.toy else TOY | {"hidden": 128, "inter": 256, "heads": 4, "kv": 2, "windows": 16, "tokens": 128}
    folder = make_llama(args.work / "small", shape, 2, torch.float32)
    given = tokens(shape["windows"], shape["tokens"], shape["vocab"])
    runs: list[tuple[str, int, str, str, dict[str, Any]]] = [
        ("gptq", 4, "fast", "float32", {}),
        ("pack-quantized", 3, "balanced", "float32", {}),
    ]
    runs += [("gptq", 4, "balanced", "bfloat16", {}), ("gptq", 4, "best", "float32", {"tune_steps": 10})]
    for name, bits, effort, dtype, more in runs[:1] if args.toy else runs:
        label = f"{bits} bits, {effort}, {dtype}"
        outs = [args.work / f"{label}, {place}".replace(", ", "-") for place in ("cpu", "gpu", "again")]
        config = gptq.QuantConfig(bits=bits, group_size=32, effort=effort, format=name, **more)  # type: ignore[arg-type]
        for out, device in zip(outs, ("cpu", args.device, args.device), strict=True):
            shutil.rmtree(out, ignore_errors=True)
            gptq.quantize(folder, out, config, calibration=given, device=device, dtype=dtype)
        codes = [codes_of(out) for out in outs[:2]]
        same = sum(int((codes[0][key] == codes[1][key]).sum()) for key in codes[0])
        different = 1 - same / sum(one.numel() for one in codes[0].values())
        bound = 1.0 if effort == "best" else 1 - LEAST_EQUAL[dtype]  # tuning wanders off from the smallest difference
        report.check(f"{label}: codes that differ from the CPU's", different, bound)
        files = [(out / "model.safetensors").read_bytes() for out in outs[1:]]
        report.check(f"{label}: bytes that differ in a second run", float(files[0] != files[1]), 0.0)
        places = {"cpu": (outs[0], "cpu"), "cpu's file": (outs[0], args.device), "gpu": (outs[1], args.device)}
        losses = {place: loss_of(out, device, dtype, shape) for place, (out, device) in places.items()}
        report.add(f"{label}: loss", losses)
        bound = 1e-3 if dtype == "float32" else 2e-2
        report.check(f"{label}: loss on the GPU beside the CPU's", abs(losses["cpu's file"] - losses["cpu"]), bound)


def codes_of(folder: Path) -> dict[str, Any]:
    """The codes of all packed layers of a result."""
    from gptq import formats
    from gptq.checkpoint.reader import Source
    from gptq.formats.packed_layers import packed_layers, read_packed
    from gptq.formats.quantization_config import quantization_of, read_quantization

    source = Source(folder)
    layers = packed_layers(source, read_quantization(folder / "config.json", quantization_of(folder) or {}))
    return {name: formats.decode(read_packed(source, name, one), one.scheme).codes for name, one in layers.items()}


def loss_of(folder: Path, device: str, dtype: str, shape: dict[str, int]) -> float:
    """Mean loss of a model on random tokens."""
    import torch

    import gptq

    ids = tokens(2, shape["tokens"], shape["vocab"], seed=9).to(device)
    with torch.no_grad():
        return float(gptq.load(folder, device=device, dtype=dtype)(ids, labels=ids, use_cache=False).loss)


class Stages:
    """Seconds of a run by stage, without those of stages inside it; the device is waited for at both ends of each."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        from gptq import solver
        from gptq.models.forward import PausableForward
        from gptq.models.weights import WeightStream
        from gptq.pipeline import block, layer, layer_inputs, quantize, row_tiles
        from gptq.pipeline.block_store import BlockStore
        from gptq.solver.hessian import HessianAccumulator

        places: list[tuple[Any, str]] = [
            (quantize, "plan_checkpoint"), (quantize, "_prepare"), (quantize, "_quantize_checkpoint"),
            (quantize, "_copy_unquantized"), (quantize, "write_files"), (PausableForward, "advance"),
            (HessianAccumulator, "_add_waiting"), (HessianAccumulator, "take"), (layer_inputs, "_factorize"),
            (layer, "find_corrections"), (layer, "solve_rows"), (row_tiles, "_sum_errors"), (row_tiles, "refine"),
            (solver, "solve"), (layer, "weight_histogram"), (WeightStream, "weight"),
            (WeightStream, "original_parameter"), (WeightStream, "fill"), (block, "_tune_block"),
            (BlockStore, "commit"), (BlockStore, "wait"),
        ]  # fmt: skip
        kept = [(owner, name, getattr(owner, name)) for owner, name in places]
        try:
            for owner, name, function in kept:
                setattr(owner, name, self._timed(name, function))
            yield
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)

    def _timed(self, name: str, function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(self.device)
                took = time.perf_counter() - began
                self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return call


def stages(args: argparse.Namespace, report: Report) -> None:
    import torch

    import gptq

    shape, blocks = SHAPES[args.toy], 2 if args.toy else 3
    given = tokens(shape["windows"], shape["tokens"], shape["vocab"])
    big, one = (make_llama(args.work / name, shape, n, torch.bfloat16) for name, n in (("big", blocks), ("one", 1)))
    dtype = "float32" if args.device == "cpu" else "auto"

    def run(label: str, folder: Path, effort: Any, windows: Any, measure: bool, **more: Any) -> float:
        out = args.work / f"out-{effort}"
        shutil.rmtree(out, ignore_errors=True)
        timed, began = Stages(args.device), time.perf_counter()
        config = gptq.QuantConfig(group_size=32 if args.toy else 128, effort=effort, format="gptq", **more)
        if measure:
            with timed.measured():
                gptq.quantize(folder, out, config, calibration=windows, device=args.device, dtype=dtype)
            slow = dict(sorted(timed.seconds.items(), key=lambda item: -item[1]))
            report.add(f"{label}: seconds by stage", {k: v for k, v in slow.items() if v > 0.01})
        else:
            gptq.quantize(folder, out, config, calibration=windows, device=args.device, dtype=dtype)
        took = time.perf_counter() - began
        report.add(f"{label}: seconds", took)
        return took

    run("warm-up, 1 block, which compiles", one, "balanced", given[: len(given) // 8], False)
    for effort in ("fast", "balanced"):
        first = run(f"{effort}, 1 block", one, effort, given, False)
        took = run(f"{effort}, {blocks} blocks", big, effort, given, False)
        of_block = (took - first) / (blocks - 1)
        report.add(f"{effort}, 32 blocks by extrapolation: seconds", took + (32 - blocks) * of_block)
        run(f"{effort}, {blocks} blocks, by stage", big, effort, given, True)
        report.add(f"{effort}: memory so far", gigabytes(args.device))
    for steps in () if args.toy else (2, 6):  # the difference are four steps of tuning
        run(f"best, 1 block, {steps} steps", one, "best", given, False, tune_steps=steps)
    report.add("best: memory", gigabytes(args.device))


def decode(args: argparse.Namespace, report: Report) -> None:
    for label, folder in {"bfloat16": args.work / "big", "packed": args.work / "out-fast"}.items():
        report.add(label, speed_of(folder, args))


def speed_of(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Speed of greedy decoding and of evaluation, and memory."""
    import torch

    import gptq

    shape, count = SHAPES[args.toy], 4 if args.toy else 64
    model: Any = gptq.load(folder, device=args.device, dtype="float32" if args.device == "cpu" else "auto")
    ids = tokens(1, min(32, shape["tokens"]), shape["vocab"]).to(args.device)

    def write(more: int) -> float:
        synchronize(args.device)
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=more, min_new_tokens=more, do_sample=False, pad_token_id=0)
        synchronize(args.device)
        return time.perf_counter() - began

    write(2)
    per_token = (write(count + 2) - write(2)) / count
    window = tokens(1, shape["tokens"], shape["vocab"], seed=5).to(args.device)
    with torch.no_grad():
        evaluate = microseconds(lambda: model(window, use_cache=False), args.device, 1.0) / 1e6
    speeds = {"tokens/s": 1 / per_token, "s/window": evaluate}
    return {"blocks": len(model.model.layers), **speeds, **gigabytes(args.device)}


RUN: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "kernels": kernels, "products": products, "agreement": agreement, "stages": stages, "decode": decode,
}  # fmt: skip


# --- the whole check --------------------------------------------------------------------------------------------------


def run_part(name: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own; return what it has found, also if it failed or was stopped."""
    file = args.work / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--device", args.device, "--work", str(args.work)]
    began, problem = time.monotonic(), ""
    log = args.out / f"check_gpu-{name}.log"
    with log.open("w") as errors:
        try:
            process = subprocess.run(
                [*command, *(["--toy"] if args.toy else [])], timeout=limit, stderr=errors, check=False
            )
            problem = f"exit code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
    known = json.loads(file.read_text()) if file.is_file() else {"found": {}, "outside": []}
    if problem:
        lines = log.read_text(errors="replace").strip().splitlines()
        known["failed"] = f"{problem}; {lines[-1][:300] if lines else 'no message'}"
    return {**known, "seconds": round(time.monotonic() - began, 1)}


def machine(device: str) -> dict[str, Any]:
    import torch
    import transformers

    import gptq

    gpu = device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else "none",
        "capability": list(torch.cuda.get_device_capability(device)) if gpu else [],
        "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__,
        "gptq": gptq.__version__, "python": platform.python_version(), "cpus": os.cpu_count(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("check_gpu"), help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder for models, about 8 GB; removed at the end unless given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--seconds", type=float, default=470, help="for everything; later parts are left out")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        report = Report(args.work / f"{args.part}.json")
        RUN[args.part](args, report)
        report.add("memory", gigabytes(args.device))
        return 0
    with tempfile.TemporaryDirectory(prefix="check_gpu") as temporary:
        args.work = args.work or Path(temporary)
        for folder in (args.work, args.out):
            folder.mkdir(parents=True, exist_ok=True)
        return check(args)


def check(args: argparse.Namespace) -> int:
    began = time.monotonic()
    results: dict[str, Any] = {"machine": machine(args.device), "parts": {}}
    for name in args.only.split(","):
        left = args.seconds - (time.monotonic() - began)
        if left < 10:
            results["parts"][name] = {"found": {}, "outside": [], "failed": "no time was left", "seconds": 0}
        else:
            print(f"{name}, at most {min(PARTS[name], left):.0f} s", flush=True)
            results["parts"][name] = run_part(name, args, min(PARTS[name], left))
        (args.out / "check_gpu.json").write_text(json.dumps(results, indent=1))
    bad = [name for name, part in results["parts"].items() if "failed" in part or part["outside"]]
    for name, part in results["parts"].items():
        print(f"\n{name}, {part['seconds']} s: {part.get('failed', 'ran')}")
        print(*(f"    {label:62} {_short(value)}" for label, value in part["found"].items()), sep="\n")
        print(*(f"    OUTSIDE  {text}" for text in part["outside"]), sep="\n")
    print("\n" + json.dumps(results))
    print(f"\n{time.monotonic() - began:.0f} s; {'not right: ' + ', '.join(bad) if bad else 'everything is right'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
