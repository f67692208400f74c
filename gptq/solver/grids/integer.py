"""Integers with a scale and an integer zero point per group: the grid of GPTQ files.

    code = clamp(round(w / scale) + zero, 0, 2^bits - 1)          w ~ scale * (code - zero)

Zero points lie in [1, 2^bits - 1]: GPTQ v1 files store zero - 1, and its readers disagree about what -1 means.

A symmetric grid has one more point on one side of zero than on the other. A negative scale turns it over, so that the
side with more points can be the one with the larger weights; readers multiply by the scale, whatever its sign.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.solver import inner_loops
from gptq.solver.grids.grid import Form, Grid, Groups
from gptq.solver.grids.scales import FloatScales

FLOAT16 = FloatScales(torch.float16)
SHRINK_FACTORS = torch.linspace(1, 0.3, 36, dtype=torch.float32).tolist()  # widths tried, relative to the min-max grid


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Codes of `bits` bits; `Codes` holds scale and zero, and nothing else is needed to pack them."""

    bits: int
    sym: bool  # the zero point is 2^(bits - 1) throughout
    scales: FloatScales = FLOAT16
    form = Form.INTEGER

    def fit_equal(self, w: Tensor, importance: Tensor | None) -> Groups:
        if importance is None:
            return Groups(*fit(w.mT, self.bits, self.sym, self.scales))
        scales, zeros = candidates(w.mT, self.bits, self.sym, self.scales)  # (candidates, groups, rows)
        best = inner_loops.best_grids(w, importance, scales, zeros, self)[None]
        return Groups(scales.gather(0, best)[0], zeros.gather(0, best)[0])

    def snap(self, scale: Tensor, shift: Tensor, groups: Groups, group: int) -> tuple[Tensor, Tensor]:
        return self.scales.nearest(scale), shift

    @property
    def tunes_scales(self) -> bool:
        return True

    def round_scales(self, scale: Tensor) -> Tensor:
        return self.scales.round(scale)

    def fits(self, scale: Tensor) -> Tensor:
        return scale.abs() <= self.scales.largest

    def quantize(self, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return quantize(w, scale, shift, self.bits)

    def steps(self, codes: Tensor, shift: Tensor) -> Tensor:
        return codes.to(shift.dtype) - shift


def fit(w: Tensor, bits: int, sym: bool, scales: FloatScales = FLOAT16) -> tuple[Tensor, Tensor]:
    """The smallest min-max grid over the columns of each row.

    Args:
        w: (..., columns) float weights of one group.
    Returns:
        scale and zero, both (...) in w's dtype; scale holds stored values, zero integers. All-zero rows get scale 1.
    Raises:
        ValueError: a scale does not fit its stored dtype.
    """
    maxq = 2**bits - 1
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if sym:
        scale = scales.round(2 * torch.maximum(-low, high) / maxq)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        # With the lowest zero point, 1, the largest code dequantizes to (maxq - 1) * scale, which must reach `high`.
        scale = scales.round(torch.maximum((high - low) / maxq, high / (maxq - 1)))
        zero = torch.round(-low / scale).clamp(1, maxq)
    return scale, zero


def candidates(w: Tensor, bits: int, sym: bool, scales: FloatScales = FLOAT16) -> tuple[Tensor, Tensor]:
    """Candidate grids for the columns of each row: the min-max grid and narrower ones, down to 0.3 of it.

    Symmetric grids are tried with both signs of the scale. Asymmetric grids shrink both ends by the same factor, with
    the zero point rounded down and rounded up.

    Args:
        w: (..., columns).
    Returns:
        scale and zero, both (candidates, ...); scale holds stored values.
    Raises:
        ValueError: a scale does not fit its stored dtype.
    """
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)  # (...)
    shrink = torch.tensor(SHRINK_FACTORS, dtype=w.dtype, device=w.device).view(-1, *[1] * low.ndim)  # (shrinks, ...)
    if sym:
        below = 2 ** (bits - 1)  # grid points on the longer side; the other side has one less
        upright = torch.maximum(-low / below, high / (below - 1))
        turned = torch.maximum(high / below, -low / (below - 1))
        scale = scales.round(torch.cat([shrink * upright, -shrink * turned]))
        return scale, torch.full_like(scale, below)
    widest, _ = fit(w, bits, False, scales)
    scale = scales.round(shrink * widest)
    zero = -low * shrink / scale  # (shrinks, ...)
    both = torch.cat([zero.floor(), zero.ceil()]).clamp(1, 2**bits - 1)
    return torch.cat([scale, scale]), both


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of w, as floats; w, scale and zero broadcast. Ties round to even."""
    return (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights of codes. In float32 the product is exact: 11 significant bits times at most 9."""
    return scale * (codes - zero)
