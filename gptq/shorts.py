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

from gptq.vectors import (
    FLOAT,
    FLOATS,
    INT,
    compiled,
    constants,
    dot_shorts,
    multiply_add,
    paired,
    splat,
    tens_of_three,
)

WIDTHS = 2, 3, 4, 8
SMALLEST = np.float32(1e-30)  # a unit whose numbers are all smaller counts as zero
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
    """Of those in a low half everything is one bit higher; see `table`."""
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


def table(bits: int) -> list[int]:
    """For `in_order`: where each of a unit's numbers is in x, and then what it is multiplied by.

    Of 3 bits, codes in a word's low half lie one bit higher than those in its high half.
    """
    return [*paired(bits), *([1, 2] if bits == 3 else [1, 1]) * 16]


@compiled
def in_order(x, row, ordered, units, to, x_sums, columns):  # type: ignore[no-untyped-def]
    """Line `to` of units (lines, inputs / 32, UNIT) is line `row` of x (rows, inputs), rounded.

    x_sums (lines, groups) are of what x is rounded to as well: so much is multiplied by W exactly. Where x is not
    finite, neither is the unit's scale.
    """
    inputs, numbers, scale = x.shape[1], np.empty(32, np.int32), np.empty(1, np.float32)
    halves, times, nil = scale.view(np.int16), ordered[33], np.float32(0)
    most = np.float32(32767 // times)
    for group in range(x_sums.shape[1]):
        total = nil
        for k in range(group * columns, min((group + 1) * columns, inputs), 32):
            unit, largest, undefined = units[to, k // 32], nil, nil
            for i in range(32):
                largest = max(largest, abs(x[row, k + i]))
                undefined += x[row, k + i] * nil
            step = largest / most + undefined
            inverse = most / largest if largest > SMALLEST else nil
            for i in range(32):
                numbers[i] = np.int32(np.rint(x[row, k + i] * inverse))
            for i in range(32):
                unit[i] = np.int16(numbers[ordered[i]] * ordered[32 + i])
            total += np.float32(numbers.sum()) * step
            scale[0] = step / np.float32(times)
            unit[32], unit[33] = halves[0], halves[1]
        x_sums[to, group] = total
