"""The two inner loops of the solver, compiled: choosing a block's codes column by column, and searching groups' grids.

ROWS rows of the weight are taken at a time. They are vector lanes, so columns of the weight are contiguous lines here,
(columns, rows), and what is kept of a block stays in the first-level cache. Where rows are no multiple of ROWS, the
last ones are taken together with some of those before, for which the same comes out once more.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gptq.compute.simd import LANES, compiled, data, load, multiply_add, splat, store, to_nearest

ROWS = 64
STARTS = range(0, ROWS, LANES)  # of the vectors that make up a line


def _within(builder: Any, x: Any, low: Any, high: Any) -> Any:
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def _choosing(context, base, reference, coupling, scale, zero, codes, Q, t, change, at, grid_at, k, maxq):  # type: ignore[no-untyped-def]
    """Column k of a block for ROWS rows, whose line begins at `at` in base and at grid_at in scale; see `columns`."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        base, reference, coupling, scale, zero, codes, Q, t, change = (
            data(context, builder, signature, arguments, i) for i in range(9)
        )
        at, grid_at, k, maxq = arguments[9:]
        line = ir.VectorType(maxq.type, LANES)

        def number(value: int) -> Any:
            return ir.Constant(k.type, value)

        def part(array: Any, start: Any, v: int) -> Any:
            return load(builder, array, builder.add(start, number(v)), line)

        totals = [cgutils.alloca_once_value(builder, part(base, at, v)) for v in STARTS]
        columns = context.make_array(signature.args[2])(context, builder, arguments[2])
        coupling_at = builder.mul(k, cgutils.unpack_tuple(builder, columns.shape, 2)[1])
        with cgutils.for_range(builder, k, intp=k.type) as loop:
            factor = splat(builder, builder.load(builder.gep(coupling, [builder.add(coupling_at, loop.index)])))
            change_at = builder.mul(loop.index, number(ROWS))
            for v, total in zip(STARTS, totals, strict=True):
                added = multiply_add(builder, factor, part(change, change_at, v), builder.load(total))
                builder.store(added, total)
        nil, top = ir.Constant(line, [0.0] * LANES), splat(builder, maxq)
        for v, total in zip(STARTS, totals, strict=True):
            place = builder.add(at, number(v))
            reached, s, z = builder.load(total), part(scale, grid_at, v), part(zero, grid_at, v)
            code = builder.fadd(to_nearest(builder, builder.fdiv(reached, s)), z)
            code = _within(builder, code, nil, top)
            q = builder.fmul(s, builder.fsub(code, z))
            store(builder, builder.fptoui(code, ir.VectorType(ir.IntType(8), LANES)), codes, place)
            store(builder, q, Q, place)
            store(builder, reached, t, place)
            moved = builder.fsub(q, part(reference, at, v))
            store(builder, moved, change, builder.add(builder.mul(k, number(ROWS)), number(v)))
        return context.get_dummy_value()

    arrays = (base, reference, coupling, scale, zero, codes, Q, t, change)
    return types.void(*arrays, types.intp, types.intp, types.intp, maxq), emit


def _measuring(context, lines, importance, group, columns, scales, zeros, at, maxq, errors):  # type: ignore[no-untyped-def]
    """errors[i] = sum_j importance[group, j] (lines[j, i] - Q_j)^2 of ROWS rows on the grids that begin at `at`."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lines, importance, scales, zeros, errors = (
            data(context, builder, signature, arguments, i) for i in (0, 1, 4, 5, 8)
        )
        group, columns, at, maxq = (arguments[i] for i in (2, 3, 6, 7))
        line = ir.VectorType(maxq.type, LANES)
        one, top = ir.Constant(line, [1.0] * LANES), splat(builder, maxq)

        def number(value: int) -> Any:
            return ir.Constant(at.type, value)

        grids = []
        for v in STARTS:
            place = builder.add(at, number(v))
            s, z = load(builder, scales, place, line), load(builder, zeros, place, line)
            # code - zero is held within bounds instead of the code. A quotient and the product with an inverse round
            # apart at a tie alone, where both neighbours err alike.
            inverse, low, high = builder.fdiv(one, s), builder.fneg(z), builder.fsub(top, z)
            total = cgutils.alloca_once_value(builder, ir.Constant(line, [0.0] * LANES))
            grids.append((v, builder.fneg(s), inverse, low, high, total))
        importance_at = builder.mul(group, columns)
        with cgutils.for_range(builder, columns, intp=columns.type) as loop:
            weight = splat(builder, builder.load(builder.gep(importance, [builder.add(importance_at, loop.index)])))
            start = builder.mul(loop.index, number(ROWS))
            for v, minus_s, inverse, low, high, total in grids:
                w = load(builder, lines, builder.add(start, number(v)), line)
                level = _within(builder, to_nearest(builder, builder.fmul(w, inverse)), low, high)
                off = multiply_add(builder, minus_s, level, w)
                added = multiply_add(builder, builder.fmul(weight, off), off, builder.load(total))
                builder.store(added, total)
        for v, *_, total in grids:
            store(builder, builder.load(total), errors, number(v))
        return context.get_dummy_value()

    intp = types.intp
    return types.void(lines, importance, intp, intp, scales, zeros, intp, maxq, errors), emit


_choose: Any = intrinsic(_choosing)
_measure: Any = intrinsic(_measuring)


@compiled
def columns(  # type: ignore[no-untyped-def]
    base, reference, coupling, scale, zero, groups, codes, Q, t, maxq, start, stop
) -> None:
    """`kernels.choose_columns` for rows from `start` to `stop`.

    Args:
        base, reference: (columns, rows) contiguous, at least ROWS rows, as all that follows.
        coupling: (columns, columns), what column k takes from the changes of those before it in line k.
        scale, zero: (groups, rows); column k belongs to groups[k].
        codes, Q, t: (columns, rows) to be written.
        start, stop: multiples of ROWS, or where the rows end.
    """
    rows = base.shape[1]
    change = np.empty((len(base), ROWS), base.dtype)
    for low in range(start, stop, ROWS):
        low = min(low, rows - ROWS)
        for k in range(len(base)):
            at, grid_at = k * rows + low, groups[k] * rows + low
            _choose(base, reference, coupling, scale, zero, codes, Q, t, change, at, grid_at, k, maxq)


@compiled
def grids(best, w, importance, scales, zeros, maxq, start, stop) -> None:  # type: ignore[no-untyped-def]
    """`kernels.best_grids` for rows from `start` to `stop`, on contiguous arrays of at least ROWS rows.

    Args:
        start, stop: multiples of ROWS, or where the rows end.
    """
    groups, columns, rows = w.shape
    lines, errors, least = np.empty((columns, ROWS), w.dtype), np.empty(ROWS, w.dtype), np.empty(ROWS, w.dtype)
    for group in range(groups):
        for low in range(start, stop, ROWS):
            low = min(low, rows - ROWS)
            lines[:] = w[group, :, low : low + ROWS]
            for c in range(len(scales)):
                _measure(
                    lines, importance, group, columns, scales, zeros, (c * groups + group) * rows + low, maxq, errors
                )
                for i in range(ROWS):
                    if c == 0 or errors[i] < least[i]:
                        least[i] = errors[i]
                        best[group, low + i] = c
