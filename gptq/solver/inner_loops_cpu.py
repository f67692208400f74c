"""The solver's two inner loops, compiled for CPUs; `inner_loops` defines what they compute.

The loops take TILE_ROWS rows of the weight at a time. Rows are vector lanes, so a column of the weight is a contiguous
line, (columns, rows), and the tile's working set stays in the first-level cache. If the number of rows is not a
multiple of TILE_ROWS, the last tile overlaps the tile before it and computes the shared rows again, with the same
result. The form of the grid (`grids.grid.Form`) is compiled on its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from llvmlite import ir

from gptq.compute.machine_code import (
    BYTE,
    LONG,
    Arguments,
    Int,
    Whole,
    compile_loop,
    counting,
    scratch,
    smaller,
    variable,
)
from gptq.compute.simd import LANES, element, load, multiply_add, round_half_even, splat, store
from gptq.solver.grids.grid import Form

TILE_ROWS = 64  # rows that a loop takes at a time, a multiple of LANES
VECTOR_STARTS = range(0, TILE_ROWS, LANES)  # offsets of the vectors in a line of TILE_ROWS numbers


def _clamp(builder: Any, x: Any, low: Any, high: Any) -> Any:
    """np.minimum(np.maximum(x, low), high)."""
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def _look_up(builder: Any, levels: Any, count: Int, x: Any) -> tuple[Any, Any]:
    """The value of the table that is nearest to x, and its code: the last one whose threshold is below x.

    Args:
        levels: pointer to (3, count) values, thresholds and codes, ascending.
    """

    def entry(row: int, j: Whole) -> Any:
        return splat(builder, builder.load(element(builder, levels, count * row + j)))

    value, code = (variable(builder, entry(row, 0)) for row in (0, 2))
    with counting(builder, 1, count) as j:
        above = builder.fcmp_ordered(">", x, entry(1, j))
        for found, row in ((value, 0), (code, 2)):
            builder.store(builder.select(above, entry(row, j), builder.load(found)), found)
    return builder.load(value), builder.load(code)


@cache
def choose_columns(form: Form, double: bool) -> int:
    """Return the loop for `inner_loops.choose_columns`, in float64 if `double`, otherwise in float32.

    Its arguments, all arrays contiguous:
        base, reference: (columns, rows), at least TILE_ROWS rows.
        coupling: (columns, columns), transposed: line k holds the factors of the changes that column k adds up.
        scale, shift: (groups, rows); column k belongs to groups[k].
        levels: (3, values), see `Grid.levels`.
        groups: (columns,) int64.
        codes, Q, t: (columns, rows), outputs; codes are uint8.
        columns, rows, values, the largest code.
    Shares are multiples of TILE_ROWS rows; the last may be less.
    """
    number = ir.DoubleType() if double else ir.FloatType()
    return compile_loop(f"choose_columns_{form.name}_{number}", partial(_choose_columns, form=form, number=number))


def _choose_columns(builder: Any, given: Arguments, form: Form, number: Any) -> None:
    base, reference, coupling, scale, shift, levels = (given.array(number) for _ in range(6))
    groups, codes, Q, t = given.array(LONG), given.array(BYTE), given.array(number), given.array(number)
    columns, rows, values, top = given.integers(4)
    line, highest = ir.VectorType(number, LANES), _as_vector(top, number)
    with (
        scratch(builder, number, columns * TILE_ROWS) as change,
        given.shares() as (start, stop),
        _tiles(start, stop, rows) as low,
        counting(builder, 0, columns) as k,
    ):
        at = k * rows + low
        totals = [variable(builder, load(builder, base, at + v, line)) for v in VECTOR_STARTS]
        with counting(builder, 0, k) as j:
            factor = splat(builder, builder.load(element(builder, coupling, k * columns + j)))
            for v, total in zip(VECTOR_STARTS, totals, strict=True):
                part = load(builder, change, j * TILE_ROWS + v, line)
                builder.store(multiply_add(builder, factor, part, builder.load(total)), total)
        grid_at = Int(builder, builder.load(element(builder, groups, k))) * rows + low
        for v, total in zip(VECTOR_STARTS, totals, strict=True):
            reached = builder.load(total)
            s, z = (load(builder, array, grid_at + v, line) for array in (scale, shift))
            code, q = _nearest(builder, reached, s, z, form, levels, values, highest)
            store(builder, builder.fptoui(code, ir.VectorType(BYTE, LANES)), codes, at + v)
            store(builder, q, Q, at + v)
            store(builder, reached, t, at + v)
            moved = builder.fsub(q, load(builder, reference, at + v, line))
            store(builder, moved, change, k * TILE_ROWS + v)


def _nearest(
    builder: Any, x: Any, s: Any, z: Any, form: Form, levels: Any, values: Int, highest: Any
) -> tuple[Any, Any]:
    """The code of the grid's point that is nearest to x, and the point; s and z are scale and shift."""
    if form is Form.TABLE:
        value, code = _look_up(builder, levels, values, builder.fdiv(x, s))
        return code, builder.fmul(s, value)
    nothing = ir.Constant(x.type, None)
    if form is Form.AFFINE:
        code = round_half_even(builder, builder.fdiv(builder.fsub(x, z), s))
        code = _clamp(builder, code, nothing, highest)
        return code, builder.fadd(builder.fmul(s, code), z)
    code = builder.fadd(round_half_even(builder, builder.fdiv(x, s)), z)
    code = _clamp(builder, code, nothing, highest)
    return code, builder.fmul(s, builder.fsub(code, z))


