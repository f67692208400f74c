"""Compiled GEMV on packed words: x W^T for few rows of x, without writing the weight to memory.

The loop works on units: 32 consecutive inputs of LANES outputs, one output per vector lane. A unit's codes are
multiplied by 32 numbers of x in the arithmetic that the CPU computes fastest. Each kind of kernel is a module that
stores x in a type of its own:

    bfloat16  two bfloat16 numbers in 32 bits (`gptq.inference.gemv_bfloat16`)
    int16     16-bit integers with one scale per unit (`gptq.inference.gemv_int16`)
    float32   float32 numbers (`gptq.inference.gemv_float32`)
"""

from functools import cache, partial
from typing import Any

from gptq.compute.machine_code import BYTE, Arguments, Int, compile_loop, counting, scratch, smaller
from gptq.compute.simd import (
    FLOAT,
    FLOATS,
    INT,
    LANES,
    SHORT,
    TILE,
    add_group,
    element,
    fill_with_zeros,
    load,
    load_unit,
    parts_of_strips,
    store,
    store_output,
    strip_offset,
)
from gptq.inference import gemv_bfloat16, gemv_float32, gemv_int16

KINDS: dict[str, Any] = {"bfloat16": gemv_bfloat16, "int16": gemv_int16, "float32": gemv_float32}


@cache
def multiply(kind: str, bits: int, halves: bool, single: bool) -> int:
    """Return the loop for y = x W^T, W = scale (codes - zero), summed in float32.

        y_o = sum_g scale_go (sum_{k in g} code_ok x_k - zero_go sum_{k in g} x_k)

    Its arguments: rows, inputs, outputs, groups, inputs of a group; words, x (rows, inputs), scale, zero, y (rows,
    outputs). x and y are bfloat16 for the kind bfloat16, otherwise float32. Scales are float16 if `halves`, otherwise
    float32; words, scale and zero are in the strips of `layout.Layout`. Shares are multiples of LANES outputs.

    The loop for several rows keeps a unit's converted codes for all of them; for the one row of `single` it would only
    write them to the stack and read them again.
    """
    emit = partial(_multiply, kind=KINDS[kind], bits=bits, halves=halves, single=single)
    return compile_loop(f"multiply_{kind}_{bits}_{halves}_{single}", emit)


def _multiply(builder: Any, given: Arguments, kind: Any, bits: int, halves: bool, single: bool) -> None:
    rows, inputs, outputs, groups, columns = given.integers(5)
    if single:
        rows = Int(builder, 1)
    words, x, scale = given.array(INT), given.array(kind.NUMBER), given.array(SHORT if halves else FLOAT)
    zero, y = given.array(BYTE), given.array(kind.NUMBER)
    units = inputs // 32
    with (
        scratch(builder, kind.UNIT_NUMBER, rows * units * kind.UNIT) as x_units,
        scratch(builder, FLOAT, rows * groups) as x_sums,
        scratch(builder, FLOAT, rows * TILE) as sums,  # of one group
        scratch(builder, FLOAT, rows * TILE) as total,  # of all groups
    ):
        with counting(builder, 0, rows) as row:
            kind.prepare_row(builder, x, row, inputs, x_units, x_sums, groups, columns, bits)
        with given.shares() as (start, stop), parts_of_strips(start, stop) as (low, taken):
            fill_with_zeros(builder, total, rows * TILE, FLOATS)
            with counting(builder, 0, groups) as group:
                fill_with_zeros(builder, sums, rows * TILE, FLOATS)
                end = smaller((group * columns + columns) // 32, units)
                with counting(builder, group * columns // 32, end) as unit:
                    at = strip_offset(low, unit, units, outputs, bits)
                    with counting(builder, 0, taken, LANES) as v, counting(builder, 0, rows) as row:
                        x_unit = element(builder, x_units, (row * units + unit) * kind.UNIT)
                        _add_unit(builder, kind, words, at + v * bits, x_unit, sums, row * TILE + v, bits)
                place = strip_offset(low, group, groups, outputs, 1)
                with counting(builder, 0, rows) as row, counting(builder, 0, taken, LANES) as v:
                    x_sum = builder.load(element(builder, x_sums, row * groups + group))
                    less = kind.subtracted(bits)
                    add_group(builder, total, row * TILE + v, sums, x_sum, scale, zero, place + v, less)
            with counting(builder, 0, rows) as row, counting(builder, 0, taken, LANES) as v:
                store_output(builder, total, row * TILE + v, y, row * outputs + low + v)


def _add_unit(builder: Any, kind: Any, words: Any, at: Int, x_unit: Any, sums: Any, sums_at: Int, bits: int) -> None:
    """Multiply the codes of a unit by its x and add up, for LANES outputs.

    sums[sums_at + i] += codes[i] @ x_unit     codes: (LANES, 32), from words[at] on
    """
    lines = load_unit(builder, words, at, bits, prefetch_later=True)
    store(builder, kind.add_unit(builder, lines, x_unit, load(builder, sums, sums_at, FLOATS)), sums, sums_at)
