"""`Codes`: a weight as codes with scales, and the computation of the weight from these."""

from collections.abc import Callable
from dataclasses import dataclass, field

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
        rows, columns = self.codes.shape
        g_idx, groups = self.g_idx.long(), self.scale.shape[1]
        if torch.compiler.is_compiling() or g_idx.is_meta:  # a compiler cannot branch on what g_idx holds
            return self._dequantize(slice(None), self.codes, lambda x: x[:, g_idx])
        runs = torch.arange(groups, device=g_idx.device).repeat_interleave(columns // groups)
        is_contiguous = torch.equal(g_idx, runs)
        Q = torch.empty(rows, columns, dtype=torch.float32, device=g_idx.device)
        for chunk in row_chunks(rows, profile_of(Q.device).copied_rows):
            codes = self.codes[chunk]
            if is_contiguous:
                grouped = codes.reshape(len(codes), groups, columns // groups)
                Q[chunk] = self._dequantize(chunk, grouped, lambda x: x[..., None]).view(len(codes), columns)
            else:
                Q[chunk] = self._dequantize(chunk, codes, lambda x: x[:, g_idx])
        return Q

    def _dequantize(self, rows: slice, codes: Tensor, spread: Callable[[Tensor], Tensor]) -> Tensor:
        """Weights of the codes of some rows; `spread` brings (rows, groups) to a shape that broadcasts with codes."""
        scale = spread(self.scale[rows].float())
        if self.table is not None:
            return scale * self.table[codes.long()]
        scaled = scale * (codes.float() - spread(self.zero[rows].float()))
        return scaled if self.offset is None else scaled + spread(self.offset[rows].float())


def row_chunks(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows, for steps that would otherwise make several copies of a whole layer."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
