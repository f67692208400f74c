"""Measure how many tokens the Hessians need: KL divergence against tokens, in the sums alone or in the forward too.

    python scripts/hessian_tokens.py MODEL --calibration first.txt --data second.txt --group-size 32 --json tokens.json
    python scripts/hessian_tokens.py --windows 32 --seq-len 512 --seeds 1          # the model in the package

Two ways to a smaller sum: every n-th token of each window, with the forward on all of them; or fewer windows, which
saves the forward too. CPU seconds are those of quantization, of all threads. Each result is saved at once; a second
run computes what is missing.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq import QuantConfig, calibration, compare, demo, quantize
from gptq.models.hf_config import read_tokenizer
from gptq.solver.hessian import HessianAccumulator, flatten_tokens


@contextmanager
def every(step: int) -> Iterator[None]:
    """Let the Hessians take every `step`-th token of a window."""
    add = HessianAccumulator.add

    def add_some(self: HessianAccumulator, x: Tensor, drift: Tensor | None = None) -> None:
        rows, drifts = (None if t is None else flatten_tokens(t)[::step] for t in (x, drift))
        if rows is not None:
            add(self, rows, drifts)

    HessianAccumulator.add = add_some  # type: ignore[method-assign]
    try:
        yield
    finally:
        HessianAccumulator.add = add  # type: ignore[method-assign]


def measure(args: argparse.Namespace, texts: tuple[str, str], step: int, windows: int, seed: int) -> dict[str, float]:
    """KL divergence of one result, and the CPU seconds that it took."""
    options: dict[str, Any] = {
        "bits": args.bits, "group_size": args.group_size, "num_samples": windows, "seq_len": args.seq_len,
        "seed": seed, "effort": args.effort,
    }  # fmt: skip
    tokenizer = read_tokenizer(args.model, trust_remote_code=False)
    drawn = calibration.draw_windows(
        calibration.documents(texts[0], "train"), tokenizer, windows, args.seq_len, seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        with every(step):
            config = QuantConfig.from_dict(options)
            quantize(args.model, Path(folder) / "out", config, calibration=drawn, dtype=args.dtype)
        seconds = time.process_time() - began
        out, measured = Path(folder) / "out", args.measured
        found = compare(out, args.model, texts[1], seq_len=args.seq_len, windows=measured, dtype=args.dtype)
    return {"kl": found.kl, "cpu": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=demo.MODEL)
    parser.add_argument("--calibration", help="default: half of the demo's text")
    parser.add_argument("--data", help="default: the other half")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--measured", type=int, default=64, help="windows")
    parser.add_argument("--shares", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("hessian_tokens.json"))
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder) / name for name in ("calibration.txt", "measured.txt")]
        for path, text in zip(texts, demo.read_texts(), strict=True):
            path.write_text(text)
        given = (args.calibration or str(texts[0]), args.data or str(texts[1]))
        cases = [(share, args.windows) for share in args.shares]
        cases += [(1, args.windows // share) for share in args.shares if share > 1]
        for seed in range(args.seeds):
            for step, windows in cases:
                key = f"every {step}, {windows} windows, seed {seed}"
                if key not in results:
                    results[key] = measure(args, given, step, windows, seed)
                    args.json.write_text(json.dumps(results, indent=1))
    print(f"{'tokens in H':>12} {'in the forward':>15} {'KL':>8}  {'of each seed':30} CPU s")
    for step, windows in cases:
        own = [results[f"every {step}, {windows} windows, seed {seed}"] for seed in range(args.seeds)]
        kl, cpu = [one["kl"] for one in own], statistics.mean(one["cpu"] for one in own)
        tokens, each = windows * args.seq_len, ", ".join(f"{x:.4f}" for x in kl)
        print(f"{tokens // step:12,} {tokens:15,} {statistics.mean(kl):8.4f}  {each:30} {cpu:.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
