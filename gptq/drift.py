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

from gptq.matmul import product
from gptq.solver import Factor, row_chunks

BLOCK = 256  # columns of a triangular matrix that a library solves for
ROWS = 1024  # of a weight whose correction is computed at a time: bounds the memory


def full_correction(W: Tensor, C: Tensor, factor: Factor) -> Tensor:
    """W C H^-1 (rows, columns) with the damped H, by two triangular solves with its factor.

    Args:
        W: (rows, columns).
        C: (columns, columns), the mean of d x^T.
    """
    perm, inverse = factor.perm, torch.argsort(factor.perm)
    correction = torch.empty_like(W)
    for rows in row_chunks(len(W), ROWS):
        Y = product(C.T, W[rows].T)[perm]  # (columns, rows) in solving order; H = U D U^T, so H^-1 Y = U^-T D^-1 U^-1 Y
        _solve_in_place(factor.U, Y, upper=True)
        _solve_in_place(factor.U.T, Y.div_(factor.D[:, None]), upper=False)
        correction[rows] = Y[inverse].T
    return correction


def _solve_in_place(T: Tensor, Y: Tensor, upper: bool) -> None:
    """Y (columns, rows) becomes T^-1 Y for a unit triangular T, most of it by products of blocks."""
    blocks = [slice(start, min(start + BLOCK, len(T))) for start in range(0, len(T), BLOCK)]
    for block in reversed(blocks) if upper else blocks:
        known = slice(block.stop, None) if upper else slice(0, block.start)
        if len(Y[known]):
            Y[block] -= product(T[block, known], Y[known])
        Y[block] = torch.linalg.solve_triangular(T[block, block], Y[block], upper=upper, unitriangular=True)


def best_share(power: float, agreement: float) -> float:
    """The share in [0, 1] of a correction with the least error, mean ||W d - share correction x||^2.

    Args:
        power, agreement: means of ||correction x||^2 and (W d) . (correction x) over tokens that the correction was
            not computed from.
    """
    return min(max(agreement / power, 0.0), 1.0) if power > 0 else 0.0
