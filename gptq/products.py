"""x W^T for a packed W: which kernel computes it, and the layout that kernel reads.

Every kernel keeps to one contract: `Product.multiply(x)` is x W^T for x (rows, inputs), within the rounding of x's
dtype. `choose` picks by width, groups, dtype, device and number of rows; None stands for unpacking the weight and
multiplying, which is always right. A layout is made from the stored tensors when a kernel is first used; the stored
tensors stay, as they are what `state_dict` holds. Beside them it takes, per weight:

    lanes     CPU, 2 to 8 bits, groups of whole 32s   5 bytes a group (scale, zero); the words are read where they are,
              unless the format, act-order or a shape that fills no vectors needs them in another order: then a copy
    int4pack  PyTorch's; CPU, 4 bits, bfloat16        1/2 byte and 4 bytes a group
    int8pack  PyTorch's; CPU, 8 bits symmetric, one group per row, bfloat16     1 byte
    triton    CUDA, 2, 3, 4, 8 bits                   1 byte a group (zero)
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from gptq import formats
from gptq.formats import Scheme
from gptq.packing import pack
from gptq.threads import run_shares, shares_of

FEW_ROWS = 4  # to which decoding anew for every row is cheaper than writing the weight out
DECODED = 2**22  # weights that are written out at a time, 16 MB in float32


class Product(Protocol):
    def multiply(self, x: Tensor) -> Tensor: ...  # (rows, inputs) -> (rows, outputs), both in x's dtype


@dataclass(frozen=True)
class Stored:
    """A layer's stored tensors with what is needed to read them."""

    packed: dict[str, Tensor]
    scheme: Scheme
    outputs: int
    inputs: int

    @property
    def device(self) -> torch.device:
        return next(iter(self.packed.values())).device

    @property
    def columns(self) -> int:
        return self.scheme.columns(self.inputs)

    def codes(self) -> formats.Codes:
        return formats.decode(self.packed, self.scheme)


def choose(stored: Stored, dtype: torch.dtype, rows: int) -> str | None:
    """The name of the kernel, or None where there is none but unpacking.

    Args:
        dtype: of activations, float16, bfloat16 or float32.
        rows: of activations, all windows' tokens together.
    """
    scheme, inputs, outputs = stored.scheme, stored.inputs, stored.outputs
    if rows < 1 or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    if stored.device.type == "cuda":
        return "triton" if scheme.format != "pack-quantized" and has_triton() else None
    if stored.device.type != "cpu":
        return None
    few, whole = rows <= FEW_ROWS, inputs % stored.columns == 0 and not scheme.scattered
    if few and whole and dtype == torch.bfloat16:
        if scheme.bits == 4 and stored.columns in (32, 64, 128, 256) and outputs % 16 == 0:
            return "int4pack"
        if scheme.bits == 8 and scheme.sym and stored.columns == inputs and inputs % 16 == 0:  # else it crashes
            return "int8pack"
    return "lanes" if stored.columns == inputs or stored.columns % 32 == 0 else None


