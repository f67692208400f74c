"""The pins of constraints.txt agree with what each supported Python is served by the registry itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
LOCAL = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT")  # what a machine adds of its own


def interpreter(version: str) -> str:
    """The command that runs this Python; skips where it is not installed."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"Python {version} with pip is not installed here")
    return found


def pip_install(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pip install --dry-run`, without the wheel folders and extra indexes that a machine may be set up with."""
    environment = {key: value for key, value in os.environ.items() if key not in LOCAL}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("version", SUPPORTED)
def test_the_pins_resolve(version: str) -> None:
    python = interpreter(version)
    if pip_install(python, "--quiet", "--no-deps", "packaging").returncode:
        pytest.skip("no package registry can be reached, so the pins were not resolved")
    found = pip_install(python, "--quiet", "--constraint", "constraints.txt", ".[dev]")
    assert found.returncode == 0, found.stderr


def test_nothing_that_torch_brings_along_is_pinned() -> None:
    pins = [line.partition("==")[0].strip().lower() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert not [name for name in pins if name.startswith(("triton", "nvidia", "cuda", "pytorch-triton"))]
    assert {"torch", "transformers", "llvmlite"} <= set(pins)
