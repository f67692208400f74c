"""`Codes`: a weight as integers with scales and zero points, and the computation of the weight from these."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.solver import grid


@dataclass(frozen=True)
class Codes:
    """A weight (rows, columns) as integers; the scales are in the dtype in which they are stored."""

    codes: Tensor  # (rows, columns) uint8
    scale: Tensor  # (rows, groups) float16, bfloat16 or float32
    zero: Tensor  # (rows, groups) uint8
    g_idx: Tensor  # (columns,) int32: the group of each column

    def weight(self) -> Tensor:
        """The dequantized weight, (rows, columns) float32: exactly what a reader of the file computes."""
        rows, columns = self.codes.shape
        g_idx, groups = self.g_idx.long(), self.scale.shape[1]
        if torch.compiler.is_compiling() or g_idx.is_meta:  # a compiler cannot branch on what g_idx holds
            scale, zero = self.scale.float()[:, g_idx], self.zero.float()[:, g_idx]
            return grid.dequantize(self.codes.float(), scale, zero)
        runs = torch.arange(groups, device=g_idx.device).repeat_interleave(columns // groups)
        is_contiguous = torch.equal(g_idx, runs)
        Q = torch.empty(rows, columns, device=g_idx.device)
        for chunk in row_chunks(rows):
            codes, scale, zero = self.codes[chunk].float(), self.scale[chunk].float(), self.zero[chunk].float()
            if is_contiguous:
                grouped = codes.view(len(codes), groups, columns // groups)
                Q[chunk] = grid.dequantize(grouped, scale[..., None], zero[..., None]).view(len(codes), columns)
            else:
                Q[chunk] = grid.dequantize(codes, scale[:, g_idx], zero[:, g_idx])
        return Q


def row_chunks(rows: int, size: int = 512) -> list[slice]:
    """Slices of at most `size` rows, for steps that would otherwise make several copies of a whole layer."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
