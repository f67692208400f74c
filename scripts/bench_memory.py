"""Quantize a checkpoint of Llama 2 7B's shape inside a memory limit; report peak memory, and time against a floor.

    python scripts/bench_memory.py FOLDER               # 32 blocks, 13.5 GB of random weights; some 18 GB of disk
    python scripts/bench_memory.py FOLDER --blocks 2    # the same layers, two blocks of them

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
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from gptq.__main__ import ENVIRONMENT
from gptq.calibration.windows import is_held_out
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.writer import ShardWriter
from gptq.config import QuantConfig, parse_size
from gptq.pipeline.quantize import quantize
from gptq.pipeline.run import Observer
from gptq.planning import cost, memory
from gptq.planning.plan import plan_checkpoint

WINDOWS, TOKENS, SEED = 8, 256, 0
SHARD_BYTES = 2_000_000_000
HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000


def tensors_of(blocks: int) -> dict[str, TensorInfo]:
    """Names and shapes of Llama 2 7B's tensors, in the model's order."""
    square, up, down = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(blocks):
        block = f"model.layers.{number}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": square for name in "qkvo"}
        shapes |= {f"{block}.mlp.gate_proj.weight": up, f"{block}.mlp.up_proj.weight": up}
        shapes |= {f"{block}.mlp.down_proj.weight": down}
        shapes |= {f"{block}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}


def make_checkpoint(folder: Path, blocks: int) -> None:
    """Write the checkpoint one tensor at a time: weights as at initialization, norms 1."""
    folder.mkdir(parents=True)
    tensors = tensors_of(blocks)
    writer = ShardWriter(folder, tensors, SHARD_BYTES)
    draw = torch.Generator().manual_seed(SEED)
    for name, info in tensors.items():
        if len(info.shape) == 1:
            writer.write(name, torch.ones(info.shape, dtype=info.dtype))
        else:  # drawn in bfloat16, which takes half the memory and time
            writer.write(name, torch.empty(info.shape, dtype=info.dtype).normal_(std=0.02, generator=draw))
    writer.close()
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=blocks, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=VOCABULARY, max_position_embeddings=4096, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)


def random_windows() -> Tensor:
    return torch.randint(0, VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(SEED))


class FirstBlock(Observer):
    """Records the time at which the first block starts."""

    def started(self, num_blocks: int, weights: int) -> None:
        self.at = time.perf_counter()

    def stage(self, text: str) -> None:
        print(text, file=sys.stderr)

    def prefetched(self, nbytes: int, seconds: float, waited: float) -> None:
        self.ahead = {"ahead_bytes": nbytes, "ahead_seconds": seconds, "ahead_waited": waited}


def child(folder: Path, limit: str, config: QuantConfig) -> None:
    """Quantize, and print time and memory as JSON."""
    began, observer = time.perf_counter(), FirstBlock()
    quantize(
        folder / "model", folder / "quantized", config, calibration=random_windows(),
        device="cpu", memory_limit=parse_size(limit), observer=observer,
    )  # fmt: skip
    found = {
        "seconds": time.perf_counter() - began,
        "kernels": observer.at - began,
        "peak": memory.peak_resident_bytes(),
        **observer.ahead,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the checkpoint and the result")
    parser.add_argument("--blocks", type=int, default=32, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--memory-limit", default="3GiB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--effort", default="balanced", choices=["fast", "balanced"], help="default: %(default)s")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = QuantConfig(effort=args.effort)
    if args.child:
        child(args.folder, args.memory_limit, config)
        return
    limit = parse_size(args.memory_limit)
    model = args.folder / "model"
    if not model.exists():
        make_checkpoint(model, args.blocks)
    plan = plan_checkpoint(str(model), config, None, trust_remote_code=False)
    held_out = sum(is_held_out(i, WINDOWS) for i in range(WINDOWS))
    work = cost.count_work(plan, config, memory.Tokens(WINDOWS, TOKENS, held_out))
    cpu = torch.device("cpu")
    rates = [cost.measure_product_rate(cpu, torch.float32, 3)]
    plain = cost.measure_product_rate(cpu, torch.float32, 1, torch.matmul)
    shutil.rmtree(args.folder / "quantized", ignore_errors=True)
    command = [sys.executable, __file__, str(args.folder), "--memory-limit", args.memory_limit, "--effort", args.effort]
    environment = {**os.environ, **ENVIRONMENT}  # as the command line sets it
    done = subprocess.run([*command, "--child"], check=True, stdout=subprocess.PIPE, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    rates.append(cost.measure_product_rate(cpu, torch.float32, 3))
    plain = max(plain, cost.measure_product_rate(cpu, torch.float32, 1, torch.matmul))
    print(f"{len(plan.blocks)} blocks, {plan.source.nbytes / 1e9:.2f} GB, {torch.get_num_threads()} threads")
    print(f"peak resident memory {found['peak'] / 2**20:,.0f} MiB, limit {limit / 2**20:,.0f} MiB")
    print(f"time {found['seconds']:,.0f} s, of which {found['kernels']:,.0f} s before the first block")
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
