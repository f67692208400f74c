"""Compiled products of bfloat16 rows and packed words, for CPUs that multiply pairs of bfloat16 (AVX-512 BF16).

A code minus half its range is exact in bfloat16, so x (code - zero) is summed in float32 with no earlier rounding.
Codes of 2 to 4 bits are converted by table lookup: the low five bits of a 16-bit lane index a table of 32 entries. The
table repeats every 2^bits, so bits above the code do not matter. Each pair of codes takes a shift, a lookup and a
multiply-add. Wider codes are converted one by one. Two codes in the two halves of a word form a pair; `code_order`
lists the pairs, and x is stored in that order.

For few rows (`gptq.inference.gemv`) codes are converted again for each row; the CPU converts them while it waits for
memory. `multiply_many` converts the codes of one group and WIDE outputs once, into a buffer that fits the first-level
cache, and multiplies this buffer by all rows.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir

from gptq.compute.machine_code import BYTE, Arguments, Int, compile_loop, counting, scratch, smaller, variable
from gptq.compute.simd import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    SHORT,
    SHORTS,
    TALL,
    WIDE,
    constant_vector,
    dot_bfloat16_pairs,
    element,
    fill_with_zeros,
    load,
    load_bytes,
    load_scales,
    load_unit,
    look_up,
    multiply_add,
    pair_order,
    shuffle,
    splat,
    store,
    store_output,
    strip_offset,
    sum_in_order,
    sum_register_tile,
    three_bit_windows,
)

NUMBER, UNIT_NUMBER = SHORT, INT  # types of the elements of x and y (bfloat16), and of a unit's x (pairs of bfloat16)
UNIT = 16  # elements of a unit's x
ONES = 0x3F803F80  # two bfloat16 numbers 1.0 in 32 bits


def subtracted(bits: int) -> float:
    """What `add_unit` subtracts from each code before it multiplies: half the range."""
    return float(2 ** (bits - 1))


def code_order(bits: int) -> list[int]:
    """The order in which a unit's 32 codes are read: 16 pairs, one after the other."""
    return pair_order(bits) if bits <= 4 else [*range(32)]


def _pairs(builder: Any, lines: list[Any]) -> Iterator[Any]:
    """Yield the 16 pairs of a unit's codes for LANES outputs, converted to bfloat16.

    bfloat16(codes[:, code_order(bits)] - 2 ** (bits - 1))     (LANES, 32), two columns in each vector of INTS
    """
    bits = len(lines)
    if bits > 4:
        for c in range(0, 32, 2):
            low, high = (_converted(builder, lines, c + i, bits) for i in range(2))
            yield builder.or_(builder.lshr(low, constant_vector(16)), high)
        return
    half = 2 ** (bits - 1)
    table = [int(np.float32(code - half).view(np.uint32)) >> 16 for code in range(2 * half)]
    for places in _three_bit_places(builder, lines) if bits == 3 else _places(builder, lines, bits):
        yield look_up(builder, table, places)


def _places(builder: Any, lines: list[Any], bits: int) -> Iterator[Any]:
    """Yield the words shifted so that a pair of codes lies in the low bits of the two halves; for 2 and 4 bits."""
    for line in lines:
        for shift in range(0, 16, bits):
            yield builder.lshr(line, constant_vector(shift)) if shift else line


def _three_bit_places(builder: Any, lines: list[Any]) -> Iterator[Any]:
    """`_places` for 3 bits: five pairs from each of `three_bit_windows`, then codes 30 and 31."""
    for window in three_bit_windows(builder, lines):
        halves = builder.bitcast(window, SHORTS)
        for i in range(5):
            shifts = ir.Constant(
                SHORTS, [ir.Constant(ir.IntType(16), 3 * i + 1 - lane % 2) for lane in range(2 * LANES)]
            )
            yield builder.bitcast(builder.lshr(halves, shifts), INTS)
    third = lines[2]
    low = builder.and_(builder.lshr(third, constant_vector(26)), constant_vector(0xFFFF))
    yield builder.or_(low, builder.and_(builder.lshr(third, constant_vector(13)), constant_vector(0xFFFF0000)))


