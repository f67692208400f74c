"""Coordinate descent after the solve: improve scales and codes in turn, each by an exact minimization.

The layer error tr(E H E^T), E = W - Q, is a quadratic in every scale and every code, with gradient G = E H (times -2).

    scale of a group:  s += (u . G_g) / (u . H_gg u)       u = code - zero in the group         (a Gauss-Seidel step)
    with an offset:    s and o by the normal equations of u = code and of 1; then o again for the s that can be stored
    code of a weight:  Q_k = the grid's point next to Q_k + G_k / H_kk     (QuantEase, arXiv 2309.01885, section 3)

Neither step can raise the error, so it falls until no step changes anything. GPTQ's codes are a good starting point,
but not a minimum in this sense.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gptq.compute.matmul import product
from gptq.compute.matrices import diagonal_of, release, set_diagonal
from gptq.solver import inner_loops
from gptq.solver.grids.grid import Form, Grid, Groups
from gptq.solver.solve import Factor, SolvedLayer

BLOCK_COLUMNS = 128  # columns whose codes are chosen between two matrix products
MAX_SCALE_RATIO = 3.0  # largest factor by which one step may change a scale, up or down


def refine(W: Tensor, solved: SolvedLayer, factor: Factor, grid: Grid, sweeps: int) -> SolvedLayer:
    """Sweep over all groups; in each group refit the scale, then choose the codes again.

    A scale or an offset keeps its old value if the refitted one would not fit the file.

    Args:
        W: (rows, columns) float32 or float64, the weight to approximate.
        factor: factor of the damped Hessian that measures the error. `factor.H` is modified during the call and
            restored on exit.
        grid: the one of the solve.
    """
    order = torch.argsort(solved.g_idx, stable=True)  # (columns,) each group contiguous
    H = factor.H if bool((order.diff() == 1).all()) else factor.H[order[:, None], order]
    Wt = W.T.contiguous()[order]  # (columns, rows), as are codes, Q and E
    codes = solved.codes.T.contiguous()[order]
    groups = _groups_of(solved, W.dtype)
    scale, shift = groups.scale, groups.shift  # (groups, rows), changed in place
    bounds = torch.bincount(solved.g_idx.long(), minlength=len(scale)).cumsum(0).tolist()
    E = Wt - solved.weight().to(W.dtype).T.contiguous()[order]
    errors = solved.row_errors.clone()
    undamped = diagonal_of(H).clone()
    set_diagonal(H, undamped + factor.ridge)  # in place, because H can be the largest tensor of all; undone below
    try:
        for _ in range(sweeps):
            for group, (start, stop) in enumerate(zip([0, *bounds[:-1]], bounds, strict=True)):
                inside = slice(start, stop)
                u = grid.steps(codes[inside], shift[group])  # (columns of the group, rows)
                G = product(H[inside], E)  # (columns of the group, rows)
                refit = _refit_with_offset if grid.form is Form.AFFINE else _refit
                G, gain = refit(u, G, H[inside, inside], grid, groups, group)
                errors -= gain
                E[inside] = Wt[inside] - scale[group] * u
                if grid.form is Form.AFFINE:
                    E[inside] -= shift[group]
                for low in range(start, stop, BLOCK_COLUMNS):
                    block = slice(low, min(low + BLOCK_COLUMNS, stop))
                    if low > start:
                        G = product(H[block], E)
                        release(H)
                    descended = _descend(Wt[block], E[block], G, H[block, block], groups, group, grid)
                    codes[block], E[block], gain = descended
                    errors -= gain
                release(H)
    finally:
        set_diagonal(H, undamped)
    inverse = torch.argsort(order)
    return replace(
        solved,
        codes=codes[inverse].T.contiguous(),
        scale=scale.T.float().contiguous(),
        offset=None if solved.offset is None else shift.T.float().contiguous(),
        row_errors=errors.clamp_(min=0),
    )


def _groups_of(solved: SolvedLayer, dtype: torch.dtype) -> Groups:
    """The groups of a solved layer in the layout of the solver."""
    shift = solved.zero if solved.offset is None else solved.offset
    supers = (None if x is None else x.T.to(dtype) for x in (solved.super_scale, solved.super_offset))
    return Groups(solved.scale.T.to(dtype).contiguous(), shift.T.to(dtype).contiguous(), *supers)


def _refit(u: Tensor, G: Tensor, H: Tensor, grid: Grid, groups: Groups, group: int) -> tuple[Tensor, Tensor]:
    """One Gauss-Seidel step on a group's scale (rows,), in place; it stays where no stored value lowers the error.

    Returns:
        G (columns, rows) for the new scale, and the decrease of each row's error (rows,) float64.
    """
    scale, shift = groups.scale[group], groups.shift[group]
    Hu = product(H, u)
    slope, curvature = (u * G).sum(0), (u * Hu).sum(0)  # (rows,)
    best = scale + slope / curvature.where(curvature > 0, 1)
    within = (curvature > 0) & _is_near(best, scale, grid)
    moved = grid.snap(best.where(within, scale), shift, groups, group)[0] - scale
    gain = moved * (2 * slope - moved * curvature)  # decrease of the error, with the scale rounded to a stored value
    moved = moved.where(gain > 0, 0)
    scale += moved
    return G.sub_(moved * Hu), gain.clamp(min=0).double()


def _refit_with_offset(
    u: Tensor, G: Tensor, H: Tensor, grid: Grid, groups: Groups, group: int
) -> tuple[Tensor, Tensor]:
    """`_refit` of a group's scale and offset together: the least squares of both, then the offset for the stored scale.

    With moves s and o, the error falls by 2 (s u + o 1) . G - (s u + o 1) . H (s u + o 1).
    """
    scale, offset = groups.scale[group], groups.shift[group]
    Hu, H1 = product(H, u), H.sum(1, keepdim=True)  # (columns, rows), (columns, 1)
    slope, slope1 = (u * G).sum(0), G.sum(0)  # (rows,)
    uu, u1, one = (u * Hu).sum(0), Hu.sum(0), H1.sum()  # (rows,), (rows,), ()
    determinant = uu * one - u1 * u1
    best = scale + (slope * one - slope1 * u1) / determinant.where(determinant > 0, 1)
    within = (determinant > 0) & _is_near(best, scale, grid)
    best = grid.snap(best.where(within, scale), offset, groups, group)[0]
    moved = best - scale
    best_offset = offset + (slope1 - moved * u1) / one
    best_offset = best_offset.where(torch.isfinite(best_offset) & grid.fits(best_offset), offset)
    moved1 = grid.snap(best, best_offset, groups, group)[1] - offset
    gain = 2 * (moved * slope + moved1 * slope1)
    gain -= moved * moved * uu + 2 * moved * moved1 * u1 + moved1 * moved1 * one
    moved, moved1 = moved.where(gain > 0, 0), moved1.where(gain > 0, 0)
    scale += moved
    offset += moved1
    return G.sub_(moved * Hu + moved1 * H1), gain.clamp(min=0).double()


def _is_near(best: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Whether a refitted scale fits the file, and is not further than MAX_SCALE_RATIO from the old one."""
    ratio = best / scale
    return (ratio > 1 / MAX_SCALE_RATIO) & (ratio < MAX_SCALE_RATIO) & grid.fits(best)


def _descend(
    W: Tensor, E: Tensor, G: Tensor, H: Tensor, groups: Groups, group: int, grid: Grid
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
    groups_of_columns = torch.full((len(W),), group, dtype=torch.int64, device=W.device)
    codes, chosen, best = inner_loops.choose_columns(
        Q + G[: len(W)] / curvature, Q, -H / curvature.T, groups.scale, groups.shift, groups_of_columns, grid
    )
    gain = ((best - Q).square_() - (best - chosen).square_()).mul_(curvature).sum(0, dtype=torch.float64)
    return codes, W - chosen, gain
