"""Float32 kernel for a unit of packed words, for any CPU; and a loop that dequantizes packed words to a weight.

32 codes of an output fill `bits` words at any width (see `gptq.formats.packing`), and in `layout.Layout` the words of
LANES outputs lie side by side, one output per vector lane. The 32 codes of a unit are unrolled: mask, convert,
multiply-add. A code is not shifted down to bit 0. In its place in the word it is 2^shift times too large, so its input
is scaled by 2^-shift beforehand, which is exact. Only codes that straddle two words or reach the sign bit are shifted.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gptq.compute.simd import (
    FLOAT,
    FLOATS,
    INT,
    LANES,
    array_data,
    compiled,
    constant_vector,
    load,
    load_bytes,
    load_scales,
    load_unit,
    multiply_add,
    splat,
    store,
    strip_offset,
)


def stays_in_place(bits: int) -> list[bool]:
    """For each of a unit's 32 codes, whether it is used in place, without a shift."""
    return [c * bits % 32 + bits < 32 for c in range(32)]


def prescale_factors(bits: int) -> list[float]:
    """For each of a unit's 32 codes, the factor by which its input is scaled beforehand."""
    return [2.0 ** -(c * bits % 32) if stays else 1.0 for c, stays in enumerate(stays_in_place(bits))]


def _codes(builder: Any, lines: list[Any]) -> Iterator[Any]:
    """Yield the 32 codes of a unit for LANES outputs, as FLOATS: codes[:, c] / prescale_factors(bits)[c]."""
    bits = len(lines)
    mask = 2**bits - 1
    for c, stays in enumerate(stays_in_place(bits)):
        word, shift = divmod(c * bits, 32)
        if stays:
            code = builder.and_(lines[word], constant_vector(mask << shift))
        elif shift + bits == 32:
            code = builder.lshr(lines[word], constant_vector(shift))
        else:
            low = builder.lshr(lines[word], constant_vector(shift))
            high = builder.shl(lines[word + 1], constant_vector(32 - shift))
            code = builder.and_(builder.or_(low, high), constant_vector(mask))
        yield builder.sitofp(code, FLOATS)


def add_unit(builder: Any, lines: list[Any], x: Any, total: Any) -> Any:
    """Add the product of a unit's codes and x to the total of LANES outputs.

    total + codes @ x     codes: (LANES, 32); x points to 32 numbers, already scaled by `prescale_factors`
    """
    for c, code in enumerate(_codes(builder, lines)):
        factor = builder.load(builder.gep(x, [ir.Constant(INT, c)]))
        total = multiply_add(builder, code, splat(builder, factor), total)
    return total


def _write_unit_intrinsic(context, words, at, scale, zero, grid_at, weight, weight_at, bits_tuple):  # type: ignore[no-untyped-def]
    """_write_unit(...): dequantize a unit for LANES outputs.

        weight[weight_at + c * stride + i] = scale[grid_at + i] * (codes[i, c] - zero[grid_at + i])

    c < 32, i < LANES; `stride` is the number of columns of weight.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, _, grid_at, _, weight_at, _ = arguments
        words, scale, zero, weight = (array_data(context, builder, signature, arguments, i) for i in (0, 2, 3, 5))
        line = context.make_array(signature.args[5])(context, builder, arguments[5])
        weight_stride = cgutils.unpack_tuple(builder, line.shape, 2)[1]
        s = load_scales(builder, scale, grid_at)
        z = load_bytes(builder, zero, grid_at)
        factors = prescale_factors(len(bits_tuple))
        for c, code in enumerate(_codes(builder, load_unit(builder, words, at, len(bits_tuple)))):
            factor = splat(builder, ir.Constant(FLOAT, factors[c]))
            difference = builder.fsub(builder.fmul(code, factor), z)
            store(builder, builder.fmul(s, difference), weight, weight_at)
            weight_at = builder.add(weight_at, weight_stride)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(words, intp, scale, zero, intp, weight, intp, bits_tuple), emit


def _scale_unit_intrinsic(context, x, at, units, units_at, sums, bits_tuple):  # type: ignore[no-untyped-def]
    """_scale_unit(...): write a unit's x, scaled, into `units`; add the unscaled x to LANES partial sums.

    units[units_at : units_at + 32] = x[at : at + 32] * prescale_factors(bits)
    sums += x[at : at + 32].reshape(-1, LANES).sum(0)
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, units_at, _, _ = arguments
        x, units, sums = (array_data(context, builder, signature, arguments, i) for i in (0, 2, 4))
        nowhere, factors = ir.Constant(at.type, 0), prescale_factors(len(bits_tuple))
        total = load(builder, sums, nowhere, FLOATS)
        for i in range(0, 32, LANES):
            part, by = load(builder, x, builder.add(at, ir.Constant(at.type, i)), FLOATS), factors[i : i + LANES]
            total = builder.fadd(total, part)
            scaled = builder.fmul(part, ir.Constant(FLOATS, [ir.Constant(FLOAT, factor) for factor in by]))
            store(builder, scaled, units, builder.add(units_at, ir.Constant(at.type, i)))
        store(builder, total, sums, nowhere)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(x, intp, units, intp, sums, bits_tuple), emit


_write_unit: Any = intrinsic(_write_unit_intrinsic)
_scale_unit: Any = intrinsic(_scale_unit_intrinsic)


@compiled
def prepare_row(x, row, units, to, x_sums, columns, bits_tuple):  # type: ignore[no-untyped-def]
    """Write row `row` of x, scaled, to line `to` of units (lines, inputs / 32, 32) float32; sum the row by groups.

    x_sums[to, group] = x[row, inputs of the group].sum()
    """
    inputs, sums = x.shape[1], np.empty(LANES, np.float32)
    for group in range(x_sums.shape[1]):
        sums[:] = np.float32(0)
        for k in range(group * columns, min((group + 1) * columns, inputs), 32):
            _scale_unit(x, row * inputs + k, units, to * inputs + k, sums, bits_tuple)
        x_sums[to, group] = sums.sum()


@compiled
def decode(words, scale, zero, weight, outputs, columns, bits_tuple, first, start, stop) -> None:  # type: ignore[no-untyped-def]
    """Dequantize some outputs: weight[:, start:stop] = W^T[:, first + start : first + stop].

    Args:
        weight: (inputs, outputs of this call) float32.
        outputs: number of all outputs, padded.
        first: the output in weight's first column.
        words, scale, zero, columns, bits_tuple, start, stop: as for `gemv.multiply`.
    """
    bits, here, units = len(bits_tuple), weight.shape[1], weight.shape[0] // 32
    groups = -(-weight.shape[0] // columns)
    for low in range(start, stop, LANES):
        for unit in range(units):
            at = strip_offset(first + low, unit, units, outputs, bits)
            grid_at = strip_offset(first + low, unit * 32 // columns, groups, outputs, 1)
            _write_unit(words, at, scale, zero, grid_at, weight, unit * 32 * here + low, bits_tuple)
