"""The solver's two inner loops, compiled for CPUs; `inner_loops` defines what they compute.

The loops take TILE_ROWS rows of the weight at a time. Rows are vector lanes, so a column of the weight is a contiguous
line, (columns, rows), and the tile's working set stays in the first-level cache. If the number of rows is not a
multiple of TILE_ROWS, the last tile overlaps the tile before it and computes the shared rows again, with the same
result. The form of the grid (`grids.grid.Form`) is the length of the tuple `form`, so that each form is compiled on its
own.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gptq.compute.simd import LANES, array_data, compiled, load, multiply_add, round_half_even, splat, store
from gptq.solver.grids.grid import Form

TILE_ROWS = 64  # rows that a loop takes at a time, a multiple of LANES
VECTOR_STARTS = range(0, TILE_ROWS, LANES)  # offsets of the vectors in a line of TILE_ROWS numbers


def _clamp(builder: Any, x: Any, low: Any, high: Any) -> Any:
    """np.minimum(np.maximum(x, low), high)."""
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def _look_up(builder: Any, levels: Any, count: Any, x: Any) -> tuple[Any, Any]:
    """The value of the table that is nearest to x, and its code: the last one whose threshold is below x.

    Args:
        levels: pointer to (3, count) values, thresholds and codes, ascending.
    """
    one = ir.Constant(count.type, 1)

    def entry(row: int, j: Any) -> Any:
        at = builder.add(builder.mul(ir.Constant(count.type, row), count), j)
        return splat(builder, builder.load(builder.gep(levels, [at])))

    first = ir.Constant(count.type, 0)
    value, code = (cgutils.alloca_once_value(builder, entry(row, first)) for row in (0, 2))
    with cgutils.for_range(builder, count, start=one, intp=count.type) as loop:
        above = builder.fcmp_ordered(">", x, entry(1, loop.index))
        for found, row in ((value, 0), (code, 2)):
            builder.store(builder.select(above, entry(row, loop.index), builder.load(found)), found)
    return builder.load(value), builder.load(code)


def _columns_of(context: Any, builder: Any, signature: Any, arguments: Any, i: int) -> Any:
    """The number of columns of the intrinsic's argument i, a matrix."""
    array = context.make_array(signature.args[i])(context, builder, arguments[i])
    return cgutils.unpack_tuple(builder, array.shape, 2)[1]


def _choose_column_intrinsic(  # type: ignore[no-untyped-def]
    context, base, reference, coupling, scale, shift, levels, codes, Q, t, change, at, grid_at, k, top, form
):
    """_choose_column(...): choose the codes of column k of a block for TILE_ROWS rows.

        t[at + i] = base[at + i] + (coupling[k, :k] @ change[:k])[i]     i < TILE_ROWS
        codes[at + i], Q[at + i] = the nearest point to t[at + i] of the grid (scale[grid_at + i], shift[grid_at + i])
        change[k, i] = Q[at + i] - reference[at + i]

    `at` is the offset of the column's line in base, reference, codes, Q and t; grid_at that in scale and shift.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        base, reference, coupling, scale, shift, levels, codes, Q, t, change = (
            array_data(context, builder, signature, arguments, i) for i in range(10)
        )
        at, grid_at, k, top = arguments[10:14]
        line, kind = ir.VectorType(top.type, LANES), Form(signature.args[14].count)

        def number(value: int) -> Any:
            return ir.Constant(k.type, value)

        def part(array: Any, start: Any, v: int) -> Any:
            return load(builder, array, builder.add(start, number(v)), line)

        totals = [cgutils.alloca_once_value(builder, part(base, at, v)) for v in VECTOR_STARTS]
        coupling_at = builder.mul(k, _columns_of(context, builder, signature, arguments, 2))
        with cgutils.for_range(builder, k, intp=k.type) as loop:
            factor = splat(builder, builder.load(builder.gep(coupling, [builder.add(coupling_at, loop.index)])))
            change_at = builder.mul(loop.index, number(TILE_ROWS))
            for v, total in zip(VECTOR_STARTS, totals, strict=True):
                added = multiply_add(builder, factor, part(change, change_at, v), builder.load(total))
                builder.store(added, total)
        nil, highest = ir.Constant(line, [0.0] * LANES), splat(builder, top)

        def nearest(reached: Any, s: Any, z: Any) -> tuple[Any, Any]:
            """Code and point."""
            if kind is Form.TABLE:
                count = _columns_of(context, builder, signature, arguments, 5)
                value, code = _look_up(builder, levels, count, builder.fdiv(reached, s))
                return code, builder.fmul(s, value)
            if kind is Form.AFFINE:
                code = round_half_even(builder, builder.fdiv(builder.fsub(reached, z), s))
                code = _clamp(builder, code, nil, highest)
                return code, builder.fadd(builder.fmul(s, code), z)
            code = builder.fadd(round_half_even(builder, builder.fdiv(reached, s)), z)
            code = _clamp(builder, code, nil, highest)
            return code, builder.fmul(s, builder.fsub(code, z))

        for v, total in zip(VECTOR_STARTS, totals, strict=True):
            place = builder.add(at, number(v))
            reached = builder.load(total)
            code, q = nearest(reached, part(scale, grid_at, v), part(shift, grid_at, v))
            store(builder, builder.fptoui(code, ir.VectorType(ir.IntType(8), LANES)), codes, place)
            store(builder, q, Q, place)
            store(builder, reached, t, place)
            moved = builder.fsub(q, part(reference, at, v))
            store(builder, moved, change, builder.add(builder.mul(k, number(TILE_ROWS)), number(v)))
        return context.get_dummy_value()

    arrays = (base, reference, coupling, scale, shift, levels, codes, Q, t, change)
    return types.void(*arrays, types.intp, types.intp, types.intp, top, form), emit


def _measure_errors_intrinsic(  # type: ignore[no-untyped-def]
    context, lines, importance, group, columns, scales, shifts, levels, at, top, form, errors
):
    """_measure_errors(...): the error of TILE_ROWS rows of a group on one candidate grid each.

    errors[i] = sum_j importance[group, j] * (lines[j, i] - Q) ** 2     i < TILE_ROWS
    with Q the nearest point to lines[j, i] of the grid (scales[at + i], shifts[at + i])
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lines, importance, scales, shifts, levels, errors = (
            array_data(context, builder, signature, arguments, i) for i in (0, 1, 4, 5, 6, 10)
        )
        group, columns, at, top = (arguments[i] for i in (2, 3, 7, 8))
        line, kind = ir.VectorType(top.type, LANES), Form(signature.args[9].count)
        nil, one, highest = (
            ir.Constant(line, [0.0] * LANES), ir.Constant(line, [1.0] * LANES), splat(builder, top)
        )  # fmt: skip

        def number(value: int) -> Any:
            return ir.Constant(at.type, value)

        grids = []
        for v in VECTOR_STARTS:
            place = builder.add(at, number(v))
            s, z = load(builder, scales, place, line), load(builder, shifts, place, line)
            # Of integers, clamp code - zero instead of the code. Multiplying by the inverse instead of dividing can
            # round differently only next to a tie, where both neighbours have the same error.
            inverse = builder.fdiv(one, s)
            low, high = (builder.fneg(z), builder.fsub(highest, z)) if kind is Form.INTEGER else (nil, highest)
            grids.append((v, builder.fneg(s), inverse, low, high, z, cgutils.alloca_once_value(builder, nil)))
        importance_at = builder.mul(group, columns)
        with cgutils.for_range(builder, columns, intp=columns.type) as loop:
            weight = splat(builder, builder.load(builder.gep(importance, [builder.add(importance_at, loop.index)])))
            start = builder.mul(loop.index, number(TILE_ROWS))
            for v, minus_s, inverse, low, high, z, total in grids:
                w = load(builder, lines, builder.add(start, number(v)), line)
                if kind is Form.AFFINE:
                    w = builder.fsub(w, z)
                exact = builder.fmul(w, inverse)
                if kind is Form.TABLE:
                    step, _ = _look_up(builder, levels, _columns_of(context, builder, signature, arguments, 6), exact)
                else:
                    step = _clamp(builder, round_half_even(builder, exact), low, high)
                off = multiply_add(builder, minus_s, step, w)
                added = multiply_add(builder, builder.fmul(weight, off), off, builder.load(total))
                builder.store(added, total)
        for v, *_, total in grids:
            store(builder, builder.load(total), errors, number(v))
        return context.get_dummy_value()

    intp = types.intp
    return types.void(lines, importance, intp, intp, scales, shifts, levels, intp, top, form, errors), emit


