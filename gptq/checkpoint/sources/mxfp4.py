"""MXFP4: E2M1 numbers, two per byte, with one power of two (a byte e for 2^(e - 127)) per 32 of a row.

X_blocks, X_scales  (experts, rows, columns / 32, 16) and (experts, rows, columns / 32) uint8: gpt-oss
                    (transformers, integrations/mxfp4.py). They stand for X (experts, columns, rows): the bfloat16
                    form of that model has the transposed matrices.
P.weight_packed, P.weight_scale  (outputs, inputs / 2) and (outputs, inputs / 32) uint8: compressed-tensors
                    (`mxfp4-pack-quantized`)
P.weight, P.weight_scale  the same: ModelOpt
P.weight, P.scale   the same with int8 and float8_e8m0fnu: the experts of DeepSeek-V4
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
from gptq.compute.number_formats import E8M0, powers_of_two, unpack_e2m1

GROUP = 32  # weights that share a scale


@dataclass(frozen=True)
class PackedMatrix(Derived):
    """A matrix (or a stack of matrices) whose last dimension is packed, in `parts` codes and scales."""

    def compute(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        for which in row_chunks(rows, self.shape):
            part = slice(which.start, which.stop)
            packed, exponents = (stored.read(name, rows=part) for name in self.parts)
            values = unpack_e2m1(packed).unflatten(-1, (-1, GROUP))  # (rows, inputs / 32, 32)
            yield which, values.mul_(powers_of_two(exponents)[..., None]).flatten(-2)


@dataclass(frozen=True)
class Blocks(Derived):
    """The experts of gpt-oss, (experts, columns, rows) with the codes of a column in `parts` blocks and scales."""

    def compute(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        for which in row_chunks(rows, self.shape):
            part = slice(which.start, which.stop)
            packed, exponents = (stored.read(name, rows=part) for name in self.parts)
            values = unpack_e2m1(packed)  # (experts, rows, columns / 32, 32)
            yield which, values.mul_(powers_of_two(exponents)[..., None]).flatten(-2).transpose(-1, -2)


def _find(stored: Source, declared: Declared) -> Mapping[str, Derived]:
    found: dict[str, Derived] = {}
    for name, info in stored.tensors.items():
        if name.endswith("_blocks") and info.dtype == torch.uint8 and len(info.shape) == 4:
            whole = name.removesuffix("_blocks")
            experts, rows, groups, half = info.shape
            scales = f"{whole}_scales"
            require_part(stored, scales, name, (experts, rows, groups), f"the shape {info.shape} of {name} needs")
            require_dtype(stored, scales, (torch.uint8,))
            require_part(stored, name, name, (experts, rows, groups, GROUP // 2), f"blocks of {GROUP} weights need")
            found[whole] = Blocks((name, scales), (experts, groups * 2 * half, rows))
        elif own := _name_of_scale(stored, name):
            layer = name.rpartition(".")[0]
            shape, expected = groups_of(stored, name, GROUP)
            require_part(stored, own, name, expected, f"{shape[-1]} inputs in groups of {GROUP} need")
            found[f"{layer}.weight"] = PackedMatrix((name, own), shape)
    return found


def _name_of_scale(stored: Source, codes: str) -> str | None:
    """Return the name of the scales of a layer's packed codes; None if `codes` are not packed codes of this kind."""
    layer, _, key = codes.rpartition(".")
    info = stored.tensors[codes]
    if key not in ("weight", "weight_packed") or len(info.shape) < 2:
        return None
    own, whole = stored.tensors.get(f"{layer}.weight_scale"), stored.tensors.get(f"{layer}.scale")
    if info.dtype == torch.uint8 and own is not None and own.dtype in (torch.uint8, E8M0):
        return f"{layer}.weight_scale"
    return f"{layer}.scale" if info.dtype == torch.int8 and whole is not None and whole.dtype == E8M0 else None


KIND = Kind("MXFP4", _find)
