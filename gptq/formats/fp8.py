"""FP8 weights, E4M3 numbers times scales: compressed-tensors' float-quantized, and the blocks of DeepSeek-V3.

A linear layer P with `out` outputs and `in` inputs is stored as

    float-quantized  P.weight            (out, in)                              float8_e4m3fn
                     P.weight_scale      (out, 1)                               bfloat16  one per output
    fp8              P.weight            (out, in)                              float8_e4m3fn
                     P.weight_scale_inv  (ceil(out / 128), ceil(in / 128))      float32  one per block of 128 x 128

    w = e4m3 scale

Scales of float-quantized are bfloat16, because transformers converts them to the dtype of the model.
"fp8" is the `quant_method` of DeepSeek-V3's and Qwen3's files; transformers, vLLM and SGLang read it, and round
activations to FP8 at run time, a scale per token and 128 inputs. `float-quantized` as it is written here is of weights
alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from gptq.checkpoint.json_objects import Options, read_options
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.formats.compressed_tensors import CompressedTensors, FloatWeights, describe_floats
from gptq.formats.format import PLAIN_KEY, SCALE_DTYPE, FileFormat
from gptq.formats.name_rules import Quantization
from gptq.formats.scheme import Linears, Scheme
from gptq.formats.table_format import TableFormat
from gptq.solver import Codes, Grid
from gptq.solver.grids.scales import FLOAT8, FloatScales
from gptq.solver.grids.table import E4M3, OCTAVE, TableGrid
from gptq.version import __version__

METHOD = "fp8"
BITS, BLOCK = 8, 128
QUANTIZER = f"gptq:{__version__}"


class FloatQuantized(TableFormat, CompressedTensors):
    name: Format = "float-quantized"
    stored_as = "float-quantized"
    codes_key, scale_key = PLAIN_KEY, "weight_scale"
    widths = (BITS,)
    holds, asks_for = "8 bits with one scale per output", "--bits 8 --group-size -1"

    def holds_scheme(self, scheme: Scheme, inputs: int) -> bool:
        return (scheme.bits, scheme.sym, scheme.groups(inputs)) == (BITS, True, 1)

    def choose_scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        return TableGrid(BITS, E4M3, FloatScales(scale_dtype), OCTAVE)

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        return {
            "weight": TensorInfo(FLOAT8, (outputs, inputs)),
            "weight_scale": TensorInfo(scale_dtype, (outputs, 1)),
        }

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        return {"weight": layer.codes.view(FLOAT8), "weight_scale": layer.scale.to(scale_dtype).contiguous()}

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        return self.to_codes(
            packed["weight"].view(torch.uint8), packed["weight_scale"], torch.tensor(E4M3, dtype=torch.float32), scheme
        )

    def describe_weights(self, scheme: Scheme) -> dict[str, Any]:
        return describe_floats(BITS, "channel", None)

    def read_weights(self, where: str, weights: Mapping[str, Any]) -> Scheme:
        read = read_options(FloatWeights, weights, where)
        if (read.num_bits, read.strategy, read.symmetric) != (BITS, "channel", True):
            raise InputError(f"{where} is {self.stored_as!r}; of such weights symmetric 8 bits per channel are read")
        return Scheme(BITS, -1, True, self.name)


class Fp8Blocks(TableFormat):
    name: Format = "fp8"
    quant_method = METHOD
    codes_key, scale_key = PLAIN_KEY, "weight_scale_inv"
    widths = (BITS,)
    holds, asks_for = f"8 bits in blocks of {BLOCK} x {BLOCK}", f"--bits 8 --group-size {BLOCK}"
    usage = (
        "from transformers import AutoModelForCausalLM  # on a GPU that multiplies FP8",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this repository")',
    )

    def holds_scheme(self, scheme: Scheme, inputs: int) -> bool:
        return (scheme.bits, scheme.sym, scheme.columns(inputs)) == (BITS, True, min(BLOCK, inputs))

    def choose_scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        return TableGrid(BITS, E4M3, FloatScales(scale_dtype), OCTAVE, block_rows=BLOCK)

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        return {
            "weight": TensorInfo(FLOAT8, (outputs, inputs)),
            "weight_scale_inv": TensorInfo(scale_dtype, (-(-outputs // BLOCK), -(-inputs // BLOCK))),
        }

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        scale = layer.scale[::BLOCK]
        if not torch.equal(_of_rows(scale, len(layer.scale)), layer.scale):
            raise ValueError(f"its rows do not share scales by {BLOCK}")
        return {"weight": layer.codes.view(FLOAT8), "weight_scale_inv": scale.to(scale_dtype).contiguous()}

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        codes = packed["weight"].view(torch.uint8)
        scale = _of_rows(packed["weight_scale_inv"], len(codes))
        return self.to_codes(codes, scale, torch.tensor(E4M3, dtype=torch.float32), scheme)

    # --- quantization_config ---

    def write_config(self, linears: Linears, config: QuantConfig | None) -> dict[str, Any]:
        """As DeepSeek-V3's; `modules_to_not_convert` names all linear layers that stay as they are."""
        return {
            "quant_method": METHOD,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [*linears.kept, *linears.others],
            "meta": {"quantizer": [QUANTIZER]},
        }

    def read_config(
        self, where: str | Path, quantization: Mapping[str, Any], family: Sequence[FileFormat]
    ) -> Quantization:
        """Files of this package are read packed; those of others, which have more layouts, are read decoded."""
        read = read_options(_Config, quantization, str(where))
        if not any(maker.startswith("gptq:") for maker in read.makers):
            raise InputError(
                f"{where} says quant_method 'fp8', and another tool wrote it; such a checkpoint can be loaded and "
                "quantized anew, but not inspected or converted"
            )
        kept = tuple((f"{re.escape(name)}$", None) for name in read.modules_to_not_convert)
        return Quantization(self.name, Scheme(BITS, BLOCK, True, self.name), kept)


def _of_rows(scale: Tensor, rows: int) -> Tensor:
    """Scales of blocks (blocks, groups) repeated for their rows: (rows, groups)."""
    return scale.repeat_interleave(BLOCK, dim=0)[:rows]


class _Config(Options):
    modules_to_not_convert: Annotated[list[str], BeforeValidator(lambda names: names or [])] = Field(
        [], description="it is a list of names"
    )
    meta: Annotated[dict[str, Any], BeforeValidator(lambda meta: meta or {})] = Field({}, description="it is an object")

    @property
    def makers(self) -> list[str]:
        makers = self.meta.get("quantizer")
        return [str(maker) for maker in makers] if isinstance(makers, list) else []
