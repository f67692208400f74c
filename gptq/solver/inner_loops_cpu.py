"""The solver's two inner loops, compiled for CPUs; `inner_loops` defines what they compute.

The loops take TILE_ROWS rows of the weight at a time. Rows are vector lanes, so a column of the weight is a contiguous
line, (columns, rows), and the tile's working set stays in the first-level cache. If the number of rows is not a
multiple of TILE_ROWS, the last tile overlaps the tile before it and computes the shared rows again, with the same
result.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gptq.compute.simd import LANES, array_data, compiled, load, multiply_add, round_half_even, splat, store

TILE_ROWS = 64  # rows that a loop takes at a time, a multiple of LANES
VECTOR_STARTS = range(0, TILE_ROWS, LANES)  # offsets of the vectors in a line of TILE_ROWS numbers


def _clamp(builder: Any, x: Any, low: Any, high: Any) -> Any:
    """np.minimum(np.maximum(x, low), high)."""
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def _choose_column_intrinsic(  # type: ignore[no-untyped-def]
    context, base, reference, coupling, scale, zero, codes, Q, t, change, at, grid_at, k, maxq
):
    """_choose_column(...): choose the codes of column k of a block for TILE_ROWS rows.

        t[at + i] = base[at + i] + (coupling[k, :k] @ change[:k])[i]     i < TILE_ROWS
        codes[at + i] = clip(rint(t[at + i] / scale[grid_at + i]) + zero[grid_at + i], 0, maxq)
        Q[at + i] = scale[grid_at + i] * (codes[at + i] - zero[grid_at + i])
        change[k, i] = Q[at + i] - reference[at + i]

    `at` is the offset of the column's line in base, reference, codes, Q and t; grid_at that in scale and zero.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        base, reference, coupling, scale, zero, codes, Q, t, change = (
            array_data(context, builder, signature, arguments, i) for i in range(9)
        )
        at, grid_at, k, maxq = arguments[9:]
        line = ir.VectorType(maxq.type, LANES)

        def number(value: int) -> Any:
            return ir.Constant(k.type, value)

        def part(array: Any, start: Any, v: int) -> Any:
            return load(builder, array, builder.add(start, number(v)), line)

        totals = [cgutils.alloca_once_value(builder, part(base, at, v)) for v in VECTOR_STARTS]
        columns = context.make_array(signature.args[2])(context, builder, arguments[2])
        coupling_at = builder.mul(k, cgutils.unpack_tuple(builder, columns.shape, 2)[1])
        with cgutils.for_range(builder, k, intp=k.type) as loop:
            factor = splat(builder, builder.load(builder.gep(coupling, [builder.add(coupling_at, loop.index)])))
            change_at = builder.mul(loop.index, number(TILE_ROWS))
            for v, total in zip(VECTOR_STARTS, totals, strict=True):
                added = multiply_add(builder, factor, part(change, change_at, v), builder.load(total))
                builder.store(added, total)
        nil, top = ir.Constant(line, [0.0] * LANES), splat(builder, maxq)
        for v, total in zip(VECTOR_STARTS, totals, strict=True):
            place = builder.add(at, number(v))
            reached, s, z = builder.load(total), part(scale, grid_at, v), part(zero, grid_at, v)
            code = builder.fadd(round_half_even(builder, builder.fdiv(reached, s)), z)
            code = _clamp(builder, code, nil, top)
            q = builder.fmul(s, builder.fsub(code, z))
            store(builder, builder.fptoui(code, ir.VectorType(ir.IntType(8), LANES)), codes, place)
            store(builder, q, Q, place)
            store(builder, reached, t, place)
            moved = builder.fsub(q, part(reference, at, v))
            store(builder, moved, change, builder.add(builder.mul(k, number(TILE_ROWS)), number(v)))
        return context.get_dummy_value()

    arrays = (base, reference, coupling, scale, zero, codes, Q, t, change)
    return types.void(*arrays, types.intp, types.intp, types.intp, maxq), emit


