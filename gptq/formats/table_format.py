"""`TableFormat`, what formats of small floating-point numbers have in common: codes stand for the values of a table."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gptq.checkpoint.reader import Source
from gptq.errors import InputError
from gptq.formats.format import FileFormat
from gptq.formats.scheme import Scheme, contiguous_groups
from gptq.solver import Codes


class TableFormat(FileFormat):
    """A format with the codes in one tensor (outputs, ...), scales in another, and groups of adjacent inputs."""

    zero_key, g_idx_key = "", ""
    has_g_idx = False
    inputs_first = False
    needs_whole_words = False
    keeps_scale_dtype = True
    codes_per_byte = 1
    holds: str  # which schemes, for a message
    asks_for: str  # the options that give such a scheme

    def holds_scheme(self, scheme: Scheme, inputs: int) -> bool:
        raise NotImplementedError

    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        if transposed:
            return "readers expect nn.Linear, and this layer is a Conv1D"
        if not self.holds_scheme(scheme, inputs):
            return f"{self.name} holds {self.holds}, which {self.asks_for} gives"
        if scheme.scattered:
            return f"{self.name} has no g_idx, which act-order with dynamic groups needs"
        return None

    def to_codes(
        self, codes: Tensor, scale: Tensor, table: Tensor, scheme: Scheme, super_scale: Tensor | None = None
    ) -> Codes:
        """Codes of unpacked codes (outputs, inputs) and scales (outputs, groups)."""
        g_idx = contiguous_groups(scheme, codes.shape[1]).to(codes.device)
        zero = torch.zeros(scale.shape, dtype=torch.uint8, device=scale.device)
        return Codes(codes, scale, zero, g_idx, table=table.to(scale.device), super_scale=super_scale)

    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        return contiguous_groups(scheme, inputs).to(packed[self.scale_key].device)

    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        """Zeros: these grids have none."""
        return torch.zeros_like(packed[self.scale_key], dtype=torch.uint8)

    def stored_shape(self, source: Source, layer: str, scheme: Scheme) -> tuple[int, int]:
        name = f"{layer}.{self.codes_key}"
        shape = source.tensors[name].shape
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"{name} in {source.folder} has the shape {shape}; it is a matrix")
        return shape[0], shape[1] * self.codes_per_byte
