"""Float32 kernel for a unit of packed words, for any CPU; and a loop that dequantizes packed words to a weight.

32 codes of an output fill `bits` words at any width (see `gptq.formats.packing`), and in `layout.Layout` the words of
LANES outputs lie side by side, one output per vector lane. The 32 codes of a unit are unrolled: mask, convert,
multiply-add. A code is not shifted down to bit 0. In its place in the word it is 2^shift times too large, so its input
is scaled by 2^-shift beforehand, which is exact. Only codes that straddle two words or reach the sign bit are shifted.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from llvmlite import ir

from gptq.compute.machine_code import BYTE, Arguments, Int, compile_loop, counting, smaller, variable
from gptq.compute.simd import (
    FLOAT,
    FLOATS,
    INT,
    LANES,
    SHORT,
    constant_vector,
    element,
    load,
    load_bytes,
    load_scales,
    load_unit,
    multiply_add,
    splat,
    store,
    strip_offset,
    sum_in_order,
)

NUMBER = UNIT_NUMBER = FLOAT  # types of the elements of x and y, and of a unit's x
UNIT = 32  # elements of a unit's x


def subtracted(bits: int) -> float:
    """What `add_unit` subtracts from each code before it multiplies."""
    return 0.0


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
        factor = builder.load(element(builder, x, c))
        total = multiply_add(builder, code, splat(builder, factor), total)
    return total


def prepare_row(  # one function for each kind of kernel
    builder: Any, x: Any, row: Int, inputs: Int, units: Any, x_sums: Any, groups: Int, columns: Int, bits: int
) -> None:
    """Write row `row` of x (rows, inputs), scaled, to units (rows, inputs / 32, UNIT); sum the row by groups.

    units[row, n] = x[row, 32 n : 32 n + 32] * prescale_factors(bits)
    x_sums[row, group] = x[row, inputs of the group].sum()     in LANES partial sums
    """
    factors = prescale_factors(bits)
    total = variable(builder, ir.Constant(FLOATS, None))
    with counting(builder, 0, groups) as group:
        builder.store(ir.Constant(FLOATS, None), total)
        with counting(builder, group * columns, smaller(group * columns + columns, inputs), 32) as k:
            for i in range(0, 32, LANES):
                part = load(builder, x, row * inputs + k + i, FLOATS)
                builder.store(builder.fadd(builder.load(total), part), total)
                by = ir.Constant(FLOATS, [ir.Constant(FLOAT, factor) for factor in factors[i : i + LANES]])
                store(builder, builder.fmul(part, by), units, row * inputs + k + i)
        builder.store(sum_in_order(builder, builder.load(total)), element(builder, x_sums, row * groups + group))


@cache
def decode(bits: int, halves: bool) -> int:
    """Return the loop that dequantizes some outputs: weight[:, start:stop] = W^T[:, first + start : first + stop].

    Its arguments: words, scale (float16 if `halves`, otherwise float32), zero, as in `layout.Layout`; weight (inputs,
    outputs of this call) float32; inputs; outputs of this call; all outputs, padded; inputs of a group; `first`.
    Shares are multiples of LANES outputs.
    """
    return compile_loop(f"decode_{bits}_{halves}", partial(_decode, bits=bits, halves=halves))


def _decode(builder: Any, given: Arguments, bits: int, halves: bool) -> None:
    words, scale, zero = given.array(INT), given.array(SHORT if halves else FLOAT), given.array(BYTE)
    weight = given.array(FLOAT)
    inputs, here, outputs, columns, first = given.integers(5)
    units, groups = inputs // 32, (inputs + columns - 1) // columns
    factors = prescale_factors(bits)
    with (
        given.shares() as (start, stop),
        counting(builder, start, stop, LANES) as low,
        counting(builder, 0, units) as n,
    ):
        grid_at = strip_offset(first + low, n * 32 // columns, groups, outputs, 1)
        s, z = load_scales(builder, scale, grid_at), load_bytes(builder, zero, grid_at)
        lines = load_unit(builder, words, strip_offset(first + low, n, units, outputs, bits), bits)
        for c, code in enumerate(_codes(builder, lines)):
            factor = splat(builder, ir.Constant(FLOAT, factors[c]))
            difference = builder.fsub(builder.fmul(code, factor), z)
            store(builder, builder.fmul(s, difference), weight, (n * 32 + c) * here + low)
