"""Sums of products of bfloat16 values, compiled: A^T B over tokens, exact products added up in float32.

Libraries round the result of such a product to bfloat16, or convert float32 factors on the way and take twice as long.
A CPU's instruction for it adds two products at once to each of LANES sums, so two tokens lie side by side: the values
of one input at both are one number of 32 bits. TALL x WIDE sums stay in registers while the tokens go by. Each sum is
made by one thread in the order of the tokens, so how many threads there are changes no bit.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from gptq.compute.simd import FLOATS, LANES, TALL, WIDE, compiled, data, load, store, sum_pairs
from gptq.compute.threads import run_shares, shares_of

KEPT = 2**17  # pairs that are read again and again, half a megabyte: they stay in the second-level cache


def add_products(sums: Tensor, a: Tensor, b: Tensor, panels: list[slice], upper: bool) -> None:
    """sums[panel] += a[:, panel]^T b for each panel, all of it, or at least what is right of the diagonal if `upper`.

    Args:
        sums: (inputs, inputs) float32, contiguous; inputs are a multiple of WIDE, and so is where a panel begins.
        a, b: what `in_pairs` makes of (tokens, inputs).
    """
    own = np.array([n for panel in panels for n in range(panel.start // WIDE, panel.stop // WIDE)])
    threads = min(torch.get_num_threads(), len(b))
    run_shares(_add_panels, (sums.numpy(), a.numpy(), b.numpy(), own, upper), [(n, threads) for n in range(threads)])


def product_of_panel(a: Tensor, b: Tensor, panel: slice, start: int) -> Tensor:
    """a[:, panel]^T b[:, start:], (panel, inputs - start) float32, of what `in_pairs` makes of (tokens, inputs).

    The panel begins and ends at multiples of WIDE, and so does `start`.
    """
    sums = torch.zeros(panel.stop - panel.start, len(b) * WIDE - start)
    left, right = a[panel.start // WIDE : panel.stop // WIDE], b[start // WIDE :]
    add_products(sums, left, right, [slice(0, len(sums))], upper=False)
    return sums


def in_pairs(x: Tensor) -> Tensor:
    """(tokens, inputs) bfloat16 as (inputs / WIDE, tokens / 2, WIDE) int32; an odd last token is paired with zeros."""
    tokens, inputs = x.shape
    pairs = torch.empty(inputs // WIDE, -(-tokens // 2), 2 * WIDE, dtype=torch.int16)
    arrays = x.contiguous().view(torch.int16).numpy(), pairs.numpy()
    run_shares(_pair_up, arrays, shares_of(len(pairs), 1))
    return pairs.view(torch.int32)


@compiled
def _pair_up(x, pairs, start, stop) -> None:  # type: ignore[no-untyped-def]
    """pairs (panels, pairs of tokens, 2 WIDE) from x (tokens, inputs) for some of the panels."""
    nil = np.int16(0)
    for panel in range(start, stop):
        for k in range(pairs.shape[1]):
            first, line = x[2 * k, panel * WIDE : (panel + 1) * WIDE], pairs[panel, k]
            if 2 * k + 1 < len(x):
                second = x[2 * k + 1, panel * WIDE : (panel + 1) * WIDE]
                for j in range(WIDE):
                    line[2 * j], line[2 * j + 1] = first[j], second[j]
            else:
                for j in range(WIDE):
                    line[2 * j], line[2 * j + 1] = first[j], nil


def _adding_tile(context, a, a_at, b, b_at, depth, sums, at, stride):  # type: ignore[no-untyped-def]
    """sums[at + i stride + j] += the products of pair i of a with pair j of b, over `depth` lines of WIDE pairs each.

    i is below TALL, j below WIDE; the first lines begin at a_at and b_at.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, a_at, _, b_at, depth, _, at, stride = arguments
        a, b, sums = (data(context, builder, signature, arguments, i) for i in (0, 2, 5))
        for row in sum_pairs(builder, builder.gep(a, [a_at]), WIDE, builder.gep(b, [b_at]), depth):
            for v, total in enumerate(row):
                place = builder.add(at, ir.Constant(at.type, v * LANES))
                store(builder, builder.fadd(load(builder, sums, place, FLOATS), builder.load(total)), sums, place)
            at = builder.add(at, stride)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(a, intp, b, intp, intp, sums, intp, intp), emit


_add_tile: Any = intrinsic(_adding_tile)


@compiled
def _add_panels(sums, left, right, own, upper, first, step) -> None:  # type: ignore[no-untyped-def]
    """The panels `own` of left with every `step`-th panel of right, from the first on."""
    depth, stride = left.shape[1], sums.shape[1]
    block = max(KEPT // (depth * WIDE), 1)
    for low in range(0, len(own), block):
        for column in range(first, len(right), step):
            for row in own[low : low + block]:
                if upper and row > column:
                    continue
                for i in range(0, WIDE, TALL):
                    at = (row * WIDE + i) * stride + column * WIDE
                    _add_tile(left, row * depth * WIDE + i, right, column * depth * WIDE, depth, sums, at, stride)
