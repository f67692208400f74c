"""Weights as smooth functions of their codes, for block tuning.

A code is relaxed to a mean of itself and its two neighbours on the grid, under a softmax of logits that Adam changes.
The softmax's temperature falls to nearly 0, so that the means end as codes, and Gumbel noise keeps codes from learning
the windows by heart (the relaxation of GSQ, arXiv 2604.18556, with less noise). A gradient then sees where a code is
going before it is there; a straight-through gradient (AutoRound, arXiv 2309.05516) sees a jump after it was made.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gptq.solver import Grid
from gptq.solver.solve import SolvedLayer

NOISE = 0.3  # Gumbel variables that are added to logits / temperature are scaled by this
LEVELS = 256  # that a Gumbel variable takes here, all equally often: a random byte costs a twentieth of a logarithm
LEAST = -30.0  # logit below the largest, whose exp is nothing beside 1 in float32; less takes exp 5 to 20 times as long
FIRST_LOGIT = -2.0  # of a code's neighbours at the start; the code's own logit is 0


def first_logits(solved: SolvedLayer, grid: Grid) -> Tensor:
    """Logits (2, outputs, inputs) of the next lower and the next higher value; -inf where the grid ends."""
    ranks = grid.ranks(solved.codes)
    logits = torch.full((2, *ranks.shape), FIRST_LOGIT, dtype=torch.float32, device=ranks.device)
    logits[0].masked_fill_(ranks == 0, -torch.inf)
    logits[1].masked_fill_(ranks == grid.top, -torch.inf)
    return logits


def soft_weight(
    solved: SolvedLayer, scale: Tensor, logits: Tensor, temperature: float, grid: Grid, noise: int | None = None
) -> Tensor:
    """Dequantize with scales changed by the fraction `scale`, and codes as means under a softmax of their logits.

    A layer's own offsets, where the grid has them, stay as they are.

    Args:
        scale: (outputs, groups).
        logits: (2, outputs, inputs), as `first_logits` makes them.
        noise: seed of the noise; None for none.
    """
    weight: Tensor = _SoftWeight.apply(scale, logits, (temperature, noise), solved, grid)
    return weight


def round_layer(solved: SolvedLayer, scale: Tensor, logits: Tensor, grid: Grid) -> SolvedLayer:
    """Apply the changes to a layer: each code moves to the most probable value, and scales get their stored dtype."""
    lower, higher = logits  # (outputs, inputs) each
    moves = torch.where(higher > lower, (higher > 0).float(), -(lower > 0).float())
    codes = grid.codes_of(grid.ranks(solved.codes) + moves)
    if not grid.tunes_scales:
        return replace(solved, codes=codes)
    return replace(solved, codes=codes, scale=grid.round_scales(solved.scale * (1 + scale)))


class _SoftWeight(torch.autograd.Function):
    """w = s (1 + change) m + offset, m = v + p_lower (v_lower - v) + p_higher (v_higher - v).

    p = softmax(logits / t + noise), the code's own logit being 0.

    With G = dL/dw: dL/dlogit = G s (1 + change) p (v_neighbour - m) / t, and dL/dchange is the sum of G s m over a
    group. Of the forward pass p is kept, in whose place the backward pass writes the gradient of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, scale: Tensor, logits: Tensor, softmax: tuple[float, int | None], solved: SolvedLayer, grid: Grid
    ) -> Tensor:
        p = _probabilities(logits, *softmax)  # (2, outputs, inputs)
        ctx.save_for_backward(scale)
        ctx.p, ctx.rest = p, (softmax[0], solved, grid)
        weight = _mean(solved, grid, p)[0].mul_(solved.spread(solved.scale * (1 + scale)))
        if solved.offset is not None:
            weight += solved.spread(solved.offset)
        return weight.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,), (temperature, solved, grid) = ctx.saved_tensors, ctx.rest
        G, p, ctx.p = solved.by_group(gradients[0]), ctx.p, None
        mean, moves = _mean(solved, grid, p)
        of_scale = None
        if ctx.needs_input_grad[0]:
            of_scale = solved.group_sums(mean.mul_(G)).mul_(solved.scale)  # (outputs, groups)
        of_mean = solved.spread(solved.scale * (1 + scale) / temperature) * G
        lower, higher = map(solved.by_group, p)
        shift = moves[0] * lower + moves[1] * higher  # of the mean from the code's own value
        for move, one in zip(moves, (lower, higher), strict=True):
            one.mul_((move - shift).mul_(of_mean))
        return of_scale, p, None, None, None


def _probabilities(logits: Tensor, temperature: float, noise: int | None) -> Tensor:
    """Probabilities (2, outputs, inputs) of the two neighbours; the rest is the code's own."""
    z = logits / temperature
    if noise is not None:
        draws, levels = torch.Generator(z.device).manual_seed(noise), gumbel_levels(z.device)
        z.sub_(draw_gumbel(z[0], levels, draws), alpha=NOISE)  # of the code's own logit
        for one in z:
            one.add_(draw_gumbel(one, levels, draws), alpha=NOISE)
    largest = z.amax(0).clamp_(min=0)  # (outputs, inputs): of all three logits
    z.sub_(largest).clamp_(min=LEAST).exp_()
    return z.div_(z[0] + z[1] + largest.neg_().clamp_(min=LEAST).exp_())


def gumbel_levels(device: torch.device) -> Tensor:
    """Return LEVELS quantiles of the Gumbel distribution, (LEVELS,) float32."""
    quantiles = (torch.arange(LEVELS, dtype=torch.float32, device=device) + 0.5) / LEVELS
    return quantiles.log_().neg_().log_().neg_()


def draw_gumbel(like: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw Gumbel variables in the shape of `like`; each is one of `levels`, which has LEVELS values."""
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device)
    drawn = words.random_(-(2**63), None, generator=generator).view(torch.uint8)[: like.numel()]
    return levels.index_select(0, drawn.int()).view_as(like)


def _mean(solved: SolvedLayer, grid: Grid, p: Tensor) -> tuple[Tensor, tuple[Any, Any]]:
    """Return the mean value in units of the scale, and the distances to the neighbours' values, as `by_group` does."""
    ranks, lower, higher = map(solved.by_group, (grid.ranks(solved.codes), *p))
    if solved.table is None:
        return (ranks + higher).sub_(lower).sub_(solved.spread(solved.zero.float())), (-1.0, 1.0)
    low, value, high = (_value_at(solved.table, ranks + move, grid) for move in (-1, 0, 1))
    moves = low.sub_(value), high.sub_(value)
    return value + lower * moves[0] + higher * moves[1], moves


def _value_at(table: Tensor, ranks: Tensor, grid: Grid) -> Tensor:
    """The table's values at ranks in ascending order; ranks past an end take the value there."""
    return table[grid.codes_of(ranks.clamp(0, grid.top)).long()]
