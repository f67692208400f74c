"""Compute x W^T for a packed W: choose a kernel for a layer, and prepare the layout that the kernel reads.

`Product.multiply(x)` is x W^T for x (..., inputs), exact up to rounding in x's dtype, or in 16-bit
integers on CPUs that multiply these faster. `prepare` makes the layout that the kernels of a device read; None means to
dequantize the weight and multiply, which always works. A kernel is compiled when it is first used.

On a CPU, for 2 to 8 bits and groups of a multiple of 32, a layout takes 3 bytes a group for scale and zero (5 if a
scale is not exact in float16). The words of the layout replace the stored words, which `state_dict` restores; they are
an additional copy for pack-quantized files, for act-order, and for shapes that need padding. The kernels on it, by x:

    bfloat16  bfloat16 x on CPUs with AVX-512 BF16; many rows only without AMX, which is faster for them
    int16     few rows at 2, 3, 4 and 8 bits on CPUs with AVX2 but without AVX-512 BF16: x is rounded to 16-bit integers
    float32   anything else; many rows multiply a weight that is dequantized tile by tile

On a GPU Triton kernels (`triton_gemm`) read GPTQ's words as they are stored, with 1 byte a group for the zero. The
words of pack-quantized files are replaced by their transpose, which is the same; for act-order and other files the
kernels' words are an additional copy.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from gptq import formats
from gptq.compute.cpu_features import has_amx, has_avx2, has_avx512_bf16, has_native_bfloat16
from gptq.compute.threads import run_compiled, run_loop, share_of
from gptq.formats.packing import pack
from gptq.inference.layout import Layout, Stored, order_of_groups
from gptq.solver.grids.grid import Form

FEW_ROWS = 4  # up to this many rows, decoding the codes anew for each row is faster than dequantizing the weight
FEW_INT16_ROWS = 16  # FEW_ROWS for x in 16-bit integers
SHARE = 64  # each thread's number of outputs is a multiple of this
DECODED = 2**22  # weights that are written out at a time, 16 MiB in float32
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))  # dtypes of activations
Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, list[int]]  # words, scale, zero, order, sizes


class Product(Protocol):
    """The product of one layer, on one device."""

    @property
    def replaces(self) -> str | None:
        """The key of the stored words that need not be kept, because `stored_words` restores them."""

    def stored_words(self) -> Tensor: ...

    def multiply(self, x: Tensor) -> Tensor: ...  # (..., inputs) -> (..., outputs), both in x's dtype

    def operands(self) -> Operands:
        """Return the product's tensors and sizes, for the operator in compiled models; sizes[0] counts the outputs."""


