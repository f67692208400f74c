"""Asymmetric calibration: what a layer should become when its input is no longer the original model's.

The layers before it are quantized, so a layer sees x where the original saw x~ = x + d. The outputs that are wanted are
W x~, and of all weights the one that comes closest to them on x is

    W* = W + share * W C H^-1,     C = mean d x^T,     share = 1,

because ||W x~ - Q x||^2 = ||(W* - Q) x||^2 + what no Q can change. Plain GPTQ on W* is then the whole method; GPTAQ
(arXiv 2504.02692) and Qronos (arXiv 2505.11695) reach about the same Q by changes to the solve, QEP (arXiv 2504.09629)
is this with a share of 1/2. C is an average over few tokens and its noise would be learned too, so the share is the one
that does best on windows which neither C nor H has seen.
"""

import torch
from torch import Tensor

from gptq.compute.matmul import product
from gptq.solver.codes import row_chunks
from gptq.solver.solve import Factor

BLOCK = 256  # columns of a triangular matrix whose inverse is made
ROWS = 1024  # that are divided at a time: bounds the memory


def full_correction(W: Tensor, C: Tensor, factor: Factor) -> Tensor:
    """W C H^-1 (rows, columns) with the damped H. Where W has more rows than columns, C H^-1 once is less work.

    Args:
        W: (rows, columns).
        C: (columns, columns), the mean of d x^T.
    """
    return divide(product(W, C), factor)


def divide(A: Tensor, factor: Factor) -> Tensor:
    """A (rows, columns) becomes A H^-1 with the damped H, by two triangular solves with its factor.

    H = U D U^T, so A H^-1 = (U^-T D^-1 U^-1 A^T)^T. Most of it are products of blocks; the triangles along the
    diagonal are inverted, which for a few hundred columns costs no digits.
    """
    U, n = factor.U, len(factor.U)
    blocks = [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    one = torch.eye(min(BLOCK, n), dtype=U.dtype, device=U.device)
    inverses = []  # of the triangles, (block, block)
    for block in blocks:
        size = block.stop - block.start
        identity = one[:size, :size]
        inverses.append(torch.linalg.solve_triangular(U[block, block], identity, upper=True, unitriangular=True))
    back = torch.argsort(factor.perm)
    for rows in row_chunks(len(A), ROWS):
        Y = A[rows].T[factor.perm]  # (columns, rows) in solving order
        for block, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
            if block.stop < n:
                Y[block] -= product(U[block, block.stop :], Y[block.stop :])
            Y[block] = product(inverse, Y[block])
        Y.div_(factor.D[:, None])
        for block, inverse in zip(blocks, inverses, strict=True):
            if block.start:
                Y[block] -= product(U[: block.start, block].T, Y[: block.start])
            Y[block] = product(inverse.T, Y[block])
        A[rows] = Y[back].T
    return A


def best_share(power: float, agreement: float) -> float:
    """The share in [0, 1] of a correction with the least error, mean ||W d - share correction x||^2.

    Args:
        power, agreement: means of ||correction x||^2 and (W d) . (correction x) over tokens that the correction was
            not computed from.
    """
    return min(max(agreement / power, 0.0), 1.0) if power > 0 else 0.0
