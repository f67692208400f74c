"""Find out how processes share a run: CPU seconds by stage and process, bytes exchanged, and the same bytes out.

    python scripts/bench_ranks.py [--ranks 1,2] [--rounds 2] [--effort balanced] [--width 1024 ...] [--json FILE]

The model and its calibration tokens are those of bench_quantize.py; options are the package's defaults at 4 bits, one
thread per process, started by torchrun. Runs of one and of several processes take turns. The shards of all results must
be equal byte for byte.

Other work on the machine changes the time on the clock, but hardly the CPU seconds that a process uses. So two ratios
are printed: of the time on the clock, whole command and imports included; and of the CPU seconds of one process to
those of the busiest of several, imports left out, which is the speedup where every process has a core of its own and
waits for nothing but work. `exchange` is what sending, receiving and copying costs; its bytes are those that a process
sends to another one by `Ranks`.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_quantize import EFFORTS, TIMED, Clock, add_model_options, calibration_tokens, make_model
from bench_quantize import STAGES as WORK_STAGES
from safetensors.torch import save_file

EXCHANGED = {"gptq.compute.distributed": {"Ranks._broadcast_bytes": "exchange", "Ranks._all_reduce": "exchange"}}
STAGES = [*WORK_STAGES[1:-1], "exchange", "other"]


def count_bytes(function: Callable[..., Any], sent: list[int]) -> Callable[..., Any]:
    """Wrap `Ranks._broadcast_bytes`: add what this process sends to each of the others."""

    def wrapper(ranks: Any, x: Any, owner: int) -> Any:
        sent[0] += x.numel() * x.element_size() * (ranks.size - 1) * (owner == ranks.rank)
        return function(ranks, x, owner)

    return wrapper


def run_worker(report: Path, arguments: list[str]) -> int:
    """Run the command with clocks in it; write CPU seconds, seconds and bytes sent of this process to `report`."""
    from gptq.cli.arguments import main as command
    from gptq.compute.distributed import Ranks
    from gptq.pipeline import quantize as _imports_everything  # noqa: F401

    sent = [0]
    Ranks._broadcast_bytes = count_bytes(Ranks._broadcast_bytes, sent)  # type: ignore[method-assign]
    cpu, clock = (Clock(TIMED | EXCHANGED, STAGES, now) for now in (time.process_time, time.perf_counter))
    for one in (cpu, clock):
        one.wrap_package()
    began, started = time.process_time(), time.perf_counter()
    code = command(arguments)
    for one in (cpu, clock):
        one.switch()
    found: dict[str, Any] = {
        "cpu": cpu.seconds,
        "clock": clock.seconds,
        "sent": sent[0],
        "total": time.process_time() - began,
    }
    found["clock"]["waiting"] = time.perf_counter() - started - found["total"]
    (report / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    return code


def quantize(model: Path, tokens: Path, out: Path, ranks: int, effort: str) -> tuple[float, list[dict[str, Any]]]:
    """Run the command in `ranks` processes; return its seconds, and the measurements of each process."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as report:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        command = [*launcher, __file__, "--worker", report, "quantize", str(model), str(out), "--calibration"]
        began = time.perf_counter()
        subprocess.run(
            [*command, str(tokens), "--device", "cpu", "--effort", effort],
            check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        seconds = time.perf_counter() - began
        return seconds, [json.loads(Path(report, f"{rank}.json").read_text()) for rank in range(ranks)]


def checksum(out: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def print_stages(runs: dict[int, list[dict[str, Any]]]) -> None:
    """Print CPU seconds by stage for every process of each number of processes."""
    columns = [(f"{rank} of {size}", found) for size, own in runs.items() for rank, found in enumerate(own)]
    print(f"{'CPU seconds':14}" + "".join(f"{title:>9}" for title, _ in columns))
    for stage in STAGES:
        print(f"{stage:14}" + "".join(f"{found['cpu'][stage]:9.2f}" for _, found in columns))
    print(f"{'total':14}" + "".join(f"{found['total']:9.2f}" for _, found in columns))
    print(f"{'MB sent':14}" + "".join(f"{found['sent'] / 1e6:9.1f}" for _, found in columns), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(run_worker(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2", help="numbers of processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--effort", default="balanced", choices=sorted(EFFORTS), help="default: %(default)s")
    add_model_options(parser)
    args = parser.parse_args()
    sizes = [int(size) for size in args.ranks.split(",")]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    busiest: dict[int, list[float]] = {size: [] for size in sizes}
    runs: dict[int, list[dict[str, Any]]] = {}
    sums: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = Path(folder, "model"), Path(folder, "tokens.safetensors")
        make_model(model, args.width, args.blocks, args.intermediate, args.vocabulary)
        save_file({"input_ids": calibration_tokens(args.windows, args.tokens, args.vocabulary)}, tokens)
        for number in range(args.rounds):
            for size in sizes[:: -1 if number % 2 else 1]:
                taken, runs[size] = quantize(model, tokens, Path(folder, "out"), size, args.effort)
                seconds[size].append(taken)
                busiest[size].append(max(found["total"] for found in runs[size]))
                sums.add(checksum(Path(folder, "out")))
            print_stages(dict(sorted(runs.items())))
    for size in sizes[1:]:
        clock, cpu = (statistics.median(of[sizes[0]]) / statistics.median(of[size]) for of in (seconds, busiest))
        print(f"{size} processes beside {sizes[0]}: {cpu:.2f} times as fast in CPU seconds, {clock:.2f} on the clock")
    print(f"the bytes are {'equal' if len(sums) == 1 else 'NOT equal'}")
    if args.json:
        facts = {"seconds": seconds, "busiest_cpu_seconds": busiest, "stages": runs, "equal_bytes": len(sums) == 1}
        args.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    sys.exit(len(sums) != 1)


if __name__ == "__main__":
    main()
