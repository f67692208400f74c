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
    array_data,
    compiled,
    constant_vector,
    dot_bfloat16_pairs,
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
    sum_register_tile,
    three_bit_windows,
)

ONES = 0x3F803F80  # two bfloat16 numbers 1.0 in 32 bits


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
        factor = builder.load(builder.gep(x, [ir.Constant(INT, p)]))
        totals[p % 2] = dot_bfloat16_pairs(builder, pair, splat(builder, factor), totals[p % 2])
    return builder.fadd(*totals)


def _order_unit_intrinsic(context, x, at, pairs, pairs_at, sums, bits_tuple):  # type: ignore[no-untyped-def]
    """_order_unit(...): copy a unit's x in the order of the codes; add this x to LANES partial sums.

    unit = x[at : at + 32][code_order(bits)]
    pairs[pairs_at : pairs_at + 16] = unit viewed as pairs;  sums += unit.reshape(16, 2).sum(1)
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, pairs_at, _, _ = arguments
        x, pairs, sums = (array_data(context, builder, signature, arguments, i) for i in (0, 2, 4))
        nowhere, numbers = ir.Constant(at.type, 0), load(builder, x, at, SHORTS)
        unit = builder.bitcast(shuffle(builder, numbers, numbers, code_order(len(bits_tuple))), INTS)
        store(builder, unit, pairs, pairs_at)
        store(
            builder,
            dot_bfloat16_pairs(builder, unit, constant_vector(ONES), load(builder, sums, nowhere, FLOATS)),
            sums,
            nowhere,
        )
        return context.get_dummy_value()

    intp = types.intp
    return types.void(x, intp, pairs, intp, sums, bits_tuple), emit


def _write_unit_intrinsic(context, words, at, weight, weight_at, bits_tuple):  # type: ignore[no-untyped-def]
    """_write_unit(...): write the converted codes of a unit, for LANES outputs.

    weight[weight_at + p * WIDE + i] = pair p of output i (see `_pairs`)     p < 16, i < LANES
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, weight_at, _ = arguments
        words, weight = (array_data(context, builder, signature, arguments, i) for i in (0, 2))
        line = builder.gep(weight, [weight_at])
        for p, pair in enumerate(_pairs(builder, load_unit(builder, words, at, len(bits_tuple)))):
            store(builder, pair, line, ir.Constant(at.type, p * WIDE))
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, weight, intp, bits_tuple), emit


def _add_tile_intrinsic(context, x, x_at, weight, depth, x_sums, scale, zero, grid_at, less, y, y_at):  # type: ignore[no-untyped-def]
    """_add_tile(...): add a group's product of TALL rows of x and WIDE outputs to y, over `depth` lines of pairs.

        y[y_at + i * WIDE + j] += scale[j] * ((X @ weight)[i, j] - (zero[j] - less) * x_sums[i])     i < TALL, j < WIDE

    X (TALL, 2 depth) begins at x[x_at]; scale and zero of the outputs begin at grid_at.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, x_at, _, depth, _, _, _, grid_at, less, _, y_at = arguments
        x, weight, x_sums, scale, zero, y = (
            array_data(context, builder, signature, arguments, i) for i in (0, 2, 4, 5, 6, 9)
        )

        def number(value: int) -> Any:
            return ir.Constant(y_at.type, value)

        totals = sum_register_tile(builder, builder.gep(x, [x_at]), TALL, weight, depth)
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


_order_unit: Any = intrinsic(_order_unit_intrinsic)
_write_unit: Any = intrinsic(_write_unit_intrinsic)
_add_tile: Any = intrinsic(_add_tile_intrinsic)


@compiled
def prepare_row(x, row, pairs, to, x_sums, columns, bits_tuple):  # type: ignore[no-untyped-def]
    """Write row `row` of x in the order of the codes to line `to` of pairs (lines, inputs / 2); sum the row by group.

    x_sums[to, group] = x[row, inputs of the group].sum()
    """
    inputs, sums = x.shape[1], np.empty(LANES, np.float32)
    for group in range(x_sums.shape[1]):
        sums[:] = np.float32(0)
        for k in range(group * columns, min((group + 1) * columns, inputs), 32):
            _order_unit(x, row * inputs + k, pairs, (to * inputs + k) // 2, sums, bits_tuple)
        x_sums[to, group] = sums.sum()


@compiled
def arrange(x, tiles, x_sums, columns, bits_tuple, start, stop) -> None:  # type: ignore[no-untyped-def]
    """Rearrange x for `multiply_many`: tiles `start` to `stop` of TALL rows; missing rows are zero.

    Args:
        x: (rows, inputs) bfloat16 viewed as int16.
        tiles: (rows / TALL, inputs / 2, TALL) int32 pairs, output.
        x_sums: (groups, rows rounded up to TALL) float32, output.
    """
    rows, inputs = x.shape
    line, sums = np.empty((1, inputs // 2), np.int32), np.empty((1, len(x_sums)), np.float32)
    for tile in range(start, stop):
        for i in range(TALL):
            row = tile * TALL + i
            if row < rows:
                prepare_row(x, row, line, 0, sums, columns, bits_tuple)
            else:
                sums[:], line[:] = np.float32(0), 0
            for group in range(len(x_sums)):  # numba takes seconds to compile an assignment of one slice to another
                x_sums[group, row] = sums[0, group]
            for p in range(inputs // 2):
                tiles[tile, p, i] = line[0, p]


@compiled
def multiply_many(  # type: ignore[no-untyped-def]
    words, tiles, x_sums, scale, zero, y, columns, bits_tuple, start, stop
) -> None:
    """`gemv.multiply` for many rows: x in tiles made by `arrange`, y (rows, outputs) bfloat16 viewed as int16.

    `outputs`, start and stop are multiples of WIDE.
    """
    (rows, outputs), (groups, _), half = y.shape, x_sums.shape, tiles.shape[1]
    bits, units, less = len(bits_tuple), half // 16, np.float32(2 ** (len(bits_tuple) - 1))
    weight = np.empty((columns // 2, WIDE), np.int32)
    sums = np.empty((len(tiles) * TALL, WIDE), np.float32)
    for low in range(start, stop, WIDE):
        sums[:] = np.float32(0)
        for group in range(groups):
            begin, end = group * columns // 32, min((group + 1) * columns // 32, units)
            for unit in range(begin, end):
                at = strip_offset(low, unit, units, outputs, bits)
                for v in range(0, WIDE, LANES):
                    _write_unit(words, at + v * bits, weight, (unit - begin) * 16 * WIDE + v, bits_tuple)
            place = strip_offset(low, group, groups, outputs, 1)
            for tile in range(len(tiles)):
                x_at, depth = (tile * half + begin * 16) * TALL, (end - begin) * 16
                own = x_sums[group, tile * TALL : (tile + 1) * TALL]
                _add_tile(tiles, x_at, weight, depth, own, scale, zero, place, less, sums, tile * TALL * WIDE)
        for row in range(rows):
            for v in range(0, WIDE, LANES):
                store_output(sums, row * WIDE + v, y, row * outputs + low + v)
