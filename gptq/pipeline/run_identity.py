"""What decides which bytes a run writes, so that a resumed run is the same run."""

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
from gptq.version import __version__

HASHED_WHOLE = 2**26  # bytes of a source file; of longer ones a piece every so often
PIECE, EVERY = 2**16, 2**24


def beginning(
    config: QuantConfig, source: Source, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> dict[str, Any]:
    """What decides which bytes come out. How many windows run at once, and the number of a GPU, do not."""
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
    described = [*source.files, *source.folder.glob("config.json"), *source.folder.glob("*.py")]
    return {
        "version": {"gptq": __version__},
        "options": {**config.to_dict(), **settings},
        "source": {file.name: fingerprint(file) for file in described},
        "machine": machine,
    }


def fingerprint(file: Path) -> str:
    """Size and checksum; of a long file only pieces are read, so that 140 GB take seconds.

    Content decides, not its date: a model that was downloaded again is the same.
    """
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        if size <= HASHED_WHOLE:
            digest.update(opened.read())
        else:
            for begin in [*range(0, size, EVERY), size - PIECE]:
                opened.seek(begin)
                digest.update(opened.read(PIECE))
    return f"{size} {digest.hexdigest()}"


def checksum_of_windows(windows: Iterable[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        for name, x in sorted(window.items()):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)} {sha256(x)}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    files = {**begun["source"], **now["source"]}
    others = [name for name in files if begun["source"].get(name) != now["source"].get(name)]
    options = changes(begun["version"], now["version"]) + changes(begun["options"], now["options"])
    return options + [f"another {name}" for name in others]


def changes(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before, after = (json.loads(json.dumps(values)) for values in (begun, now))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} {_shown(name, before.get(name))}, now {_shown(name, after.get(name))}" for name in names]


def _shown(name: str, value: Any) -> str:
    if name == "overrides":
        return " ".join(str(Override.of(pair)) for pair in value or []) or "none"
    return "none" if value is None else str(value)
