"""16-bit integer kernel for a unit of packed words, for CPUs without bfloat16 products (AVX2); sums are exact.

One instruction (`simd.dot_int16_pairs`) multiplies pairs of 16-bit integers and adds up each pair: twice as many
products as a float32 multiply-add of the same vector width. So a unit's 32 numbers of x are rounded to 16-bit integers
with one scale per unit; a rounding error is at most about 2^-16 of the unit's largest number (2^-15 for 3-bit codes).
Two codes in the halves of a word form a pair. They are not shifted down: masked in place they are 2^shift times too
large. Products of the same shift are summed separately, and each sum is shifted once at the end of the unit, which is
exact.
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
    array_data,
    compiled,
    constant_vector,
    dot_int16_pairs,
    load,
    multiply_add,
    pair_order,
    reduce_add,
    reduce_max,
    round_half_even,
    shuffle,
    splat,
    store,
    three_bit_windows,
)

WIDTHS = 2, 3, 4, 8  # bits of the codes that the kernel supports
SMALLEST_INPUT = 1e-30  # a unit whose largest |x| does not exceed this number is treated as zero
UNIT = 34  # int16 elements of a unit's x: 32 numbers, and their float32 scale in two elements


def _pairs(builder: Any, lines: list[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the 16 pairs of a unit's codes for LANES outputs, each with its shift: the codes times 2^shift.

    The pairs are in the order of `simd.pair_order`.
    """
    bits = len(lines)
    if bits == 3:
        yield from _three_bit_pairs(builder, lines)
        return
    mask = (2**bits - 1) * 0x10001
    for line in lines:
        for shift in range(0, 16, bits):
            if shift == 8:
                line = builder.lshr(line, constant_vector(8))
            yield shift % 8, builder.and_(line, constant_vector(mask << shift % 8))


def _three_bit_pairs(builder: Any, lines: list[Any]) -> Iterator[tuple[int, Any]]:
    """`_pairs` for 3 bits; codes in low halves are one bit higher than in high halves (see `_round_unit_intrinsic`)."""
    mask = 7 << 16 | 7 << 1
    for window in three_bit_windows(builder, lines):
        for i in range(5):
            if i == 3:
                window = builder.lshr(window, constant_vector(9))
            yield 3 * (i % 3), builder.and_(window, constant_vector(mask << 3 * (i % 3)))
    third = lines[2]
    low = builder.and_(builder.lshr(third, constant_vector(25)), constant_vector(7 << 1))
    yield 0, builder.or_(low, builder.and_(builder.lshr(third, constant_vector(13)), constant_vector(7 << 16)))


def add_unit(builder: Any, lines: list[Any], x: Any, total: Any) -> Any:
    """Add the product of a unit's codes and x to the total of LANES outputs.

    total + scale * (codes @ integers)     codes: (LANES, 32); x points to the unit's UNIT elements
    """
    pairs_of_x = builder.bitcast(x, INT.as_pointer())
    sums: dict[int, Any] = {}

    def of_x(p: int) -> Any:
        found = builder.load(builder.gep(pairs_of_x, [ir.Constant(INT, p)]))
        found.align = 2
        return found

    for p, (shift, pair) in enumerate(_pairs(builder, lines)):
        product = dot_int16_pairs(builder, pair, splat(builder, of_x(p)))
        sums[shift] = builder.add(sums[shift], product) if shift in sums else product
    whole, at = None, 0
    for shift in sorted(sums, reverse=True):
        whole = (
            sums[shift] if whole is None else builder.add(sums[shift], builder.ashr(whole, constant_vector(at - shift)))
        )
        at = shift
    scale = builder.bitcast(of_x(16), FLOAT)
    return multiply_add(builder, builder.sitofp(whole, FLOATS), splat(builder, scale), total)


def _round_unit_intrinsic(context, x, at, units, units_at, bits_tuple):  # type: ignore[no-untyped-def]
    """_round_unit(...): round a unit's x to integers with a common scale; return the sum of the rounded numbers.

        scale = abs(x[at : at + 32]).max() / 32767;  integers = rint(x[at : at + 32] / scale).astype(np.int16)
        units[units_at : units_at + UNIT] = integers[pair_order(bits)], scale;  return scale * integers.sum()

    If a number is not finite, neither is the scale. At 3 bits, codes in the low half of a word lie one bit higher than
    codes in the high half. So at 3 bits integers are limited to 16383, the integers for high halves are doubled, and
    the stored scale is halved.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, units_at, _ = arguments
        x, units = (array_data(context, builder, signature, arguments, i) for i in (0, 2))
        twice, order = len(bits_tuple) == 3, pair_order(len(bits_tuple))
        parts = [load(builder, x, builder.add(at, ir.Constant(at.type, i)), FLOATS) for i in (0, LANES)]
        high, other = (builder.and_(builder.bitcast(part, INTS), constant_vector(0x7FFFFFFF)) for part in parts)
        high = builder.select(builder.icmp_signed(">", high, other), high, other)  # the bits of |x| compare like |x|
        largest, most = builder.bitcast(reduce_max(builder, high), FLOAT), ir.Constant(FLOAT, 32767 >> twice)
        seen = builder.fcmp_ordered(">", largest, ir.Constant(FLOAT, SMALLEST_INPUT))
        inverse = splat(builder, builder.select(seen, builder.fdiv(most, largest), ir.Constant(FLOAT, 0)))
        step = builder.fdiv(largest, most)
        first, second = (builder.fptosi(round_half_even(builder, builder.fmul(part, inverse)), INTS) for part in parts)
        low, high = (
            builder.and_(shuffle(builder, first, second, order[i::2]), constant_vector(0xFFFF)) for i in (0, 1)
        )
        unit = builder.bitcast(builder.gep(units, [units_at]), INT.as_pointer())
        nowhere = ir.Constant(at.type, 0)
        store(builder, builder.or_(low, builder.shl(high, constant_vector(16 + twice))), unit, nowhere)
        scale = builder.fmul(step, ir.Constant(FLOAT, 0.5)) if twice else step
        builder.store(builder.bitcast(scale, INT), builder.gep(unit, [ir.Constant(at.type, LANES)])).align = 2
        return builder.fmul(builder.sitofp(reduce_add(builder, builder.add(first, second)), FLOAT), step)

    intp = types.intp
    return types.float32(x, intp, units, intp, bits_tuple), emit


_round_unit: Any = intrinsic(_round_unit_intrinsic)


@compiled
def prepare_row(x, row, units, to, x_sums, columns, bits_tuple):  # type: ignore[no-untyped-def]
    """Write row `row` of x (rows, inputs), rounded, to line `to` of units (lines, inputs / 32, UNIT) int16.

    x_sums[to, group] is the sum of the rounded numbers of a group, so that zero points are applied exactly.
    """
    inputs = x.shape[1]
    for group in range(x_sums.shape[1]):
        total = np.float32(0)
        for k in range(group * columns, min((group + 1) * columns, inputs), 32):
            total += _round_unit(x, row * inputs + k, units, (to * inputs + k) // 32 * UNIT, bits_tuple)
        x_sums[to, group] = total
