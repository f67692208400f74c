"""Checkpoints of integers that the file formats lay out, as sources of plain weights (`gptq.checkpoint.sources`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq import formats
from gptq.checkpoint.derived import Derived
from gptq.checkpoint.reader import Source
from gptq.checkpoint.sources.decoded import Declared, Kind, row_chunks
from gptq.errors import InputError
from gptq.formats.pack_quantized import PackQuantized
from gptq.formats.packed_layers import PackedLayer, packed_layers, read_packed
from gptq.formats.quantization_config import method_of, read_quantization
from gptq.solver import Codes

CAUTION = (
    "the errors of that rounding stay, and those of the new one are added: quantize the original checkpoint if there "
    "is one"
)


@dataclass(frozen=True)
class IntegerLayer(Derived):
    """A packed linear layer, of which the whole is unpacked to bytes and then decoded."""

    layer: str
    packed: PackedLayer

    def compute(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        codes = formats.decode(read_packed(stored, self.layer, self.packed), self.packed.scheme)
        for which in row_chunks(rows, self.shape):
            part = slice(which.start, which.stop)
            yield which, Codes(codes.codes[part], codes.scale[part], codes.zero[part], codes.g_idx).weight()


def _find(stored: Source, declared: Declared) -> Mapping[str, Derived]:
    layers = {layer for name in stored.tensors if (layer := _layer_of_words(stored, name))}
    if not layers:
        return {}
    name = min(name for name in stored.tensors if _layer_of_words(stored, name))
    if not declared.values:
        raise InputError(
            f"{name} in {stored.file_of(name)} holds packed integers, but no quantization_config in {declared.where} "
            "says how"
        )
    if method_of(declared.values) not in {known.quant_method for known in formats.FORMATS.values()}:
        return {}
    values = _without_other_groups(declared.values)
    if values is None:
        return {}
    quantization = read_quantization(declared.where, values)
    own = stored.restricted_to([name for name in stored.tensors if name.rpartition(".")[0] in layers])
    found: dict[str, Derived] = {}
    for layer, packed in packed_layers(own, quantization).items():
        parts = sorted(packed.suffixes, key=lambda key: key != formats.FORMATS[packed.scheme.format].codes_key)
        names = tuple(f"{layer}.{key}" for key in parts)
        found[f"{layer}.weight"] = IntegerLayer(names, (packed.outputs, packed.inputs), layer, packed)
    return found


def _layer_of_words(stored: Source, name: str) -> str:
    """Return the layer whose packed words the tensor `name` holds; "" if it holds something else."""
    layer, _, key = name.rpartition(".")
    keys = {known.codes_key for known in formats.FORMATS.values()}
    return layer if key in keys and stored.tensors[name].dtype == torch.int32 else ""


def _without_other_groups(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a `quantization_config` with only the groups of layers that are packed words, and without activations.

    Returns None if it has groups and none of them is packed. The others are found by their tensors.
    """
    groups = values.get("config_groups")
    if not isinstance(groups, dict):
        return dict(values)
    kept = {
        name: {key: value for key, value in group.items() if not key.endswith("_activations")}
        for name, group in groups.items()
        if isinstance(group, dict) and (group.get("format") or values.get("format")) == PackQuantized.stored_as
    }
    return {**values, "config_groups": kept} if kept else None


KIND = Kind("packed integers", _find, CAUTION)
