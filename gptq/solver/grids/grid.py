"""`Grid`: the points that a weight can be rounded to, which a file format decides; and `Groups`, fitted grids.

A grid has one of three forms. With the scale s of a group, and the code c of a weight:

    INTEGER   w = s (c - zero)    zero is an integer
    AFFINE    w = s c + offset    offset is a real number
    TABLE     w = s table[c]

The inner loops (`gptq.solver.inner_loops`) know the forms; which scales and offsets there are is the grid's own matter.
Numbers of groups are (groups, rows) in the solver, where a column of the weight is a contiguous line.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor


class Form(IntEnum):
    """How a code stands for a weight."""

    INTEGER = 1
    AFFINE = 2
    TABLE = 3


@dataclass(frozen=True)
class Groups:
    """The fitted grids of groups; all values are as a file can hold them, in the dtype of the solve."""

    scale: Tensor  # (groups, rows)
    shift: Tensor  # (groups, rows): zero points, offsets, or zeros that mean nothing, by the grid's form
    super_scale: Tensor | None = None  # (super-blocks, rows), see `two_level`
    super_offset: Tensor | None = None  # (super-blocks, rows)


class Grid(ABC):
    """The points that a weight of a layer can be rounded to."""

    form: Form
    bits: int  # of a code
    independent: ClassVar[bool] = True  # whether a group can be fitted without the other groups of its row

    @property
    def top(self) -> int:
        """The largest code; of a table, its number of values less 1."""
        return int(2**self.bits - 1)

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the fields of `Codes` that layers on this grid have, besides those that all have."""
        return {Form.INTEGER: (), Form.AFFINE: ("offset",), Form.TABLE: ("table",)}[self.form]

    @property
    def joins_rows(self) -> bool:
        """Whether rows share scales, so that the rows of a layer cannot be mixed with others."""
        return False

    def for_layers(self, weights: Iterable[Tensor]) -> "Grid":
        """Return the grid for layers that engines fuse into one, with what these must have in common fixed.

        Args:
            weights: (outputs, inputs) each; read only if they matter.
        """
        return self

    # --- groups ---

    @abstractmethod
    def fit_equal(self, w: Tensor, importance: Tensor | None) -> Groups:
        """Fit groups of equal size.

        Args:
            w: (groups, columns of a group, rows).
            importance: (groups, columns of a group), weights of the squared error that is to be small; None takes
                grids that clip nothing, or weighs all columns alike.
        Raises:
            ValueError: a scale does not fit its stored dtype.
        """

    def snap(self, scale: Tensor, shift: Tensor, groups: Groups, group: int) -> tuple[Tensor, Tensor]:
        """Round the scale and the shift (rows,) of one group to values that a file can hold beside all others.

        The values have to be within what the file can hold, which `fits` tells; here nothing is checked.
        """
        raise NotImplementedError

    @abstractmethod
    def fits(self, scale: Tensor) -> Tensor:
        """Whether scales are within what a file can hold."""

    @property
    def tunes_scales(self) -> bool:
        """Whether the scale of a group may change by a little, alone; then `round_scales` gives the stored one."""
        return False

    def round_scales(self, scale: Tensor) -> Tensor:
        """Round scales to stored ones; raises ValueError if one does not fit."""
        raise NotImplementedError

    @property
    def tunes_offsets(self) -> bool:
        """Whether the offset of a group may change by a little, alone; then `round_offsets` gives the stored one."""
        return False

    def round_offsets(self, offset: Tensor) -> Tensor:
        """Round offsets to stored ones."""
        raise NotImplementedError

    # --- codes ---

    @abstractmethod
    def quantize(self, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Codes of the nearest points, as floats; w, scale and shift broadcast."""

    @abstractmethod
    def steps(self, codes: Tensor, shift: Tensor) -> Tensor:
        """What the scale is multiplied by, in the dtype of shift: code - zero, code, or table[code]."""

    def dequantize(self, codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Weights of codes."""
        scaled = scale * self.steps(codes, shift)
        return scaled + shift if self.form is Form.AFFINE else scaled

    def weighted_error(self, w: Tensor, importance: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The weighted squared error of each group of each row, (groups, rows); arguments as in `fit_equal`."""
        s, o = scale[:, None], shift[:, None]
        Q = self.dequantize(self.quantize(w, s, o), s, o)
        return torch.einsum("gcr,gc->gr", (w - Q).square_(), importance)

    def levels(self, like: Tensor) -> Tensor:
        """Of a table: (3, values) ascending values, thresholds and codes, in the dtype and on the device of `like`.

        The threshold of a value is the largest number that is rounded to the value before it.
        """
        return like.new_zeros(3, 1)

    # --- codes ranked by value: what tuning moves through ---

    def ranks(self, codes: Tensor) -> Tensor:
        """The place of each code among the grid's values, in ascending order; float32."""
        return codes.float()

    def codes_of(self, ranks: Tensor) -> Tensor:
        """The inverse of `ranks`: uint8."""
        return ranks.to(torch.uint8)


def fit(grid: Grid, Wt: Tensor, group_size: int, importance: Tensor | None) -> Groups:
    """Fit the grids of all groups of Wt, contiguous (columns, rows). The last group may be short.

    Args:
        importance: (columns,), see `Grid.fit_equal`.
    """
    columns, rows = Wt.shape
    whole = columns // group_size * group_size
    found = []
    for start, stop, size in ((0, whole, group_size), (whole, columns, columns - whole)):
        if stop > start:
            w = Wt[start:stop].view(-1, size, rows)  # (groups, columns of a group, rows)
            found.append(grid.fit_equal(w, None if importance is None else importance[start:stop].view(-1, size)))
    if len(found) == 1:
        return found[0]
    first, last = found
    joined = torch.cat([first.scale, last.scale]), torch.cat([first.shift, last.shift])
    return Groups(*joined, first.super_scale, first.super_offset)
