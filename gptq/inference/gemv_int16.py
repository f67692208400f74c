"""A unit of packed words times x in 16 bits, for CPUs without products of bfloat16: integers, added up exactly.

One instruction multiplies sixteen pairs of 16-bit integers and adds up each pair, where it would be eight products of
float32. So the 32 numbers of x that a unit meets are rounded to 16 bits, by a scale of their own: none is off by more
than about 2^-16 of the largest (2^-15 for codes of 3 bits). Two codes in the halves of a word are a pair. They are not
shifted down for it: masked in place they are 2^shift times too large, so those with the same shift are added up by
themselves, and their sum is shifted when the unit is done, which loses nothing.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptq.compute.simd import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    chosen,
    compiled,
    constants,
    data,
    dot_shorts,
    largest_of,
    load,
    multiply_add,
    paired,
    splat,
    store,
    sum_of,
    tens_of_three,
    to_nearest,
)

WIDTHS = 2, 3, 4, 8
SMALLEST = 1e-30  # a unit whose numbers are all smaller counts as zero
UNIT = 34  # numbers of 16 bits: 32 of x, and the 32 bits of their scale


def _pairs(builder: Any, lines: list[Any]) -> Iterator[tuple[int, Any]]:
    """The 16 pairs of a unit, of LANES outputs each, and how many bits too high they are."""
    bits = len(lines)
    if bits == 3:
        yield from _pairs_of_three(builder, lines)
        return
    mask = (2**bits - 1) * 0x10001
    for line in lines:
        for shift in range(0, 16, bits):
            if shift == 8:
                line = builder.lshr(line, constants(8))
            yield shift % 8, builder.and_(line, constants(mask << shift % 8))


def _pairs_of_three(builder: Any, lines: list[Any]) -> Iterator[tuple[int, Any]]:
    """Of those in a low half everything is one bit higher; see `_rounding_unit`."""
    mask = 7 << 16 | 7 << 1
    for window in tens_of_three(builder, lines):
        for i in range(5):
            if i == 3:
                window = builder.lshr(window, constants(9))
            yield 3 * (i % 3), builder.and_(window, constants(mask << 3 * (i % 3)))
    third = lines[2]
    low = builder.and_(builder.lshr(third, constants(25)), constants(7 << 1))
    yield 0, builder.or_(low, builder.and_(builder.lshr(third, constants(13)), constants(7 << 16)))


def add_unit(builder: Any, lines: list[Any], x: Any, total: Any) -> Any:
    """total + sum_c code_c x_c of LANES outputs, over the 32 codes of a unit; x points to its UNIT numbers."""
    pairs_of_x = builder.bitcast(x, INT.as_pointer())
    sums: dict[int, Any] = {}

    def of_x(p: int) -> Any:
        found = builder.load(builder.gep(pairs_of_x, [ir.Constant(INT, p)]))
        found.align = 2
        return found

    for p, (shift, pair) in enumerate(_pairs(builder, lines)):
        product = dot_shorts(builder, pair, splat(builder, of_x(p)))
        sums[shift] = builder.add(sums[shift], product) if shift in sums else product
    whole, at = None, 0
    for shift in sorted(sums, reverse=True):
        whole = sums[shift] if whole is None else builder.add(sums[shift], builder.ashr(whole, constants(at - shift)))
        at = shift
    scale = builder.bitcast(of_x(16), FLOAT)
    return multiply_add(builder, builder.sitofp(whole, FLOATS), splat(builder, scale), total)


def _rounding_unit(context, x, at, units, units_at, width):  # type: ignore[no-untyped-def]
    """A unit's 32 numbers of x, from `at` on, rounded, and their scale, from units_at on; returns their sum.

    That of what x is rounded to, which W is multiplied by exactly. If a number is not finite, neither is the scale. Of
    3 bits, codes in a word's low half lie one bit higher than those in its high half, so what these meet is doubled.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, units_at, _ = arguments
        x, units = (data(context, builder, signature, arguments, i) for i in (0, 2))
        twice, order = len(width) == 3, paired(len(width))
        parts = [load(builder, x, builder.add(at, ir.Constant(at.type, i)), FLOATS) for i in (0, LANES)]
        high, other = (builder.and_(builder.bitcast(part, INTS), constants(0x7FFFFFFF)) for part in parts)
        high = builder.select(builder.icmp_signed(">", high, other), high, other)  # bits of |x| are in its order
        largest, most = builder.bitcast(largest_of(builder, high), FLOAT), ir.Constant(FLOAT, 32767 >> twice)
        seen = builder.fcmp_ordered(">", largest, ir.Constant(FLOAT, SMALLEST))
        inverse = splat(builder, builder.select(seen, builder.fdiv(most, largest), ir.Constant(FLOAT, 0)))
        step = builder.fdiv(largest, most)
        first, second = (builder.fptosi(to_nearest(builder, builder.fmul(part, inverse)), INTS) for part in parts)
        low, high = (builder.and_(chosen(builder, first, second, order[i::2]), constants(0xFFFF)) for i in (0, 1))
        unit = builder.bitcast(builder.gep(units, [units_at]), INT.as_pointer())
        nowhere = ir.Constant(at.type, 0)
        store(builder, builder.or_(low, builder.shl(high, constants(16 + twice))), unit, nowhere)
        scale = builder.fmul(step, ir.Constant(FLOAT, 0.5)) if twice else step
        builder.store(builder.bitcast(scale, INT), builder.gep(unit, [ir.Constant(at.type, LANES)])).align = 2
        return builder.fmul(builder.sitofp(sum_of(builder, builder.add(first, second)), FLOAT), step)

    intp = types.intp
    return types.float32(x, intp, units, intp, width), emit


_round_unit: Any = intrinsic(_rounding_unit)


@compiled
def in_order(x, row, units, to, x_sums, columns, width):  # type: ignore[no-untyped-def]
    """Line `to` of units (lines, inputs / 32, UNIT) is line `row` of x (rows, inputs), rounded.

    x_sums (lines, groups) are of what x is rounded to as well.
    """
    inputs = x.shape[1]
    for group in range(x_sums.shape[1]):
        total = np.float32(0)
        for k in range(group * columns, min((group + 1) * columns, inputs), 32):
            total += _round_unit(x, row * inputs + k, units, (to * inputs + k) // 32 * UNIT, width)
        x_sums[to, group] = total
