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
from gptq.checkpoint.source_state import fingerprint
from gptq.checkpoint.tensors import sha256
from gptq.config import Override, QuantConfig
from gptq.formats.quantization_config import MODELOPT_CONFIG
from gptq.version import __version__


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
    return {
        "version": {"gptq": __version__},
        "options": {**config.to_dict(), **settings},
        "source": {file.name: fingerprint(file) for file in decisive_files(source)},
        "machine": machine,
    }


def decisive_files(source: Source, known: Iterable[str] = ()) -> list[Path]:
    """Return the files that decide on the weights of the result: those of the source's, config.json and the code.

    Args:
        known: names of files that the folder had; the decisive of these are returned though they be gone.
    """
    folder = source.folder
    gone = [folder / name for name in known if not (folder / name).exists()]
    others = [path for path in (*folder.iterdir(), *gone) if path.parent == folder and _is_decisive(path.name)]
    return [*source.files, *sorted({*others} - {*source.files})]


def _is_decisive(name: str) -> bool:
    return name in ("config.json", MODELOPT_CONFIG) or (name.endswith(".py") and not name.startswith("."))


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