@contextmanager
def _tiles(start: Int, stop: Int, rows: Int) -> Iterator[Int]:
    """for each tile of a share: its first row; the last tile is moved back to end with the rows."""
    with counting(start.builder, start, stop, TILE_ROWS) as low:
        yield smaller(low, rows - TILE_ROWS)


@cache
def best_grids(form: Form, double: bool) -> int:
    """Return the loop for `inner_loops.best_grids`, in float64 if `double`, otherwise in float32.

    Its arguments, all arrays contiguous:
        best: (groups, rows) int64, output; at least TILE_ROWS rows.
        w: (groups, columns, rows).
        importance: (groups, columns).
        scales, shifts: (candidates, groups, rows).
        levels: (3, values), see `Grid.levels`.
        groups, columns, rows, candidates, values, the largest code.
    Shares are multiples of TILE_ROWS rows; the last may be less.
    """
    number = ir.DoubleType() if double else ir.FloatType()
    return compile_loop(f"best_grids_{form.name}_{number}", partial(_best_grids, form=form, number=number))


def _best_grids(builder: Any, given: Arguments, form: Form, number: Any) -> None:
    best = given.array(LONG)
    w, importance, scales, shifts, levels = (given.array(number) for _ in range(5))
    groups, columns, rows, candidates, values, top = given.integers(6)
    line, highest = ir.VectorType(number, LANES), _as_vector(top, number)
    numbers = ir.VectorType(LONG, LANES)
    with (
        scratch(builder, number, columns * TILE_ROWS) as lines,
        given.shares() as (start, stop),
        counting(builder, 0, groups) as group,
        _tiles(start, stop, rows) as low,
    ):
        with counting(builder, 0, columns) as j:
            for v in VECTOR_STARTS:
                w_line = load(builder, w, (group * columns + j) * rows + low + v, line)
                store(builder, w_line, lines, j * TILE_ROWS + v)
        least = [variable(builder, ir.Constant(line, None)) for _ in VECTOR_STARTS]
        first = [variable(builder, ir.Constant(numbers, None)) for _ in VECTOR_STARTS]
        with counting(builder, 0, candidates) as c:
            own = element(builder, importance, group * columns)
            at = (c * groups + group) * rows + low
            grids = [tuple(load(builder, array, at + v, line) for array in (scales, shifts)) for v in VECTOR_STARTS]
            errors = _measure_errors(builder, lines, own, columns, grids, form, levels, values, highest)
            is_first, all_of_them = c.is_below(1), ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES)
            for error, held, found in zip(errors, least, first, strict=True):
                smaller_ones = builder.fcmp_ordered("<", error, builder.load(held))
                better = builder.select(is_first, all_of_them, smaller_ones)
                builder.store(builder.select(better, error, builder.load(held)), held)
                builder.store(builder.select(better, splat(builder, c.value), builder.load(found)), found)
        for v, found in zip(VECTOR_STARTS, first, strict=True):
            store(builder, builder.load(found), best, group * rows + low + v)


def _measure_errors(
    builder: Any,
    lines: Any,
    importance: Any,
    columns: Int,
    grids: list[tuple[Any, ...]],
    form: Form,
    levels: Any,
    values: Int,
    highest: Any,
) -> list[Any]:
    """The error of TILE_ROWS rows of a group on one candidate grid each, as vectors.

    errors[i] = sum_j importance[j] * (lines[j, i] - Q) ** 2     i < TILE_ROWS
    with Q the nearest point to lines[j, i] of the grid (scale[i], shift[i]), of which `grids` has the vectors
    """
    nothing, one = ir.Constant(highest.type, None), ir.Constant(highest.type, [1.0] * LANES)
    totals = [variable(builder, nothing) for _ in grids]
    # Of integers, clamp code - zero instead of the code. Multiplying by the inverse instead of dividing can round
    # differently only next to a tie, where both neighbours have the same error.
    inverses = [builder.fdiv(one, s) for s, _ in grids]
    bounds = [
        (builder.fneg(z), builder.fsub(highest, z)) if form is Form.INTEGER else (nothing, highest) for _, z in grids
    ]
    with counting(builder, 0, columns) as j:
        weight = splat(builder, builder.load(element(builder, importance, j)))
        for v, (s, z), inverse, (low, high), total in zip(VECTOR_STARTS, grids, inverses, bounds, totals, strict=True):
            w = load(builder, lines, j * TILE_ROWS + v, highest.type)
            if form is Form.AFFINE:
                w = builder.fsub(w, z)
            exact = builder.fmul(w, inverse)
            if form is Form.TABLE:
                step, _ = _look_up(builder, levels, values, exact)
            else:
                step = _clamp(builder, round_half_even(builder, exact), low, high)
            off = multiply_add(builder, builder.fneg(s), step, w)
            builder.store(multiply_add(builder, builder.fmul(weight, off), off, builder.load(total)), total)
    return [builder.load(total) for total in totals]


def _as_vector(number: Int, kind: Any) -> Any:
    """np.full(LANES, number) in float32 or float64."""
    return splat(number.builder, number.builder.sitofp(number.value, kind))
