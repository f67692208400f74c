#!/usr/bin/env python
"""Measure tokens per second and memory of a Llama-shaped model: original in bfloat16 and float32, and quantized.

The model has random weights. It is quantized by round-to-nearest, output head included (speed does not depend on the
choice of codes), and loaded with `gptq.load`. Decoding is greedy `generate` at batch size 1 without the time of the
first token; prefill is one forward of a prompt. All models run in turns in every round and medians over the rounds are
printed, so that a slow phase of the machine affects all of them. "x best original" compares with the faster of the two
originals, which is float32 on a CPU without bfloat16 products.

`--llama-cpp` adds llama.cpp on our GGUF files of the same model. It is compiled below --environments from the package
registry, which takes minutes. Layers have the given type; the embedding, which is the output head too, has 8 bits, and
6 beside K types. It rounds activations to int8, and is driven through its C interface, in its own process that sleeps
while the others run.

`--cpu` counts CPU seconds instead of those on the clock, which other work on the machine changes less; for one thread.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from check_llama_cpp import TYPES, Llama, compile_llama
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gptq import QuantConfig, load, quantize
from gptq.formats import gguf_file
from gptq.inference.quant_linear import QuantLinear

SEED = 0


@dataclass
class Result:
    """The measurements of one model in one dtype of activations."""

    name: str
    dtype: str
    bits: int  # 16 or 32 for the original
    weight_bytes: int  # bytes of weights and layouts after decoding and prefill
    layout_bytes: int  # bytes of kernel layouts among them
    decode: float  # tokens per second
    prefill: float  # tokens per second


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """Write a random Llama with tied embeddings in bfloat16."""
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
    elif isinstance(made, dict | list):
        for value in made.values() if isinstance(made, dict) else made:
            yield from tensors_of(value)
    elif is_dataclass(made):
        for field in fields(made):
            yield from tensors_of(getattr(made, field.name))


def memory(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of all weights and layouts, and of the layouts beyond the stored tensors; shared storage counts once."""
    held = [*model.parameters(), *model.buffers()]
    made = [layer._product for layer in model.modules() if isinstance(layer, QuantLinear)]
    state = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    whole = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*held, *tensors_of(made)]}
    return sum(whole.values()), sum(whole.values()) - sum(state.values())


Clock = Callable[[], float]