def make(name: str, stored: Stored) -> Product | None:
    """The kernel with its layout; None where g_idx cannot be sorted into groups of equal size."""
    makers: dict[str, Callable[[Stored], Product | None]] = {
        "lanes": Lanes.of,
        "int4pack": Int4Pack.of,
        "int8pack": Int8Pack.of,
        "triton": TritonProduct.of,
    }
    return makers[name](stored)


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Lanes:
    """The compiled loop of `lanes`: for few rows on the words themselves, for many on weights written out by tiles."""

    words: Tensor  # (units * bits, padded outputs) int32
    scale: Tensor  # (groups, padded outputs) float32
    zero: Tensor  # (groups, padded outputs) uint8
    prescale: Tensor  # (padded inputs,) float32
    perm: Tensor | None  # (inputs,) order in which groups are runs
    bits: int
    columns: int
    outputs: int

    @classmethod
    def of(cls, stored: Stored) -> "Lanes | None":
        from gptq import lanes, vectors

        scheme, inputs, outputs = stored.scheme, stored.inputs, stored.outputs
        perm = None
        if scheme.scattered:
            g_idx = formats.decode_groups(stored.packed, scheme, inputs)
            perm = torch.argsort(g_idx, stable=True)
            if not torch.equal(g_idx[perm], formats.in_runs(scheme, inputs)):
                return None
        wide, deep = _up(outputs, vectors.LANES), _up(inputs, 32)
        if perm is None and scheme.format != "pack-quantized" and (wide, deep) == (outputs, inputs):
            words = stored.packed["qweight"].contiguous()
            scale = stored.packed["scales"]
            zero = formats.decode_zeros(stored.packed["qzeros"], scheme, outputs).T
        else:
            integers = stored.codes()
            codes = integers.codes if perm is None else integers.codes[:, perm]
            padded = torch.nn.functional.pad(codes, (0, deep - inputs, 0, wide - outputs))  # (wide, deep)
            words = pack(padded.T, scheme.bits)
            scale, zero = integers.scale.T, integers.zero.T
        rim = (0, wide - outputs)
        scale = torch.nn.functional.pad(scale.float(), rim).contiguous()
        zero = torch.nn.functional.pad(zero, rim).contiguous()
        prescale = torch.tensor(lanes.prescale(scheme.bits)).repeat(deep // 32)
        columns = deep if stored.columns == inputs else stored.columns
        return cls(words, scale, zero, prescale, perm, scheme.bits, columns, outputs)

    def multiply(self, x: Tensor) -> Tensor:
        if self.perm is not None:
            x = x[:, self.perm]
        if x.shape[1] < len(self.prescale):
            x = torch.nn.functional.pad(x, (0, len(self.prescale) - x.shape[1]))
        y = self._few(x.float()) if len(x) <= FEW_ROWS else self._many(x)
        return y[:, : self.outputs].to(x.dtype)

    def _few(self, x: Tensor) -> Tensor:
        from gptq import lanes

        rows, inputs = x.shape
        groups = len(self.scale)
        sums = torch.nn.functional.pad(x, (0, groups * self.columns - inputs)).view(rows, groups, -1).sum(-1)
        y = torch.empty(rows, self.words.shape[1])
        arrays = _arrays(self.words, x * self.prescale, sums, self.scale, self.zero, y)
        run_shares(lanes.multiply, (*arrays, self.columns, (0,) * self.bits), shares_of(y.shape[1], lanes.TILE))
        return y

    def _many(self, x: Tensor) -> Tensor:
        from gptq import lanes

        dtype = x.dtype if x.dtype == torch.bfloat16 and _fast_bfloat16() else torch.float32
        x = x.to(dtype)
        rows, inputs = x.shape
        outputs = self.words.shape[1]
        y = torch.empty(rows, outputs, dtype=dtype)
        step = max(DECODED // inputs // lanes.TILE, 1) * lanes.TILE
        for first in range(0, outputs, step):
            taken = min(step, outputs - first)
            weight = torch.empty(inputs, taken)  # of the tile, transposed
            arrays = _arrays(self.words, self.scale, self.zero, weight)
            run_shares(lanes.decode, (*arrays, self.columns, (0,) * self.bits, first), shares_of(taken, lanes.TILE))
            torch.mm(x, weight.to(dtype), out=y[:, first : first + taken])
        return y


@dataclass(frozen=True)
class Int4Pack:
    """PyTorch's product with 4-bit weights; it takes scale (code - 8) + offset, both in the activations' dtype."""

    words: Tensor  # opaque, (outputs, inputs / 2) uint8
    scale_and_offset: Tensor  # (groups, outputs, 2) bfloat16
    columns: int

    @classmethod
    def of(cls, stored: Stored) -> "Int4Pack":
        integers = stored.codes()
        scale = integers.scale.float()
        offset = scale * (8 - integers.zero.float())
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.codes.int(), 1)
        return cls(words, torch.stack([scale.T, offset.T], -1).to(torch.bfloat16).contiguous(), stored.columns)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.words, self.columns, self.scale_and_offset
        )
        return y


@dataclass(frozen=True)
class Int8Pack:
    """PyTorch's product with signed bytes and a scale per output."""

    codes: Tensor  # (outputs, inputs) int8
    scale: Tensor  # (outputs,) bfloat16

    @classmethod
    def of(cls, stored: Stored) -> "Int8Pack":
        integers = stored.codes()
        signed = (integers.codes.int() - 128).to(torch.int8).contiguous()
        return cls(signed, integers.scale[:, 0].to(torch.bfloat16).contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.codes, self.scale)
        return y


@dataclass(frozen=True)
class TritonProduct:
    """The kernel of `triton_product`, on GPTQ's stored tensors as they are; any g_idx."""

    stored: Stored
    zero: Tensor  # (groups, outputs) uint8

    @classmethod
    def of(cls, stored: Stored) -> "TritonProduct":
        zero = formats.decode_zeros(stored.packed["qzeros"], stored.scheme, stored.outputs)
        return cls(stored, zero.T.contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        from gptq import triton_product

        packed = self.stored.packed
        return triton_product.multiply(
            x, packed["qweight"], packed["scales"], self.zero, packed["g_idx"], self.stored.scheme.bits
        )


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.contiguous().numpy() for tensor in tensors]


@cache
def _fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16; where it does not, float32 is faster and no less exact."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asked if ask is not None)
