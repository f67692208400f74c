"""Quantize a checkpoint of a Llama's shape inside a memory limit; report peak memory, and time against a floor.

    python scripts/bench_memory.py FOLDER               # 32 blocks, 13.5 GB of random weights; some 18 GB of disk
    python scripts/bench_memory.py FOLDER --blocks 2    # the same layers, two blocks of them
    python scripts/bench_memory.py FOLDER --shape 70b --blocks 2 --memory-limit 8GiB    # some 13 GB of disk

The whole model is planned too, from a checkpoint of headers over sparse files, which takes no disk. Memory does not
depend on the number of blocks, so what is said of all of them can be compared with a run of the first.

The checkpoint is written to FOLDER/model, tensor by tensor and sharded, unless it exists. A child process quantizes it
at 4 bits with group size 128 on 8 x 256 random tokens, with defaults otherwise, and reports its peak resident memory
as counted by the kernel (VmHWM). Before and after, the rate of a float32 matrix product is measured with the same
number of threads, for torch's `@` and for the package's own product. The floor is the number of floating-point
operations that the run needs (see gptq/planning/cost.py) divided by the better of the two rates. Weights are random,
which does not change the cost.

Set OMP_NUM_THREADS to the number of free cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gptq.__main__ import ENVIRONMENT
from gptq.calibration.windows import held_out_windows
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.writer import ShardWriter
from gptq.config import QuantConfig, parse_size
from gptq.models.hf_config import choose_dtype
from gptq.pipeline.quantize import quantize
from gptq.pipeline.run import Observer
from gptq.planning import cost, memory
from gptq.planning.plan import plan_checkpoint

CPU = torch.device("cpu")
WINDOWS, TOKENS, SEED = 8, 256, 0
SHARD_BYTES = 2_000_000_000
SHAPES: dict[str, dict[str, Any]] = {  # Llama 2 7B, Llama 3 70B
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def config_of(shape: str, blocks: int) -> LlamaConfig:
    sizes: dict[str, Any] = SHAPES[shape] | ({"num_hidden_layers": blocks} if blocks else {})
    return LlamaConfig(
        **sizes, max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    )  # fmt: skip


def tensors_of(config: LlamaConfig) -> dict[str, TensorInfo]:
    """Names and shapes of a Llama's tensors, in the model's order."""
    with torch.device("meta"):
        parameters = LlamaForCausalLM(config).named_parameters()
    return {name: TensorInfo(torch.bfloat16, tuple(parameter.shape)) for name, parameter in parameters}


def make_checkpoint(folder: Path, config: LlamaConfig, sparse: bool = False) -> None:
    """Write the checkpoint one tensor at a time: weights as at initialization, norms 1; if `sparse`, headers alone.

    The output head stays a hole in its file: zeros, which nothing multiplies with.
    """
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tensors = tensors_of(config)
    writer = ShardWriter(folder, tensors, SHARD_BYTES)
    draw = torch.Generator().manual_seed(SEED)
    for name, info in tensors.items():
        if sparse or name == "lm_head.weight":
            continue
        if len(info.shape) == 1:
            writer.write(name, torch.ones(info.shape, dtype=info.dtype))
        else:  # drawn in bfloat16, which takes half the memory and time
            writer.write(name, torch.empty(info.shape, dtype=info.dtype).normal_(std=0.02, generator=draw))
    writer.abandon()


def random_windows(shape: str) -> Tensor:
    draw = torch.Generator().manual_seed(SEED)
    return torch.randint(0, SHAPES[shape]["vocab_size"], (WINDOWS, TOKENS), generator=draw)


def plan_whole_model(shape: str, config: QuantConfig, limit: int, tokens: memory.Tokens) -> memory.MemoryPlan:
    """Plan all blocks from headers; print what is said of memory."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_checkpoint(model, config_of(shape, 0), sparse=True)
        began = time.perf_counter()
        plan = plan_checkpoint(str(model), config, None, trust_remote_code=False)
        dtype = choose_dtype("auto", plan.hf_config, CPU)
        chosen, says = memory.decide_memory(plan, config, tokens, CPU, dtype, None, limit, None)
        gigabytes, seconds = plan.source.nbytes / 1e9, time.perf_counter() - began
        print(f"the whole model, {len(plan.blocks)} blocks, {gigabytes:.0f} GB, planned in {seconds:.1f} s: {says}")
    return chosen


