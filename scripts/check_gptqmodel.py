"""Load our GPTQ files with GPTQModel's torch backend on a CPU; compare its logits with ours.

    python scripts/check_gptqmodel.py --model MODEL --text TEXT.txt

MODEL is a small Llama-like checkpoint. The script makes a virtual environment (`--venv`), installs GPTQModel from the
package registry, and quantizes MODEL in every case below. In the environment, GPTQModel then computes the logits of
some windows, in the same dtype as we do. The table shows the largest logit, the largest difference, and for comparison
the difference that rounding the activations makes (ours in bfloat16 against ours in float32).
"""

import sys

import torch
from peer_environment import PACKAGES, check_reader
from safetensors.torch import load_file

from gptq import Override, QuantConfig, load

READER = """
import os, sys
os.cpu_count = lambda: 16  # its thread pool fails on machines with few cores
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file
for folder in sys.argv[2:]:
    model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu")
    with torch.no_grad():
        logits = model.model(input_ids=load_file(sys.argv[1])["input_ids"]).logits
    save_file({"logits": logits.float().contiguous()}, folder + ".logits")
    print("DTYPE", folder, str(next(model.model.parameters()).dtype).removeprefix("torch."), flush=True)
"""
CASES = {
    "4 bits, groups of 32, v1": QuantConfig(bits=4, group_size=32, format="gptq"),
    "4 bits, groups of 32, v2": QuantConfig(bits=4, group_size=32, format="gptq_v2"),
    "4 bits, asymmetric, v2": QuantConfig(bits=4, group_size=32, sym=False, format="gptq_v2"),
    "4 bits, act-order with g_idx, v1": QuantConfig(
        bits=4, group_size=32, desc_act=True, static_groups=False, format="gptq"
    ),
    "8 bits, a group per row, v1": QuantConfig(bits=8, group_size=-1, format="gptq"),
    "2 bits, asymmetric, v2": QuantConfig(bits=2, group_size=16, sym=False, format="gptq_v2"),
    "4 bits, down_proj 8 bits, v1": QuantConfig(
        bits=4, group_size=32, format="gptq", overrides=(Override("down_proj", bits=8, group_size=-1),)
    ),
}


def compare(folders: dict[str, str], ids: torch.Tensor, printed: str) -> int:
    """Compare logits in the dtype that GPTQModel took; print a line per case."""
    dtypes = dict(line.split()[1:] for line in printed.splitlines() if line.startswith("DTYPE"))
    print(f"{'case':36} {'dtype':9} {'largest logit':>13} {'difference':>10} {'rounding':>9}")
    failed = False
    for case, folder in folders.items():
        theirs = load_file(f"{folder}.logits")["logits"]
        with torch.no_grad():
            ours = load(folder, dtype=dtypes[folder], device="cpu")(input_ids=ids).logits.float()
            exact = load(folder, dtype="float32", device="cpu")(input_ids=ids).logits
            half = load(folder, dtype="bfloat16", device="cpu")(input_ids=ids).logits.float()
        difference, rounding = float((theirs - ours).abs().max()), float((half - exact).abs().max())
        print(f"{case:36} {dtypes[folder]:9} {float(ours.abs().max()):13.3f} {difference:10.4f} {rounding:9.4f}")
        failed |= difference > 3 * rounding
    print("a difference is more than rounding" if failed else "all within rounding of the activations")
    return int(failed)


if __name__ == "__main__":
    description = (__doc__ or "").splitlines()[0]
    sys.exit(check_reader(description, "gptqmodel-venv", PACKAGES["gptqmodel"], CASES, READER, compare))