def _converted(builder: Any, lines: list[Any], c: int, bits: int) -> Any:
    """Code c minus half its range, as float32 viewed as INTS; the low 16 bits are zero: bfloat16 holds it exactly."""
    word, shift = divmod(c * bits, 32)
    code = builder.lshr(lines[word], constant_vector(shift)) if shift else lines[word]
    if shift + bits > 32:
        code = builder.or_(code, builder.shl(lines[word + 1], constant_vector(32 - shift)))
    code = builder.and_(code, constant_vector(2**bits - 1))
    return builder.bitcast(builder.sitofp(builder.sub(code, constant_vector(2 ** (bits - 1))), FLOATS), INTS)


def add_unit(builder: Any, lines: list[Any], x: Any, total: Any) -> Any:
    """Add the product of a unit's codes and x to the total of LANES outputs.

    total + (codes - 2 ** (bits - 1)) @ x     codes: (LANES, 32); x points to 16 pairs of inputs
    """
    totals = [total, ir.Constant(FLOATS, None)]  # two independent sums hide the latency of the instruction
    for p, pair in enumerate(_pairs(builder, lines)):
        factor = builder.load(element(builder, x, p))
        totals[p % 2] = dot_bfloat16_pairs(builder, pair, splat(builder, factor), totals[p % 2])
    return builder.fadd(*totals)


