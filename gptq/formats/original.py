"""Open the checkpoint that is to be quantized or compared with: plain, or stored quantized and decoded when read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq import formats
from gptq.checkpoint.assembled import open_source
from gptq.checkpoint.derived import Derived, DerivedSource
from gptq.checkpoint.pickled import notes_on_conversion
from gptq.checkpoint.reader import Source
from gptq.checkpoint.sources import KINDS
from gptq.checkpoint.sources.decoded import (
    Declared,
    Kind,
    activation_scales,
    dtype_of_config,
)
from gptq.errors import InputError
from gptq.formats import awq, compressed_tensors, integer_sources
from gptq.formats.quantization_config import MODELOPT, TRANSLATED, method_of, quantization_of, translated

ALL_KINDS: tuple[Kind, ...] = (*KINDS, integer_sources.KIND, awq.KIND)


@dataclass(frozen=True)
class Method:
    """What a `quantization_config` of a method may say: keys that are known, and those that have to say nothing."""

    keys: frozenset[str]
    empty: frozenset[str] = frozenset()


def _method(keys: str, empty: str = "") -> Method:
    return Method(frozenset(keys.split()), frozenset(empty.split()))


METHODS: Mapping[str, Method] = {  # by `quant_method`; the formats' own readers check theirs
    "fp8": _method(
        "fmt activation_scheme weight_block_size scale_fmt expert_dtype modules_to_not_convert modules_to_convert "
        "ignored_layers ignore dequantize kv_cache_scheme is_checkpoint_fp8_serialized meta"
    ),
    "fbgemm_fp8": _method("activation_scale_ub modules_to_not_convert"),
    "mxfp4": _method("modules_to_not_convert dequantize"),
    MODELOPT: _method(
        "quant_algo kv_cache_quant_algo kv_cache_scheme exclude_modules ignore group_size config_groups producer "
        "quantized_layers targets version",
        empty="pre_quant_scale has_zero_point",
    ),
    compressed_tensors.METHOD: _method(
        compressed_tensors.CONFIG_KEYS,
        empty="transform_config sparsity_config",
    ),
}
READ_BY_FORMATS = {known.quant_method for known in formats.FORMATS.values()} | {awq.METHOD}
# Last parts of the names of tensors without which a weight would be read wrongly: in any checkpoint, and in one that
# is known to be quantized.
ALWAYS_PARTS = {"qweight", "weight_packed", "absmax", "quant_map", "SCB", "pre_quant_scale"}
PARTS = {
    "qzeros",
    "scales",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_g_idx",
}


def open_original(folder: Path) -> Source:
    """Open a checkpoint folder; weights that are stored quantized are found by their tensors and shown decoded.

    Raises:
        InputError: the checkpoint cannot be read, or is quantized in a way that is not known; the message names the
            tensor, or the entry of config.json.
    """
    stored = open_source(folder)
    stored.notes = notes_on_conversion(folder)
    config = folder / "config.json"
    stated = (quantization_of(folder) or {}) if config.is_file() else {}
    declared = Declared(config, translated(config, stated))
    if declared.values:
        _refuse_results(folder, stated)
        _check_method(declared)
    encoded: dict[str, Derived] = {}
    notes: list[str] = []
    for kind in ALL_KINDS:
        found = kind.find(stored, declared)
        _refuse_doubles(stored, encoded, found)
        encoded.update(found)
        notes += _note_on_kind(kind, found)
    _refuse_leftovers(stored, encoded, bool(declared.values))
    if not encoded:
        if declared.values:
            method = method_of(declared.values)
            stored.notes = [*stored.notes, f"{config} says quant_method {method!r}, but the weights are plain"]
        return stored
    left_out = activation_scales(stored, encoded)
    if left_out:
        notes.append(f"{len(left_out)} scales of activations ({left_out[0]} ...) are left out")
    return DerivedSource(stored, encoded, dtype_of_config(folder), left_out, notes)


def _refuse_results(folder: Path, stated: Mapping[str, Any]) -> None:
    """Raises InputError if a checkpoint is a result in a format that is not decoded here."""
    kinds = [known for known in formats.FORMATS.values() if known.quant_method == method_of(stated)]
    if kinds and not any(known.is_source for known in kinds):
        raise InputError(f"{folder} is quantized for {kinds[0].quant_method}, which is not decoded; give its original")


def _check_method(declared: Declared) -> None:
    """Check that a `quantization_config` is of a known method and says nothing unknown.

    Raises:
        InputError: the method or a key is not known; the message names it.
    """
    name = method_of(declared.values)
    method = METHODS.get(name)
    if method is None:
        if name in READ_BY_FORMATS:
            return
        known = ", ".join(sorted({*METHODS, *READ_BY_FORMATS, *TRANSLATED}))
        raise InputError(f"{declared.where} says quant_method {name!r}, which is not read; what is read is {known}")
    for key, value in declared.values.items():
        if key in method.empty and value:
            raise InputError(f"{declared.where} says {key} {str(value)[:80]}, which is not read")
        if key not in {"quant_method", *method.keys, *method.empty}:
            raise InputError(
                f"{declared.where} has a quantization_config with the key {key!r}, which is not known of {name!r}"
            )


def _refuse_doubles(stored: Source, encoded: Mapping[str, Derived], found: Mapping[str, Derived]) -> None:
    """Raises InputError if a weight is stored twice: in two ways, or plain and quantized."""
    for name, codes in found.items():
        if name in encoded or (name in stored.tensors and name not in codes.parts):
            other = encoded[name].parts[0] if name in encoded else name
            raise InputError(f"{stored.folder} holds both {other} and {codes.parts[0]} for one weight; one is too many")


def _refuse_leftovers(stored: Source, encoded: Mapping[str, Derived], is_quantized: bool) -> None:
    """Raises InputError if a tensor is left over that a quantized weight needs."""
    suspects = ALWAYS_PARTS | (PARTS if encoded or is_quantized else set())
    used = {part for codes in encoded.values() for part in codes.parts}
    for name in stored.tensors:
        if name not in used and name.rpartition(".")[2] in suspects:
            raise InputError(
                f"{name} in {stored.file_of(name)} belongs to a weight that is stored quantized, but the other tensors "
                "of it are missing, or of a kind that is not read"
            )


def _note_on_kind(kind: Kind, found: Mapping[str, Derived]) -> list[str]:
    if not found:
        return []
    remark = f"; {kind.caution}" if kind.caution else ""
    return [f"{len(found)} weights of the checkpoint are {kind.name} ({next(iter(found))} ...), decoded{remark}"]
