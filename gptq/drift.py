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

from gptq.solver import Factor, row_chunks


def full_correction(W: Tensor, C: Tensor, factor: Factor) -> Tensor:
    """W C H^-1 (rows, columns) with the damped H, by two triangular solves with its factor.

    Args:
        W: (rows, columns).
        C: (columns, columns), the mean of d x^T.
    """
    perm, inverse = factor.perm, torch.argsort(factor.perm)
    corrected = torch.empty_like(W)
    for rows in row_chunks(len(W)):
        Y = (W[rows] @ C)[:, perm]  # (chunk, columns) in solving order; H = U D U^T, so Y H^-1 = Y U^-T D^-1 U^-1
        Y = torch.linalg.solve_triangular(factor.U.T, Y, upper=False, left=False, unitriangular=True)
        Y = torch.linalg.solve_triangular(factor.U, Y / factor.D, upper=True, left=False, unitriangular=True)
        corrected[rows] = Y[:, inverse]
    return corrected


def best_share(agreement: float, power: float) -> float:
    """The share in [0, 1] of a correction A (rows, columns) with the least error ||W d - share A x||^2.

    Args:
        agreement, power: means of (W d).(A x) and ||A x||^2 over windows that the correction was not computed from.
    """
    return min(max(agreement / power, 0.0), 1.0) if power > 0 else 0.0
