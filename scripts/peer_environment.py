"""Shared by scripts that run other tools: environments for them, and checks that they read our files as we do."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from gptq import QuantConfig, quantize

TORCH = f"torch=={torch.__version__.partition('+')[0]}"  # this process's version, for all tools
# Packages of each tool's environment, as steps of pip: GPTQModel's build needs torch and build tools installed before.
PACKAGES: dict[str, list[list[str]]] = {
    "llm-compressor": [[TORCH], ["llmcompressor==0.14.0.1"]],
    "gptqmodel": [
        [TORCH, "setuptools", "wheel", "packaging", "ninja", "numpy", "pybind11"],
        ["--no-build-isolation", "gptqmodel==7.7.0", "optimum==2.3.0"],
    ],
    "auto-round": [[TORCH], ["auto-round==0.16.1"]],
}
Compare = Callable[[dict[str, str], torch.Tensor, str], int]  # folders by case, token ids, the reader's output


def make_environment(folder: Path, steps: list[list[str]]) -> str:
    """Make a virtual environment and install packages; return the path of its Python.

    Args:
        folder: of the environment; it is reused if it is complete.
        steps: arguments of one `pip install` each, run in order, because a build without isolation needs its
            dependencies installed before. Without steps the result is this process's own Python.
    """
    if not steps:
        return sys.executable
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for step in steps:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *step], check=True)
        (folder / "ready").touch()
    return str(python)


def check_reader(
    description: str,
    venv: str,
    steps: list[list[str]],
    cases: dict[str, QuantConfig],
    reader: str,
    compare: Compare,
) -> int:
    """Quantize a model in every case, let another tool read the results, and compare; return the exit code.

    Args:
        description: for --help.
        venv, steps: default folder name of the tool's environment below the temporary folder, and its packages.
        cases: configurations by name.
        reader: Python code that runs in the environment. Its arguments are a safetensors file with `input_ids` and the
            folders of all cases. It writes what it computes beside each folder.
        compare: compares that with our own results and returns the exit code.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of a small checkpoint")
    parser.add_argument("--text", required=True, help="calibration text, a .txt file")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / venv)
    args = parser.parse_args()
    python = make_environment(args.venv, steps)
    with tempfile.TemporaryDirectory() as work:
        folders = {}
        for number, (case, config) in enumerate(cases.items()):
            folders[case] = str(Path(work) / f"case{number}")
            options = {**config.to_dict(), "num_samples": 32, "seq_len": 128}
            quantize(args.model, folders[case], QuantConfig.from_dict(options), calibration=args.text)
        ids = torch.randint(3, 400, (2, 64), generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": ids}, Path(work) / "input")
        command = [python, "-c", reader, str(Path(work) / "input"), *folders.values()]
        on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=on_cpu, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
            return 1
        return compare(folders, ids, done.stdout)
