"""Load our MLX folders with mlx-lm on Linux, and compare its weights and logits with ours.

    python scripts/check_mlx.py --model MODEL --text TEXT.txt

MODEL is a small Llama-like checkpoint whose layers have multiples of 32 inputs, such as gptq/demo_model. The script
makes a virtual environment (`--venv`), installs mlx and mlx-lm from the package registry, and quantizes MODEL in every
case below. Weights must be equal bit for bit; logits are compared with activations in float32 on both sides.
"""

import sys

import torch
from peer_environment import check_reader
from safetensors.torch import load_file

from gptq import Override, QuantConfig, load
from gptq.inference.quant_linear import QuantLinear

PACKAGES = [["numpy", "mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "safetensors"]]
READER = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file
mx.set_default_device(mx.cpu)
ids = mx.array(load_file(sys.argv[1])["input_ids"])
for folder in sys.argv[2:]:
    model, _ = load_model(Path(folder))
    found = {}
    for name, module in model.named_modules():
        if "scales" in module:
            scales, biases = (module[key].astype(mx.float32) for key in ("scales", "biases"))
            sizes = {"group_size": module.group_size, "bits": module.bits}
            found[name] = np.array(mx.dequantize(module.weight, scales, biases, **sizes))
    model.set_dtype(mx.float32)
    found["logits"] = np.array(model(ids))
    save_file(found, folder + ".theirs")
"""
CASES = {
    f"{bits} bits, {'symmetric' if sym else 'asymmetric'}": QuantConfig(
        bits=bits, group_size=64 if bits % 2 else 32, sym=sym, format="mlx", effort="fast"
    )
    for bits in (2, 3, 4, 5, 6, 8)
    for sym in (True, False)
} | {
    "4 bits, down_proj 8 bits": QuantConfig(
        bits=4, group_size=64, format="mlx", effort="fast", overrides=(Override("down_proj", bits=8, group_size=128),)
    ),
    "4 bits with the head, o_proj of block 0 as it was": QuantConfig(
        bits=4, group_size=64, format="mlx", effort="fast", lm_head=True,
        overrides=(Override(r"layers\.0\..*o_proj", skip=True),),
    ),
}  # fmt: skip


def compare(folders: dict[str, str], ids: torch.Tensor, printed: str) -> int:
    """Compare dequantized weights bit for bit, and logits in float32; print a line per case."""
    print(f"{'case':52} {'largest logit':>13} {'difference':>10}  weights")
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
        largest, difference = float(ours.abs().max()), float((theirs["logits"] - ours).abs().max())
        print(f"{case:52} {largest:13.3f} {difference:10.2e}  {'bit for bit' if alike else 'DIFFER'}")
        failed |= not alike or difference > 1e-4 * largest
    print("there are differences" if failed else "all alike")
    return int(failed)


if __name__ == "__main__":
    sys.exit(check_reader((__doc__ or "").splitlines()[0], "mlx-venv", PACKAGES, CASES, READER, compare))
