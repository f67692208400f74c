"""Compiled kernel for Gram matrices of bfloat16 values: A^T B over tokens, exact products summed in float32.

torch rounds the result of a bfloat16 product to bfloat16; converting float32 factors inside the product takes twice as
long. The CPU's instruction (`simd.dot_bfloat16_pairs`) adds two products to each of LANES sums, so tokens are stored in
pairs: one input's values at two consecutive tokens share 32 bits. A register tile of TALL x WIDE sums runs over all
tokens. Each sum is computed by one thread in the order of the tokens, so the number of threads does not change the
result.
"""

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from gptq.compute.machine_code import LONG, Arguments, Int, compile_loop, counting, larger, smaller
from gptq.compute.simd import (
    FLOAT,
    FLOATS,
    INT,
    LANES,
    SHORT,
    TALL,
    WIDE,
    element,
    load,
    shuffle,
    store,
    sum_register_tile,
)
from gptq.compute.threads import run_loop

CACHED_PAIRS = 2**17  # pairs of the left factor reused from the second-level cache at a time, 512 KiB


def add_products(sums: Tensor, a: Tensor, b: Tensor, panels: list[slice], upper: bool) -> None:
    """Add to each panel of rows: sums[panel] += a[:, panel]^T b.

    Args:
        sums: (inputs, inputs) float32, contiguous; `inputs` and the panels' starts are multiples of WIDE.
        a, b: (tokens, inputs) as returned by `pair_tokens`.
        upper: the result is only needed right of the diagonal; most of the rest is skipped.
    """
    numbers = [n for panel in panels for n in range(panel.start // WIDE, panel.stop // WIDE)]
    own = torch.tensor(numbers, dtype=torch.int64)
    threads = min(torch.get_num_threads(), len(b))
    sizes = len(own), b.shape[1], sums.shape[1], len(b), threads, 1 if upper else len(sums)
    run_loop(_add_panels(), threads, 1, sums, a, b, own, *sizes)


def panel_product(a: Tensor, b: Tensor, panel: slice, start: int) -> Tensor:
    """a[:, panel]^T b[:, start:], (panel, inputs - start) float32.

    Args:
        a, b: (tokens, inputs) as returned by `pair_tokens`.
        panel, start: bounds are multiples of WIDE.
    """
    sums = torch.zeros(panel.stop - panel.start, len(b) * WIDE - start, dtype=torch.float32)
    left, right = a[panel.start // WIDE : panel.stop // WIDE], b[start // WIDE :]
    add_products(sums, left, right, [slice(0, len(sums))], upper=False)
    return sums


def pair_tokens(x: Tensor) -> Tensor:
    """Rearrange (tokens, inputs) bfloat16 to (inputs / WIDE, tokens / 2, WIDE) int32.

    Each int32 holds one input's values at two consecutive tokens; an odd last token is paired with zeros.
    """
    tokens, inputs = x.shape
    pairs = torch.empty(inputs // WIDE, -(-tokens // 2), 2 * WIDE, dtype=torch.int16)
    run_loop(_pair_up(), len(pairs), 1, x.contiguous(), pairs, tokens, inputs)
    return pairs.view(torch.int32)


@cache
def _pair_up() -> int:
    """Return the loop that writes panels of pairs (panels, tokens / 2, 2 WIDE) int16 from x (tokens, inputs) int16.

    pairs[panel, k, 2 j + i] = x[2 k + i, panel * WIDE + j], i = 0 or 1
    """

    def emit(builder: Any, given: Arguments) -> None:
        x, pairs = given.array(SHORT), given.array(SHORT)
        tokens, inputs = given.integers(2)
        half = (tokens + 1) // 2
        order = [i * LANES + j for j in range(LANES) for i in range(2)]  # alternately of two vectors
        line = ir.VectorType(SHORT, LANES)
        nothing = ir.Constant(line, None)
        with given.shares() as (start, stop), counting(builder, start, stop) as panel:
            to = panel * half * (2 * WIDE)

            def write(k: Int, second: Int | None) -> None:
                for v in range(0, WIDE, LANES):
                    first = load(builder, x, k * 2 * inputs + panel * WIDE + v, line)
                    other = nothing if second is None else load(builder, x, second * inputs + panel * WIDE + v, line)
                    store(builder, shuffle(builder, first, other, order), pairs, to + k * (2 * WIDE) + 2 * v)

            with counting(builder, 0, tokens // 2) as k:
                write(k, k * 2 + 1)
            with counting(builder, tokens // 2, half) as k:  # an odd last token
                write(k, None)

    return compile_loop("pair_up", emit)


@cache
def _add_panels() -> int:
    """Return the loop that multiplies the panels `own` of left with every `step`-th panel of right.

    Its arguments: sums (., stride), left and right (panels, depth, WIDE), own (count,) int64; count, depth, stride,
    panels of right, step, reach. Panels `row` of left and `column` of right are multiplied if row < column + reach.
    A share is the panels of right that begin at its number.
    """
    return compile_loop("add_panels", _emit_panels)


def _emit_panels(builder: Any, given: Arguments) -> None:
    sums, left, right, own = given.array(FLOAT), given.array(INT), given.array(INT), given.array(LONG)
    count, depth, stride, panels, step, reach = given.integers(6)
    block = larger(Int(builder, CACHED_PAIRS) // (depth * WIDE), Int(builder, 1))
    with (
        given.shares() as (first, _),
        counting(builder, 0, (count + block - 1) // block) as n,
        counting(builder, 0, (panels - first + step - 1) // step) as m,
        counting(builder, n * block, smaller(n * block + block, count)) as i,
    ):
        column, row = first + m * step, Int(builder, builder.load(element(builder, own, i)))
        with builder.if_then(row.is_below(column + reach)), counting(builder, 0, WIDE, TALL) as tall:
            a, b = element(builder, left, row * depth * WIDE + tall), element(builder, right, column * depth * WIDE)
            _add_tile(builder, a, b, depth, sums, (row * WIDE + tall) * stride + column * WIDE, stride)


def _add_tile(builder: Any, a: Any, b: Any, depth: Int, sums: Any, at: Int, stride: Int) -> None:
    """Add the product of one register tile to the sums, over `depth` lines of WIDE pairs.

    sums[at + i * stride + j] += (a.T @ b)[i, j]     i < TALL, j < WIDE; a (2 depth, TALL), b (2 depth, WIDE)
    """
    for row in sum_register_tile(builder, a, WIDE, b, depth):
        for v, total in enumerate(row):
            place = at + v * LANES
            store(builder, builder.fadd(load(builder, sums, place, FLOATS), builder.load(total)), sums, place)
        at = at + stride
