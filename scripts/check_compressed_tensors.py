"""Loads our pack-quantized files with llm-compressor's reader (compressed-tensors) and compares its logits with ours.

    python scripts/check_compressed_tensors.py --model MODEL --text TEXT.txt

MODEL is a small Llama-like checkpoint. The script makes an environment (`--venv`), installs llm-compressor from the
package registry, quantizes MODEL in every case below, and has plain transformers with compressed-tensors compute the
logits of some windows in that environment, in float32 on both sides. The weight that it decompresses for each
layer has to be ours bit for bit.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gptq import Override, QuantConfig, load, quantize
from gptq.inference.quant_linear import QuantLinear

PACKAGES = ("llmcompressor==0.14.0.1",)
THEIRS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=load_file(sys.argv[1])["input_ids"]).logits
    weights = {name: m.weight.float().clone() for name, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    save_file({"logits": logits.float().contiguous(), **weights}, folder + ".theirs")
"""
CASES = {
    f"{bits} bits, {'symmetric' if sym else 'asymmetric'}": QuantConfig(
        bits=bits, group_size=4 if bits % 2 else -1, sym=sym, format="pack-quantized"
    )
    for bits in range(2, 9)
    for sym in (True, False)
} | {
    "4 bits, down_proj 8 bits": QuantConfig(
        bits=4, group_size=32, format="pack-quantized", overrides=(Override("down_proj", bits=8, group_size=-1),)
    ),
    "4 bits, o_proj of block 0 as it was": QuantConfig(
        bits=4, group_size=-1, format="pack-quantized", overrides=(Override(r"layers\.0\..*o_proj", skip=True),)
    ),
}


def make_environment(venv: Path) -> Path:
    """An environment with llm-compressor."""
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, *PACKAGES], check=True)
        (venv / "ready").touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a small checkpoint")
    parser.add_argument("--text", required=True, help="calibration text, a .txt file")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "llmcompressor-venv")
    args = parser.parse_args()
    python = make_environment(args.venv)
    with tempfile.TemporaryDirectory() as work:
        folders = {}
        for number, (case, config) in enumerate(CASES.items()):
            folders[case] = str(Path(work) / f"case{number}")
            options = {**config.to_dict(), "num_samples": 32, "seq_len": 128}
            quantize(args.model, folders[case], QuantConfig.from_dict(options), calibration=args.text)
        ids = torch.randint(3, 400, (2, 64), generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": ids}, Path(work) / "input")
        command = [str(python), "-c", THEIRS, str(Path(work) / "input"), *folders.values()]
        printed = subprocess.run(command, capture_output=True, text=True)
        if printed.returncode:
            print(printed.stdout[-2000:], printed.stderr[-2000:], file=sys.stderr)
            return 1
        return compare(folders, ids)


def compare(folders: dict[str, str], ids: torch.Tensor) -> int:
    print(f"{'case':36} {'largest logit':>13} {'difference':>10}  weights")
    failed = False
    for case, folder in folders.items():
        theirs = load_file(f"{folder}.theirs")
        network = load(folder, dtype="float32", device="cpu")
        with torch.no_grad():
            ours = network(input_ids=ids).logits
        layers = {name: m for name, m in network.named_modules() if isinstance(m, QuantLinear)}
        alike = layers.keys() == theirs.keys() - {"logits"} and all(
            torch.equal(layer.weight, theirs[name]) for name, layer in layers.items()
        )
        difference = float((theirs["logits"] - ours).abs().max())
        print(f"{case:36} {float(ours.abs().max()):13.3f} {difference:10.2e}  {'bit for bit' if alike else 'DIFFER'}")
        failed |= not alike or difference > 1e-4
    print("there are differences" if failed else "all alike")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
