"""x W^T for a packed W: choose the kernel that computes it, and make the layout that the kernel reads.

The contract of every kernel: `Product.multiply(x)` is x W^T for x (..., inputs), exact up to rounding in x's dtype, or
in 16-bit integers on CPUs that multiply these faster. `choose` decides by bits, groups, dtype, device and number of
rows; None means to dequantize the weight and multiply, which always works. A layout is made from the stored tensors
when a kernel is first used. It takes this memory per weight, in addition to the stored tensors:

    pairs     bfloat16 on CPUs with AVX-512 BF16; 2 to 8 bits, groups of a multiple of 32. 3 bytes a group for scale and
              zero (5 if a scale is not exact in float16). The rearranged words replace the stored ones, which
              `state_dict` restores. They are an additional copy for pack-quantized files, for act-order, and for shapes
              that need padding.
    lanes     any CPU; 2 to 8 bits, groups of a multiple of 32. The same memory as pairs. For few rows at 2, 3, 4 and 8
              bits, CPUs with AVX2 but without bfloat16 products round x to 16-bit integers
              (`gptq.inference.gemv_int16`)
    int4pack  PyTorch's; bfloat16 on CPUs without AVX2, 4 bits. 1/2 byte a weight and 4 bytes a group
    int8pack  PyTorch's; bfloat16 on CPUs without AVX2, 8 bits symmetric, one group per row. 1 byte a weight
    triton    CUDA; 2, 3, 4, 8 bits. 1 byte a group for the zero
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from gptq import formats
from gptq.compute.cpu_features import has_amx, has_avx2, has_avx512_bf16, has_native_bfloat16
from gptq.compute.threads import run_compiled, run_shares, shares_of
from gptq.inference.layout import Layout, Stored, round_up

FEW_ROWS = 4  # up to this many rows, decoding the codes again for each row is faster than writing the weight out
FEW_SHORTS = 16  # the same for x in 16-bit integers
SHARE = 64  # each thread's number of outputs is a multiple of this
DECODED = 2**22  # weights that are written out at a time, 16 MiB in float32


class Product(Protocol):
    def multiply(self, x: Tensor) -> Tensor: ...  # (..., inputs) -> (..., outputs), both in x's dtype


def choose(stored: Stored, dtype: torch.dtype, rows: int) -> str | None:
    """The name of the kernel, or None to dequantize the weight and multiply.

    Args:
        dtype: of activations, float16, bfloat16 or float32.
        rows: tokens in a forward, all windows together.
    """
    scheme, inputs, outputs = stored.scheme, stored.inputs, stored.outputs
    if rows < 1 or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    if stored.device.type == "cuda":
        return "triton" if formats.FORMATS[scheme.format].inputs_first and has_triton() else None
    if stored.device.type != "cpu":
        return None
    few, whole = rows <= FEW_ROWS, inputs % stored.columns == 0 and not scheme.scattered
    units = stored.columns == inputs or stored.columns % 32 == 0
    if units and dtype == torch.bfloat16 and not (has_amx() and not few) and has_avx512_bf16():
        return "pairs"
    if few and whole and dtype == torch.bfloat16 and not has_avx2():
        if scheme.bits == 4 and stored.columns in (32, 64, 128, 256) and outputs % 16 == 0:
            return "int4pack"
        if scheme.bits == 8 and scheme.sym and stored.columns == inputs and inputs % 16 == 0:  # else it crashes
            return "int8pack"
    return "lanes" if units else None


def make(name: str, stored: Stored) -> Product | None:
    """Make the kernel and its layout; None where g_idx cannot be sorted into groups of equal size."""
    makers: dict[str, Callable[[Stored], Product | None]] = {
        "pairs": Pairs.of,
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
class FewRows:
    """The compiled GEMV (`gptq.inference.gemv`) on a layout; its kind is "pairs", "shorts" or "lanes"."""

    kind: str
    address: int  # of the compiled worker
    given: tuple[int, ...]  # the worker's constant arguments: sizes, and the addresses of words, scale and zero

    @classmethod
    def of(cls, layout: Layout, kind: str) -> "FewRows":
        from gptq.inference import gemv

        held = [tensor.data_ptr() for tensor in (layout.words, layout.scale, layout.zero)]
        given = layout.inputs, layout.width, layout.groups, layout.columns, *held
        worker = gemv.worker(kind, layout.bits, layout.scale.dtype == torch.int16)
        return cls(kind, worker.address, given)

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T (..., padded outputs) for a contiguous x (..., padded inputs), both of the kind's dtype.

        A product with one row takes microseconds, so this avoids the overhead of reshapes.
        """
        inputs, width, groups, columns, words, scale, zero = self.given
        y = x.new_empty((*x.shape[:-1], width))
        rows, share = x.numel() // inputs, round_up(-(-width // torch.get_num_threads()), SHARE)
        sizes = 0, share, rows, inputs, width, groups, columns
        run_compiled(self.address, (*sizes, words, x.data_ptr(), scale, zero, y.data_ptr()))
        return y