def prepare(stored: Stored) -> Product | None:
    """Make the product of a layer for the device of its tensors; None means to dequantize the weight and multiply."""
    if formats.FORMATS[stored.scheme.format].grid(stored.scheme).form is not Form.INTEGER:
        return None  # the kernels know integer zero points
    if stored.device.type == "cuda":
        return TritonProduct.of(stored) if has_triton() else None
    if stored.device.type != "cpu" or not (stored.columns == stored.inputs or stored.columns % 32 == 0):
        return None
    layout = Layout.of(stored)
    return None if layout is None else CpuProduct(layout)


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class CpuProduct:
    """The product by the compiled CPU loops, on a layout."""

    layout: Layout
    _few: dict[str, "FewRows"] = field(
        default_factory=dict, compare=False, repr=False
    )  # the GEMVs used so far, by kind

    @property
    def replaces(self) -> str | None:
        return "qweight" if self.layout.whole else None

    def stored_words(self) -> Tensor:
        return self.layout.stored_words()

    def multiply(self, x: Tensor) -> Tensor:
        layout, kind = self.layout, self.kind(x)
        x_arranged = layout.arrange(x)
        few = FEW_INT16_ROWS if kind == "int16" else FEW_ROWS
        if x_arranged.numel() <= layout.inputs * few:
            y = self._few_rows(kind).multiply(x_arranged if kind == "bfloat16" else x_arranged.float())
        else:
            multiply_many = _multiply_bfloat16 if kind == "bfloat16" else _multiply_float32
            y = multiply_many(layout, x_arranged.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return layout.drop_padding(y).to(x.dtype)

    def kind(self, x: Tensor) -> str:
        """Choose the kernel for x (..., inputs): "bfloat16", "int16" or "float32"."""
        if x.dtype == torch.bfloat16 and has_avx512_bf16():
            few = x.numel() <= FEW_ROWS * x.shape[-1]
            return "bfloat16" if few or not has_amx() else "float32"
        from gptq.inference import gemv_int16

        quick = has_avx2() and not has_avx512_bf16() and self.layout.bits in gemv_int16.WIDTHS
        return "int16" if quick else "float32"

    def _few_rows(self, kind: str) -> "FewRows":
        if kind not in self._few:
            self._few[kind] = FewRows.of(self.layout, kind)
        return self._few[kind]

    def operands(self) -> Operands:
        own = self.layout
        return (
            own.words,
            own.scale,
            own.zero,
            own.perm,
            [own.outputs, own.inputs, own.bits, own.columns, own.padded_outputs],
        )

    @classmethod
    def of_operands(
        cls, words: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None, sizes: list[int]
    ) -> "CpuProduct":
        outputs, inputs, bits, columns, padded_outputs = sizes
        return cls(Layout(words, scale, zero, order, inputs, bits, columns, outputs, padded_outputs, whole=False))


@dataclass(frozen=True)
class FewRows:
    """The compiled GEMV (`gptq.inference.gemv`) on a layout; its kind is "bfloat16", "int16" or "float32"."""

    loop: Callable[[bool], int]  # its address, for a single row or for several
    given: tuple[int, ...]  # the loop's constant arguments: sizes, and the addresses of words, scale and zero

    @classmethod
    def of(cls, layout: Layout, kind: str) -> "FewRows":
        from gptq.inference import gemv

        held = [tensor.data_ptr() for tensor in (layout.words, layout.scale, layout.zero)]
        given = layout.inputs, layout.padded_outputs, layout.groups, layout.columns, *held
        return cls(partial(gemv.multiply, kind, layout.bits, layout.has_half_scales), given)

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T (..., padded outputs) for a contiguous x (..., padded inputs), both of the kind's dtype.

        A product with one row takes microseconds, so this avoids the overhead of reshapes.
        """
        inputs, outputs, groups, columns, words, scale, zero = self.given
        y = x.new_empty((*x.shape[:-1], outputs))
        rows = x.numel() // inputs
        sizes = 0, share_of(outputs, SHARE), outputs, rows, inputs, outputs, groups, columns
        run_compiled(self.loop(rows == 1), (*sizes, words, x.data_ptr(), scale, zero, y.data_ptr()))
        return y


def _multiply_float32(layout: Layout, x: Tensor) -> Tensor:
    """x W^T (rows, padded outputs) for x (rows, padded inputs), on weights dequantized tile by tile."""
    from gptq.compute import simd
    from gptq.inference import gemv_float32

    dtype = x.dtype if x.dtype == torch.bfloat16 and has_native_bfloat16() else torch.float32
    x = x.to(dtype)
    rows, inputs = x.shape
    y = torch.empty(rows, layout.padded_outputs, dtype=dtype, device="cpu")
    step = max(DECODED // inputs // simd.TILE, 1) * simd.TILE
    decode = gemv_float32.decode(layout.bits, layout.has_half_scales)
    for first in range(0, layout.padded_outputs, step):
        taken = min(step, layout.padded_outputs - first)
        weight = torch.empty(inputs, taken, dtype=torch.float32, device="cpu")  # a tile of W^T
        sizes = inputs, taken, layout.padded_outputs, layout.columns, first
        run_loop(decode, taken, SHARE, layout.words, layout.scale, layout.zero, weight, *sizes)
        torch.mm(x, weight.to(dtype), out=y[:, first : first + taken])
    return y


def _multiply_bfloat16(layout: Layout, x: Tensor) -> Tensor:
    """x W^T (rows, padded outputs) bfloat16 for x (rows, padded inputs) bfloat16; sums are exact in float32."""
    from gptq.compute import simd
    from gptq.inference import gemv_bfloat16

    rows, inputs = x.shape
    y = torch.empty(rows, layout.padded_outputs, dtype=torch.bfloat16, device="cpu")
    count = -(-rows // simd.TALL)
    tiles = torch.empty(count, inputs // 2, simd.TALL, dtype=torch.int32, device="cpu")
    sums = torch.empty(layout.groups, count * simd.TALL, dtype=torch.float32, device="cpu")
    run_loop(gemv_bfloat16.arrange(layout.bits), count, 1, x, tiles, sums, rows, inputs, layout.groups, layout.columns)
    given = layout.words, layout.scale, layout.zero, tiles, sums, y
    sizes = rows, inputs, layout.padded_outputs, layout.groups, layout.columns
    multiply_many = gemv_bfloat16.multiply_many(layout.bits, layout.has_half_scales)
    run_loop(multiply_many, layout.padded_outputs, simd.WIDE, *given, *sizes)
    return y


@dataclass(frozen=True)
class TritonProduct:
    """The kernels of `triton_gemm`, on words in the order of GPTQ's `qweight`, groups being runs of inputs."""

    words: Tensor  # (words, outputs) int32
    scale: Tensor  # (groups, outputs)
    zero: Tensor  # (groups, outputs) uint8
    order: Tensor | None  # (inputs,) order of the inputs that makes groups runs of inputs; None: they are already
    inputs: int
    bits: int
    columns: int  # inputs in a group
    replaces: str | None = None  # the stored words, of which `words` is a transposed copy

    @classmethod
    def of(cls, stored: Stored) -> "TritonProduct | None":
        """Make the product of a layer; None if the kernels do not take its groups."""
        scheme, inputs, columns = stored.scheme, stored.inputs, stored.columns
        if not (columns == inputs or columns % 32 == 0):
            return None
        form, order, replaces = formats.FORMATS[scheme.format], None, None
        if scheme.scattered:
            order = order_of_groups(stored)
            if order is None:
                return None
        zero = formats.decode_zeros(stored.packed, scheme, stored.outputs).T.contiguous()
        if order is None and form.inputs_first:
            return cls(
                stored.packed[form.codes_key], stored.packed[form.scale_key], zero, None, inputs, scheme.bits, columns
            )
        if order is None and form.transposed_words:
            words, replaces = stored.packed[form.codes_key].T.contiguous(), form.codes_key
        else:
            codes = stored.codes().codes
            words = pack((codes if order is None else codes[:, order]).T, scheme.bits)
        scale = stored.codes().scale.T.contiguous()
        return cls(words, scale, zero, order, inputs, scheme.bits, columns, replaces)

    def stored_words(self) -> Tensor:
        return self.words.T.contiguous()

    def multiply(self, x: Tensor) -> Tensor:
        from gptq.inference import triton_gemm

        rows = x.reshape(-1, x.shape[-1])
        rows = (rows if self.order is None else rows.index_select(1, self.order)).contiguous()
        y = triton_gemm.multiply(rows, self.words, self.scale, self.zero, self.bits, self.columns)
        return y.view(*x.shape[:-1], -1)

    def operands(self) -> Operands:
        sizes = [self.words.shape[1], self.inputs, self.bits, self.columns]
        return self.words, self.scale, self.zero, self.order, sizes

    @classmethod
    def of_operands(
        cls, words: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None, sizes: list[int]
    ) -> "TritonProduct":
        _, inputs, bits, columns = sizes
        return cls(words, scale, zero, order, inputs, bits, columns)


# --- the operator of compiled models ----------------------------------------------------------------------------------


def _on_cpu(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None, sizes: list[int]) -> Tensor:
    """`CpuProduct.multiply` as one operator, which a compiler does not look into; contiguous, as `_shape` announces."""
    return CpuProduct.of_operands(words, scale, zero, order, sizes).multiply(x).contiguous()


def _on_cuda(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None, sizes: list[int]) -> Tensor:
    return TritonProduct.of_operands(words, scale, zero, order, sizes).multiply(x).contiguous()


def _shape(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None, sizes: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[0])


_operators = torch.library.Library("gptq", "FRAGMENT")  # others may have operators of that name
_operators.define("multiply(Tensor x, Tensor words, Tensor scale, Tensor zero, Tensor? order, int[] sizes) -> Tensor")
_operators.impl("multiply", _on_cpu, "CPU")
_operators.impl("multiply", _on_cuda, "CUDA")
_operators.impl("multiply", _shape, "Meta")
