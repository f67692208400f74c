"""Loads our GPTQ files with GPTQModel's torch backend on a CPU and compares its logits with ours.

    python scripts/check_gptqmodel.py --model MODEL --text TEXT.txt

MODEL is a small Llama-like checkpoint. The script makes an environment (`--venv`), installs GPTQModel from the package
registry, quantizes MODEL in every case below, and has GPTQModel compute the logits of some windows in that environment.
Both sides run in the same dtype; the table shows the largest difference beside the largest logit and what rounding the
activations alone comes to (ours in bfloat16 against ours in float32).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gptq import Override, QuantConfig, load, quantize

PACKAGES = ("gptqmodel==7.7.0", "optimum==2.3.0")
THEIRS = """
import os, sys
os.cpu_count = lambda: 16  # its pool of threads refuses machines with few cores
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


def make_environment(venv: Path) -> Path:
    """An environment with GPTQModel; its build wants torch to be there first."""
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, "setuptools", "wheel", "packaging", "ninja", "numpy", "pybind11"], check=True)
        subprocess.run([*pip, "--no-build-isolation", *PACKAGES], check=True)
        (venv / "ready").touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a small checkpoint")
    parser.add_argument("--text", required=True, help="calibration text, a .txt file")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "gptqmodel-venv")
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
        on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        printed = subprocess.run(command, env=on_cpu, capture_output=True, text=True)
        if printed.returncode:
            print(printed.stdout[-2000:], printed.stderr[-2000:], file=sys.stderr)
            return 1
        dtypes = dict(line.split()[1:] for line in printed.stdout.splitlines() if line.startswith("DTYPE"))
        return compare(folders, dtypes, ids)


def compare(folders: dict[str, str], dtypes: dict[str, str], ids: torch.Tensor) -> int:
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
    sys.exit(main())
