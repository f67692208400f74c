"""compressed-tensors' FP4 formats: E2M1 numbers, two per byte, with a float8 or power-of-two scale per group.

A linear layer P with `out` outputs and `in` inputs is stored as

                         nvfp4-pack-quantized              mxfp4-pack-quantized
    P.weight_packed        (out, in / 2)   uint8             (out, in / 2)   uint8   the even input in the low half
    P.weight_scale         (out, in / 16)  float8_e4m3fn     (out, in / 32)  uint8   E8M0: 2^(byte - 127)
    P.weight_global_scale  (1,)            float32           -
    w =                    e2m1 (scale / global scale)       e2m1 scale

The global scale is 448 * 6 / max |w|, and the same in layers that engines fuse into one. Activations stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoint.json_objects import read_options
from gptq.checkpoint.tensors import TensorInfo
from gptq.compute.number_formats import E2M1, exponents_of, pack_pairs, powers_of_two, unpack_pairs
from gptq.config import Format
from gptq.errors import InputError
from gptq.formats.compressed_tensors import CompressedTensors, FloatWeights, describe_floats
from gptq.formats.format import SCALE_DTYPE
from gptq.formats.scheme import Scheme
from gptq.formats.table_format import TableFormat
from gptq.solver import Codes, Grid
from gptq.solver.grids.scales import FLOAT8, Float8Scales, PowersOfTwo
from gptq.solver.grids.table import NEAR, TableGrid

BITS, NAN_EXPONENT = 4, 255


class Fp4(TableFormat, CompressedTensors):
    """What both formats have in common."""

    codes_key, scale_key = "weight_packed", "weight_scale"
    codes_per_byte = 2
    widths = (BITS,)
    group: int  # inputs that share a scale
    strategy: str
    stored_scale: torch.dtype

    @property
    def holds(self) -> str:  # type: ignore[override]
        return f"4 bits in whole groups of {self.group} inputs"

    @property
    def asks_for(self) -> str:  # type: ignore[override]
        return f"--bits 4 --group-size {self.group}"

    def holds_scheme(self, scheme: Scheme, inputs: int) -> bool:
        size = scheme.columns(inputs)
        return (scheme.bits, scheme.sym, size) == (BITS, True, self.group) and inputs % size == 0

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        return {
            "weight_packed": TensorInfo(torch.uint8, (outputs, inputs // 2)),
            "weight_scale": TensorInfo(self.stored_scale, (outputs, inputs // self.group)),
        }

    def describe_weights(self, scheme: Scheme) -> dict[str, Any]:
        return describe_floats(BITS, self.strategy, self.group) | {"scale_dtype": str(self.stored_scale)}

    def read_weights(self, where: str, weights: Mapping[str, Any]) -> Scheme:
        read = read_options(FloatWeights, weights, where)
        if (read.num_bits, read.group_size, read.symmetric) != (BITS, self.group, True):
            raise InputError(
                f"{where} is {self.stored_as!r}; of such weights symmetric groups of {self.group} are read"
            )
        return Scheme(BITS, self.group, True, self.name)


class Nvfp4(Fp4):
    name: Format = "nvfp4-pack-quantized"
    stored_as = "nvfp4-pack-quantized"
    other_keys = ("weight_global_scale",)
    group, strategy, stored_scale = 16, "tensor_group", FLOAT8

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        return TableGrid(BITS, E2M1, Float8Scales(1.0))

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        whole = {"weight_global_scale": TensorInfo(torch.float32, (1,))}
        return super().layout(scheme, outputs, inputs, scale_dtype) | whole

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        if layer.super_scale is None or bool((layer.super_scale != layer.super_scale[0]).any()):
            raise ValueError("its rows have no global scale in common")
        return {
            "weight_packed": pack_pairs(layer.codes),
            "weight_scale": (layer.scale * layer.super_scale).to(FLOAT8),
            "weight_global_scale": layer.super_scale.float().flatten()[:1].clone(),
        }

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        whole = packed["weight_global_scale"].float()
        scale = packed["weight_scale"].float() / whole
        each = whole.expand(len(scale), 1)
        return self.to_codes(
            unpack_pairs(packed["weight_packed"]), scale, torch.tensor(E2M1, dtype=torch.float32), scheme, each
        )

    def find_wrong_value(self, packed: Mapping[str, Tensor]) -> tuple[str, str] | None:
        whole = float(packed["weight_global_scale"])
        return None if whole > 0 else ("weight_global_scale", f"{whole}, and scales are divided by it")


class Mxfp4(Fp4):
    name: Format = "mxfp4-pack-quantized"
    stored_as = "mxfp4-pack-quantized"
    group, strategy, stored_scale = 32, "group", torch.uint8

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        return TableGrid(BITS, E2M1, PowersOfTwo(), NEAR)

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        return {"weight_packed": pack_pairs(layer.codes), "weight_scale": exponents_of(layer.scale)}

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        exponents = packed["weight_scale"]
        codes = unpack_pairs(packed["weight_packed"])
        return self.to_codes(codes, powers_of_two(exponents), torch.tensor(E2M1, dtype=torch.float32), scheme)

    def find_wrong_value(self, packed: Mapping[str, Tensor]) -> tuple[str, str] | None:
        wrong = bool((packed["weight_scale"] == NAN_EXPONENT).any())
        return ("weight_scale", f"{NAN_EXPONENT}, which stands for NaN") if wrong else None
