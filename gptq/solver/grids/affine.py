"""Integers with a scale and a real-valued offset per group: w = scale * code + offset.

A real offset is better than an integer zero point because it takes any value, and because the best one follows from the
codes in closed form (NeUQI, arXiv 2505.17595): with weights h_j of the squared error and codes c_j, scale and offset
minimize

    sum_j h_j (w_j - scale c_j - offset)^2,

a linear least-squares problem in two unknowns. `fit_equal` takes the best of many grids by search, then solves this for
the codes it has, and chooses the codes again, a few times.

Packing: ggml's Q4_1 and Q5_1 are groups of 32 with float16 scales: d = scale, m = offset, and `Codes.codes` as they
are. MLX's affine mode has groups of 32, 64 or 128, and scales in the dtype of the model: scales = scale, biases =
offset.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.solver import inner_loops
from gptq.solver.grids.grid import Form, Grid, Groups
from gptq.solver.grids.integer import FLOAT16, SHRINK_FACTORS
from gptq.solver.grids.scales import FloatScales

REFINEMENTS = 4  # times that least squares and new codes follow the search


@dataclass(frozen=True)
class AffineGrid(Grid):
    """Codes of `bits` bits; `Codes` holds scale and offset, both of which are values of `scales.dtype`."""

    bits: int
    scales: FloatScales = FLOAT16
    form = Form.AFFINE

    def fit_equal(self, w: Tensor, importance: Tensor | None) -> Groups:
        if importance is None:
            low = w.amin(1)
            return Groups(self.scales.round((w.amax(1) - low) / self.top), self.scales.round_offset(low))
        return Groups(*search(self, w, importance))

    def snap(self, scale: Tensor, shift: Tensor, groups: Groups, group: int) -> tuple[Tensor, Tensor]:
        return self.scales.nearest(scale), self.scales.nearest_offset(shift)

    @property
    def tunes_scales(self) -> bool:
        return True

    def round_scales(self, scale: Tensor) -> Tensor:
        return self.scales.round(scale)

    @property
    def tunes_offsets(self) -> bool:
        return True

    def round_offsets(self, offset: Tensor) -> Tensor:
        return self.scales.round_offset(offset)

    def fits(self, scale: Tensor) -> Tensor:
        return scale.abs() <= self.scales.largest

    def quantize(self, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.round((w - shift) / scale).clamp(0, self.top)

    def steps(self, codes: Tensor, shift: Tensor) -> Tensor:
        return codes.to(shift.dtype)


def search(
    grid: AffineGrid, w: Tensor, importance: Tensor, largest_offset: float | None = None
) -> tuple[Tensor, Tensor]:
    """Find scale and offset (groups, rows) with a small weighted error: search, then alternate (see the module).

    Args:
        w: (groups, columns of a group, rows).
        importance: (groups, columns of a group).
        largest_offset: upper bound of the offsets; None if there is none.
    """
    low, high = w.amin(1), w.amax(1)  # (groups, rows)
    if largest_offset is not None:
        low = low.clamp(max=largest_offset)
    high = torch.maximum(high, low)
    weights = importance[:, :, None]  # (groups, columns of a group, 1)
    total = weights.sum(1).clamp(min=torch.finfo(w.dtype).tiny)
    middle = ((weights * w).sum(1) / total).clamp(low, high)
    if largest_offset is not None:
        middle = middle.clamp(max=largest_offset)
    shrink = torch.tensor(SHRINK_FACTORS, dtype=w.dtype, device=w.device).view(-1, 1, 1)
    scales = grid.scales.round(shrink * (high - low) / grid.top)  # (candidates, groups, rows)
    offsets = grid.scales.round_offset(middle + shrink * (low - middle))
    best = inner_loops.best_grids(w, importance, scales, offsets, grid)[None]
    scale, offset = scales.gather(0, best)[0], offsets.gather(0, best)[0]
    error = grid.weighted_error(w, importance, scale, offset)
    for _ in range(REFINEMENTS):
        codes = grid.quantize(w, scale[:, None], offset[:, None])
        s, o = least_squares(w, codes, weights, scale, offset, largest_offset)
        s, o = grid.scales.round(s), grid.scales.round_offset(o)
        found = grid.weighted_error(w, importance, s, o)
        better = found < error
        scale, offset, error = s.where(better, scale), o.where(better, offset), found.where(better, error)
    return scale, offset


def least_squares(
    w: Tensor, codes: Tensor, weights: Tensor, scale: Tensor, offset: Tensor, largest_offset: float | None
) -> tuple[Tensor, Tensor]:
    """The best scale and offset (groups, rows) for given codes; the old ones where all codes are equal.

    Args:
        w, codes: (groups, columns of a group, rows).
        weights: (groups, columns of a group, 1), of the squared error.
    """
    total = weights.sum(1)
    mean_code, mean_w = ((weights * x).sum(1) / total for x in (codes, w))  # (groups, rows)
    off = codes - mean_code[:, None]
    spread, along = (weights * off.square()).sum(1), (weights * off * w).sum(1)
    s = along / spread.where(spread > 0, 1)
    usable = (spread > 0) & (s > 0) & torch.isfinite(s) & torch.isfinite(mean_w)
    s = s.where(usable, scale)
    o = mean_w - s * mean_code
    if largest_offset is not None and bool((o > largest_offset).any()):  # on the bound, the scale alone is free
        power, product = (weights * codes.square()).sum(1), (weights * codes * (w - largest_offset)).sum(1)
        alone = (product / power.where(power > 0, 1)).where((power > 0) & (product > 0), scale)
        s, o = s.where(o <= largest_offset, alone), o.clamp(max=largest_offset)
    return s, o.where(usable, offset)
