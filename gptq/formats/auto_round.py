"""AutoRound's own export, which is read as the GPTQ or AWQ file that its tensors make; it is not written.

`packing_format` of its `quantization_config` says how the tensors are laid out:

    auto_round:auto_gptq, auto_round:gptq, or absent   GPTQ v1 without g_idx; what AutoRound writes for symmetric layers
    auto_round                                         GPTQ v2 without g_idx; asymmetric layers
    auto_round:gptqmodel                               GPTQ v2 with g_idx
    auto_round:auto_awq, auto_round:awq                AWQ, version "gemm"

`extra_config` gives options of single layers, by name or by a regular expression that is searched for in the name; a
name comes before expressions, and of these the first that is found counts. `block_name_to_quantize` is not needed: the
tensors show which layers are packed.

Source: auto-round 0.16.1, export/export_to_autoround/export.py, inference/convert_model.py and inference/backend.py;
for files without `packing_format`, AutoRoundConfig of transformers 5.23.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from gptq.checkpoint.json_objects import Options, read_options
from gptq.errors import InputError

METHOD = "auto-round"
COPY = "quantization_config.json"  # what config.json says, once more
V1 = {"quant_method": "gptq", "checkpoint_format": "gptq"}
V2 = {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "version": "gemm"}
BY_PACKING: dict[str, dict[str, str]] = {
    "auto_round:auto_gptq": V1,
    "auto_round:gptq": V1,
    "auto_round": V2,
    "auto_round:gptqmodel": V2,
    "auto_round:auto_awq": AWQ,
    "auto_round:awq": AWQ,
}
QUANTIZED = 8  # bits; a layer with more is not quantized
SCHEME = ("bits", "group_size", "sym")


class _Options(Options):
    packing_format: str = Field("auto_round:auto_gptq", description="it is the name of a layout")
    extra_config: dict[str, dict[str, Any]] = Field({}, description="it holds options by layer, each an object")


class _OwnOptions(Options):
    bits: int = Field(description="it is a number of bits")
    data_type: str = Field("int", description="it is 'int'")
    act_bits: int | None = Field(None, description="it is a number of bits, or null")
    super_bits: int | None = Field(None, description="it is null, since scales that are quantized are not read")
    rotation_config: Any = None


def translate(where: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of the GPTQ or AWQ file that has the tensors of this one.

    Args:
        values: the `quantization_config` of a file by AutoRound, which `where` holds.
    Raises:
        InputError: it is of a layout that is not read, or malformed.
    """
    options = read_options(_Options, values, str(where))
    layout = BY_PACKING.get(options.packing_format)
    if layout is None:
        raise InputError(
            f"{where} says packing_format {options.packing_format!r}; of AutoRound's files those of "
            f"{', '.join(BY_PACKING)} are read: export it again with format 'auto_round' and data_type 'int'"
        )
    _check(str(where), values)
    rules: dict[str, dict[str, Any]] = {}
    for name, own in sorted(options.extra_config.items(), key=lambda item: not _is_name(item[0])):
        said = {key: value for key, value in own.items() if value is not None}
        quantized = _check(f"{where}, extra_config {name!r},", {**values, **said})
        pattern = f"{re.escape(name)}$" if _is_name(name) else f".*(?:{name})"
        changes = {key: said[key] for key in SCHEME if key in said}
        rules[f"+:{pattern}" if quantized else f"-:{pattern}"] = changes if quantized else {}
    made_by = f"{METHOD}:{values.get('autoround_version', 'unknown')}"
    said = {key: values[key] for key in SCHEME if key in values}
    return {**layout, **said, "desc_act": False, "dynamic": rules, "meta": {"quantizer": [made_by]}}


def _is_name(key: str) -> bool:
    """Whether a key of `extra_config` is the name of one layer, not an expression."""
    return re.fullmatch(r"[\w.-]+", key) is not None


def _check(where: str, values: Mapping[str, Any]) -> bool:
    """Return whether layers with these options are quantized.

    Raises:
        InputError: their weights are not integers with a plain scale, or they are rotated.
    """
    own = read_options(_OwnOptions, values, where)
    if own.bits > QUANTIZED:
        return False
    wrong = {
        "data_type": own.data_type if own.data_type != "int" else None,
        "act_bits": own.act_bits if own.act_bits is not None and own.act_bits <= QUANTIZED else None,
        "super_bits": own.super_bits,
        "rotation_config": own.rotation_config or values.get("spinquant_config"),
    }
    for key, value in wrong.items():
        if value is not None:
            raise InputError(
                f"{where} says {key} {str(value)[:80]!r}; of AutoRound's files those are read whose weights alone are "
                "quantized, to integers (data_type 'int'), without rotations"
            )
    return True
