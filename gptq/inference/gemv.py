"""x W^T for few rows of x, on packed words: one compiled loop, whatever numbers x is made of for it.

Codes are never written out. A unit is 32 codes of LANES outputs, which are the lanes of vectors; how it meets its 32
numbers of x depends on what the CPU is quick at, and the type of these numbers says how:

    pairs     two bfloat16 numbers in 32 bits (`gptq.inference.gemv_bfloat16`)
    shorts    integers of 16 bits, with a scale (`gptq.inference.gemv_int16`)
    lanes     float32 (`gptq.inference.gemv_float32`)
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload

from gptq.compute.simd import (
    FLOATS,
    LANES,
    SOURCES,
    TILE,
    add_group,
    claim,
    compiled,
    data,
    leave,
    load,
    place_of,
    pointer,
    store,
    unit_lines,
)
from gptq.inference import gemv_bfloat16, gemv_float32, gemv_int16

ARGUMENTS = 12  # of a `worker`
ADDING = {types.int32: gemv_bfloat16.add_unit, types.int16: gemv_int16.add_unit, types.float32: gemv_float32.add_unit}
ORDERING = {types.int32: gemv_bfloat16.in_order, types.int16: gemv_int16.in_order, types.float32: gemv_float32.in_order}


@dataclass(frozen=True)
class Kind:
    """What x is made of."""

    number: Any  # one of x, as of y, for its type
    unit: Any  # type of the numbers of a unit
    size: int  # how many there are


KINDS = {
    "pairs": Kind(np.int16(0), np.int32, 16),
    "shorts": Kind(np.float32(0), np.int16, gemv_int16.UNIT),
    "lanes": Kind(np.float32(0), np.float32, 32),
}


def _adding_unit(context, words, at, x, x_at, sums, sums_at, width):  # type: ignore[no-untyped-def]
    """sums[sums_at + i] += sum_c code_c of output i * x_c, for LANES outputs i and the 32 codes of a unit.

    The unit's words begin at words[at], its numbers of x at x_at; `width` is a tuple of `bits` numbers, as its length
    is part of its type.
    """
    add_unit = ADDING[x.dtype]

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, x_at, _, sums_at, _ = arguments
        words, x, sums = (data(context, builder, signature, arguments, i) for i in (0, 2, 4))
        lines = unit_lines(builder, words, at, len(width), ahead=True)
        total = add_unit(builder, lines, builder.gep(x, [x_at]), load(builder, sums, sums_at, FLOATS))
        store(builder, total, sums, sums_at)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, x, intp, sums, intp, width), emit


_add_unit: Any = intrinsic(_adding_unit)


def _in_order(x: Any, row: int, units: Any, x_sums: Any, columns: int, width: tuple[int, ...]) -> None:
    """Row `row` of x as the numbers of its units, and the sums of its groups."""


@overload(_in_order)
def _typed_in_order(x, row, units, x_sums, columns, width):  # type: ignore[no-untyped-def]
    in_order = ORDERING[units.dtype]
    return lambda x, row, units, x_sums, columns, width: in_order(x, row, units, row, x_sums, columns, width)


@compiled
def multiply(  # type: ignore[no-untyped-def]
    words, x, x_sums, scale, zero, less, y, columns, width, start, stop
) -> None:
    """y[:, start:stop] = x W^T for W = scale (codes - zero), summed in float32.

        y_o = sum_g scale_go (sum_{k in g} code_ok x_k - zero_go sum_{k in g} x_k)

    Args:
        words: int32, scale: float32 or int16, zero: uint8, each in strips as `layout.Layout` has them.
        x: (rows, units, numbers of a unit), a unit for each 32 inputs.
        x_sums: (rows, groups) float32, of x.
        less: what codes are smaller by when they meet x.
        y: (rows, outputs) float32, or int16 that are the bits of bfloat16 numbers; outputs are multiples of LANES.
        columns: of a group, a multiple of 32.
        width: a tuple of `bits` numbers.
        start, stop: multiples of LANES.
    """
    (rows, units, size), (_, groups), (_, outputs), bits = x.shape, x_sums.shape, y.shape, len(width)
    sums, total = np.empty((rows, TILE), np.float32), np.empty((rows, TILE), np.float32)  # of a group, and of all
    low = start
    while low < stop:
        taken = min(stop, (low // TILE + 1) * TILE) - low
        total[:] = np.float32(0)
        for group in range(groups):
            sums[:] = np.float32(0)
            for unit in range(group * columns // 32, min((group + 1) * columns // 32, units)):
                at = place_of(low, unit, units, outputs, bits)
                for v in range(0, taken, LANES):
                    for row in range(rows):
                        _add_unit(words, at + v * bits, x, (row * units + unit) * size, sums, row * TILE + v, width)
            place = place_of(low, group, groups, outputs, 1)
            for row in range(rows):
                for v in range(0, taken, LANES):
                    add_group(total, row * TILE + v, sums, x_sums[row, group], scale, zero, place + v, less)
        for row in range(rows):
            for v in range(0, taken, LANES):
                leave(total, row * TILE + v, y, row * outputs + low + v)
        low += taken


@cache
def worker(kind: str, bits: int, halves: bool) -> Any:
    """`multiply` as a function for `threads.run_compiled`, which claims some of the outputs until there are none left.

    Its arguments: 0, outputs in a share, rows, inputs, outputs, groups, columns of a group, and the addresses of words,
    x (rows, inputs), scale, zero and y (rows, outputs). For pairs x and y are bfloat16, otherwise float32. Scales are
    float32, or if `halves` float16.
    """
    of_x, unit_type, size = KINDS[kind].number, KINDS[kind].unit, KINDS[kind].size
    width, number = (SOURCES,) * bits, np.int16(0) if halves else np.float32(0)  # compiled anew for other sources
    less = np.float32(2 ** (bits - 1) if kind == "pairs" else 0)

    def work(table):  # type: ignore[no-untyped-def]
        given = carray(table, (ARGUMENTS,))
        share, rows, inputs, outputs = given[1], given[2], given[3], given[4]
        groups, columns, at = given[5], given[6], given[7:]
        words = carray(pointer(at[0], np.int32(0)), (inputs // 32 * len(width) * outputs,))
        x = carray(pointer(at[1], of_x), (rows, inputs))
        scale = carray(pointer(at[2], number), (groups * outputs,))
        zero = carray(pointer(at[3], np.uint8(0)), (groups * outputs,))
        y = carray(pointer(at[4], of_x), (rows, outputs))
        units, x_sums = np.empty((rows, inputs // 32, size), unit_type), np.empty((rows, groups), np.float32)
        for row in range(rows):
            _in_order(x, row, units, x_sums, columns, width)
        start = claim(table) * share
        while start < outputs:
            stop = min(start + share, outputs)
            multiply(words, units, x_sums, scale, zero, less, y, columns, width, start, stop)
            start = claim(table) * share

    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)
