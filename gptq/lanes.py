"""A compiled loop that multiplies rows by packed words, for CPUs: codes are never written out.

Thirty-two codes of an output fill `bits` words, whatever the width (see `packing`), and in GPTQ's layout the words of
neighbouring outputs lie side by side. So LANES outputs are the lanes of a vector and a unit of 32 codes is unrolled:
mask, convert, multiply-add. A code is not shifted down: its number in place is 2^shift times too large, and the input
that it meets is made as much smaller beforehand, which is exact. Only codes that straddle two words, or reach the sign
bit, are shifted.

The vectors are written as LLVM's, as its vectorizer does not find them in a loop; they run on any CPU that LLVM knows.
numba is imported with this module, so it is imported when the first product is computed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # outputs in a vector
VECTORS = 16  # taken together, so that what is read of a line of words is 1 KB long
TILE = LANES * VECTORS

_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)


def in_place(bits: int) -> list[bool]:
    """Which of a unit's 32 codes the loop leaves where they are in their word."""
    return [c * bits % 32 + bits < 32 for c in range(32)]


def prescale(bits: int) -> list[float]:
    """What the inputs of a unit's 32 codes are multiplied by beforehand."""
    return [2.0 ** -(c * bits % 32) if stays else 1.0 for c, stays in enumerate(in_place(bits))]


def _load(builder: Any, array: Any, offset: Any, vector: ir.VectorType) -> Any:
    loaded = builder.load(builder.bitcast(builder.gep(array, [offset]), vector.as_pointer()))
    loaded.align = 4
    return loaded


def _store(builder: Any, value: Any, array: Any, offset: Any) -> None:
    stored = builder.store(value, builder.bitcast(builder.gep(array, [offset]), value.type.as_pointer()))
    stored.align = 4


def _splat(builder: Any, number: Any) -> Any:
    """LANES times the same float."""
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [ir.Constant(_INT, 0)] * LANES))


def _codes(builder: Any, words: Any, at: Any, stride: Any, bits: int) -> Iterator[Any]:
    """The 32 codes of a unit as vectors of floats, those that stay in place 2^shift times too large."""

    def constant(number: int) -> ir.Constant:
        return ir.Constant(_INTS, [ir.Constant(_INT, number)] * LANES)

    lines = []
    for _ in range(bits):
        lines.append(_load(builder, words, at, _INTS))
        at = builder.add(at, stride)
    mask = 2**bits - 1
    for c, stays in enumerate(in_place(bits)):
        word, shift = divmod(c * bits, 32)
        if stays:
            code = builder.and_(lines[word], constant(mask << shift))
        elif shift + bits == 32:
            code = builder.lshr(lines[word], constant(shift))
        else:
            low = builder.lshr(lines[word], constant(shift))
            high = builder.shl(lines[word + 1], constant(32 - shift))
            code = builder.and_(builder.or_(low, high), constant(mask))
        yield builder.sitofp(code, _FLOATS)


def _data(context: Any, builder: Any, signature: Any, arguments: Any, i: int) -> Any:
    """Where the elements of an array begin."""
    return context.make_array(signature.args[i])(context, builder, arguments[i]).data