@dataclass(frozen=True)
class Lanes:
    """Compiled loops for any CPU: few rows multiply the packed words, many rows a weight dequantized tile by tile."""

    layout: Layout
    few: FewRows

    @classmethod
    def of(cls, stored: Stored) -> "Lanes | None":
        from gptq.inference import gemv_int16

        layout = Layout.of(stored)
        if layout is None:
            return None
        quick = has_avx2() and not has_avx512_bf16() and layout.bits in gemv_int16.WIDTHS
        return cls(layout, FewRows.of(layout, "shorts" if quick else "lanes"))

    def multiply(self, x: Tensor) -> Tensor:
        arranged = self.layout.arranged(x)
        if arranged.numel() <= self.layout.inputs * (FEW_SHORTS if self.few.kind == "shorts" else FEW_ROWS):
            y = self.few.multiply(arranged.float())
        else:
            y = self._many(arranged.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return self.layout.left_of(y).to(x.dtype)

    def _many(self, x: Tensor) -> Tensor:
        """x W^T (rows, padded outputs) for x (rows, padded inputs)."""
        from gptq.compute import simd
        from gptq.inference import gemv_float32

        dtype = x.dtype if x.dtype == torch.bfloat16 and has_native_bfloat16() else torch.float32
        own, x = self.layout, x.to(dtype)
        rows, inputs = x.shape
        y = torch.empty(rows, own.width, dtype=dtype, device="cpu")
        step = max(DECODED // inputs // simd.TILE, 1) * simd.TILE
        for first in range(0, own.width, step):
            taken = min(step, own.width - first)
            weight = torch.empty(inputs, taken, dtype=torch.float32, device="cpu")  # of the tile, transposed
            arrays = _arrays(own.words, own.scale, own.zero, weight)
            given = (*arrays, own.width, own.columns, (0,) * own.bits, first)
            run_shares(gemv_float32.decode, given, shares_of(taken, SHARE))
            torch.mm(x, weight.to(dtype), out=y[:, first : first + taken])
        return y


@dataclass(frozen=True)
class Pairs:
    """The compiled loops of `gemv_bfloat16`, for bfloat16 activations; exact products are summed in float32."""

    layout: Layout
    few: FewRows

    @classmethod
    def of(cls, stored: Stored) -> "Pairs | None":
        layout = Layout.of(stored)
        return None if layout is None else cls(layout, FewRows.of(layout, "pairs"))

    def multiply(self, x: Tensor) -> Tensor:
        arranged = self.layout.arranged(x)
        if arranged.numel() <= self.layout.inputs * FEW_ROWS:
            y = self.few.multiply(arranged)
        else:
            y = self._many(arranged.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return self.layout.left_of(y)

    def _many(self, x: Tensor) -> Tensor:
        """x W^T (rows, padded outputs) for x (rows, padded inputs)."""
        from gptq.compute import simd
        from gptq.inference import gemv_bfloat16

        own, (rows, inputs) = self.layout, x.shape
        y = torch.empty(rows, own.width, dtype=torch.bfloat16, device="cpu")
        count = -(-rows // simd.TALL)
        tiles = torch.empty(count, inputs // 2, simd.TALL, dtype=torch.int32, device="cpu")
        sums = torch.empty(own.groups, count * simd.TALL, dtype=torch.float32, device="cpu")
        arrays = _arrays(x.view(torch.int16), tiles, sums)
        run_shares(gemv_bfloat16.arrange, (*arrays, own.columns, (0,) * own.bits), shares_of(count, 1))
        arrays = _arrays(own.words, tiles, sums, own.scale, own.zero, y.view(torch.int16))
        run_shares(
            gemv_bfloat16.multiply_many, (*arrays, own.columns, (0,) * own.bits), shares_of(own.width, simd.WIDE)
        )
        return y


@dataclass(frozen=True)
class Int4Pack:
    """PyTorch's kernel for 4-bit weights, scale (code - 8) + offset, with both in the activations' dtype."""

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
            _rows_of(x), self.words, self.columns, self.scale_and_offset
        )
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Int8Pack:
    """PyTorch's kernel for int8 weights with one scale per output."""

    codes: Tensor  # (outputs, inputs) int8
    scale: Tensor  # (outputs,) bfloat16

    @classmethod
    def of(cls, stored: Stored) -> "Int8Pack":
        integers = stored.codes()
        signed = (integers.codes.int() - 128).to(torch.int8).contiguous()
        return cls(signed, integers.scale[:, 0].to(torch.bfloat16).contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(_rows_of(x), self.codes, self.scale)
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class TritonProduct:
    """The kernel of `triton_gemm`, on the tensors of GPTQ files as stored; any g_idx."""

    stored: Stored
    zero: Tensor  # (groups, outputs) uint8

    @classmethod
    def of(cls, stored: Stored) -> "TritonProduct":
        zero = formats.decode_zeros(stored.packed, stored.scheme, stored.outputs)
        return cls(stored, zero.T.contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        from gptq.inference import triton_gemm

        packed = self.stored.packed
        y = triton_gemm.multiply(
            _rows_of(x), packed["qweight"], packed["scales"], self.zero, packed["g_idx"], self.stored.scheme.bits
        )
        return y.view(*x.shape[:-1], -1)


def _rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.contiguous().numpy() for tensor in tensors]
