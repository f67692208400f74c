"""Load our pack-quantized files with compressed-tensors, llm-compressor's reader; compare its logits with ours.

    python scripts/check_compressed_tensors.py --model MODEL --text TEXT.txt

MODEL is a small Llama-like checkpoint. The script makes a virtual environment (`--venv`), installs llm-compressor from
the package registry, and quantizes MODEL in every case below. In the environment, transformers with compressed-tensors
then computes the logits of some windows, in float32 on both sides. Each layer's decompressed weight must equal ours bit
for bit.
"""

import sys

import torch
from peer_environment import check_reader
from safetensors.torch import load_file

from gptq import Override, QuantConfig, load
from gptq.inference.quant_linear import QuantLinear

PACKAGES = [["torch"], ["llmcompressor==0.14.0.1"]]  # steps of pip
READER = """
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


def compare(folders: dict[str, str], ids: torch.Tensor, printed: str) -> int:
    """Compare logits in float32, and dequantized weights bit for bit; print a line per case."""
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
    description = (__doc__ or "").splitlines()[0]
    sys.exit(check_reader(description, "llmcompressor-venv", PACKAGES, CASES, READER, compare))
