"""A unit of packed words times x in float32, for any CPU; and packed words written out as weights.

Thirty-two codes of an output fill `bits` words, whatever the width (see `packing`), and in `layout.Layout` those of
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

from gptq.compute.simd import (
    FLOAT,
    FLOATS,
    INT,
    LANES,
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


def add_unit(builder: Any, lines: list[Any], x: Any, total: Any) -> Any:
    """total + sum_c code_c x_c of LANES outputs, over the 32 codes of a unit; x points to 32 numbers, prescaled."""
    for c, code in enumerate(_codes(builder, lines)):
        factor = builder.load(builder.gep(x, [ir.Constant(INT, c)]))
        total = multiply_add(builder, code, splat(builder, factor), total)
    return total


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


def _scaling_unit(context, x, at, units, units_at, sums, width):  # type: ignore[no-untyped-def]
    """A unit's 32 numbers of x, from `at` on, prescaled, from units_at on; LANES parts of their sum join sums."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, units_at, _, _ = arguments
        x, units, sums = (data(context, builder, signature, arguments, i) for i in (0, 2, 4))
        nowhere, factors = ir.Constant(at.type, 0), prescale(len(width))
        total = load(builder, sums, nowhere, FLOATS)
        for i in range(0, 32, LANES):
            part, by = load(builder, x, builder.add(at, ir.Constant(at.type, i)), FLOATS), factors[i : i + LANES]
            total = builder.fadd(total, part)
            scaled = builder.fmul(part, ir.Constant(FLOATS, [ir.Constant(FLOAT, factor) for factor in by]))
            store(builder, scaled, units, builder.add(units_at, ir.Constant(at.type, i)))
        store(builder, total, sums, nowhere)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(x, intp, units, intp, sums, width), emit


_write_unit: Any = intrinsic(_writing_unit)
_scale_unit: Any = intrinsic(_scaling_unit)


@compiled
def in_order(x, row, units, to, x_sums, columns, width):  # type: ignore[no-untyped-def]
    """Line `to` of units (lines, inputs / 32, 32) float32 is line `row` of x, prescaled, x_sums its groups' sums."""
    inputs, sums = x.shape[1], np.empty(LANES, np.float32)
    for group in range(x_sums.shape[1]):
        sums[:] = np.float32(0)
        for k in range(group * columns, min((group + 1) * columns, inputs), 32):
            _scale_unit(x, row * inputs + k, units, to * inputs + k, sums, width)
        x_sums[to, group] = sums.sum()


@compiled
def decode(words, scale, zero, weight, outputs, columns, width, first, start, stop) -> None:  # type: ignore[no-untyped-def]
    """weight (inputs, outputs here) becomes W^T in float32, outputs first + start to first + stop.

    The rest is as for `rows.multiply`.
    """
    bits, here, units = len(width), weight.shape[1], weight.shape[0] // 32
    groups = -(-weight.shape[0] // columns)
    for low in range(start, stop, LANES):
        for unit in range(units):
            at = place_of(first + low, unit, units, outputs, bits)
            grid_at = place_of(first + low, unit * 32 // columns, groups, outputs, 1)
            _write_unit(words, at, scale, zero, grid_at, weight, unit * 32 * here + low, width)