def _measure_errors_intrinsic(context, lines, importance, group, columns, scales, zeros, at, maxq, errors):  # type: ignore[no-untyped-def]
    """_measure_errors(...): the error of TILE_ROWS rows of a group on one candidate grid each.

    level = clip(rint(lines[j, i] / scales[at + i]), -zeros[at + i], maxq - zeros[at + i])
    errors[i] = sum_j importance[group, j] * (lines[j, i] - scales[at + i] * level) ** 2     i < TILE_ROWS
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lines, importance, scales, zeros, errors = (
            array_data(context, builder, signature, arguments, i) for i in (0, 1, 4, 5, 8)
        )
        group, columns, at, maxq = (arguments[i] for i in (2, 3, 6, 7))
        line = ir.VectorType(maxq.type, LANES)
        one, top = ir.Constant(line, [1.0] * LANES), splat(builder, maxq)

        def number(value: int) -> Any:
            return ir.Constant(at.type, value)

        grids = []
        for v in VECTOR_STARTS:
            place = builder.add(at, number(v))
            s, z = load(builder, scales, place, line), load(builder, zeros, place, line)
            # Clamp code - zero instead of the code. Multiplying by the inverse instead of dividing can round
            # differently only next to a tie, where both neighbours have the same error.
            inverse, low, high = builder.fdiv(one, s), builder.fneg(z), builder.fsub(top, z)
            total = cgutils.alloca_once_value(builder, ir.Constant(line, [0.0] * LANES))
            grids.append((v, builder.fneg(s), inverse, low, high, total))
        importance_at = builder.mul(group, columns)
        with cgutils.for_range(builder, columns, intp=columns.type) as loop:
            weight = splat(builder, builder.load(builder.gep(importance, [builder.add(importance_at, loop.index)])))
            start = builder.mul(loop.index, number(TILE_ROWS))
            for v, minus_s, inverse, low, high, total in grids:
                w = load(builder, lines, builder.add(start, number(v)), line)
                level = _clamp(builder, round_half_even(builder, builder.fmul(w, inverse)), low, high)
                off = multiply_add(builder, minus_s, level, w)
                added = multiply_add(builder, builder.fmul(weight, off), off, builder.load(total))
                builder.store(added, total)
        for v, *_, total in grids:
            store(builder, builder.load(total), errors, number(v))
        return context.get_dummy_value()

    intp = types.intp
    return types.void(lines, importance, intp, intp, scales, zeros, intp, maxq, errors), emit


_choose_column: Any = intrinsic(_choose_column_intrinsic)
_measure_errors: Any = intrinsic(_measure_errors_intrinsic)


@compiled
def choose_columns(  # type: ignore[no-untyped-def]
    base, reference, coupling, scale, zero, groups, codes, Q, t, maxq, start, stop
) -> None:
    """`inner_loops.choose_columns` for rows from `start` to `stop`; all arrays are contiguous.

    Args:
        base, reference: (columns, rows), at least TILE_ROWS rows.
        coupling: (columns, columns), transposed: line k holds the factors of the changes that column k adds up.
        scale, zero: (groups, rows); column k belongs to groups[k].
        codes, Q, t: (columns, rows), outputs.
        start, stop: multiples of TILE_ROWS; stop may be the number of rows.
    """
    rows = base.shape[1]
    change = np.empty((len(base), TILE_ROWS), base.dtype)
    for low in range(start, stop, TILE_ROWS):
        low = min(low, rows - TILE_ROWS)
        for k in range(len(base)):
            at, grid_at = k * rows + low, groups[k] * rows + low
            _choose_column(base, reference, coupling, scale, zero, codes, Q, t, change, at, grid_at, k, maxq)


@compiled
def best_grids(best, w, importance, scales, zeros, maxq, start, stop) -> None:  # type: ignore[no-untyped-def]
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
                _measure_errors(
                    lines, importance, group, columns, scales, zeros, (c * groups + group) * rows + low, maxq, errors
                )
                for i in range(TILE_ROWS):
                    if c == 0 or errors[i] < least[i]:
                        least[i] = errors[i]
                        best[group, low + i] = c
