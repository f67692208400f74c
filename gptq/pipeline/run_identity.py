"""Identify a run by everything its output depends on, so that only the same run is resumed."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import sha256
from gptq.config import Override, QuantConfig
from gptq.formats.quantization_config import MODELOPT_CONFIG
from gptq.version import __version__

MAX_HASHED_WHOLE = 2**26  # bytes; of larger files only pieces are hashed
PIECE_BYTES, PIECE_STRIDE = 2**16, 2**24  # length of a piece, and distance from one to the next


def describe_run(
    config: QuantConfig, source: Source, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> dict[str, Any]:
    """Return the options, versions and source files that the output depends on; and the machine.

    batch_size, memory limits and the number of a GPU are left out, because the output does not depend on them.
    """
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "trust_remote_code": trust_remote_code,
    }
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": gpu or torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    described = [
        *source.files,
        *source.folder.glob("config.json"),
        *source.folder.glob(MODELOPT_CONFIG),
        *source.folder.glob("*.py"),
    ]
    return {
        "version": {"gptq": __version__},
        "options": {**config.to_dict(), **settings},
        "source": {file.name: fingerprint(file) for file in described},
        "machine": machine,
    }


def fingerprint(file: Path) -> str:
    """Return a file's size and checksum; of a large file only pieces are read, so that 140 GB take seconds.

    The modification time is ignored: a model that was downloaded again is the same.
    """
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        if size <= MAX_HASHED_WHOLE:
            digest.update(opened.read())
        else:
            for start in [*range(0, size, PIECE_STRIDE), size - PIECE_BYTES]:
                opened.seek(start)
                digest.update(opened.read(PIECE_BYTES))
    return f"{size} {digest.hexdigest()}"


def checksum_of_windows(windows: Iterable[Mapping[str, Tensor]]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and values of all windows' inputs."""
    digest = hashlib.sha256()
    for window in windows:
        for name, x in sorted(window.items()):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)} {sha256(x)}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def find_differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what differs between two results of `describe_run`, except the machine."""
    files = {**begun["source"], **now["source"]}
    others = [name for name in files if begun["source"].get(name) != now["source"].get(name)]
    options = list_changes(begun["version"], now["version"]) + list_changes(begun["options"], now["options"])
    return options + [f"another {name}" for name in others]


def list_changes(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the values that differ between two mappings."""
    before, after = (json.loads(json.dumps(values)) for values in (begun, now))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [
        f"{name} {_format_value(name, before.get(name))}, now {_format_value(name, after.get(name))}" for name in names
    ]


def _format_value(name: str, value: Any) -> str:
    if name == "overrides":
        return " ".join(str(Override.of(pair)) for pair in value or []) or "none"
    return "none" if value is None else str(value)