def _adding_unit(context, words, at, stride, x, x_at, sums, sums_at, width):  # type: ignore[no-untyped-def]
    """sums[sums_at + i] += sum_c code_c of output i * x[x_at + c], for LANES outputs i and the 32 codes of a unit.

    All arrays are contiguous. The unit's words are words[at + j * stride + i], j below bits; `width` is a tuple of
    `bits` numbers, as its length is part of its type.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, stride, _, x_at, _, sums_at, _ = arguments
        words, x, sums = (_data(context, builder, signature, arguments, i) for i in (0, 3, 5))
        fma_type = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fmuladd.v{LANES}f32")
        total = _load(builder, sums, sums_at, _FLOATS)
        for c, code in enumerate(_codes(builder, words, at, stride, len(width))):
            factor = builder.load(builder.gep(x, [builder.add(x_at, ir.Constant(x_at.type, c))]))
            total = builder.call(fma, [code, _splat(builder, factor), total])
        _store(builder, total, sums, sums_at)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.intp, x, types.intp, sums, types.intp, width), emit


def _writing_unit(context, words, at, stride, s, z, lane, weight, weight_at, width):  # type: ignore[no-untyped-def]
    """weight[weight_at + c * stride of weight + i] = s[lane + i] (code_c of output i - z[lane + i]), c below 32."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, stride, _, _, lane, _, weight_at, _ = arguments
        words, s, z, weight = (_data(context, builder, signature, arguments, i) for i in (0, 3, 4, 6))
        line = context.make_array(signature.args[6])(context, builder, arguments[6])
        weight_stride = cgutils.unpack_tuple(builder, line.shape, 2)[1]
        scale, zero = _load(builder, s, lane, _FLOATS), _load(builder, z, lane, _FLOATS)
        factors = prescale(len(width))
        for c, code in enumerate(_codes(builder, words, at, stride, len(width))):
            factor = _splat(builder, ir.Constant(_FLOAT, factors[c]))
            difference = builder.fsub(builder.fmul(code, factor), zero)
            _store(builder, builder.fmul(scale, difference), weight, weight_at)
            weight_at = builder.add(weight_at, weight_stride)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, intp, s, z, intp, weight, intp, width), emit


_add_unit: Any = intrinsic(_adding_unit)
_write_unit: Any = intrinsic(_writing_unit)
_compiled: Callable[..., Any] = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


@_compiled
def multiply(  # type: ignore[no-untyped-def]
    words, x, x_sums, scale, zero, y, columns, width, start, stop
) -> None:
    """y[:, start:stop] = x W^T for W = scale (codes - zero), in float32.

        y_o = sum_g scale_go (sum_{k in g} code_ok x_k - zero_go sum_{k in g} x_k)

    Args:
        words: (inputs / 32 * bits, outputs) int32; inputs are multiples of 32, outputs of LANES.
        x: (rows, inputs) multiplied by `prescale`.
        x_sums: (rows, groups), of x as it was.
        scale: (groups, outputs) float32.
        zero: (groups, outputs) uint8.
        columns: of a group, a multiple of 32.
        width: a tuple of `bits` numbers.
        start, stop: multiples of LANES.
    """
    rows, inputs = x.shape
    outputs, bits = words.shape[1], len(width)
    nil = np.float32(0)
    sums = np.empty((rows, TILE), np.float32)  # of a group
    line, s = np.empty(TILE, np.float32), np.ones(TILE, np.float32)
    z, total = np.zeros(TILE, np.float32), np.empty((rows, TILE), np.float32)
    for low in range(start, stop, TILE):
        taken = min(TILE, stop - low)
        total[:] = nil
        for group in range(scale.shape[0]):
            sums[:] = nil
            for k in range(group * columns, min((group + 1) * columns, inputs), 32):
                first = k // 32 * bits * outputs + low
                for v in range(0, taken, LANES):
                    for row in range(rows):
                        _add_unit(words, first + v, outputs, x, row * inputs + k, sums, row * TILE + v, width)
            s[:taken] = scale[group, low : low + taken]
            z[:taken] = zero[group, low : low + taken]
            for row in range(rows):
                x_sum = x_sums[row, group]
                line[:] = total[row]
                for i in range(TILE):
                    line[i] += s[i] * (sums[row, i] - z[i] * x_sum)
                total[row] = line
        y[:, low : low + taken] = total[:, :taken]


@_compiled
def decode(words, scale, zero, weight, columns, width, first, start, stop) -> None:  # type: ignore[no-untyped-def]
    """weight (inputs, outputs here): outputs first + start to first + stop of W^T in float32; the rest as above."""
    outputs, bits, here = words.shape[1], len(width), weight.shape[1]
    s, z = np.ones(TILE, np.float32), np.zeros(TILE, np.float32)
    for low in range(start, stop, TILE):
        taken = min(TILE, stop - low)
        for k in range(0, weight.shape[0], 32):
            if k % columns == 0:
                s[:taken] = scale[k // columns, first + low : first + low + taken]
                z[:taken] = zero[k // columns, first + low : first + low + taken]
            at = k // 32 * bits * outputs + first + low
            for v in range(0, taken, LANES):
                _write_unit(words, at + v, outputs, s, z, v, weight, k * here + low + v, width)
