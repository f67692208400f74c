"""Compiled loops that multiply bfloat16 rows by packed words, for CPUs with an instruction for pairs of them.

A code less half its range is a bfloat16 number, exactly, so x (code - zero) is summed in float32 without any rounding
before. 16 bits of a word that hold a code in their lowest bits, whatever is above, are looked up in a table of 32
numbers that repeats every 2^bits: shift, look up, multiply and add are all there is to do for 32 codes of 2 to 4 bits.
Wider codes are converted one by one. The codes i and j that come to lie in the two halves of a word are a pair; `order`
says which, and x is put in that order.

For few rows (`gptq.inference.gemv`) codes are looked up for each row anew, which is hidden behind reading them. In
`multiply_many` those of one group and WIDE outputs are written out, which is little enough to stay in the first-level
cache, and multiplied with all rows.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gptq.compute.simd import (
    FLOATS,
    INT,
    INTS,
    LANES,
    SHORTS,
    TALL,
    WIDE,
    chosen,
    compiled,
    constants,
    data,
    dot_pairs,
    leave,
    load,
    load_bytes,
    load_scales,
    look_up,
    multiply_add,
    paired,
    place_of,
    splat,
    store,
    sum_pairs,
    tens_of_three,
    unit_lines,
)

ONES = 0x3F803F80  # a pair of bfloat16 ones


def order(bits: int) -> list[int]:
    """Which of a unit's 32 codes make up its 16 pairs, one pair after the other."""
    return paired(bits) if bits <= 4 else [*range(32)]


def _pairs(builder: Any, lines: list[Any]) -> Iterator[Any]:
    """The 16 pairs of a unit, of LANES outputs each, as bfloat16 numbers: codes less half their range."""
    bits = len(lines)
    if bits > 4:
        for c in range(0, 32, 2):
            low, high = (_converted(builder, lines, c + i, bits) for i in range(2))
            yield builder.or_(builder.lshr(low, constants(16)), high)
        return
    half = 2 ** (bits - 1)
    table = [int(np.float32(code - half).view(np.uint32)) >> 16 for code in range(2 * half)]
    for places in _places_of_three(builder, lines) if bits == 3 else _places(builder, lines, bits):
        yield look_up(builder, table, places)


def _places(builder: Any, lines: list[Any], bits: int) -> Iterator[Any]:
    for line in lines:
        for shift in range(0, 16, bits):
            yield builder.lshr(line, constants(shift)) if shift else line


def _places_of_three(builder: Any, lines: list[Any]) -> Iterator[Any]:
    for window in tens_of_three(builder, lines):
        halves = builder.bitcast(window, SHORTS)
        for i in range(5):
            shifts = ir.Constant(
                SHORTS, [ir.Constant(ir.IntType(16), 3 * i + 1 - lane % 2) for lane in range(2 * LANES)]
            )
            yield builder.bitcast(builder.lshr(halves, shifts), INTS)
    third = lines[2]
    low = builder.and_(builder.lshr(third, constants(26)), constants(0xFFFF))
    yield builder.or_(low, builder.and_(builder.lshr(third, constants(13)), constants(0xFFFF0000)))


def _converted(builder: Any, lines: list[Any], c: int, bits: int) -> Any:
    """Code c less half its range as the bits of a float32, of which the lower 16 are zero."""
    word, shift = divmod(c * bits, 32)
    code = builder.lshr(lines[word], constants(shift)) if shift else lines[word]
    if shift + bits > 32:
        code = builder.or_(code, builder.shl(lines[word + 1], constants(32 - shift)))
    code = builder.and_(code, constants(2**bits - 1))
    return builder.bitcast(builder.sitofp(builder.sub(code, constants(2 ** (bits - 1))), FLOATS), INTS)


def add_unit(builder: Any, lines: list[Any], x: Any, total: Any) -> Any:
    """total + sum_c code_c x_c of LANES outputs, over the 32 codes of a unit less half their range.

    x points to 16 pairs.
    """
    totals = [total, ir.Constant(FLOATS, None)]  # two, as each waits for its last
    for p, pair in enumerate(_pairs(builder, lines)):
        factor = builder.load(builder.gep(x, [ir.Constant(INT, p)]))
        totals[p % 2] = dot_pairs(builder, pair, splat(builder, factor), totals[p % 2])
    return builder.fadd(*totals)


def _ordering_unit(context, x, at, pairs, pairs_at, sums, width):  # type: ignore[no-untyped-def]
    """A unit's 32 numbers of x, from `at` on, as 16 pairs from pairs_at on; LANES parts of their sum join sums."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, pairs_at, _, _ = arguments
        x, pairs, sums = (data(context, builder, signature, arguments, i) for i in (0, 2, 4))
        nowhere, numbers = ir.Constant(at.type, 0), load(builder, x, at, SHORTS)
        unit = builder.bitcast(chosen(builder, numbers, numbers, order(len(width))), INTS)
        store(builder, unit, pairs, pairs_at)
        store(builder, dot_pairs(builder, unit, constants(ONES), load(builder, sums, nowhere, FLOATS)), sums, nowhere)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(x, intp, pairs, intp, sums, width), emit


def _writing_unit(context, words, at, weight, weight_at, width):  # type: ignore[no-untyped-def]
    """weight[weight_at + p WIDE + i] is pair p of output i of a unit, p below 16, i below LANES."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, weight_at, _ = arguments
        words, weight = (data(context, builder, signature, arguments, i) for i in (0, 2))
        line = builder.gep(weight, [weight_at])
        for p, pair in enumerate(_pairs(builder, unit_lines(builder, words, at, len(width)))):
            store(builder, pair, line, ir.Constant(at.type, p * WIDE))
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, weight, intp, width), emit