_choose_column: Any = intrinsic(_choose_column_intrinsic)
_measure_errors: Any = intrinsic(_measure_errors_intrinsic)


@compiled
def choose_columns(  # type: ignore[no-untyped-def]
    base, reference, coupling, scale, shift, levels, groups, codes, Q, t, top, form, start, stop
) -> None:
    """`inner_loops.choose_columns` for rows from `start` to `stop`; all arrays are contiguous.

    Args:
        base, reference: (columns, rows), at least TILE_ROWS rows.
        coupling: (columns, columns), transposed: line k holds the factors of the changes that column k adds up.
        scale, shift: (groups, rows); column k belongs to groups[k].
        levels: (3, values), see `Grid.levels`.
        codes, Q, t: (columns, rows), outputs.
        start, stop: multiples of TILE_ROWS; stop may be the number of rows.
    """
    rows = base.shape[1]
    change = np.empty((len(base), TILE_ROWS), base.dtype)
    for low in range(start, stop, TILE_ROWS):
        low = min(low, rows - TILE_ROWS)
        for k in range(len(base)):
            at, grid_at = k * rows + low, groups[k] * rows + low
            _choose_column(
                base, reference, coupling, scale, shift, levels, codes, Q, t, change, at, grid_at, k, top, form
            )


@compiled
def best_grids(  # type: ignore[no-untyped-def]
    best, w, importance, scales, shifts, levels, top, form, start, stop
) -> None:
    """`inner_loops.best_grids` for rows from `start` to `stop`, on contiguous arrays of at least TILE_ROWS rows.

    Args:
        best: (groups, rows), output.
        start, stop: multiples of TILE_ROWS; stop may be the number of rows.
    """
    groups, columns, rows = w.shape
    lines, errors, least = (
        np.empty((columns, TILE_ROWS), w.dtype),
        np.empty(TILE_ROWS, w.dtype),
        np.empty(TILE_ROWS, w.dtype),
    )
    for group in range(groups):
        for low in range(start, stop, TILE_ROWS):
            low = min(low, rows - TILE_ROWS)
            lines[:] = w[group, :, low : low + TILE_ROWS]
            for c in range(len(scales)):
                at = (c * groups + group) * rows + low
                _measure_errors(lines, importance, group, columns, scales, shifts, levels, at, top, form, errors)
                for i in range(TILE_ROWS):
                    if c == 0 or errors[i] < least[i]:
                        least[i] = errors[i]
                        best[group, low + i] = c
