"""NVFP4: E2M1 numbers, two per byte, with one float8 scale per 16 of a row and one float32 scale per tensor.

P.weight_packed, P.weight_scale, P.weight_global_scale  compressed-tensors (`nvfp4-pack-quantized`):
                  w = e2m1 * (scale / global scale)
P.weight, P.weight_scale, P.weight_scale_2              ModelOpt: w = e2m1 * (scale * scale 2)

codes (outputs, inputs / 2) uint8, scales (outputs, inputs / 16) float8_e4m3fn, the third () or (1,) float32
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.checkpoint.derived import Derived
from gptq.checkpoint.reader import Source
from gptq.checkpoint.sources.decoded import (
    Declared,
    Kind,
    groups_of,
    require_dtype,
    require_part,
    row_chunks,
)
from gptq.compute.number_formats import unpack_e2m1
from gptq.errors import InputError

GROUP = 16  # weights that share a scale
GLOBAL = {"weight_packed": "weight_global_scale", "weight": "weight_scale_2"}  # by the key of the codes


@dataclass(frozen=True)
class TwoScales(Derived):
    """In `parts` codes, scales and the scale of the whole tensor, which divides or multiplies the others."""

    divides: bool

    def compute(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        whole = stored.read(self.parts[2]).float()
        for which in row_chunks(rows, self.shape):
            part = slice(which.start, which.stop)
            packed, scale = (stored.read(name, rows=part) for name in self.parts[:2])
            scale = scale.float() / whole if self.divides else scale.float() * whole  # (rows, inputs / 16)
            values = unpack_e2m1(packed).unflatten(-1, (-1, GROUP))
            yield which, values.mul_(scale[..., None]).flatten(-2)


def _find(stored: Source, declared: Declared) -> Mapping[str, Derived]:
    found: dict[str, Derived] = {}
    for name, info in stored.tensors.items():
        layer, _, key = name.rpartition(".")
        scale, whole = f"{layer}.weight_scale", f"{layer}.{GLOBAL.get(key, '')}"
        if key not in GLOBAL or info.dtype != torch.uint8 or not info.shape or not _has_scales(stored, scale, whole):
            continue
        shape, expected = groups_of(stored, name, GROUP)
        require_part(stored, scale, name, expected, f"{shape[-1]} inputs in groups of {GROUP} need")
        require_dtype(stored, scale, (torch.float8_e4m3fn,))
        if whole not in stored.tensors:
            raise InputError(f"{name} in {stored.file_of(name)} is stored quantized, but {whole} is missing")
        if stored.tensors[whole].shape not in ((), (1,)):
            found_shape = stored.tensors[whole].shape
            raise InputError(f"{whole} in {stored.file_of(whole)} has the shape {found_shape}; it is one number")
        require_dtype(stored, whole, (torch.float32,))
        found[f"{layer}.weight"] = TwoScales((name, scale, whole), shape, key == "weight_packed")
    return found


def _has_scales(stored: Source, scale: str, whole: str) -> bool:
    """Whether one of the two tensors shows that a layer is stored as NVFP4."""
    own = stored.tensors.get(scale)
    return whole in stored.tensors or (own is not None and own.dtype == torch.float8_e4m3fn)


KIND = Kind("NVFP4", _find)
