#!/usr/bin/env python
"""Tokens per second and memory of a Llama-shaped model: the original in bfloat16 and float32, and packed to fewer bits.

The model is random and written to a temporary folder, quantized by rounding to nearest (speed does not depend on how
codes were chosen), with its output head, and loaded with `gptq.load`. Decoding is greedy `generate` at batch 1, and
the seconds of its first token are taken off; prefill is one forward of a prompt. All models take turns in every
round, and medians over the rounds are printed, so that a slow moment of the machine does not fall on one of them.
"x best original" compares with the faster of the two originals, which on a CPU without bfloat16 products is float32.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gptq import QuantConfig, load, quantize
from gptq.charts import Chart, Series, png
from gptq.linear import QuantLinear

SEED = 0


@dataclass
class Result:
    """Of one model and dtype of activations."""

    name: str
    dtype: str
    bits: int  # 16 or 32: the original
    weight_bytes: int  # everything that is held once the model has run both ways
    layout_bytes: int  # of these, what kernels made for themselves
    decode: float  # tokens per second
    prefill: float


def make_model(folder: Path, args: argparse.Namespace) -> None:
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.blocks,
        num_attention_heads=args.width // 64, num_key_value_heads=max(args.width // 256, 1), head_dim=64,
        vocab_size=args.vocab, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def tensors_of(made: Any) -> Iterator[Tensor]:
    """The tensors that a kernel's layout holds."""
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, dict):
        for value in made.values():
            yield from tensors_of(value)
    elif is_dataclass(made):
        for field in fields(made):
            yield from tensors_of(getattr(made, field.name))


def memory(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of all weights, and of what kernels hold beside the stored tensors; what is shared counts once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    both = dict(held)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            for made in layer._made.values():
                for tensor in tensors_of(made):
                    both[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(both.values()), sum(both.values()) - sum(held.values())


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def measure(model: Any, prompt: Tensor, tokens: int) -> tuple[float, float]:
    """Tokens per second of decoding and of prefill."""
    options = {"do_sample": False, "pad_token_id": 0}
    few = prompt[:, :8]

    def generate(count: int) -> Callable[[], object]:
        return lambda: model.generate(few, max_new_tokens=count, min_new_tokens=count, **options)

    with torch.no_grad():
        decode = (tokens - 1) / (seconds(generate(tokens)) - seconds(generate(1)))
        prefill = prompt.shape[1] / seconds(lambda: model(prompt, logits_to_keep=1))
    return decode, prefill


def run(args: argparse.Namespace) -> list[Result]:
    prompt = torch.randint(0, args.vocab, (1, args.prompt), generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory() as temporary:
        original = Path(temporary) / "original"
        make_model(original, args)
        folders = {16: original}
        for bits in args.bits:
            options: dict[str, Any] = {"method": "rtn", "bits": bits, "group_size": args.group_size, "lm_head": True}
            folders[bits] = Path(temporary) / str(bits)
            quantize(original, folders[bits], QuantConfig.from_dict({**options, "format": "gptq"}))
        names = {b: "original" if b == 16 else f"{b} bits" for b in folders}
        keys = [(bits, dtype) for bits in folders for dtype in ("bfloat16", "float32")]
        models = {(bits, dtype): load(folders[bits], device="cpu", dtype=dtype) for bits, dtype in keys}
        for model in models.values():  # layouts are made and loops compiled before anything is timed
            measure(model, prompt, 2)
        found: dict[Any, list[tuple[float, float]]] = {key: [] for key in models}
        for _ in range(args.rounds):
            for key, model in models.items():
                found[key].append(measure(model, prompt, args.tokens))
        results = []
        for (bits, dtype), model in models.items():
            decode, prefill = (statistics.median(column) for column in zip(*found[bits, dtype], strict=True))
            width = 32 if bits == 16 and dtype == "float32" else bits
            results.append(Result(names[bits], dtype, width, *memory(model), decode, prefill))
    return results


def print_table(results: list[Result]) -> None:
    originals = [r for r in results if r.name == "original"]
    bfloat16 = next(r for r in originals if r.dtype == "bfloat16")
    best = max(r.decode for r in originals)
    fastest = max(r.prefill for r in originals)
    print("| model | activations | weights MB | of it layouts | decode tok/s | x bf16 | x best original | "
          "prefill tok/s | x bf16 | x best original |")  # fmt: skip
    print("| --- " * 10 + "|")
    for r in results:
        print(f"| {r.name} | {r.dtype} | {r.weight_bytes / 1e6:.0f} | {r.layout_bytes / 1e6:.0f} | {r.decode:.2f} | "
              f"{r.decode / bfloat16.decode:.2f} | {r.decode / best:.2f} | {r.prefill:.0f} | "
              f"{r.prefill / bfloat16.prefill:.2f} | {r.prefill / fastest:.2f} |")  # fmt: skip


def draw(results: list[Result], path: Path) -> None:
    names = [r.name for r in results if r.dtype == "bfloat16"]
    series = [
        Series(f"{dtype} activations", [r.decode for r in results if r.dtype == dtype])
        for dtype in ("bfloat16", "float32")
    ]
    ticks: dict[float, str] = dict(enumerate(names))
    png(Chart("Greedy decoding, batch 1", "weights", "tokens per second", series, "dots", names, ticks), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--vocab", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2], choices=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="to decode, 2 or more (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args()
    if args.width < 64 or args.width % 64 or args.tokens < 2:
        parser.error("--width is a multiple of 64, and --tokens at least 2")
    results = run(args)
    print_table(results)
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    print(f"threads: {facts['threads']}, torch {facts['torch']}, CPU: {torch.backends.cpu.get_cpu_capability()}")
    if args.json:
        shape = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
        args.json.write_text(json.dumps({**facts, **shape, "results": [asdict(r) for r in results]}, indent=1))
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
