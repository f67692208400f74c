"""Compiled loops that multiply bfloat16 rows by packed words, for CPUs with an instruction for pairs of them.

A code less half its range is a bfloat16 number, exactly, so x (code - zero) is summed in float32 without any rounding
before. 16 bits of a word that hold a code in their lowest bits, whatever is above, are looked up in a table of 32
numbers that repeats every 2^bits: shift, look up, multiply and add are all there is to do for 32 codes of 2 to 4 bits.
Wider codes are converted one by one. The codes i and j that come to lie in the two halves of a word are a pair; `order`
says which, and x is put in that order.

In `multiply` codes are looked up for each row anew, which for few rows is hidden behind reading them. In
`multiply_many` those of one group and WIDE outputs are written out, which is little enough to stay in the first-level
cache, and multiplied with all rows.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from gptq.vectors import (
    FLOATS,
    INTS,
    LANES,
    SHORTS,
    TALL,
    TILE,
    WIDE,
    add_group,
    claim,
    compiled,
    constants,
    data,
    dot_pairs,
    load,
    load_bytes,
    load_scales,
    look_up,
    multiply_add,
    permute,
    place_of,
    pointer,
    splat,
    store,
    sum_pairs,
    unit_lines,
)

ARGUMENTS = 13  # of a `worker`
ONES = 0x3F803F80  # a pair of bfloat16 ones


def order(bits: int) -> list[int]:
    """Which of a unit's 32 codes make up its 16 pairs, one pair after the other."""
    if bits == 3:  # ten codes of each 32 bits that begin one bit before a code; the last two are by themselves
        pairs = [(ten + i, ten + 5 + i) for ten in (0, 10, 20) for i in range(5)]
        return [code for pair in [*pairs, (30, 31)] for code in pair]
    if bits in (2, 4):
        word, half = 32 // bits, 16 // bits
        return [code for first in range(0, 32, word) for i in range(half) for code in (first + i, first + half + i)]
    return [*range(32)]


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
    """32 bits that begin one before a code hold five in each half, from bit 1 in the low and from bit 0 in the high."""
    first, second, third = lines
    begun = [builder.shl(first, constants(1))]
    for low, high, bit in ((first, second, 29), (second, third, 27)):
        begun.append(builder.or_(builder.lshr(low, constants(bit)), builder.shl(high, constants(32 - bit))))
    for window in begun:
        halves = builder.bitcast(window, SHORTS)
        for i in range(5):
            shifts = ir.Constant(
                SHORTS, [ir.Constant(ir.IntType(16), 3 * i + 1 - lane % 2) for lane in range(2 * LANES)]
            )
            yield builder.bitcast(builder.lshr(halves, shifts), INTS)
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


def _adding_unit(context, words, at, x, x_at, sums, sums_at, width):  # type: ignore[no-untyped-def]
    """sums[sums_at + i] += sum_c code_c of output i * x_c, for LANES outputs i and the 32 codes of a unit.

    The unit's words begin at words[at], its pairs of x at x_at; `width` is a tuple of `bits` numbers, as its length is
    part of its type.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, x_at, _, sums_at, _ = arguments
        words, x, sums = (data(context, builder, signature, arguments, i) for i in (0, 2, 4))
        totals = [load(builder, sums, sums_at, FLOATS), ir.Constant(FLOATS, None)]  # two, as each waits for its last
        line = builder.gep(x, [x_at])
        for p, pair in enumerate(_pairs(builder, unit_lines(builder, words, at, len(width), ahead=True))):
            factor = builder.load(builder.gep(line, [ir.Constant(x_at.type, p)]))
            totals[p % 2] = dot_pairs(builder, pair, splat(builder, factor), totals[p % 2])
        store(builder, builder.fadd(*totals), sums, sums_at)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, x, intp, sums, intp, width), emit


def _ordering_unit(context, x, at, ordered, pairs, pairs_at, sums):  # type: ignore[no-untyped-def]
    """A unit's 32 numbers of x, from `at` on, as 16 pairs from pairs_at on; LANES parts of their sum join sums."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        x, ordered, pairs, sums = (data(context, builder, signature, arguments, i) for i in (0, 2, 3, 5))
        nowhere = ir.Constant(arguments[1].type, 0)
        places = load(builder, ordered, nowhere, SHORTS)
        unit = builder.bitcast(permute(builder, load(builder, x, arguments[1], SHORTS), places), INTS)
        store(builder, unit, pairs, arguments[4])
        store(builder, dot_pairs(builder, unit, constants(ONES), load(builder, sums, nowhere, FLOATS)), sums, nowhere)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(x, intp, ordered, pairs, intp, sums), emit


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


_add_unit: Any = intrinsic(_adding_unit)
_order_unit: Any = intrinsic(_ordering_unit)
_write_unit: Any = intrinsic(_writing_unit)
_add_tile: Any = intrinsic(_adding_tile)


