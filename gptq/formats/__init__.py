"""The file formats: how integers are stored for each engine, one file per format; `FORMATS` lists the formats."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format
from gptq.formats.format import SCALE_DTYPE, FileFormat
from gptq.formats.fp4 import Mxfp4, Nvfp4
from gptq.formats.fp8 import FloatQuantized, Fp8Blocks
from gptq.formats.gguf import Gguf, GgufIq4, GgufK
from gptq.formats.gptq import GPTQ_BITS, GptqV1, GptqV2
from gptq.formats.int_quantized import IntQuantized
from gptq.formats.mlx import Mlx
from gptq.formats.pack_quantized import PackQuantized, PackQuantizedA8
from gptq.formats.scheme import Scheme, contiguous_groups
from gptq.solver import Codes

__all__ = [
    "FORMATS", "GPTQ_BITS", "SCALE_DTYPE", "Codes", "FileFormat", "Scheme", "contiguous_groups", "decode",
    "decode_groups", "decode_shaped", "decode_zeros", "encode", "layout", "refusal",
]  # fmt: skip

FORMATS: dict[Format, FileFormat] = {
    known.name: known
    for known in (
        *(GptqV1(), GptqV2(), PackQuantized(), PackQuantizedA8(), IntQuantized(), Mlx(), Gguf(), GgufK(), GgufIq4()),
        *(FloatQuantized(), Fp8Blocks(), Nvfp4(), Mxfp4()),
    )
}


# The methods of `FileFormat`, called on the format that a scheme names.


def layout(scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE) -> dict[str, TensorInfo]:
    return FORMATS[scheme.format].layout(scheme, outputs, inputs, scale_dtype)


def encode(
    layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
) -> dict[str, Tensor]:
    return FORMATS[scheme.format].encode(layer, scheme, scale_dtype, allow_zero)


def decode(packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    return FORMATS[scheme.format].decode(packed, scheme)


def decode_shaped(packed: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Codes:
    return FORMATS[scheme.format].decode_shaped(packed, scheme, shape)


def decode_groups(packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
    return FORMATS[scheme.format].decode_groups(packed, scheme, inputs)


def decode_zeros(packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
    return FORMATS[scheme.format].decode_zeros(packed, scheme, outputs)


def refusal(scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
    return FORMATS[scheme.format].refusal(scheme, outputs, inputs, transposed)
