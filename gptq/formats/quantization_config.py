"""Find and read a checkpoint's `quantization_config`, which says how its layers are stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq import formats
from gptq.checkpoint.untrusted import read_json
from gptq.errors import InputError
from gptq.formats.gptq import METHOD as ASSUMED  # early AutoGPTQ did not say its quant_method
from gptq.formats.gptq import QUANTIZE_CONFIG
from gptq.formats.name_rules import Quantization


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return the `quantization_config` of a checkpoint folder as stored; None if the checkpoint is not quantized.

    It is in config.json. AutoGPTQ used to write only quantize_config.json; if both files exist, they have to agree.

    Raises:
        InputError: a file cannot be read, or they differ in what decides how tensors are read.
    """
    config, beside = folder / "config.json", folder / QUANTIZE_CONFIG
    within = read_json(config).get("quantization_config")
    if not isinstance(within, dict | None):
        raise InputError(f"{config} has {within!r} for its quantization_config, not an object")
    own = read_json(beside) if beside.is_file() else None
    if within is None or own is None:
        return within or own
    for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format"):
        if key in own and key in within and own[key] != within[key]:
            raise InputError(f"{beside} says {key} {own[key]!r}, but config.json beside it says {within[key]!r}")
    return dict(within)


def read_quantization(where: str | Path, quantization: Mapping[str, Any]) -> Quantization:
    """Return what a `quantization_config`, found in the file or folder `where`, says.

    Raises:
        InputError: the `quantization_config` is of another format, lacks a value, or contradicts itself.
    """
    method = quantization.get("quant_method", ASSUMED)
    family = [known for known in formats.FORMATS.values() if known.quant_method == method]
    if family:
        return family[0].read_config(where, quantization, family)
    raise InputError(f"{where} says quant_method {method!r}; what is read is {_known_methods()}")


def _known_methods() -> str:
    """'gptq' (format 'gptq' or 'gptq_v2') and ..."""
    names: dict[str, list[str]] = {}
    for known in formats.FORMATS.values():
        names.setdefault(known.quant_method, []).append(repr(known.name))
    return " and ".join(f"{method!r} (format {' or '.join(of)})" for method, of in names.items())