class FirstBlock(Observer):
    """Records the time at which the first block starts."""

    def started(self, num_blocks: int, weights: int) -> None:
        self.at = time.perf_counter()

    def stage(self, text: str) -> None:
        print(text, file=sys.stderr)

    def prefetched(self, nbytes: int, seconds: float, waited: float) -> None:
        self.ahead = {"ahead_bytes": nbytes, "ahead_seconds": seconds, "ahead_waited": waited}


def child(folder: Path, shape: str, limit: str, config: QuantConfig) -> None:
    """Quantize, and print time and memory as JSON."""
    began, observer = time.perf_counter(), FirstBlock()
    quantize(
        folder / "model", folder / "quantized", config, calibration=random_windows(shape),
        device="cpu", memory_limit=parse_size(limit), observer=observer,
    )  # fmt: skip
    found = {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time(),
        "kernels": observer.at - began,
        "peak": memory.peak_resident_bytes(),
        **observer.ahead,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the checkpoint and the result")
    parser.add_argument("--shape", default="7b", choices=SHAPES, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=0, help="of the checkpoint (default: all)")
    parser.add_argument("--memory-limit", default="3GiB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--effort", default="balanced", choices=["fast", "balanced"], help="default: %(default)s")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = QuantConfig(effort=args.effort)
    if args.child:
        child(args.folder, args.shape, args.memory_limit, config)
        return
    limit = parse_size(args.memory_limit)
    tokens = memory.Tokens(WINDOWS, TOKENS, len(held_out_windows(WINDOWS)))
    planned = plan_whole_model(args.shape, config, limit, tokens)
    model = args.folder / "model"
    if not model.exists():
        make_checkpoint(model, config_of(args.shape, args.blocks))
    plan = plan_checkpoint(str(model), config, None, trust_remote_code=False)
    work = cost.count_work(plan, config, tokens)
    rates = [cost.measure_product_rate(CPU, torch.float32, 3)]
    plain = cost.measure_product_rate(CPU, torch.float32, 1, torch.matmul)
    shutil.rmtree(args.folder / "quantized", ignore_errors=True)
    command = [sys.executable, __file__, str(args.folder), "--memory-limit", args.memory_limit, "--effort", args.effort]
    command += ["--shape", args.shape]
    environment = {**os.environ, **ENVIRONMENT}  # as the command line sets it
    done = subprocess.run([*command, "--child"], check=True, stdout=subprocess.PIPE, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    rates.append(cost.measure_product_rate(CPU, torch.float32, 3))
    plain = max(plain, cost.measure_product_rate(CPU, torch.float32, 1, torch.matmul))
    print(f"{len(plan.blocks)} blocks, {plan.source.nbytes / 1e9:.2f} GB, {torch.get_num_threads()} threads")
    print(f"peak resident memory {found['peak'] / 2**20:,.0f} MiB, limit {limit / 2**20:,.0f} MiB, "
          f"planned for the whole model {planned.peak / 2**20:,.0f} MiB")  # fmt: skip
    print(
        f"time {found['seconds']:,.0f} s, of which {found['kernels']:,.0f} s before the first block; "
        f"{found['cpu']:,.0f} CPU seconds"
    )
    for what, rate in (("torch's product", plain), ("the package's own", max(rates))):
        floor = work.total / rate
        print(
            f"floor {floor:,.0f} s: {work.total / 1e12:,.1f} Tflop at {rate / 1e9:,.1f} Gflop/s ({what}); "
            f"ratio {found['seconds'] / floor:.2f}"
        )
    print(
        f"read ahead {found['ahead_bytes'] / 1e9:.2f} GB in {found['ahead_seconds']:.1f} s, of which "
        f"{found['ahead_seconds'] - found['ahead_waited']:.1f} s were hidden behind the solver"
    )
    if found["peak"] > limit:
        sys.exit("the limit was exceeded")


if __name__ == "__main__":
    main()
