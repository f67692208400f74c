"""The grids of ggml's K-quants: scales are small integers times a float16 that SUPER inputs share.

A super-block of 256 inputs has groups of 16 or 32; with d and dmin float16 of the super-block, sc and m integers of the
group, and c the code of a weight,

    Q4_K, Q5_K, Q2_K    w = (d sc) c - (dmin m)       sc and m of 6, 6 and 4 bits, at least 0
    Q6_K, Q3_K          w = (d sc) (c - 2^(bits - 1))       sc signed, of 8 and 6 bits

d sc and dmin m are exact in float32, so that the solver sees a scale and an offset per group like any other; the last
difference is rounded once, as in readers. sc is never 0 here: a scale of 0 has only one of the points of a scale of d.

Packing: `Codes.codes` are c, `Codes.super_scale` is d (rows, super-blocks) and `Codes.super_offset` dmin; `sub_scales`
gives sc and m.

A super-block is fitted by weighted least squares in turns: sc and m of every group to the best of their neighbours, for
the codes that follow from them; then d and dmin for these codes. No turn raises the error.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from gptq.solver import inner_loops
from gptq.solver.grids import affine, integer
from gptq.solver.grids.grid import Form, Grid, Groups
from gptq.solver.grids.integer import FLOAT16
from gptq.solver.grids.scales import FloatScales

SUPER = 256  # inputs of a super-block
ROUNDS = 4  # turns of the fit
FLOAT32 = FloatScales(torch.float32)


@dataclass(frozen=True)
class TwoLevelGrid(Grid):
    """A grid of K-quants; see the module."""

    bits: int
    columns: int  # of a group, 16 or 32
    scale_bits: int  # of sc and m
    sym: bool
    independent = False

    @property
    def form(self) -> Form:  # type: ignore[override]
        return Form.INTEGER if self.sym else Form.AFFINE

    @property
    def stored(self) -> tuple[str, ...]:
        return ("super_scale",) if self.sym else ("offset", "super_scale", "super_offset")

    @property
    def _range(self) -> tuple[int, int]:
        """The smallest and the largest sc."""
        half = 2 ** (self.scale_bits - 1)
        return (-half, half - 1) if self.sym else (1, 2**self.scale_bits - 1)

    # --- groups ---

    def fit_equal(self, w: Tensor, importance: Tensor | None) -> Groups:
        groups, columns, _ = w.shape
        if columns != self.columns or groups * columns % SUPER:
            raise ValueError(f"{groups} groups of {columns} inputs are no super-blocks of {SUPER} in {self.columns}s")
        weights = w.new_ones(groups, columns) if importance is None else importance
        return self._fit_symmetric(w, weights) if self.sym else self._fit_affine(w, weights)

    def _fit_affine(self, w: Tensor, importance: Tensor) -> Groups:
        s, o = affine.search(affine.AffineGrid(self.bits, FLOAT32), w, importance, largest_offset=0.0)
        _, largest = self._range
        d = FLOAT16.round(self._of_supers(s).amax(1) / largest)  # (super-blocks, rows)
        dmin = FLOAT16.round(self._of_supers(-o).amax(1) / largest)
        sc, m = self._nearest(s, d), self._nearest_offset(o, dmin)
        for turn in range(ROUNDS):
            scales = torch.stack([(sc + i).clamp(*self._range) for i, _ in product((0, -1, 1), repeat=2)])
            mins = torch.stack([(m + j).clamp(0, largest) for _, j in product((0, -1, 1), repeat=2)])
            dd, dm = self._of_groups(d), self._of_groups(dmin)
            best = inner_loops.best_grids(w, importance, dd * scales, -(dm * mins), self)[None]
            sc, m = scales.gather(0, best)[0], mins.gather(0, best)[0]
            if turn < ROUNDS - 1:
                d, dmin = self._refit_affine(w, importance, sc, m, d, dmin)
        return Groups(self._of_groups(d) * sc, -(self._of_groups(dmin) * m), d, dmin)

    def _refit_affine(
        self, w: Tensor, importance: Tensor, sc: Tensor, m: Tensor, d: Tensor, dmin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best d and dmin (super-blocks, rows) for the codes of these; the old ones where they are no better."""
        scale, offset = self._of_groups(d) * sc, -(self._of_groups(dmin) * m)
        codes = self.quantize(w, scale[:, None], offset[:, None])
        h = importance[:, :, None]
        a, b = sc * (h * codes * codes).sum(1) * sc, -sc * m * (h * codes).sum(1)  # (groups, rows)
        c, p, q = m * m * h.sum(1), sc * (h * codes * w).sum(1), -m * (h * w).sum(1)
        a, b, c, p, q = (self._of_supers(x).sum(1) for x in (a, b, c, p, q))
        determinant = a * c - b * b
        usable = determinant > 1e-6 * a * c
        whole = determinant.where(usable, 1)
        new_d = ((c * p - b * q) / whole).where(usable, (p - b * dmin) / a.where(a > 0, 1))
        new_dmin = ((a * q - b * p) / whole).where(usable, dmin)
        fine = (new_d > 0) & (new_dmin >= 0) & (a > 0) & (torch.maximum(new_d, new_dmin) < FLOAT16.largest)
        new_d, new_dmin = (FLOAT16.round(x.where(fine, old)) for x, old in ((new_d, d), (new_dmin, dmin)))
        before = self.weighted_error(w, importance, scale, offset)
        after = self.weighted_error(w, importance, self._of_groups(new_d) * sc, -(self._of_groups(new_dmin) * m))
        better = self._of_supers(after).sum(1) < self._of_supers(before).sum(1)
        return new_d.where(better, d), new_dmin.where(better, dmin)

    def _fit_symmetric(self, w: Tensor, importance: Tensor) -> Groups:
        scales, zeros = integer.candidates(w.mT, self.bits, True, FLOAT32)
        best = inner_loops.best_grids(w, importance, scales, zeros, self)[None]
        s, zero = self._of_supers(scales.gather(0, best)[0]), zeros[0]
        leading = s.gather(1, s.abs().argmax(1, keepdim=True))[:, 0]  # (super-blocks, rows) the largest, with its sign
        d = FLOAT16.round(leading / self._range[0])
        sc = self._nearest(s.flatten(0, 1), d)
        for turn in range(ROUNDS):
            near = torch.stack([self._no_zero(sc + i, sc) for i in (0, -1, 1)])
            near = torch.cat([near, (-near).clamp(*self._range)])
            best = inner_loops.best_grids(w, importance, self._of_groups(d) * near, zero.expand_as(near), self)[None]
            sc = near.gather(0, best)[0]
            if turn < ROUNDS - 1:
                d = self._refit_symmetric(w, importance, sc, zero, d)
        return Groups(self._of_groups(d) * sc, zero, d)

    def _refit_symmetric(self, w: Tensor, importance: Tensor, sc: Tensor, zero: Tensor, d: Tensor) -> Tensor:
        """The best d (super-blocks, rows) for the codes of this one; the old one where it is no better."""
        scale = self._of_groups(d) * sc
        u = self.steps(self.quantize(w, scale[:, None], zero[:, None]), zero[:, None])
        h = importance[:, :, None]
        power = self._of_supers(sc * sc * (h * u * u).sum(1)).sum(1)
        along = self._of_supers(sc * (h * u * w).sum(1)).sum(1)
        best = along / power.where(power > 0, 1)
        new = FLOAT16.round(best.where((best * d > 0) & (best.abs() < FLOAT16.largest), d))
        before = self.weighted_error(w, importance, scale, zero)
        after = self.weighted_error(w, importance, self._of_groups(new) * sc, zero)
        return new.where(self._of_supers(after).sum(1) < self._of_supers(before).sum(1), d)

    def snap(self, scale: Tensor, shift: Tensor, groups: Groups, group: int) -> tuple[Tensor, Tensor]:
        """d and dmin stay as they are; sc and m move to the nearest integers."""
        block = group * self.columns // SUPER
        if groups.super_scale is None:
            raise ValueError("these groups have no super-blocks")
        d = groups.super_scale[block]
        snapped = d * self._no_zero(torch.round(scale / d).clamp(*self._range), scale / d)
        if groups.super_offset is None:
            return snapped, shift
        dmin = groups.super_offset[block]
        return snapped, -(dmin * torch.round(-shift / dmin).clamp(0, self._range[1]))

    def fits(self, scale: Tensor) -> Tensor:
        return torch.isfinite(scale)

    def _nearest(self, s: Tensor, d: Tensor) -> Tensor:
        exact = s / self._of_groups(d)
        return self._no_zero(torch.round(exact).clamp(*self._range), exact)

    def _nearest_offset(self, o: Tensor, dmin: Tensor) -> Tensor:
        return torch.round(-o / self._of_groups(dmin)).clamp(0, self._range[1])

    def _no_zero(self, sc: Tensor, near: Tensor) -> Tensor:
        """sc within its range, with 1 or -1 instead of 0, whichever side of zero `near` is on."""
        sc = sc.clamp(*self._range)
        one = torch.ones_like(sc)
        return torch.where(sc == 0, torch.where(near < 0, -one, one) if self.sym else one, sc)

    def _of_supers(self, x: Tensor) -> Tensor:
        """(groups, rows) -> (super-blocks, groups of one, rows)."""
        return x.view(-1, SUPER // self.columns, x.shape[1])

    def _of_groups(self, x: Tensor) -> Tensor:
        """(super-blocks, rows) -> (groups, rows), each repeated for the groups of its super-block."""
        return x.repeat_interleave(SUPER // self.columns, dim=0)

    # --- codes ---

    def quantize(self, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if self.sym:
            return integer.quantize(w, scale, shift, self.bits)
        return torch.round((w - shift) / scale).clamp(0, self.top)

    def steps(self, codes: Tensor, shift: Tensor) -> Tensor:
        return codes.to(shift.dtype) - shift if self.sym else codes.to(shift.dtype)


K_QUANTS = {  # by bits
    2: TwoLevelGrid(2, 16, 4, sym=False),
    3: TwoLevelGrid(3, 16, 6, sym=True),
    4: TwoLevelGrid(4, 32, 6, sym=False),
    5: TwoLevelGrid(5, 32, 6, sym=False),
    6: TwoLevelGrid(6, 16, 8, sym=True),
}


def sub_scales(scale: Tensor, super_scale: Tensor) -> Tensor:
    """The integers (rows, groups) int8 that scales are multiples of: sc = scale / d, or m = -offset / dmin.

    Args:
        scale: (rows, groups).
        super_scale: (rows, super-blocks).
    """
    each = super_scale.repeat_interleave(scale.shape[1] // super_scale.shape[1], dim=1)
    return torch.round(scale.double() / each.double()).to(torch.int8)
