"""Find and read a checkpoint's `quantization_config`, which says how its layers are stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq import formats
from gptq.checkpoint.untrusted import read_json
from gptq.errors import InputError
from gptq.formats import auto_round, mlx
from gptq.formats.gptq import METHOD as ASSUMED  # early AutoGPTQ did not say its quant_method
from gptq.formats.gptq import QUANTIZE_CONFIG
from gptq.formats.name_rules import Quantization

KEYS = ("quantization_config", "compression_config")
SECTIONS = ("text_config",)  # parts of config.json that describe a model of their own
TRANSLATED = {auto_round.METHOD: auto_round.translate}  # by `quant_method`: other words for the layouts of a format
MODELOPT, MODELOPT_CONFIG = "modelopt", "hf_quant_config.json"
COPIES = (MODELOPT_CONFIG, auto_round.COPY)  # files of other tools, of which a result has none


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return the `quantization_config` of a checkpoint folder as stored; None if the checkpoint is not quantized.

    It is in config.json, there or in its `text_config`; early compressed-tensors called it `compression_config`, and
    MLX calls it `quantization`. AutoGPTQ used to write only quantize_config.json; if both files exist, they have to
    agree. ModelOpt too has a file of its own, which counts if config.json says nothing.

    Raises:
        InputError: a file cannot be read, or they differ in what decides how tensors are read.
    """
    config, beside = folder / "config.json", folder / QUANTIZE_CONFIG
    values = read_json(config)
    parts = [values, *(values[key] for key in SECTIONS if isinstance(values.get(key), dict))]
    within = next((part[key] for part in parts for key in KEYS if part.get(key) is not None), None)
    of_mlx = values.get(mlx.CONFIG_KEY)
    for key, said in ((KEYS[0], within), (mlx.CONFIG_KEY, of_mlx)):
        if not isinstance(said, dict | None):
            raise InputError(f"{config} has {said!r} for its {key}, not an object")
    if of_mlx is not None:
        within = _quantization_of_mlx(config, of_mlx, within or {})
    own = read_json(beside) if beside.is_file() else None
    if within is None or own is None:
        return within or own or _quantization_of_modelopt(folder)
    for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format"):
        if key in own and key in within and own[key] != within[key]:
            raise InputError(f"{beside} says {key} {own[key]!r}, but config.json beside it says {within[key]!r}")
    return dict(within)


def _quantization_of_mlx(config: Path, of_mlx: dict[str, Any], within: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json with an entry for MLX says; that of another format in `within` comes first."""
    method = within.get("quant_method")
    if method == mlx.METHOD and mlx.plain_config(within) != of_mlx:
        raise InputError(f"{config} has a {mlx.CONFIG_KEY} and a {KEYS[0]} that say different things")
    return {"quant_method": mlx.METHOD, **of_mlx} if method is None else within


def _quantization_of_modelopt(folder: Path) -> dict[str, Any] | None:
    if not (folder / MODELOPT_CONFIG).is_file():
        return None
    values = read_json(folder / MODELOPT_CONFIG).get("quantization")
    if not isinstance(values, dict):
        raise InputError(f"{folder / MODELOPT_CONFIG} has {values!r} for its quantization, not an object")
    return {"quant_method": MODELOPT, **values}


def replace_quantization(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json with this `quantization_config`, and none in the other places for it."""
    kept = {key: value for key, value in config.items() if key not in KEYS[1:]}
    for key in SECTIONS:
        if isinstance(kept.get(key), dict):
            kept[key] = {name: value for name, value in kept[key].items() if name not in KEYS}
    return kept | {KEYS[0]: dict(quantization)}


def method_of(quantization: Mapping[str, Any]) -> str:
    """Return the `quant_method` that a `quantization_config` names."""
    return str(quantization.get("quant_method", ASSUMED))


def translated(where: str | Path, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `quantization_config`, found in `where`, in the words of the format that has its tensors.

    Raises:
        InputError: it is of a method in `TRANSLATED`, and says what is not read.
    """
    translate = TRANSLATED.get(method_of(quantization))
    return dict(quantization) if translate is None else translate(where, quantization)


def read_quantization(where: str | Path, quantization: Mapping[str, Any]) -> Quantization:
    """Return what a `quantization_config`, found in the file or folder `where`, says.

    One of `TRANSLATED` is read as the format's that it is translated to.

    Raises:
        InputError: the `quantization_config` is of another format, lacks a value, or contradicts itself.
    """
    said, quantization = method_of(quantization), translated(where, quantization)
    method = method_of(quantization)
    family = [known for known in formats.FORMATS.values() if known.quant_method == method]
    if family:
        return family[0].read_config(where, quantization, family)
    what = repr(method) if said == method else f"{said!r}, with the layout of {method!r}"
    raise InputError(f"{where} says quant_method {what}; what is read is {_known_methods()}")


def _known_methods() -> str:
    """'gptq' (format 'gptq' or 'gptq_v2') and ..."""
    names: dict[str, list[str]] = {}
    for known in formats.FORMATS.values():
        names.setdefault(known.quant_method, []).append(repr(known.name))
    return " and ".join(f"{method!r} (format {' or '.join(of)})" for method, of in names.items())
