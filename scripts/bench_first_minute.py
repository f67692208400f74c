"""Time what a user meets first: importing, --help, a plan, the first forward, the first measured window, the demo.

    python scripts/bench_first_minute.py                              # this checkout
    python scripts/bench_first_minute.py --against ../old --rounds 3  # and another one, in turn
    python scripts/bench_first_minute.py --stages import help plan    # some of them

Every stage runs in a fresh process with empty folders for HOME and for caches, as on a new machine. The figures are CPU
seconds of the process and its children, medians, and in brackets the elapsed ones, which count on an idle machine.

    import     `import gptq`
    help       `gptq --help`
    plan       `gptq plan` of a checkpoint of Llama 2 70B's shape, of files without contents
    prompt     the first forward of a packed model, 16 tokens, beyond what the second takes; without loading
    token      the same for the first single token after it
    window     the first window of 512 tokens that `gptq eval` measures, beyond what the second takes
    demo       `gptq demo`
"""

import argparse
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("import", "help", "plan", "prompt", "token", "window", "demo")
SHAPE_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
INSIDE = """
import resource, sys, time
def used():
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime, time.perf_counter()
stage, model, text = sys.argv[1:]
import torch
from gptq import load
from gptq.evaluation import evaluate
network, tokens = load(model), torch.arange(3, 515)[None]
marks = []
if stage == "window":
    windows = torch.arange(3, 3 + 3 * 512).reshape(3, 512) % network.config.vocab_size
    marks.append(used())
    evaluate.measure_perplexity(network, windows, lambda done, total: marks.append(used()))
else:
    with torch.no_grad():
        for part in (tokens[:, :16],) * 2 + (tokens[:, :1],) * 2:
            marks += [used(), network(part) and used()]
    marks = marks[:2] + marks[3:4] if stage == "prompt" else marks[4:6] + marks[7:8]
print(*[(b - a) - (c - b) for a, b, c in zip(*marks[:3])])
"""


def write_shape(folder: Path) -> None:
    """A checkpoint of Llama 2 70B's shape in bfloat16, a file for each block, which has a header and no stored byte."""
    hidden, inner, kv, vocab = 8192, 28672, 1024, 32000
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    ends = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    files: list[dict[str, tuple[int, ...]]] = [{f"{name}.weight": shape for name, shape in ends.items()}]
    files += [{f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()} for i in range(80)]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPE_70B))
    places: dict[str, str] = {}
    for number, shapes in enumerate(files):
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        own = f"model-{number:05}.safetensors"
        places |= dict.fromkeys(shapes, own)
        with (folder / own).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def run(stage: str, checkout: Path, inputs: Path, home: Path) -> tuple[float, float]:
    """CPU and elapsed seconds of a stage, in a process that imports the package from `checkout`."""
    cli = [sys.executable, "-m", "gptq"]
    command = {
        "import": [sys.executable, "-c", "import gptq"],
        "help": [*cli, "--help"],
        "plan": [*cli, "plan", str(inputs / "70b"), "--bits", "4"],
        "demo": [*cli, "demo"],
    }.get(stage, [sys.executable, "-c", INSIDE, stage, str(inputs / "packed"), ""])
    own = {"HOME": str(home), "NUMBA_CACHE_DIR": str(home / "numba"), "PYTHONPATH": str(checkout)}
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **own}, cwd=home, capture_output=True, text=True, check=False)
    after, seconds = os.times(), time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{stage} of {checkout} failed:\n{done.stderr[-2000:]}")
    if stage in ("prompt", "token", "window"):
        cpu, seconds = (float(number) for number in done.stdout.split()[-2:])
        return cpu, seconds
    return after.children_user - before.children_user + after.children_system - before.children_system, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the folder of another checkout")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    own = Path(__file__).resolve().parents[1]
    checkouts = [own, *([args.against.resolve()] if args.against else [])]
    found: dict[str, list[list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        write_shape(inputs / "70b")
        model, packed = str(own / "gptq" / "demo_model"), str(inputs / "packed")
        options = ["--method", "rtn", "--group-size", "128"]
        made = [sys.executable, "-m", "gptq", "quantize", model, packed, *options]
        subprocess.run(made, env={**os.environ, "PYTHONPATH": str(own)}, capture_output=True, check=True)
        for stage in args.stages:
            found[stage] = [[] for _ in checkouts]
            for n in range(args.rounds):
                for i, checkout in enumerate(checkouts):
                    home = Path(scratch) / f"{stage}-{n}-{i}"
                    home.mkdir()
                    found[stage][i].append(run(stage, checkout, inputs, home))
            medians = [[statistics.median(x) for x in zip(*runs, strict=True)] for runs in found[stage]]
            print(f"{stage:8}", *(f"{cpu:8.2f} ({seconds:.2f})" for cpu, seconds in medians), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
