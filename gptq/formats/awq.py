"""AWQ's file format (AutoAWQ, version "gemm"), which is read as a source and not written.

For a linear layer P with `out` outputs and `in` inputs in groups of g it stores, at 4 bits,

    P.qweight  (in, out / 8)             int32    codes; a word holds 8 outputs in the order ORDER, the first lowest
    P.qzeros   (ceil(in / g), out / 8)   int32    zero points, packed alike
    P.scales   (ceil(in / g), out)       float16

and w = (code - zero) * scale. Source: AutoAWQ, awq/utils/packing_utils.py and awq/modules/linear/gemm.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gptq.checkpoint.derived import Derived
from gptq.checkpoint.json_objects import Options, read_options
from gptq.checkpoint.reader import Source
from gptq.checkpoint.sources.decoded import Declared, Kind, require_dtype, require_part, row_chunks
from gptq.errors import InputError
from gptq.formats.gptq import GptqV1, read_schemes
from gptq.formats.integer_sources import CAUTION
from gptq.formats.option_keys import check_keys
from gptq.formats.quantization_config import method_of
from gptq.solver import Codes

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each nibble of a word
PER_WORD = len(ORDER)
BITS = 32 // PER_WORD


@dataclass(frozen=True)
class AwqLayer(Derived):
    """A layer of words `parts[0]`, zero points and scales."""

    group_size: int

    def compute(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        codes, zero = (_unpack(stored.read(name)) for name in self.parts[:2])  # (out, in), (out, groups) uint8
        scale = stored.read(self.parts[2]).T  # (out, groups)
        g_idx = torch.arange(self.shape[1], dtype=torch.int32) // self.group_size
        for which in row_chunks(rows, self.shape):
            part = slice(which.start, which.stop)
            yield which, Codes(codes[part], scale[part], zero[part], g_idx).weight()


def _unpack(words: Tensor) -> Tensor:
    """Unpack words (lines, out / 8) int32 to codes (out, lines) uint8."""
    nibbles = torch.stack([(words >> 4 * ORDER.index(output)) & 15 for output in range(PER_WORD)], dim=-1)
    return nibbles.to(torch.uint8).flatten(1).T


class _Options(Options):
    bits: Literal[4] = Field(description="of AWQ files those of 4 bits are read")
    version: Literal["gemm", "GEMM"] = Field("gemm", description="of AWQ files those of version 'gemm' are read")


def _find(stored: Source, declared: Declared) -> Mapping[str, Derived]:
    if not declared.values or method_of(declared.values) != METHOD:
        return {}
    check_keys(str(declared.where), declared.values)
    read_options(_Options, declared.values, str(declared.where))
    layers = [name.removesuffix(".qweight") for name in stored.tensors if name.endswith(".qweight")]
    said = {key: value for key, value in declared.values.items() if value is not None}
    schemes = read_schemes(declared.where, said, GptqV1.name).schemes(layers)  # their options are GPTQ's
    found: dict[str, Derived] = {}
    for layer in layers:
        name, scheme = f"{layer}.qweight", schemes[layer]
        info = stored.tensors[name]
        if scheme is None or scheme.bits != BITS:
            width = f"{scheme.bits} bits" if scheme else "not quantized"
            raise InputError(f"{declared.where} says {width} of {layer}; of AWQ files those of {BITS} bits are read")
        if len(info.shape) != 2 or 0 in info.shape:
            raise InputError(f"{name} in {stored.file_of(name)} has the shape {info.shape}, not that of a matrix")
        require_dtype(stored, name, (torch.int32,))
        inputs, words = info.shape
        size = scheme.columns(inputs)
        groups, why = scheme.groups(inputs), f"{name} {info.shape} in groups of {size} needs"
        zeros, scales = f"{layer}.qzeros", f"{layer}.scales"
        require_part(stored, zeros, name, (groups, words), why)
        require_part(stored, scales, name, (groups, words * PER_WORD), why)
        require_dtype(stored, zeros, (torch.int32,))
        require_dtype(stored, scales, (torch.float16, torch.bfloat16, torch.float32))
        found[f"{layer}.weight"] = AwqLayer((name, zeros, scales), (words * PER_WORD, inputs), size)
    return found


KIND = Kind("AWQ's packed integers", _find, CAUTION)
