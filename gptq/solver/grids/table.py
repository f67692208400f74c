"""A table of values times a scale per group: w = scale * table[code].

The tables are ggml's IQ4_NL, and the float formats e2m1 (FP4) and e4m3 (FP8); the code of a float is its bit pattern.
Packing: `Codes.codes` are the indices into the table, `Codes.scale` the scales. With `Float8Scales`, the file holds
`Codes.super_scale`, the divisor of the layer, and `Float8Scales(divisor).stored(scale)`; with `PowersOfTwo`, the byte
127 + log2(scale). IQ4_NL has float16 scales per 32 inputs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from gptq.solver import inner_loops
from gptq.solver.grids.grid import Form, Grid, Groups
from gptq.solver.grids.integer import FLOAT16
from gptq.solver.grids.scales import FLOAT8_RANGE, Float8Scales, FloatScales, Scales

IQ4_NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
E4M3 = tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())  # 127 and 255 are NaN
# Scales that the search tries, relative to the scale that puts the largest weight on the table's largest value.
FINE = tuple(torch.linspace(1.2, 0.4, 33, dtype=torch.float32).tolist())
NEAR = (2.0, 1.5, 1.0, 0.75, 0.5)  # for powers of two
# Floats are as dense everywhere: further scales repeat these.
OCTAVE = tuple(torch.linspace(1, 2, 9, dtype=torch.float32).tolist())[:-1]


@dataclass(frozen=True)
class TableGrid(Grid):
    """The values of a table times a scale."""

    bits: int
    table: tuple[float, ...]  # 2^bits values by code; NaN where a code has no value
    scales: Scales = FLOAT16
    tried: tuple[float, ...] = FINE
    block_rows: int = 1  # adjacent rows that share a scale
    form = Form.TABLE

    @property
    def top(self) -> int:
        return len(_ascending(self.table)) - 1

    @property
    def joins_rows(self) -> bool:
        return self.block_rows > 1

    @property
    def stored(self) -> tuple[str, ...]:
        return ("table", "super_scale") if isinstance(self.scales, Float8Scales) else ("table",)

    def for_layers(self, weights: Iterable[Tensor]) -> Grid:
        """Fix the divisor of float8 scales, so that the largest weight of all gets the largest value and scale."""
        if not isinstance(self.scales, Float8Scales):
            return self
        largest = torch.stack([W.abs().max() for W in weights]).max().float()
        reach = torch.tensor(FLOAT8_RANGE[1] * self._ends[0][1], dtype=torch.float32, device=largest.device)
        divisor = float(reach / largest) if bool(largest > 0) else 1.0
        return replace(self, scales=Float8Scales(divisor))

    # --- groups ---

    def fit_equal(self, w: Tensor, importance: Tensor | None) -> Groups:
        low, high = (-w.amin(1)).clamp(min=0), w.amax(1).clamp(min=0)  # (groups, rows)
        if 0.0 not in self.table:  # a group of zeros gets the smallest scale
            high = high.clamp(min=torch.finfo(w.dtype).tiny)
        upright, turned = (self._blocks(torch.maximum(low / -down, high / up)) for down, up in self._ends)
        if importance is None:
            bottom, top = self._ends[0]
            return self._groups(self.scales.plain(self._blocks(torch.maximum(low * (top / -bottom), high)), top))
        signs = [upright, -turned] if self.scales.signed and not self._is_symmetric else [upright]
        factors = torch.tensor(self.tried, dtype=w.dtype, device=w.device).view(-1, 1, 1)
        scales = self.scales.round(torch.cat([(factors * one).clamp(max=self.scales.largest) for one in signs]))
        if self.block_rows == 1:
            best = inner_loops.best_grids(w, importance, scales, torch.zeros_like(scales), self)
        else:
            best = self._best_of_blocks(w, importance, scales)
        return self._groups(scales.gather(0, best[None])[0])

    @property
    def _ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The table's smallest and largest value, and those of the table turned over."""
        low, high = _ascending(self.table)[0][0], _ascending(self.table)[-1][0]
        return (low, high), (-high, -low)

    @property
    def _is_symmetric(self) -> bool:
        (low, high), _ = self._ends
        return low == -high

    def _groups(self, scale: Tensor) -> Groups:
        divisor = self.scales.divisor if isinstance(self.scales, Float8Scales) else None
        shared = None if divisor is None else scale.new_full((1, scale.shape[1]), divisor)
        return Groups(scale, torch.zeros_like(scale), shared)

    def _blocks(self, x: Tensor) -> Tensor:
        """The largest number of each block of rows, in all its rows; x is (groups, rows)."""
        if self.block_rows == 1:
            return x
        parts = x.split(self.block_rows, dim=1)
        return torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in parts], dim=1)

    def _best_of_blocks(self, w: Tensor, importance: Tensor, scales: Tensor) -> Tensor:
        """The candidate, of scales (candidates, groups, rows), with the least error of each block of rows."""
        errors = torch.stack([self.weighted_error(w, importance, scale, torch.zeros_like(scale)) for scale in scales])
        parts = errors.split(self.block_rows, dim=2)  # (candidates, groups, rows of a block) each
        return torch.cat([part.sum(2, keepdim=True).argmin(0).expand(part.shape[1:]) for part in parts], dim=1)

    def snap(self, scale: Tensor, shift: Tensor, groups: Groups, group: int) -> tuple[Tensor, Tensor]:
        """Scales that rows share stay as they are."""
        return (groups.scale[group] if self.block_rows > 1 else self.scales.nearest(scale)), shift

    @property
    def tunes_scales(self) -> bool:
        return isinstance(self.scales, FloatScales) and self.block_rows == 1

    def round_scales(self, scale: Tensor) -> Tensor:
        return self.scales.round(scale)

    def fits(self, scale: Tensor) -> Tensor:
        return scale.abs() <= self.scales.largest

    # --- codes ---

    def quantize(self, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        _, thresholds, codes = self.levels(w)
        nearest: Tensor = codes[torch.bucketize(w / scale, thresholds[1:].contiguous())]
        return nearest

    def steps(self, codes: Tensor, shift: Tensor) -> Tensor:
        return torch.tensor(self.table, dtype=shift.dtype, device=shift.device)[codes.long()]

    def levels(self, like: Tensor) -> Tensor:
        return _levels(self.table, like.dtype).to(like.device)

    def ranks(self, codes: Tensor) -> Tensor:
        place = torch.zeros(len(self.table), dtype=torch.float32, device=codes.device)
        order = self.levels(place)[2].long()
        place[order] = torch.arange(len(order), dtype=torch.float32, device=codes.device)
        return place[codes.long()]

    def codes_of(self, ranks: Tensor) -> Tensor:
        return self.levels(ranks.float())[2].to(torch.uint8)[ranks.long()]


@cache
def _ascending(table: tuple[float, ...]) -> list[tuple[float, int]]:
    """Values and their codes, ascending; of equal values the first code (that of 0, not that of -0)."""
    codes: dict[float, int] = {}
    for code, value in enumerate(table):
        if not math.isnan(value):
            codes.setdefault(value, code)
    return sorted(codes.items())


@cache
def _levels(table: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """`Grid.levels`. A number in the middle of two values is rounded to the one with the even code."""
    values, codes = zip(*_ascending(table), strict=True)
    value, code = torch.tensor(values, dtype=dtype), torch.tensor(codes, dtype=dtype)
    middle = (value[1:] + value[:-1]) / 2
    below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    middle = torch.where(code[1:] % 2 == 0, below, middle)
    return torch.stack([value, torch.cat([value.new_full((1,), -torch.inf), middle]), code])
