"""`Codes`: a weight as codes with scales, and the computation of the weight from these."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from gptq.compute.device_profile import profile_of


@dataclass(frozen=True)
class Codes:
    """A weight (rows, columns) as codes; the scales are in the dtype in which they are stored.

    w = scale * (code - zero) + offset, or scale * table[code] if there is a table. What a grid has no use for is None;
    zero points are 0 where a grid has none. `gptq.solver.grids` says which grid holds what.
    """

    codes: Tensor  # (rows, columns) uint8
    scale: Tensor  # (rows, groups) float16, bfloat16 or float32
    zero: Tensor  # (rows, groups) uint8
    g_idx: Tensor  # (columns,) int32: the group of each column
    offset: Tensor | None = field(default=None, kw_only=True)  # (rows, groups) float
    table: Tensor | None = field(default=None, kw_only=True)  # (values,) float32
    super_scale: Tensor | None = field(default=None, kw_only=True)  # (rows, super-blocks) float32
    super_offset: Tensor | None = field(default=None, kw_only=True)  # (rows, super-blocks) float32

    def weight(self) -> Tensor:
        """The dequantized weight, (rows, columns) float32: exactly what a reader of the file computes."""
        if torch.compiler.is_compiling() or self.g_idx.is_meta:  # a compiler cannot branch on what g_idx holds
            g_idx = self.g_idx.long()
            return self._dequantize(slice(None), self.codes, lambda x: x[:, g_idx])
        Q = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        for chunk in row_chunks(len(Q), profile_of(Q.device).copied_rows):
            found = self._dequantize(chunk, self.by_group(self.codes[chunk]), self.spread)
            Q[chunk] = found.flatten(1)
        return Q

    def _dequantize(self, rows: slice, codes: Tensor, spread: Callable[[Tensor], Tensor]) -> Tensor:
        """Weights of the codes of some rows; `spread` brings (rows, groups) to a shape that broadcasts with codes."""
        scale = spread(self.scale[rows].float())
        if self.table is not None:
            return scale * self.table[codes.long()]
        scaled = scale * (codes.float() - spread(self.zero[rows].float()))
        return scaled if self.offset is None else scaled + spread(self.offset[rows].float())

    @cached_property
    def group_columns(self) -> int | None:
        """The number of columns of each group, if groups are runs of as many columns; otherwise None."""
        columns, groups = self.codes.shape[1], self.scale.shape[1]
        if columns % groups:
            return None
        runs = torch.arange(groups, device=self.g_idx.device).repeat_interleave(columns // groups)
        return columns // groups if torch.equal(self.g_idx.long(), runs) else None

    def by_group(self, x: Tensor) -> Tensor:
        """Return x (rows, columns) as (rows, groups, columns of a group) if groups are alike; otherwise as it is."""
        return x if self.group_columns is None else x.unflatten(1, (-1, self.group_columns))

    def spread(self, values: Tensor) -> Tensor:
        """Return values (rows, groups) in a shape that broadcasts with the result of `by_group`."""
        return values[:, self.g_idx.long()] if self.group_columns is None else values[..., None]

    def group_sums(self, x: Tensor) -> Tensor:
        """Return the sums (rows, groups) over the columns of each group of x, a result of `by_group`."""
        if self.group_columns is not None:
            return x.sum(-1)
        return x.new_zeros(len(x), self.scale.shape[1]).index_add_(1, self.g_idx.long(), x)


def row_chunks(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows, for steps that would otherwise make several copies of a whole layer."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