class Arrivals:
    """A streamer for `generate` that records the times at which the prompt and each token arrive."""

    def __init__(self, now: Clock) -> None:
        self.times: list[float] = []
        self.now = now

    def put(self, _: Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None: ...


def measure(model: Any, prompt: Tensor, now: Clock, tokens: int) -> tuple[float, float]:
    """Tokens per second of decoding, from the first to the last of `tokens` new ones, and of prefill."""
    arrivals = Arrivals(now)
    with torch.no_grad():
        model.generate(prompt[:, :8], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
                       streamer=arrivals)  # fmt: skip
        start = now()
        model(prompt, logits_to_keep=1)
        prefill = prompt.shape[1] / (now() - start)
    _, first, *_, last = arrivals.times
    return (tokens - 1) / (last - first), prefill


Measure = Callable[[int], tuple[float, float]]  # number of tokens to decode -> tokens per second of decode and prefill
Sizes = Callable[[], tuple[int, int]]  # -> bytes of weights and layouts, and of layouts alone


@dataclass
class Contestant:
    """One way of running the model."""

    name: str
    dtype: str
    bits: int
    measure: Measure
    sizes: Sizes


def ours(folders: dict[int, Path], dtypes: list[str], prompt: Tensor, now: Clock) -> Iterator[Contestant]:
    """Load the original and the quantized models in this process."""
    for bits, folder in folders.items():
        for dtype in dtypes:
            model = load(folder, device="cpu", dtype=dtype)
            width = 32 if bits == 16 and dtype == "float32" else bits
            name = "original" if bits == 16 else f"{bits} bits"
            yield Contestant(name, dtype, width, partial(measure, model, prompt, now), partial(memory, model))


class LlamaCpp:
    """A GGUF file of the same model in llama.cpp, in its own process, which waits while the others run."""

    def __init__(self, llama: Llama, file: Path, prompt: Tensor, cpu: bool) -> None:
        self.process = llama.start(file, torch.get_num_threads())
        self.file, self.prompt, self.cpu = file, prompt, cpu

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("llama.cpp was started without pipes")
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def measure(self, tokens: int) -> tuple[float, float]:
        found = self.ask({"prompt": self.prompt[0].tolist(), "tokens": tokens, "cpu": self.cpu})
        return found["decode"], found["prefill"]

    def agreement(self, original: Any) -> float:
        """Correlation of its logits for a short prompt with the original's: about 1 if it is the same model."""
        few = self.prompt[:, :16]
        with torch.no_grad():
            expected = original(few).logits[0, -1].float()
        return float(
            torch.corrcoef(torch.stack([expected, torch.tensor(self.ask({"logits": few[0].tolist()})["logits"])]))[0, 1]
        )


def file_size(file: Path) -> tuple[int, int]:
    return file.stat().st_size, 0


def theirs(args: argparse.Namespace, original: Path, folder: Path, prompt: Tensor) -> Iterator[Contestant]:
    """Make our GGUF files of these types, and load each in llama.cpp."""
    llama = compile_llama(args.environments / "llama.cpp")
    reference = load(original, device="cpu", dtype="bfloat16")
    for kind in args.llama_cpp:
        options, _ = TYPES[kind]
        quantize(original, folder / kind, QuantConfig.from_dict({"method": "rtn", **options}))
        file = folder / kind / gguf_file.FILE
        served = LlamaCpp(llama, file, prompt, args.cpu)
        print(f"llama.cpp {kind}: its logits correlate with the original's by {served.agreement(reference):.4f}")
        yield Contestant(f"llama.cpp {kind}", "int8", options["bits"], served.measure, partial(file_size, file))


def run(args: argparse.Namespace) -> list[Result]:
    """Make all models, time them in turns, and return the medians."""
    prompt = torch.randint(0, args.vocab, (1, args.prompt), generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory() as temporary:
        original = Path(temporary) / "original"
        make_model(original, args)
        folders = {16: original}
        for bits in args.bits:
            options: dict[str, Any] = {"method": "rtn", "bits": bits, "group_size": args.group_size, "lm_head": True}
            folders[bits] = Path(temporary) / str(bits)
            quantize(original, folders[bits], QuantConfig.from_dict({**options, "format": "gptq"}))
        contestants = [*ours(folders, args.dtypes, prompt, time.process_time if args.cpu else time.perf_counter)]
        if args.llama_cpp:
            contestants += theirs(args, original, Path(temporary), prompt)
        for contestant in contestants:  # warm up: make layouts and compile loops before the timed rounds
            contestant.measure(2)
        found: list[list[tuple[float, float]]] = [[] for _ in contestants]
        for _ in range(args.rounds):
            for contestant, rates in zip(contestants, found, strict=True):
                rates.append(contestant.measure(args.tokens))
        results = []
        for one, rates in zip(contestants, found, strict=True):
            decode, prefill = (statistics.median(column) for column in zip(*rates, strict=True))
            results.append(Result(one.name, one.dtype, one.bits, *one.sizes(), decode, prefill))
    return results


def print_table(results: list[Result]) -> None:
    originals = [r for r in results if r.name == "original"]
    first = originals[0]  # in bfloat16, unless it was not asked for
    best = max(r.decode for r in originals)
    fastest = max(r.prefill for r in originals)
    print(f"| model | activations | weights MB | of it layouts | decode tok/s | x {first.dtype} | x best original | "
          f"prefill tok/s | x {first.dtype} | x best original |")  # fmt: skip
    print("| --- " * 10 + "|")
    for r in results:
        print(f"| {r.name} | {r.dtype} | {r.weight_bytes / 1e6:.0f} | {r.layout_bytes / 1e6:.0f} | {r.decode:.2f} | "
              f"{r.decode / first.decode:.2f} | {r.decode / best:.2f} | {r.prefill:.0f} | "
              f"{r.prefill / first.prefill:.2f} | {r.prefill / fastest:.2f} |")  # fmt: skip


def draw(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.35 * len(results)), layout="constrained")
    labels = [f"{r.name}, {r.dtype}" for r in results]
    colours = ["C7" if r.name == "original" else "C1" if r.name.startswith("llama.cpp") else "C0" for r in results]
    for axes, values, title in zip(
        figure.subplots(1, 2, sharey=True),
        ([r.decode for r in results], [r.prefill for r in results]),
        ("Greedy decoding, batch 1", "Prefill"),
        strict=True,
    ):
        bars = axes.barh(range(len(results)), values, color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_yticks(range(len(results)), labels)
        axes.set_xlabel("tokens per second")
        axes.set_title(title)
        axes.margins(x=0.15)
    figure.gca().invert_yaxis()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--vocab", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2], choices=[2, 3, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"],
                        help="of activations (default: %(default)s)")  # fmt: skip
    parser.add_argument("--llama-cpp", nargs="+", default=[], choices=TYPES, help="ggml's types of our GGUF files")
    parser.add_argument("--cpu", action="store_true", help="tokens per CPU second; for one thread, on a busy machine")
    default = Path(tempfile.gettempdir()) / "gptq-peers"
    parser.add_argument("--environments", type=Path, default=default, metavar="FOLDER", help="default: %(default)s")
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
        shape = {k: v for k, v in vars(args).items() if k not in ("json", "plot", "environments")}
        args.json.write_text(json.dumps({**facts, **shape, "results": [asdict(r) for r in results]}, indent=1))
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
