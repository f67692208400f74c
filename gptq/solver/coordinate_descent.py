"""After the solve: scales and codes made better in turn, each step the exact minimum over what it changes.

The layer error tr(E H E^T), E = W - Q, is a quadratic in every scale and every code, with gradient G = E H (times -2).

    scale of a group:  s += (u . G_g) / (u . H_gg u)       u = code - zero in the group         (a Gauss-Seidel step)
    code of a weight:  Q_k = the grid's point next to Q_k + G_k / H_kk     (QuantEase, arXiv 2309.01885, section 3)

Neither can raise the error, so it falls until nothing moves. GPTQ's codes are a good start and not such a minimum.
"""

import torch
from torch import Tensor

from gptq.compute.matmul import product
from gptq.solver import grid, inner_loops
from gptq.solver.solve import Factor, SolvedLayer

BLOCK = 128  # columns whose codes are chosen between two matrix products
FARTHEST = 3.0  # a scale moves to no more than this times what it is, and no less than one over it


def refine(W: Tensor, solved: SolvedLayer, factor: Factor, bits: int, sweeps: int) -> SolvedLayer:
    """Sweeps over all groups; each first refits a group's scale, then its codes.

    Args:
        W: (rows, columns) float32 or float64, what the layer is to come close to.
        factor: whose damped Hessian measures the error.
    Raises:
        ValueError: a scale does not fit its stored dtype.
    """
    order = torch.argsort(solved.g_idx, stable=True)  # (columns,) each group contiguous
    H = factor.H if bool((order.diff() == 1).all()) else factor.H[order[:, None], order]
    undamped = H.diagonal().clone()
    H.diagonal().add_(factor.ridge)  # in place, as H can be the largest of all; taken back below
    Wt = W.T.contiguous()[order]  # (columns, rows), as are codes, Q and E
    codes = solved.codes.T.contiguous()[order]
    scale = solved.scale.T.to(W.dtype).contiguous()  # (groups, rows)
    zero = solved.zero.T.to(W.dtype).contiguous()
    bounds = torch.bincount(solved.g_idx.long(), minlength=len(scale)).cumsum(0).tolist()
    E = Wt - solved.weight().to(W.dtype).T.contiguous()[order]
    errors = solved.row_errors.clone()
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
            for low in range(start, stop, BLOCK):
                block = slice(low, min(low + BLOCK, stop))
                if low > start:
                    G = product(H[block], E)
                chosen = _descend(Wt[block], E[block], G, H[block, block], scale, zero, group, bits)
                codes[block], E[block], gain = chosen
                errors -= gain
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
    """How far each row's scale (rows,) moves, to a float16 that lowers the error; H u, (columns, rows); by how much."""
    Hu = product(H, u)
    slope, curvature = (u * G).sum(0), (u * Hu).sum(0)  # (rows,)
    best = scale + slope / curvature.where(curvature > 0, 1)
    ratio = best / scale
    within = (curvature > 0) & (ratio > 1 / FARTHEST) & (ratio < FARTHEST)
    moved = grid.as_stored(best.where(within, scale)) - scale
    gain = moved * (2 * slope - moved * curvature)  # what the error loses, after rounding to float16
    return moved.where(gain > 0, 0), Hu, gain.clamp(min=0).double()


def _descend(
    W: Tensor, E: Tensor, G: Tensor, H: Tensor, scale: Tensor, zero: Tensor, group: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and E of a block of one group, (columns, rows), after each code has gone to its best place in turn.

    And how much of their error rows (rows,) lose: with t the best place of a code, H_kk ((t - Q_k)^2 - (t - new)^2).
    """
    Q = W - E
    width = H.diagonal()[:, None]  # (columns, 1)
    codes, chosen, best = inner_loops.choose_columns(
        Q + G[: len(W)] / width, Q, -H / width.T, scale, zero, [group] * len(W), bits
    )
    gain = ((best - Q).square_() - (best - chosen).square_()).mul_(width).sum(0, dtype=torch.float64)
    return codes, W - chosen, gain
