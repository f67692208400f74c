"""What a file format has to answer; each format is one object of one file, and stands in the table of `formats`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format, QuantConfig
from gptq.formats.name_rules import Quantization
from gptq.formats.scheme import Linears, Scheme
from gptq.solver import Codes

SCALE_DTYPE = torch.float16  # of the scales that are chosen here; other tools' files may hold others


class FileFormat(ABC):
    """How layers lie in a file, and what the file's `quantization_config` says of them.

    A layer's tensors are called LAYER.KEY, with the keys below.
    """

    name: Format
    quant_method: str  # what `quantization_config` calls the family of formats, and the tag on a model card
    codes_key: str  # every packed layer has it
    scale_key: str
    zero_key: str
    g_idx_key: str
    other_keys: tuple[str, ...] = ()
    config_files: tuple[str, ...] = ()  # files beside config.json that hold the `quantization_config` too
    usage: tuple[str, ...]  # lines of Python that load a file, for the model card
    zero_offset: int = 0  # what is taken off a zero point before it is stored
    has_g_idx: bool  # whether readers take groups that are not runs of columns
    inputs_first: bool  # words and scales are matrices of (inputs, outputs), not (outputs, inputs)
    needs_whole_words: bool  # some readers do not take a layer whose codes leave a part of a word empty
    keeps_scale_dtype: bool  # readers compute with the scales as they are stored, whatever their dtype

    @property
    def keys(self) -> frozenset[str]:
        """The keys of all tensors that a layer may have."""
        return frozenset({self.codes_key, self.scale_key, self.zero_key, self.g_idx_key, *self.other_keys})

    @abstractmethod
    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        """Why readers of the format would not take a layer of this shape, or None.

        Args:
            transposed: the layer is transformers' Conv1D, not nn.Linear.
        """

    # --- a layer's tensors ---

    @abstractmethod
    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        """Dtype and shape of the tensors of a layer, by key."""

    @abstractmethod
    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of `layout` that hold a layer's integers.

        Args:
            allow_zero: write a zero point of 0 even where readers disagree about what is stored for it, to write again
                what a file held before.
        Raises:
            ValueError: the format cannot hold these integers.
        """

    @abstractmethod
    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        """The integers that stored tensors stand for; the inverse of `encode`.

        Raises:
            ValueError: the shapes do not fit each other.
        """

    @abstractmethod
    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        """The group of each input, (inputs,) int32."""

    @abstractmethod
    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        """The zero points, (outputs, groups) uint8."""

    @abstractmethod
    def stored_shape(self, source: Source, layer: str) -> tuple[int, int]:
        """(outputs, inputs) of a layer whose tensors are all in the file, from those that give them plainly.

        Raises:
            InputError: they do not.
        """

    def explain_shape(self, info: TensorInfo, scheme: Scheme, outputs: int, inputs: int) -> str:
        """What is known about a tensor of the wrong shape, to be appended to a message; "" if nothing is."""
        return ""

    # --- quantization_config ---

    @abstractmethod
    def write_config(self, linears: Linears, config: QuantConfig | None) -> dict[str, Any]:
        """The `quantization_config` of a file.

        Args:
            config: the options it was quantized with; None for what another tool quantized.
        """

    def rename_config(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """The `quantization_config` of another tool's file of the same `quant_method`, made to say this format."""
        return dict(quantization)

    @abstractmethod
    def read_config(self, where: str | Path, quantization: Mapping[str, Any]) -> Quantization:
        """What a `quantization_config` of this `quant_method`, found in the file or folder `where`, says.

        Raises:
            InputError: it is of another format, or lacks a value, or contradicts itself.
        """