def prepare_row(
    builder: Any, x: Any, row: Int, inputs: Int, units: Any, x_sums: Any, groups: Int, columns: Int, bits: int
) -> None:
    """Write row `row` of x (rows, inputs) in the order of the codes to units (rows, inputs / 2); sum it by groups.

    x_sums[row, group] = x[row, inputs of the group].sum()     in LANES partial sums
    """

    def keep(k: Int, unit: Any) -> None:
        store(builder, unit, units, (row * inputs + k) // 2)

    with counting(builder, 0, groups) as group:
        total = _order_group(builder, x, row, inputs, group, columns, bits, keep)
        builder.store(total, element(builder, x_sums, row * groups + group))


def _order_group(
    builder: Any, x: Any, row: Int, inputs: Int, group: Int, columns: Int, bits: int, keep: Callable[[Int, Any], None]
) -> Any:
    """Call keep(k, unit) with each unit of a group's x, from input k on, in the order of the codes; return their sum.

    unit = x[row, k : k + 32][code_order(bits)] viewed as pairs
    """
    sums = variable(builder, ir.Constant(FLOATS, None))
    builder.store(ir.Constant(FLOATS, None), sums)
    with counting(builder, group * columns, smaller(group * columns + columns, inputs), 32) as k:
        numbers = load(builder, x, row * inputs + k, SHORTS)
        unit = builder.bitcast(shuffle(builder, numbers, numbers, code_order(bits)), INTS)
        keep(k, unit)
        builder.store(dot_bfloat16_pairs(builder, unit, constant_vector(ONES), builder.load(sums)), sums)
    return sum_in_order(builder, builder.load(sums))


@cache
def arrange(bits: int) -> int:
    """Return the loop that rearranges x for `multiply_many`, by tiles of TALL rows; missing rows are zero.

    Its arguments: x (rows, inputs) bfloat16; tiles (rows / TALL, inputs / 2, TALL) int32 pairs and x_sums (groups, rows
    rounded up to TALL) float32, which are outputs; rows, inputs, groups, inputs of a group. Shares are tiles.
    """
    return compile_loop(f"arrange_{bits}", partial(_arrange, bits=bits))


def _arrange(builder: Any, given: Arguments, bits: int) -> None:
    x, tiles, x_sums = given.array(SHORT), given.array(INT), given.array(FLOAT)
    rows, inputs, groups, columns = given.integers(4)
    whole_rows = (rows + TALL - 1) // TALL * TALL

    def keep_at(at: Int) -> Callable[[Int, Any], None]:
        def keep(k: Int, unit: Any) -> None:
            for p in range(LANES):
                pair = builder.extract_element(unit, ir.Constant(INT, p))
                builder.store(pair, element(builder, tiles, at + (k // 2 + p) * TALL))

        return keep

    with given.shares() as (start, stop), counting(builder, start * TALL, stop * TALL) as row:
        tile_at = row // TALL * TALL * (inputs // 2) + (row - row // TALL * TALL)
        with builder.if_else(row.is_below(rows)) as (present, missing):
            with present, counting(builder, 0, groups) as group:
                total = _order_group(builder, x, row, inputs, group, columns, bits, keep_at(tile_at))
                builder.store(total, element(builder, x_sums, group * whole_rows + row))
            with missing:
                with counting(builder, 0, groups) as group:
                    builder.store(ir.Constant(FLOAT, 0.0), element(builder, x_sums, group * whole_rows + row))
                with counting(builder, 0, inputs // 2) as p:
                    builder.store(ir.Constant(INT, 0), element(builder, tiles, tile_at + p * TALL))


@cache
def multiply_many(bits: int, halves: bool) -> int:
    """Return the loop that multiplies many rows, in tiles made by `arrange`.

    Its arguments: words, scale (float16 if `halves`, otherwise float32), zero, as in `layout.Layout`; tiles, x_sums; y
    (rows, outputs) bfloat16; rows, inputs, outputs, groups, inputs of a group. Shares are multiples of WIDE outputs.
    """
    return compile_loop(f"multiply_many_{bits}_{halves}", partial(_multiply_many, bits=bits, halves=halves))


def _multiply_many(builder: Any, given: Arguments, bits: int, halves: bool) -> None:
    words, scale, zero = given.array(INT), given.array(SHORT if halves else FLOAT), given.array(BYTE)
    tiles, x_sums, y = given.array(INT), given.array(FLOAT), given.array(SHORT)
    rows, inputs, outputs, groups, columns = given.integers(5)
    count, half, units = (rows + TALL - 1) // TALL, inputs // 2, inputs // 32
    with (
        scratch(builder, INT, columns // 2 * WIDE) as weight,
        scratch(builder, FLOAT, count * TALL * WIDE) as sums,
        given.shares() as (start, stop),
        counting(builder, start, stop, WIDE) as low,
    ):
        fill_with_zeros(builder, sums, count * TALL * WIDE, FLOATS)
        with counting(builder, 0, groups) as group:
            begin, end = group * columns // 32, smaller((group * columns + columns) // 32, units)
            with counting(builder, begin, end) as unit:
                at = strip_offset(low, unit, units, outputs, bits)
                for v in range(0, WIDE, LANES):
                    _write_unit(builder, words, at + v * bits, weight, (unit - begin) * 16 * WIDE + v, bits)
            grids = _load_grids(builder, scale, zero, strip_offset(low, group, groups, outputs, 1), bits)
            with counting(builder, 0, count) as tile:
                x = element(builder, tiles, (tile * half + begin * 16) * TALL)
                own = element(builder, x_sums, (group * count + tile) * TALL)
                _add_tile(builder, x, weight, (end - begin) * 16, own, grids, sums, tile * TALL * WIDE)
        with counting(builder, 0, rows) as row:
            for v in range(0, WIDE, LANES):
                store_output(builder, sums, row * WIDE + v, y, row * outputs + low + v)


def _write_unit(builder: Any, words: Any, at: Int, weight: Any, weight_at: Int, bits: int) -> None:
    """Write the converted codes of a unit, for LANES outputs.

    weight[weight_at + p * WIDE + i] = pair p of output i (see `_pairs`)     p < 16, i < LANES
    """
    for p, pair in enumerate(_pairs(builder, load_unit(builder, words, at, bits))):
        store(builder, pair, weight, weight_at + p * WIDE)


def _load_grids(builder: Any, scale: Any, zero: Any, at: Int, bits: int) -> list[tuple[Any, Any]]:
    """Scales, and zeros less what the codes are less, of WIDE outputs."""
    less = splat(builder, ir.Constant(FLOAT, subtracted(bits)))
    places = [at + v for v in range(0, WIDE, LANES)]
    return [
        (load_scales(builder, scale, place), builder.fsub(load_bytes(builder, zero, place), less)) for place in places
    ]


def _add_tile(
    builder: Any, x: Any, weight: Any, depth: Int, x_sums: Any, grids: list[tuple[Any, Any]], y: Any, y_at: Int
) -> None:
    """Add a group's product of TALL rows of x (TALL, 2 depth) and WIDE outputs to y, over `depth` lines of pairs.

    y[y_at + i * WIDE + j] += scale[j] * ((x @ weight)[i, j] - zero[j] * x_sums[i])     i < TALL, j < WIDE
    """
    for i, row in enumerate(sum_register_tile(builder, x, TALL, weight, depth)):
        x_sum = splat(builder, builder.load(element(builder, x_sums, i)))
        for v, (total, (scale, zero)) in enumerate(zip(row, grids, strict=True)):
            place = y_at + (i * WIDE + v * LANES)
            inside = builder.fsub(builder.load(total), builder.fmul(zero, x_sum))
            store(builder, multiply_add(builder, scale, inside, load(builder, y, place, FLOATS)), y, place)
