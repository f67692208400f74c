"""Let mlx-lm compute a tiny random model of every type that it and transformers know, and compare its logits with ours.

    python scripts/sweep_mlx.py
    python scripts/sweep_mlx.py llama qwen3_moe

Each model is built as in sweep_architectures.py, rounded to nearest at 4 bits in groups of 32 in MLX's format, and run
on 24 tokens, in float32 on both sides. The script makes a virtual environment (`--venv`) with mlx and mlx-lm, prints a
line for each model type, and then the types whose logits differ by less than 1e-4 of the largest: those that
`formats/compatibility.py` lists. Models may differ from real ones of their type in what a configuration turns on.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
import transformers
from check_mlx import PACKAGES
from peer_environment import make_environment
from safetensors.torch import load_file, save_file
from sweep_architectures import kinds_of, random_ids, small_model

from gptq import InputError, QuantConfig, load, quantize

CLOSE = 1e-4  # difference of logits, relative to the largest
LIST = """
import pkgutil
import mlx_lm.models
from mlx_lm.utils import MODEL_REMAPPING
print(*(name for _, name, _ in pkgutil.iter_modules(mlx_lm.models.__path__)), *MODEL_REMAPPING)
"""
READER = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[2]))
model.set_dtype(mx.float32)
found = model(mx.array(load_file(sys.argv[1])["input_ids"]))
save_file({"logits": np.array(found.astype(mx.float32))}, sys.argv[3])
"""


def compare(kind: str, work: Path, python: str) -> tuple[bool, str]:
    """Return whether mlx-lm computes a model of this type as we do, and what to print."""
    try:
        model, _ = small_model(kind, "AutoModelForCausalLM")
    except Exception as error:  # of any type: transformers builds no small model
        return False, f"unbuilt: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    for parameter in model.parameters():  # as large as trained ones, so that attention depends on the rotation
        values = parameter.detach()
        values.normal_(0, 0.2) if values.ndim > 1 else values.normal_(1, 0.1)
    source, out = work / kind, work / f"{kind}-mlx"
    model.save_pretrained(source)
    config = QuantConfig(method="rtn", group_size=32, format="mlx")
    try:
        quantize(source, out, config, dtype="float32")
        network = load(out, dtype="float32", device="cpu")
    except InputError as error:
        return False, f"refused: {' '.join(str(error).split())[:150]}"
    ids = random_ids()
    with torch.no_grad():
        ours = network(input_ids=ids, use_cache=False).logits
    save_file({"input_ids": ids}, work / "input")
    command = [python, "-c", READER, str(work / "input"), str(out), str(work / "logits")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return False, f"mlx-lm fails: {' '.join((done.stderr.strip() or '?').splitlines()[-1].split())[:150]}"
    theirs, largest = load_file(work / "logits")["logits"], float(ours.abs().max())
    if not 0 < largest < float("inf"):
        return False, "its logits are not finite"
    difference = float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("inf")
    return difference <= CLOSE * largest, f"largest logit {largest:.3f}, difference {difference:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="model types; by default all that both know")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "mlx-venv")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    python = make_environment(args.venv, PACKAGES)
    listed = subprocess.run([python, "-c", LIST], capture_output=True, text=True, check=True).stdout.split()
    alike = []
    for kind in args.kinds or sorted({*listed} & {*kinds_of("causal")}):
        with tempfile.TemporaryDirectory() as work:
            fine, says = compare(kind, Path(work), python)
        alike += [kind] if fine else []
        print(f"{kind:24} {'alike' if fine else '-':6} {says}", flush=True)
    print(f"{len(alike)} alike: {' '.join(alike)}")


if __name__ == "__main__":
    main()
