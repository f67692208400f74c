"""compressed-tensors' file format pack-quantized, which llm-compressor writes.

With codes and zero points that are signed and carry an offset of 2^(bits - 1), hence the same bits as GPTQ's, a linear
layer P with `out` outputs and `in` inputs in groups of g is stored as

    P.weight_packed      (out, ceil(in * bits / 32))      int32  codes, packed along the inputs
    P.weight_scale       (out, in / g)                    float  in the model's dtype, or float16 as here
    P.weight_zero_point  (ceil(out * bits / 32), in / g)  int32  zero, packed along the outputs; asymmetric only
    P.weight_shape       (2,)                             int64  out, in
    P.weight_g_idx       (in,)                            int32  in files of older releases with act-order by groups

Packing is one dense bit stream; compressed-tensors before 0.18 padded the words of 3, 5, 6 and 7 bits instead (its
change #715).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoint.assembled import TensorIndex
from gptq.checkpoint.json_objects import read_options
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format
from gptq.errors import InputError
from gptq.formats.compressed_tensors import CompressedTensors, IntegerWeights, describe_integers
from gptq.formats.format import SCALE_DTYPE
from gptq.formats.joined_experts import join_experts
from gptq.formats.packing import num_words, pack, unpack
from gptq.formats.scheme import Scheme, contiguous_groups
from gptq.solver import Codes


class PackQuantized(CompressedTensors):
    name: Format = "pack-quantized"
    stored_as = "pack-quantized"
    widths = (2, 3, 4, 5, 6, 8)
    codes_key, scale_key, zero_key, g_idx_key = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    other_keys = ("weight_shape",)
    transposed_words = True
    joins_experts = True

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        groups, int32 = scheme.groups(inputs), torch.int32
        zeros = TensorInfo(int32, (num_words(outputs, scheme.bits), groups))
        return {
            "weight_packed": TensorInfo(int32, (outputs, num_words(inputs, scheme.bits))),
            "weight_scale": TensorInfo(scale_dtype, (outputs, groups)),
            "weight_shape": TensorInfo(torch.int64, (2,)),
            **({} if scheme.sym else {"weight_zero_point": zeros}),
            **({"weight_g_idx": TensorInfo(int32, (inputs,))} if scheme.scattered else {}),
        }

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        if scheme.scattered:
            raise ValueError("groups that are not runs of columns are read from older files, and no longer written")
        return {
            "weight_packed": pack(layer.codes.T, scheme.bits).T.contiguous(),
            "weight_scale": layer.scale.to(scale_dtype).contiguous(),
            "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
            **({} if scheme.sym else {"weight_zero_point": pack(layer.zero, scheme.bits)}),
        }

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        outputs, inputs = (int(n) for n in packed["weight_shape"])
        return self.decode_shaped(packed, scheme, (outputs, inputs))

    def decode_shaped(self, packed: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Codes:
        outputs, inputs = shape
        codes = unpack(packed["weight_packed"].T, scheme.bits, inputs).T
        zero, g_idx = self.decode_zeros(packed, scheme, outputs), self.decode_groups(packed, scheme, inputs)
        return Codes(codes, packed["weight_scale"], zero, g_idx)

    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        if scheme.scattered:
            return packed["weight_g_idx"]
        return contiguous_groups(scheme, inputs).to(packed["weight_scale"].device)

    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        if not scheme.sym:
            return unpack(packed["weight_zero_point"], scheme.bits, outputs)
        scale = packed["weight_scale"]
        return torch.full(scale.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8, device=scale.device)

    def stored_shape(self, source: Source, layer: str, scheme: Scheme) -> tuple[int, int]:
        name = f"{layer}.weight_shape"
        info = source.tensors[name]
        if info.shape != (2,) or info.dtype.is_floating_point:
            raise InputError(f"{name} in {source.folder} is {info}, not two integers")
        outputs, inputs = source.read(name).tolist()
        if outputs < 1 or inputs < 1:
            raise InputError(f"{name} in {source.folder} says {outputs} x {inputs}")
        return outputs, inputs

    def assemble(self, folder: Path, out: Path) -> TensorIndex | None:
        return join_experts(folder, out, self.keys - {self.zero_key}) if self.joins_experts else None

    def explain_shape(self, info: TensorInfo, scheme: Scheme, outputs: int, inputs: int) -> str:
        if info.shape != (outputs, -(-inputs // (32 // scheme.bits))):
            return ""
        return "; compressed-tensors before 0.18 padded words of this width, write the file again with a newer one"

    def describe_weights(self, scheme: Scheme) -> dict[str, Any]:
        return describe_integers(scheme)

    def read_weights(self, where: str, weights: Mapping[str, Any]) -> Scheme:
        read = read_options(IntegerWeights, weights, where)
        return Scheme(read.num_bits, read.columns, read.symmetric, self.name, read.is_scattered)


class PackQuantizedA8(PackQuantized):
    """The same tensors; at run time the activations of each token are rounded to int8 (W4A8)."""

    name: Format = "pack-quantized-a8"
    activation_bits = 8
    joins_experts = False  # vLLM's loader of gpt-oss knows its weight-only methods by name
