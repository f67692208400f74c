"""Compiled GEMV on packed words: x W^T for few rows of x, without writing the weight to memory.

The loop works on units: 32 consecutive inputs of LANES outputs, one output per vector lane. A unit's codes are
multiplied by 32 numbers of x in the arithmetic that the CPU computes fastest. Each kind of kernel stores x in a type of
its own, and numba selects the kernel by that type:

    bfloat16  two bfloat16 numbers in 32 bits (`gptq.inference.gemv_bfloat16`)
    int16     16-bit integers with one scale per unit (`gptq.inference.gemv_int16`)
    float32   float32 numbers (`gptq.inference.gemv_float32`)
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload

from gptq.compute.simd import (
    FLOATS,
    LANES,
    SOURCE_DIGEST,
    TILE,
    add_group,
    array_data,
    compiled,
    compiled_callback,
    fetch_and_increment,
    load,
    load_unit,
    pointer,
    store,
    store_output,
    strip_offset,
)
from gptq.inference import gemv_bfloat16, gemv_float32, gemv_int16

WORKER_ARGUMENTS = 12  # entries in the argument table of a `worker`
ADD_UNIT = {types.int32: gemv_bfloat16.add_unit, types.int16: gemv_int16.add_unit, types.float32: gemv_float32.add_unit}
PREPARE_ROW = {
    types.int32: gemv_bfloat16.prepare_row,
    types.int16: gemv_int16.prepare_row,
    types.float32: gemv_float32.prepare_row,
}


@dataclass(frozen=True)
class Kind:
    """The types of a kind of kernel."""

    number: Any  # an example of x's and y's element type (int16: bfloat16 numbers viewed as int16)
    unit: Any  # element type of a unit's x, as the kernel reads it
    size: int  # elements in a unit's x


KINDS = {
    "bfloat16": Kind(np.int16(0), np.int32, 16),
    "int16": Kind(np.float32(0), np.int16, gemv_int16.UNIT),
    "float32": Kind(np.float32(0), np.float32, 32),
}


def _add_unit_intrinsic(context, words, at, x, x_at, sums, sums_at, bits_tuple):  # type: ignore[no-untyped-def]
    """_add_unit(...): multiply the codes of a unit by its x and add up, for LANES outputs.

        sums[sums_at + i] += codes[i] @ x_unit     codes: (LANES, 32), from words[at] on; x_unit: from x[x_at] on

    `bits_tuple` is a tuple of `bits` numbers; its length is part of its type, so numba compiles a loop for each number
    of bits.
    """
    add_unit = ADD_UNIT[x.dtype]

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, x_at, _, sums_at, _ = arguments
        words, x, sums = (array_data(context, builder, signature, arguments, i) for i in (0, 2, 4))
        lines = load_unit(builder, words, at, len(bits_tuple), prefetch_later=True)
        total = add_unit(builder, lines, builder.gep(x, [x_at]), load(builder, sums, sums_at, FLOATS))
        store(builder, total, sums, sums_at)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, x, intp, sums, intp, bits_tuple), emit


_add_unit: Any = intrinsic(_add_unit_intrinsic)


def _prepare_row(x: Any, row: int, units: Any, x_sums: Any, columns: int, bits_tuple: tuple[int, ...]) -> None:
    """Convert row `row` of x to the units that the kernel reads; write the sum of each group of the row to x_sums."""


@overload(_prepare_row)
def _overload_prepare_row(x, row, units, x_sums, columns, bits_tuple):  # type: ignore[no-untyped-def]
    prepare_row = PREPARE_ROW[units.dtype]
    return lambda x, row, units, x_sums, columns, bits_tuple: prepare_row(
        x, row, units, row, x_sums, columns, bits_tuple
    )


@compiled
def multiply(  # type: ignore[no-untyped-def]
    words, x, x_sums, scale, zero, less, y, columns, bits_tuple, start, stop
) -> None:
    """y[:, start:stop] = x W^T for W = scale (codes - zero), summed in float32.

        y_o = sum_g scale_go (sum_{k in g} code_ok x_k - zero_go sum_{k in g} x_k)

    Args:
        words, scale, zero: int32, float32 or float16 viewed as int16, uint8; in the strips of `layout.Layout`.
        x: (rows, units, elements of a unit), a unit for each 32 inputs.
        x_sums: (rows, groups) float32, sums of x.
        less: what the kernel subtracts from each code before it multiplies: half the range for bfloat16, otherwise 0.
        y: (rows, outputs) float32, or bfloat16 viewed as int16; `outputs` is a multiple of LANES.
        columns: inputs in a group, a multiple of 32.
        bits_tuple: a tuple of `bits` numbers.
        start, stop: multiples of LANES.
    """
    (rows, units, size), (_, groups), (_, outputs), bits = x.shape, x_sums.shape, y.shape, len(bits_tuple)
    sums, total = np.empty((rows, TILE), np.float32), np.empty((rows, TILE), np.float32)  # of one group, of all groups
    low = start
    while low < stop:
        taken = min(stop, (low // TILE + 1) * TILE) - low
        total[:] = np.float32(0)
        for group in range(groups):
            sums[:] = np.float32(0)
            for unit in range(group * columns // 32, min((group + 1) * columns // 32, units)):
                at = strip_offset(low, unit, units, outputs, bits)
                for v in range(0, taken, LANES):
                    for row in range(rows):
                        _add_unit(
                            words, at + v * bits, x, (row * units + unit) * size, sums, row * TILE + v, bits_tuple
                        )
            place = strip_offset(low, group, groups, outputs, 1)
            for row in range(rows):
                for v in range(0, taken, LANES):
                    add_group(total, row * TILE + v, sums, x_sums[row, group], scale, zero, place + v, less)
        for row in range(rows):
            for v in range(0, taken, LANES):
                store_output(total, row * TILE + v, y, row * outputs + low + v)
        low += taken


@cache
def worker(kind: str, bits: int, halves: bool) -> Any:
    """Compile `multiply` as a C function for `threads.run_compiled`; threads take shares of outputs until none is left.

    The argument table of the C function: 0 (the shared counter), outputs in a share, rows, inputs, outputs, groups,
    columns of a group, and the addresses of words, x (rows, inputs), scale, zero and y (rows, outputs). x and y are
    bfloat16 for the kind bfloat16, otherwise float32. Scales are float16 if `halves`, otherwise float32.
    """
    of_x, unit_type, size = KINDS[kind].number, KINDS[kind].unit, KINDS[kind].size
    bits_tuple = (SOURCE_DIGEST,) * bits  # captured by `work`, so that it is compiled again when any source changes
    number = np.int16(0) if halves else np.float32(0)
    less = np.float32(2 ** (bits - 1) if kind == "bfloat16" else 0)

    def work(table):  # type: ignore[no-untyped-def]
        given = carray(table, (WORKER_ARGUMENTS,))
        share, rows, inputs, outputs = given[1], given[2], given[3], given[4]
        groups, columns, at = given[5], given[6], given[7:]
        words = carray(pointer(at[0], np.int32(0)), (inputs // 32 * len(bits_tuple) * outputs,))
        x = carray(pointer(at[1], of_x), (rows, inputs))
        scale = carray(pointer(at[2], number), (groups * outputs,))
        zero = carray(pointer(at[3], np.uint8(0)), (groups * outputs,))
        y = carray(pointer(at[4], of_x), (rows, outputs))
        units, x_sums = np.empty((rows, inputs // 32, size), unit_type), np.empty((rows, groups), np.float32)
        for row in range(rows):
            _prepare_row(x, row, units, x_sums, columns, bits_tuple)
        start = fetch_and_increment(table) * share
        while start < outputs:
            stop = min(start + share, outputs)
            multiply(words, units, x_sums, scale, zero, less, y, columns, bits_tuple, start, stop)
            start = fetch_and_increment(table) * share

    return compiled_callback(types.void(types.CPointer(types.int64)), work)
