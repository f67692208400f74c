"""Coordinate descent after the solve: improve scales and codes in turn, each by an exact minimization.

The layer error tr(E H E^T), E = W - Q, is a quadratic in every scale and every code, with gradient G = E H (times -2).

    scale of a group:  s += (u . G_g) / (u . H_gg u)       u = code - zero in the group         (a Gauss-Seidel step)
    code of a weight:  Q_k = the grid's point next to Q_k + G_k / H_kk     (QuantEase, arXiv 2309.01885, section 3)

Neither step can raise the error, so it falls until no step changes anything. GPTQ's codes are a good starting point,
but not a minimum in this sense.
"""

import torch
from torch import Tensor

from gptq.compute.matmul import product
from gptq.solver import grid, inner_loops
from gptq.solver.solve import Factor, SolvedLayer

BLOCK_COLUMNS = 128  # columns whose codes are chosen between two matrix products
MAX_SCALE_RATIO = 3.0  # largest factor by which one step may change a scale, up or down


def refine(W: Tensor, solved: SolvedLayer, factor: Factor, bits: int, sweeps: int) -> SolvedLayer:
    """Sweep over all groups; in each group refit the scale, then choose the codes again.

    A scale keeps its old value if the refitted scale would not fit float16.

    Args:
        W: (rows, columns) float32 or float64, the weight to approximate.
        factor: factor of the damped Hessian that measures the error. `factor.H` is modified during the call and
            restored on exit.
    """
    order = torch.argsort(solved.g_idx, stable=True)  # (columns,) each group contiguous
    H = factor.H if bool((order.diff() == 1).all()) else factor.H[order[:, None], order]
    Wt = W.T.contiguous()[order]  # (columns, rows), as are codes, Q and E
    codes = solved.codes.T.contiguous()[order]
    scale = solved.scale.T.to(W.dtype).contiguous()  # (groups, rows)
    zero = solved.zero.T.to(W.dtype).contiguous()
    bounds = torch.bincount(solved.g_idx.long(), minlength=len(scale)).cumsum(0).tolist()
    E = Wt - solved.weight().to(W.dtype).T.contiguous()[order]
    errors = solved.row_errors.clone()
    undamped = H.diagonal().clone()
    H.diagonal().add_(factor.ridge)  # in place, because H can be the largest tensor of all; undone below
    try:
        for _ in range(sweeps):
            for group, (start, stop) in enumerate(zip([0, *bounds[:-1]], bounds, strict=True)):
                inside = slice(start, stop)
                u = codes[inside].to(W.dtype) - zero[group]  # (columns of the group, rows)
                G = product(H[inside], E)  # (columns of the group, rows)
                moved, Hu, gain = _refit(u, G, H[inside, inside], scale[group])
                errors -= gain
                scale[group] += moved
                E[inside] = Wt[inside] - scale[group] * u
                G -= moved * Hu
                for low in range(start, stop, BLOCK_COLUMNS):
                    block = slice(low, min(low + BLOCK_COLUMNS, stop))
                    if low > start:
                        G = product(H[block], E)
                    descended = _descend(Wt[block], E[block], G, H[block, block], scale, zero, group, bits)
                    codes[block], E[block], gain = descended
                    errors -= gain
    finally:
        H.diagonal().copy_(undamped)
    inverse = torch.argsort(order)
    return SolvedLayer(
        codes=codes[inverse].T.contiguous(),
        scale=scale.T.float().contiguous(),
        zero=solved.zero,
        g_idx=solved.g_idx,
        row_errors=errors.clamp_(min=0),
    )


def _refit(u: Tensor, G: Tensor, H: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One Gauss-Seidel step on a group's scale (rows,).

    Returns:
        the change of each row's scale (rows,), 0 where no float16 value lowers the error; H u (columns, rows); and the
        decrease of each row's error (rows,) float64.
    """
    Hu = product(H, u)
    slope, curvature = (u * G).sum(0), (u * Hu).sum(0)  # (rows,)
    best = scale + slope / curvature.where(curvature > 0, 1)
    ratio = best / scale
    within = (curvature > 0) & (ratio > 1 / MAX_SCALE_RATIO) & (ratio < MAX_SCALE_RATIO)
    within &= best.abs() <= torch.finfo(grid.SCALE_DTYPE).max  # otherwise the old scale stays, which fits float16
    moved = grid.round_scale(best.where(within, scale)) - scale
    gain = moved * (2 * slope - moved * curvature)  # decrease of the error, with the scale rounded to float16
    return moved.where(gain > 0, 0), Hu, gain.clamp(min=0).double()


def _descend(
    W: Tensor, E: Tensor, G: Tensor, H: Tensor, scale: Tensor, zero: Tensor, group: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Move each code of a block of one group to its best value, one column after another.

    With t the best real value of a weight, the error decreases by H_kk ((t - Q_k)^2 - (t - new Q_k)^2).

    Args:
        W, E, G: (columns, rows) of the block; G may have further rows below.
        H: (columns, columns) of the block.
    Returns:
        codes and E of the block, and the decrease of each row's error (rows,) float64.
    """
    Q = W - E
    curvature = H.diagonal()[:, None]  # (columns, 1)
    codes, chosen, best = inner_loops.choose_columns(
        Q + G[: len(W)] / curvature, Q, -H / curvature.T, scale, zero, [group] * len(W), bits
    )
    gain = ((best - Q).square_() - (best - chosen).square_()).mul_(curvature).sum(0, dtype=torch.float64)
    return codes, W - chosen, gain
