"""Compiled kernel for Gram matrices of bfloat16 values: A^T B over tokens, exact products summed in float32.

torch rounds the result of a bfloat16 product to bfloat16; converting float32 factors inside the product takes twice as
long. The CPU's instruction (`simd.dot_bfloat16_pairs`) adds two products to each of LANES sums, so tokens are stored in
pairs: one input's values at two consecutive tokens share 32 bits. A register tile of TALL x WIDE sums runs over all
tokens. Each sum is computed by one thread in the order of the tokens, so the number of threads does not change the
result.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from gptq.compute.simd import FLOATS, LANES, TALL, WIDE, array_data, compiled, load, store, sum_register_tile
from gptq.compute.threads import run_shares, shares_of

CACHED_PAIRS = 2**17  # pairs of the left factor reused from the second-level cache at a time, 512 KiB


def add_products(sums: Tensor, a: Tensor, b: Tensor, panels: list[slice], upper: bool) -> None:
    """Add to each panel of rows: sums[panel] += a[:, panel]^T b.

    Args:
        sums: (inputs, inputs) float32, contiguous; `inputs` and the panels' starts are multiples of WIDE.
        a, b: (tokens, inputs) as returned by `pair_tokens`.
        upper: the result is only needed right of the diagonal; most of the rest is skipped.
    """
    own = np.array([n for panel in panels for n in range(panel.start // WIDE, panel.stop // WIDE)])
    threads = min(torch.get_num_threads(), len(b))
    run_shares(_add_panels, (sums.numpy(), a.numpy(), b.numpy(), own, upper), [(n, threads) for n in range(threads)])


def panel_product(a: Tensor, b: Tensor, panel: slice, start: int) -> Tensor:
    """a[:, panel]^T b[:, start:], (panel, inputs - start) float32.

    Args:
        a, b: (tokens, inputs) as returned by `pair_tokens`.
        panel, start: bounds are multiples of WIDE.
    """
    sums = torch.zeros(panel.stop - panel.start, len(b) * WIDE - start)
    left, right = a[panel.start // WIDE : panel.stop // WIDE], b[start // WIDE :]
    add_products(sums, left, right, [slice(0, len(sums))], upper=False)
    return sums


def pair_tokens(x: Tensor) -> Tensor:
    """Rearrange (tokens, inputs) bfloat16 to (inputs / WIDE, tokens / 2, WIDE) int32.

    Each int32 holds one input's values at two consecutive tokens; an odd last token is paired with zeros.
    """
    tokens, inputs = x.shape
    pairs = torch.empty(inputs // WIDE, -(-tokens // 2), 2 * WIDE, dtype=torch.int16)
    arrays = x.contiguous().view(torch.int16).numpy(), pairs.numpy()
    run_shares(_pair_up, arrays, shares_of(len(pairs), 1))
    return pairs.view(torch.int32)


@compiled
def _pair_up(x, pairs, start, stop) -> None:  # type: ignore[no-untyped-def]
    """Write panels start to stop of pairs (panels, tokens / 2, 2 WIDE) int16 from x (tokens, inputs) int16.

    pairs[panel, k, 2 j + i] = x[2 k + i, panel * WIDE + j], i = 0 or 1
    """
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


def _add_tile_intrinsic(context, a, a_at, b, b_at, depth, sums, at, stride):  # type: ignore[no-untyped-def]
    """_add_tile(...): add the product of one register tile to the sums, over `depth` lines of WIDE pairs.

        sums[at + i * stride + j] += (A.T @ B)[i, j]     i < TALL, j < WIDE

    A (2 depth, TALL) and B (2 depth, WIDE) are the bfloat16 columns whose pairs begin at a[a_at] and b[b_at].
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, a_at, _, b_at, depth, _, at, stride = arguments
        a, b, sums = (array_data(context, builder, signature, arguments, i) for i in (0, 2, 5))
        for row in sum_register_tile(builder, builder.gep(a, [a_at]), WIDE, builder.gep(b, [b_at]), depth):
            for v, total in enumerate(row):
                place = builder.add(at, ir.Constant(at.type, v * LANES))
                store(builder, builder.fadd(load(builder, sums, place, FLOATS), builder.load(total)), sums, place)
            at = builder.add(at, stride)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(a, intp, b, intp, intp, sums, intp, intp), emit


_add_tile: Any = intrinsic(_add_tile_intrinsic)


@compiled
def _add_panels(sums, left, right, own, upper, first, step) -> None:  # type: ignore[no-untyped-def]
    """Multiply the panels `own` of left with every `step`-th panel of right from `first` on: one thread's share."""
    depth, stride = left.shape[1], sums.shape[1]
    block = max(CACHED_PAIRS // (depth * WIDE), 1)
    for low in range(0, len(own), block):
        for column in range(first, len(right), step):
            for row in own[low : low + block]:
                if upper and row > column:
                    continue
                for i in range(0, WIDE, TALL):
                    at = (row * WIDE + i) * stride + column * WIDE
                    _add_tile(left, row * depth * WIDE + i, right, column * depth * WIDE, depth, sums, at, stride)