@compiled
def multiply(  # type: ignore[no-untyped-def]
    words, pairs, x_sums, scale, zero, y, columns, width, start, stop
) -> None:
    """y[:, start:stop] = x W^T for W = scale (codes - zero), summed in float32; for few rows.

    Args:
        words: int32, scale: float32 or int16, zero: uint8, each in strips as `products.Layout` has them.
        pairs: (rows, inputs / 2) int32, x in the order of the words' codes; inputs are multiples of 32.
        x_sums: (rows, groups) float32, of x.
        y: (rows, outputs) int16, the bits of bfloat16 numbers; outputs are multiples of LANES.
        columns: of a group, a multiple of 32.
        width: a tuple of `bits` numbers.
        start, stop: multiples of LANES.
    """
    (rows, half), (_, groups), (_, outputs) = pairs.shape, x_sums.shape, y.shape
    bits, units, nil, less = len(width), half // 16, np.float32(0), np.float32(2 ** (len(width) - 1))
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
                        _add_unit(words, at + v * bits, pairs, row * half + unit * 16, sums, row * TILE + v, width)
            place = place_of(low, group, groups, outputs, 1)
            for row in range(rows):
                for v in range(0, taken, LANES):
                    add_group(total, row * TILE + v, sums, x_sums[row, group], scale, zero, place + v, less)
        for row in range(rows):
            _rounded(total[row], y, row, low, low + taken)
        low += taken


@cache
def worker(bits: int, halves: bool) -> Any:
    """`multiply` as a function for `threads.run_compiled`, which claims some of the outputs until there are none left.

    Its arguments: 0, outputs in a share, rows, inputs, outputs, groups, columns of a group, and the addresses of words,
    x (rows, inputs) bfloat16, scale, zero, y (rows, outputs) bfloat16 and what `order` says, as 16 bits each. Scales
    are float32, or if `halves` float16.
    """
    width, number = (0,) * bits, np.int16(0) if halves else np.float32(0)

    def work(table):  # type: ignore[no-untyped-def]
        given = carray(table, (ARGUMENTS,))
        share, rows, inputs, outputs = given[1], given[2], given[3], given[4]
        groups, columns, at = given[5], given[6], given[7:]
        words = carray(pointer(at[0], np.int32(0)), (inputs // 32 * len(width) * outputs,))
        x = carray(pointer(at[1], np.int16(0)), (rows, inputs))
        scale = carray(pointer(at[2], number), (groups * outputs,))
        zero = carray(pointer(at[3], np.uint8(0)), (groups * outputs,))
        y = carray(pointer(at[4], np.int16(0)), (rows, outputs))
        ordered = carray(pointer(at[5], np.int16(0)), (32,))
        pairs, x_sums = np.empty((rows, inputs // 2), np.int32), np.empty((rows, groups), np.float32)
        for row in range(rows):
            _in_order(x, row, ordered, pairs, row, x_sums, columns)
        start = claim(table) * share
        while start < outputs:
            multiply(words, pairs, x_sums, scale, zero, y, columns, width, start, min(start + share, outputs))
            start = claim(table) * share

    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)


@compiled
def _in_order(x, row, ordered, pairs, to, x_sums, columns):  # type: ignore[no-untyped-def]
    """Line `to` of pairs (lines, inputs / 2) is line `row` of x in the order of the words, x_sums its groups' sums."""
    inputs, sums = x.shape[1], np.empty(LANES, np.float32)
    for group in range(x_sums.shape[1]):
        sums[:] = np.float32(0)
        for k in range(group * columns, min((group + 1) * columns, inputs), 32):
            _order_unit(x, row * inputs + k, ordered, pairs, (to * inputs + k) // 2, sums)
        x_sums[to, group] = sums.sum()


@compiled
def _rounded(sums, y, row, start, stop):  # type: ignore[no-untyped-def]
    """y[row, start:stop] becomes the sums as bfloat16, rounded to the nearest, ties to even."""
    bits = sums.view(np.int32)
    for i in range(stop - start):
        y[row, start + i] = np.int16((bits[i] + 0x7FFF + ((bits[i] >> 16) & 1)) >> 16)


@compiled
def arrange(x, ordered, tiles, x_sums, columns, start, stop) -> None:  # type: ignore[no-untyped-def]
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
                _in_order(x, row, ordered, line, 0, sums, columns)
                x_sums[:, row], tiles[tile, :, i] = sums[0], line[0]
            else:
                x_sums[:, row], tiles[tile, :, i] = np.float32(0), 0


@compiled
def multiply_many(  # type: ignore[no-untyped-def]
    words, tiles, x_sums, scale, zero, y, columns, width, start, stop
) -> None:
    """As `multiply`, for x in tiles, and with y (rows, outputs) int16, the bits of bfloat16 numbers.

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
            _rounded(sums[row], y, row, low, low + WIDE)