def _adding_tile(context, x, x_at, weight, depth, x_sums, scale, zero, grid_at, less, y, y_at):  # type: ignore[no-untyped-def]
    """y[y_at + i WIDE + j] += scale_j (sum_k x_ik weight_kj - (zero_j - less) x_sums_i), i below TALL, j below WIDE.

    Over `depth` lines of pairs, of TALL rows in x from x_at on, of WIDE outputs in weight. x_sums are those of these
    rows; scales and zeros begin at grid_at.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, x_at, _, depth, _, _, _, grid_at, less, _, y_at = arguments
        x, weight, x_sums, scale, zero, y = (
            data(context, builder, signature, arguments, i) for i in (0, 2, 4, 5, 6, 9)
        )

        def number(value: int) -> Any:
            return ir.Constant(y_at.type, value)

        totals = sum_pairs(builder, builder.gep(x, [x_at]), TALL, weight, depth)
        grids = []
        for v in range(0, WIDE, LANES):
            place = builder.add(grid_at, number(v))
            z = builder.fsub(load_bytes(builder, zero, place), splat(builder, less))
            grids.append((load_scales(builder, scale, place), z))
        for i, row in enumerate(totals):
            x_sum = splat(builder, builder.load(builder.gep(x_sums, [number(i)])))
            for v, (total, (s, z)) in enumerate(zip(row, grids, strict=True)):
                place = builder.add(y_at, number(i * WIDE + v * LANES))
                inside = builder.fsub(builder.load(total), builder.fmul(z, x_sum))
                store(builder, multiply_add(builder, s, inside, load(builder, y, place, FLOATS)), y, place)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(x, intp, weight, intp, x_sums, scale, zero, intp, types.float32, y, intp), emit


_order_unit: Any = intrinsic(_ordering_unit)
_write_unit: Any = intrinsic(_writing_unit)
_add_tile: Any = intrinsic(_adding_tile)


@compiled
def in_order(x, row, pairs, to, x_sums, columns, width):  # type: ignore[no-untyped-def]
    """Line `to` of pairs (lines, inputs / 2) is line `row` of x in the order of the words, x_sums its groups' sums."""
    inputs, sums = x.shape[1], np.empty(LANES, np.float32)
    for group in range(x_sums.shape[1]):
        sums[:] = np.float32(0)
        for k in range(group * columns, min((group + 1) * columns, inputs), 32):
            _order_unit(x, row * inputs + k, pairs, (to * inputs + k) // 2, sums, width)
        x_sums[to, group] = sums.sum()


@compiled
def arrange(x, tiles, x_sums, columns, width, start, stop) -> None:  # type: ignore[no-untyped-def]
    """x as `multiply_many` wants it, some of its tiles of TALL rows; rows beyond x's are zero.

    Args:
        x: (rows, inputs) int16, the bits of bfloat16 numbers.
        tiles: (rows / TALL, inputs / 2, TALL) int32.
        x_sums: (groups, rows) float32.
    """
    rows, inputs = x.shape
    line, sums = np.empty((1, inputs // 2), np.int32), np.empty((1, len(x_sums)), np.float32)
    for tile in range(start, stop):
        for i in range(TALL):
            row = tile * TALL + i
            if row < rows:
                in_order(x, row, line, 0, sums, columns, width)
                x_sums[:, row], tiles[tile, :, i] = sums[0], line[0]
            else:
                x_sums[:, row], tiles[tile, :, i] = np.float32(0), 0


@compiled
def multiply_many(  # type: ignore[no-untyped-def]
    words, tiles, x_sums, scale, zero, y, columns, width, start, stop
) -> None:
    """As `rows.multiply`, for x in tiles, and with y (rows, outputs) int16, the bits of bfloat16 numbers.

    Outputs are a multiple of WIDE, and so are start and stop.
    """
    (rows, outputs), (groups, _), half = y.shape, x_sums.shape, tiles.shape[1]
    bits, units, less = len(width), half // 16, np.float32(2 ** (len(width) - 1))
    weight = np.empty((columns // 2, WIDE), np.int32)
    sums = np.empty((len(tiles) * TALL, WIDE), np.float32)
    for low in range(start, stop, WIDE):
        sums[:] = np.float32(0)
        for group in range(groups):
            begin, end = group * columns // 32, min((group + 1) * columns // 32, units)
            for unit in range(begin, end):
                at = place_of(low, unit, units, outputs, bits)
                for v in range(0, WIDE, LANES):
                    _write_unit(words, at + v * bits, weight, (unit - begin) * 16 * WIDE + v, width)
            place = place_of(low, group, groups, outputs, 1)
            for tile in range(len(tiles)):
                x_at, depth = (tile * half + begin * 16) * TALL, (end - begin) * 16
                own = x_sums[group, tile * TALL : (tile + 1) * TALL]
                _add_tile(tiles, x_at, weight, depth, own, scale, zero, place, less, sums, tile * TALL * WIDE)
        for row in range(rows):
            for v in range(0, WIDE, LANES):
                leave(sums, row * WIDE + v, y, row * outputs + low + v)
