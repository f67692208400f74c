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

from llvmlite import ir

from gptq.compute.machine_code import Int, counting, smaller, variable
from gptq.compute.simd import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    SHORT,
    constant_vector,
    dot_int16_pairs,
    element,
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

NUMBER, UNIT_NUMBER = FLOAT, SHORT  # types of the elements of x and y, and of a unit's x
WIDTHS = 2, 3, 4, 8  # bits of the codes that the kernel supports
SMALLEST_INPUT = 1e-30  # a unit whose largest |x| does not exceed this number is treated as zero
UNIT = 34  # int16 elements of a unit's x: 32 numbers, and their float32 scale in two elements


def subtracted(bits: int) -> float:
    """What `add_unit` subtracts from each code before it multiplies."""
    return 0.0


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
    """`_pairs` for 3 bits; codes in low halves are one bit higher than in high halves (see `_round_unit`)."""
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
        found = builder.load(element(builder, pairs_of_x, p))
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


def _round_unit(builder: Any, x: Any, at: Int, units: Any, units_at: Int, bits: int) -> Any:
    """Round a unit's x to integers with a common scale; return the sum of the rounded numbers.

        scale = abs(x[at : at + 32]).max() / 32767;  integers = rint(x[at : at + 32] / scale).astype(np.int16)
        units[units_at : units_at + UNIT] = integers[pair_order(bits)], scale;  return scale * integers.sum()

    If a number is not finite, neither is the scale. At 3 bits, codes in the low half of a word lie one bit higher than
    codes in the high half. So at 3 bits integers are limited to 16383, the integers for high halves are doubled, and
    the stored scale is halved.
    """
    twice, order = bits == 3, pair_order(bits)
    parts = [load(builder, x, at + i, FLOATS) for i in (0, LANES)]
    high, other = (builder.and_(builder.bitcast(part, INTS), constant_vector(0x7FFFFFFF)) for part in parts)
    high = builder.select(builder.icmp_signed(">", high, other), high, other)  # the bits of |x| compare like |x|
    largest, most = builder.bitcast(reduce_max(builder, high), FLOAT), ir.Constant(FLOAT, 32767 >> twice)
    seen = builder.fcmp_ordered(">", largest, ir.Constant(FLOAT, SMALLEST_INPUT))
    inverse = splat(builder, builder.select(seen, builder.fdiv(most, largest), ir.Constant(FLOAT, 0)))
    step = builder.fdiv(largest, most)
    first, second = (builder.fptosi(round_half_even(builder, builder.fmul(part, inverse)), INTS) for part in parts)
    low, high = (builder.and_(shuffle(builder, first, second, order[i::2]), constant_vector(0xFFFF)) for i in (0, 1))
    unit = builder.bitcast(element(builder, units, units_at), INT.as_pointer())
    store(builder, builder.or_(low, builder.shl(high, constant_vector(16 + twice))), unit, 0)
    scale = builder.fmul(step, ir.Constant(FLOAT, 0.5)) if twice else step
    builder.store(builder.bitcast(scale, INT), element(builder, unit, LANES)).align = 2
    return builder.fmul(builder.sitofp(reduce_add(builder, builder.add(first, second)), FLOAT), step)


def prepare_row(
    builder: Any, x: Any, row: Int, inputs: Int, units: Any, x_sums: Any, groups: Int, columns: Int, bits: int
) -> None:
    """Write row `row` of x (rows, inputs), rounded, to units (rows, inputs / 32, UNIT).

    x_sums[row, group] is the sum of the rounded numbers of a group, so that zero points are applied exactly.
    """
    total = variable(builder, ir.Constant(FLOAT, 0.0))
    with counting(builder, 0, groups) as group:
        builder.store(ir.Constant(FLOAT, 0.0), total)
        with counting(builder, group * columns, smaller(group * columns + columns, inputs), 32) as k:
            part = _round_unit(builder, x, row * inputs + k, units, (row * inputs + k) // 32 * UNIT, bits)
            builder.store(builder.fadd(builder.load(total), part), total)
        builder.store(builder.load(total), element(builder, x_sums, row * groups + group))
