"""Quantize a checkpoint of Llama 2 7B's shape inside a memory limit, and compare the time with the arithmetic it takes.

    python scripts/bench_memory.py FOLDER                       # 32 blocks, 13.5 GB of random weights; about 18 GB of disk
    python scripts/bench_memory.py FOLDER --blocks 2            # the same layers, two blocks of them

The checkpoint is made in FOLDER/model, block by block and sharded, unless it is there already. A child process quantizes
it at 4 bits with group size 128 on 8 x 256 random tokens, all else by default, and says what the kernel counted as its
peak resident memory (VmHWM). Before and after that the rate of a float32 matrix product is measured with as many
threads; the floor is the number of floating-point operations that the run cannot do without (see `gptq.cost`),
divided by the better of the two rates. Random weights change no cost but that of reading text.

Set OMP_NUM_THREADS to the number of cores that are free.
"""

import json
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from gptq import memory
from gptq.checkpoint import ShardWriter, TensorInfo
from gptq.config import QuantConfig

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
    """Write it one tensor at a time; weights are as large as initialization makes them, norms are one."""
    folder.mkdir(parents=True)
    tensors = tensors_of(blocks)
    writer = ShardWriter(folder, tensors, SHARD_BYTES)
    draw = torch.Generator().manual_seed(SEED)
    for name, info in tensors.items():
        if len(info.shape) == 1:
            writer.write(name, torch.ones(info.shape, dtype=info.dtype))
        else:  # bfloat16 halves the memory, and the time, of drawing
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


def child(folder: Path, limit: str) -> None:
    """Quantize, and print what it took."""
    from gptq.engine import quantize

    began = time.perf_counter()
    quantize(
        folder / "model", folder / "quantized", QuantConfig(), calibration=random_windows(),
        device="cpu", memory_limit=memory.parse_size(limit),
    )  # fmt: skip
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": memory.peak_resident()}))
