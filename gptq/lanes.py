"""A compiled loop that multiplies rows by packed words, for CPUs: codes are never written out.

Thirty-two codes of an output fill `bits` words, whatever the width (see `packing`), and in GPTQ's layout the words of
neighbouring outputs lie side by side. So LANES outputs are the lanes of a vector and a unit of 32 codes is unrolled:
mask, convert, multiply-add. A code is not shifted down: its number in place is 2^shift times too large, and the input
that it meets is made as much smaller beforehand, which is exact. Only codes that straddle two words, or reach the sign
bit, are shifted.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gptq.vectors import (
    FLOAT,
    FLOATS,
    INTS,
    LANES,
    TILE,
    compiled,
    constants,
    data,
    load,
    multiply_add,
    splat,
    store,
)


def in_place(bits: int) -> list[bool]:
    """Which of a unit's 32 codes the loop leaves where they are in their word."""
    return [c * bits % 32 + bits < 32 for c in range(32)]


def prescale(bits: int) -> list[float]:
    """What the inputs of a unit's 32 codes are multiplied by beforehand."""
    return [2.0 ** -(c * bits % 32) if stays else 1.0 for c, stays in enumerate(in_place(bits))]


def _codes(builder: Any, words: Any, at: Any, stride: Any, bits: int) -> Iterator[Any]:
    """The 32 codes of a unit as vectors of floats, those that stay in place 2^shift times too large."""

    lines = []
    for _ in range(bits):
        lines.append(load(builder, words, at, INTS))
        at = builder.add(at, stride)
    mask = 2**bits - 1
    for c, stays in enumerate(in_place(bits)):
        word, shift = divmod(c * bits, 32)
        if stays:
            code = builder.and_(lines[word], constants(mask << shift))
        elif shift + bits == 32:
            code = builder.lshr(lines[word], constants(shift))
        else:
            low = builder.lshr(lines[word], constants(shift))
            high = builder.shl(lines[word + 1], constants(32 - shift))
            code = builder.and_(builder.or_(low, high), constants(mask))
        yield builder.sitofp(code, FLOATS)


def _adding_unit(context, words, at, stride, x, x_at, sums, sums_at, width):  # type: ignore[no-untyped-def]
    """sums[sums_at + i] += sum_c code_c of output i * x[x_at + c], for LANES outputs i and the 32 codes of a unit.

    All arrays are contiguous. The unit's words are words[at + j * stride + i], j below bits; `width` is a tuple of
    `bits` numbers, as its length is part of its type.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, stride, _, x_at, _, sums_at, _ = arguments
        words, x, sums = (data(context, builder, signature, arguments, i) for i in (0, 3, 5))
        total = load(builder, sums, sums_at, FLOATS)
        for c, code in enumerate(_codes(builder, words, at, stride, len(width))):
            factor = builder.load(builder.gep(x, [builder.add(x_at, ir.Constant(x_at.type, c))]))
            total = multiply_add(builder, code, splat(builder, factor), total)
        store(builder, total, sums, sums_at)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.intp, x, types.intp, sums, types.intp, width), emit


def _writing_unit(context, words, at, stride, s, z, lane, weight, weight_at, width):  # type: ignore[no-untyped-def]
    """weight[weight_at + c * stride of weight + i] = s[lane + i] (code_c of output i - z[lane + i]), c below 32."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, stride, _, _, lane, _, weight_at, _ = arguments
        words, s, z, weight = (data(context, builder, signature, arguments, i) for i in (0, 3, 4, 6))
        line = context.make_array(signature.args[6])(context, builder, arguments[6])
        weight_stride = cgutils.unpack_tuple(builder, line.shape, 2)[1]
        scale, zero = load(builder, s, lane, FLOATS), load(builder, z, lane, FLOATS)
        factors = prescale(len(width))
        for c, code in enumerate(_codes(builder, words, at, stride, len(width))):
            factor = splat(builder, ir.Constant(FLOAT, factors[c]))
            difference = builder.fsub(builder.fmul(code, factor), zero)
            store(builder, builder.fmul(scale, difference), weight, weight_at)
            weight_at = builder.add(weight_at, weight_stride)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, intp, s, z, intp, weight, intp, width), emit


_add_unit: Any = intrinsic(_adding_unit)
_write_unit: Any = intrinsic(_writing_unit)


@compiled
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
    s, z, line = np.ones(TILE, np.float32), np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
    total = np.empty((rows, TILE), np.float32)
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


@compiled
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
