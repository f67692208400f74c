"""Quantize one model with this package and with other GPTQ tools, in turns, on the same tokens; compare times.

    python scripts/bench_peers.py [--peers llm-compressor,gptqmodel] [--rounds 2] [--width 1024 ...] [--json FILE]
    python scripts/bench_peers.py --ours fast,balanced --peers llm-compressor,gptqmodel,auto-round --rounds 1 --steps 2

The second line is enough for memory, which does not depend on the number of AutoRound's steps.

Each tool, this package too, has its own virtual environment, made below --environments with nothing in it but what the
tool requires, because packages that transformers finds and imports take memory. Each run is its own process, from a
safetensors folder to a safetensors folder: 4 bits, symmetric, groups of 128, each tool's own default order and grid.
The model and its tokens are those of bench_quantize.py. Seconds exclude imports; those of the CPU, of all threads, are
changed less by other work on the machine. The peak resident memory (VmHWM) includes imports. Forwards are in bfloat16;
on CPUs without bfloat16 products, where libraries are very slow in it, all tools use float32. Our run has the
environment variables that its command sets. A round runs every tool once; every other round reverses the order.
The paper's own code is not included, because it is in no package registry.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_quantize import add_model_options, calibration_tokens, make_model
from peer_environment import PACKAGES, TORCH, make_environment
from safetensors.torch import save_file
from transformers import AutoConfig

from gptq.__main__ import ENVIRONMENT
from gptq.models.hf_config import choose_dtype

TELL = """
print("MEASURED", json.dumps({"seconds": time.perf_counter() - start[0], "cpu": time.process_time() - start[1],
    "peak": 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))}))
"""
BEGIN = """
import json, os, sys, time
os.cpu_count = lambda: max(16, len(os.sched_getaffinity(0)))  # GPTQModel's thread pool fails on machines with few cores
import torch
from safetensors.torch import load_file
model, tokens, out, steps = *sys.argv[1:4], int(sys.argv[5])
dtype = getattr(torch, sys.argv[4])
"""
ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
RUN_OURS = """
from gptq import QuantConfig, quantize
import gptq.pipeline.quantize
start = time.perf_counter(), time.process_time()
config = QuantConfig(bits=4, group_size=128, format="pack-quantized", **{options})
quantize(model, out, config, calibration=load_file(tokens)["input_ids"])
"""
LEVELS = {OURS: {"sweeps": 0, "two_streams": False, "tune_steps": 0}, "fast": {"effort": "fast"},
          "balanced": {"effort": "balanced"}}  # fmt: skip
CODE = {
    **{level: RUN_OURS.format(options=options) for level, options in LEVELS.items()},
    "llm-compressor": """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM
start = time.perf_counter(), time.process_time()
ids = load_file(tokens)["input_ids"]
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
        shuffle_calibration_samples=False)
loaded.save_pretrained(out, save_compressed=True)
""",
    "gptqmodel": """
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
start = time.perf_counter(), time.process_time()
ids = load_file(tokens)["input_ids"]
loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128), device="cpu", dtype=dtype,
                        backend=BACKEND.TORCH)
loaded.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
loaded.save(out)
""",
    "auto-round": """
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
start = time.perf_counter(), time.process_time()
ids = load_file(tokens)["input_ids"]
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
tool = AutoRound(loaded, AutoTokenizer.from_pretrained(model), bits=4, group_size=128, sym=True, iters=steps,
                 dataset=data, seqlen=ids.shape[1], nsamples=len(ids), device_map="cpu", enable_torch_compile=False)
