"""A compiled loop that multiplies rows by packed words, for CPUs: codes are never written out.

Thirty-two codes of an output fill `bits` words, whatever the width (see `packing`), and in `products.Layout` those of
LANES outputs lie side by side. They are the lanes of a vector, and a unit of 32 codes is unrolled:
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
    LANES,
    TILE,
    add_group,
    compiled,
    constants,
    data,
    load,
    load_bytes,
    load_scales,
    multiply_add,
    place_of,
    splat,
    store,
    unit_lines,
)


def in_place(bits: int) -> list[bool]:
    """Which of a unit's 32 codes the loop leaves where they are in their word."""
    return [c * bits % 32 + bits < 32 for c in range(32)]


def prescale(bits: int) -> list[float]:
    """What the inputs of a unit's 32 codes are multiplied by beforehand."""
    return [2.0 ** -(c * bits % 32) if stays else 1.0 for c, stays in enumerate(in_place(bits))]


def _codes(builder: Any, lines: list[Any]) -> Iterator[Any]:
    """The 32 codes of a unit as vectors of floats, those that stay in place 2^shift times too large."""
    bits = len(lines)
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


def _adding_unit(context, words, at, x, x_at, sums, sums_at, width):  # type: ignore[no-untyped-def]
    """sums[sums_at + i] += sum_c code_c of output i * x[x_at + c], for LANES outputs i and the 32 codes of a unit.

    All arrays are contiguous. The unit's words begin at words[at]; `width` is a tuple of `bits` numbers, as its length
    is part of its type.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, x_at, _, sums_at, _ = arguments
        words, x, sums = (data(context, builder, signature, arguments, i) for i in (0, 2, 4))
        total = load(builder, sums, sums_at, FLOATS)
        for c, code in enumerate(_codes(builder, unit_lines(builder, words, at, len(width), ahead=True))):
            factor = builder.load(builder.gep(x, [builder.add(x_at, ir.Constant(x_at.type, c))]))
            total = multiply_add(builder, code, splat(builder, factor), total)
        store(builder, total, sums, sums_at)
        return context.get_dummy_value()

    return types.void(words, types.intp, x, types.intp, sums, types.intp, width), emit


def _writing_unit(context, words, at, scale, zero, grid_at, weight, weight_at, width):  # type: ignore[no-untyped-def]
    """weight[weight_at + c * stride of weight + i] = scale_i (code_c of output i - zero_i), c below 32.

    The first of LANES scales and zeros is at grid_at.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, _, grid_at, _, weight_at, _ = arguments
        words, scale, zero, weight = (data(context, builder, signature, arguments, i) for i in (0, 2, 3, 5))
        line = context.make_array(signature.args[5])(context, builder, arguments[5])
        weight_stride = cgutils.unpack_tuple(builder, line.shape, 2)[1]
        s = load_scales(builder, scale, grid_at)
        z = load_bytes(builder, zero, grid_at)
        factors = prescale(len(width))
        for c, code in enumerate(_codes(builder, unit_lines(builder, words, at, len(width)))):
            factor = splat(builder, ir.Constant(FLOAT, factors[c]))
            difference = builder.fsub(builder.fmul(code, factor), z)
            store(builder, builder.fmul(s, difference), weight, weight_at)
            weight_at = builder.add(weight_at, weight_stride)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, scale, zero, intp, weight, intp, width), emit


_add_unit: Any = intrinsic(_adding_unit)
_write_unit: Any = intrinsic(_writing_unit)


@compiled
def multiply(  # type: ignore[no-untyped-def]
    words, x, x_sums, scale, zero, y, columns, width, start, stop
) -> None:
    """y[:, start:stop] = x W^T for W = scale (codes - zero), in float32.

        y_o = sum_g scale_go (sum_{k in g} code_ok x_k - zero_go sum_{k in g} x_k)

    Args:
        words: int32, scale: float32 or int16, zero: uint8, each in strips as `products.Layout` has them.
        x: (rows, inputs) multiplied by `prescale`; inputs are multiples of 32.
        x_sums: (rows, groups), of x as it was.
        y: (rows, outputs); outputs are multiples of LANES.
        columns: of a group, a multiple of 32.
        width: a tuple of `bits` numbers.
        start, stop: multiples of LANES.
    """
    (rows, inputs), (_, groups), (_, outputs) = x.shape, x_sums.shape, y.shape
    bits, units, nil = len(width), inputs // 32, np.float32(0)
    sums, total = np.empty((rows, TILE), np.float32), np.empty((rows, TILE), np.float32)  # of a group, and of all
    low = start
    while low < stop:
        taken = min(stop, (low // TILE + 1) * TILE) - low
        total[:] = nil
        for group in range(groups):
            sums[:] = nil
            for unit in range(group * columns // 32, min((group + 1) * columns // 32, units)):
                at = place_of(low, unit, units, outputs, bits)
                for v in range(0, taken, LANES):
                    for row in range(rows):
                        _add_unit(words, at + v * bits, x, row * inputs + unit * 32, sums, row * TILE + v, width)
            place = place_of(low, group, groups, outputs, 1)
            for row in range(rows):
                for v in range(0, taken, LANES):
                    add_group(total, row * TILE + v, sums, x_sums[row, group], scale, zero, place + v, nil)
        y[:, low : low + taken] = total[:, :taken]
        low += taken


@compiled
def decode(words, scale, zero, weight, outputs, columns, width, first, start, stop) -> None:  # type: ignore[no-untyped-def]
    """weight (inputs, outputs here): outputs first + start to first + stop of W^T in float32; the rest as above."""
    bits, here, units = len(width), weight.shape[1], weight.shape[0] // 32
    groups = -(-weight.shape[0] // columns)
    for low in range(start, stop, LANES):
        for unit in range(units):
            at = place_of(first + low, unit, units, outputs, bits)
            grid_at = place_of(first + low, unit * 32 // columns, groups, outputs, 1)
            _write_unit(words, at, scale, zero, grid_at, weight, unit * 32 * here + low, width)
