"""compressed-tensors' file format int-quantized: 8-bit weights whose readers round activations to int8 too (W8A8).

A linear layer P with `out` outputs and `in` inputs is stored as

    P.weight        (out, in)  int8     code - 128, so that the zero point is 0
    P.weight_scale  (out, 1)   float16  one scale per output

At run time each token x is rounded to int8 with the scale max |x| / 127; sums of int8 products are exact in int32, and
are multiplied by both scales.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoint.json_objects import read_options
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format
from gptq.errors import InputError
from gptq.formats.compressed_tensors import CompressedTensors, IntegerWeights, describe_integers
from gptq.formats.format import PLAIN_KEY, SCALE_DTYPE
from gptq.formats.scheme import Scheme, contiguous_groups
from gptq.solver import Codes

BITS, MIDDLE = 8, 128


class IntQuantized(CompressedTensors):
    name: Format = "int-quantized"
    stored_as = "int-quantized"
    codes_key, scale_key, zero_key, g_idx_key = PLAIN_KEY, "weight_scale", "", ""
    activation_bits = 8

    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        if (scheme.bits, scheme.sym, scheme.groups(inputs)) != (BITS, True, 1):
            return (
                "int-quantized holds symmetric 8 bits with one scale per output, which --bits 8 --group-size -1 gives; "
                "for fewer bits or groups take pack-quantized-a8"
            )
        return super().refusal(scheme, outputs, inputs, transposed)

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        return {
            "weight": TensorInfo(torch.int8, (outputs, inputs)),
            "weight_scale": TensorInfo(scale_dtype, (outputs, 1)),
        }

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        if bool((layer.zero != MIDDLE).any()):
            raise ValueError("a zero point is not in the middle, and int-quantized holds symmetric weights only")
        return {
            "weight": (layer.codes ^ MIDDLE).view(torch.int8),  # turning the highest bit over subtracts 128
            "weight_scale": layer.scale.to(scale_dtype).contiguous(),
        }

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        outputs, inputs = packed["weight"].shape
        codes = packed["weight"].view(torch.uint8) ^ MIDDLE
        zero, g_idx = self.decode_zeros(packed, scheme, outputs), self.decode_groups(packed, scheme, inputs)
        return Codes(codes, packed["weight_scale"], zero, g_idx)

    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        return contiguous_groups(scheme, inputs).to(packed["weight_scale"].device)

    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        scale = packed["weight_scale"]
        return torch.full(scale.shape, MIDDLE, dtype=torch.uint8, device=scale.device)

    def stored_shape(self, source: Source, layer: str, scheme: Scheme) -> tuple[int, int]:
        name = f"{layer}.weight"
        shape = source.tensors[name].shape
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"{name} in {source.folder} has the shape {shape}; it is a matrix")
        return shape[0], shape[1]

    def describe_weights(self, scheme: Scheme) -> dict[str, Any]:
        return describe_integers(scheme)

    def read_weights(self, where: str, weights: Mapping[str, Any]) -> Scheme:
        read = read_options(IntegerWeights, weights, where)
        if (read.num_bits, read.columns, read.symmetric) != (BITS, -1, True):
            raise InputError(f"{where} is {self.stored_as!r}; of such weights symmetric 8 bits per channel are read")
        return Scheme(read.num_bits, read.columns, read.symmetric, self.name)