tool.quantize_and_save(out, format="auto_round")
""",
}


def run(tool: str, python: str, model: Path, tokens: Path, out: Path, steps: int) -> dict[str, float]:
    """Seconds and peak bytes of one run; raises RuntimeError with the end of the tool's output if it fails."""
    command = [python, "-c", BEGIN + CODE[tool] + TELL, str(model), str(tokens), str(out)]
    command.append(str(choose_dtype("auto", AutoConfig.from_pretrained(model), torch.device("cpu"))).partition(".")[2])
    command.append(str(steps))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    if tool in LEVELS:  # PYTHONPATH: the environment may be from another checkout
        environment = ENVIRONMENT | environment | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out.parent)
    lines = [line for line in found.stdout.splitlines() if line.startswith("MEASURED ")]
    if found.returncode or not lines or not any(out.rglob("*.safetensors")):
        raise RuntimeError(f"{tool} failed:\n{found.stdout[-1500:]}\n{found.stderr[-3000:]}")
    measured: dict[str, float] = json.loads(lines[0].removeprefix("MEASURED "))
    return measured


def add_tokenizer(model: Path, vocabulary: int) -> None:
    """Add a tokenizer with one word per token: the other tools require one, although they are given tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2")
    made.save_pretrained(model)


def compare(
    pythons: dict[str, str], model: Path, tokens: Path, rounds: int, steps: int
) -> dict[str, list[dict[str, float]]]:
    """Run all tools in turns; return the measurements of each tool's runs."""
    found: dict[str, list[dict[str, float]]] = {tool: [] for tool in pythons}
    for turn in range(rounds):
        for tool in list(pythons)[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                found[tool].append(run(tool, pythons[tool], model, tokens, Path(folder) / "out", steps))
            last = found[tool][-1]
            print(f"round {turn + 1}: {tool} {last['seconds']:.1f} s, {last['cpu']:.1f} of the CPU, "
                  f"{last['peak'] / 1e6:.0f} MB", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="llm-compressor,gptqmodel", help="default: %(default)s")
    parser.add_argument("--ours", default=OURS, help=f"of {', '.join(LEVELS)} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="of AutoRound for each block (default: %(default)s)")
    default = Path(tempfile.gettempdir()) / "gptq-peers"
    parser.add_argument("--environments", type=Path, default=default, metavar="FOLDER", help="default: %(default)s")
    add_model_options(parser)
    args = parser.parse_args()
    tools = [*args.ours.split(","), *args.peers.split(",")]
    if unknown := set(tools) - set(CODE):
        parser.error(f"no tool is called {min(unknown)}; there are {', '.join(CODE)}")
    own = make_environment(args.environments / "gptq", [[TORCH], ["--editable", str(ROOT)]])
    pythons = {
        tool: own if tool in LEVELS else make_environment(args.environments / tool, PACKAGES[tool]) for tool in tools
    }
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = Path(folder) / "model", Path(folder) / "tokens.safetensors"
        make_model(model, args.width, args.blocks, args.intermediate, args.vocabulary)
        add_tokenizer(model, args.vocabulary)
        save_file({"input_ids": calibration_tokens(args.windows, args.tokens, args.vocabulary)}, tokens)
        found = compare(pythons, model, tokens, args.rounds, args.steps)
    print(f"{'tool':16}{'seconds':>10}{'range':>18}{'x first':>8}{'CPU':>8}{'x first':>8}{'peak MB':>9}")
    for tool, runs in found.items():
        seconds, cpu = ([one[kind] for one in runs] for kind in ("seconds", "cpu"))
        ratios = [
            statistics.median(one[kind] for one in runs) / statistics.median(one[kind] for one in found[tools[0]])
            for kind in ("seconds", "cpu")
        ]
        spread, peak = f"{min(seconds):.1f} to {max(seconds):.1f}", max(one["peak"] for one in runs)
        print(f"{tool:16}{statistics.median(seconds):10.1f}{spread:>18}{ratios[0]:8.2f}"
              f"{statistics.median(cpu):8.1f}{ratios[1]:8.2f}{peak / 1e6:9.0f}")  # fmt: skip
    if args.json:
        facts: dict[str, Any] = {"cores": os.cpu_count(), "windows": args.windows, "tokens": args.tokens}
        args.json.write_text(json.dumps(facts | {"runs": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
