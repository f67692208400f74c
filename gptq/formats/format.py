"""`FileFormat`, the base class of the file formats: how layers are stored, and what a `quantization_config` says."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoint.assembled import TensorIndex
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.writer import file_bytes
from gptq.config import Format, QuantConfig
from gptq.formats.name_rules import Quantization
from gptq.formats.scheme import Layers, Linears, Scheme
from gptq.solver import Codes, Grid, IntegerGrid
from gptq.solver.grids.grid import Form
from gptq.solver.grids.scales import FloatScales

PLAIN_KEY = "weight"  # key of a weight that is not packed
SCALE_DTYPE = torch.float16  # dtype of scales that this package chooses; other tools' files may hold others


class FileFormat(ABC):
    """How layers are stored in a file, and what the `quantization_config` of the file says of the layers.

    A layer's tensors are called LAYER.KEY, with the keys below.
    """

    name: Format
    quant_method: str  # what `quantization_config` calls the family of formats, and the tag on a model card
    codes_key: str  # every packed layer has a tensor with this key; "weight", as in plain layers, in some formats
    scale_key: str
    zero_key: str  # "" if the format has no such tensor, as for g_idx_key
    g_idx_key: str
    other_keys: tuple[str, ...] = ()
    optional_keys: frozenset[str] = frozenset()  # of `layout`, that files of some tools lack
    is_source = True  # whether files can be quantized anew, or be an original to compare with
    ignores_windows_of: frozenset[str] = frozenset()  # model types whose sliding windows the engine does not know
    config_files: tuple[str, ...] = ()  # files beside config.json that hold the `quantization_config` too
    usage: tuple[str, ...]  # lines of Python that load a file, for the model card
    zero_offset: int = 0  # number that is subtracted from a zero point before it is stored
    has_g_idx: bool  # whether readers take groups that are not runs of columns
    inputs_first: bool  # words and scales are matrices of (inputs, outputs), not (outputs, inputs)
    transposed_words: bool = False  # the words are those of GPTQ's qweight, transposed
    needs_whole_words: bool  # some readers do not take a layer whose codes leave a part of a word empty
    keeps_scale_dtype: bool  # readers compute with the scales as they are stored, whatever their dtype
    widths: tuple[int, ...] = (2, 3, 4, 8)  # bits per weight that are tried to meet a target size
    is_assembled: bool = False  # `assemble` makes the file, under names that the checkpoint does not have
    joins_experts: bool = False  # writes experts by the rules of `joined_experts`
    stacks_experts: bool = False  # `assemble` stacks experts, in tensors that transformers cannot take apart
    embedding_types: tuple[str, ...] = ()  # block types to which embeddings and heads that are no layers are rounded
    activation_bits: int | None = None  # readers round each token's activations to integers of this width

    @property
    def keys(self) -> frozenset[str]:
        """The keys of all tensors that only a packed layer may have; the `weight` of a plain layer is not one."""
        keys = {self.codes_key, self.scale_key, self.zero_key, self.g_idx_key, *self.other_keys}
        return frozenset(keys - {"", PLAIN_KEY})

    @property
    def marker_key(self) -> str:
        """The key by which a packed layer is known."""
        return self.scale_key if self.codes_key == PLAIN_KEY else self.codes_key

    @abstractmethod
    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        """Return why readers of the format would not take a layer of this shape, or None.

        Args:
            transposed: the layer is transformers' Conv1D, not nn.Linear.
        """

    def layers_refusal(self, layers: Layers) -> str | None:
        """Return why the format cannot hold these layers in one file, or None; `refusal` is of single layers."""
        return None

    def adapt(self, scheme: Scheme) -> Scheme:
        """Return the scheme with the group size and the symmetry that the format has for its width."""
        return scheme

    def takes_grid(self, grid: Grid, scheme: Scheme) -> bool:
        """Whether codes that were chosen on `grid` can be written with this scheme."""
        own = self.grid(scheme)
        if own.form is Form.TABLE:
            return own == grid
        return (own.form, own.stored) == (grid.form, grid.stored)

    def choose_scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which to choose the scales of a layer whose weight has this dtype."""
        return SCALE_DTYPE

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        """What the weights of a layer are rounded to. By default integers with a scale and an integer zero point.

        Args:
            scale_dtype: in which scales are stored, so that they are chosen in it.
        """
        return IntegerGrid(scheme.bits, scheme.sym, FloatScales(scale_dtype))

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
        """Return the tensors of `layout` that hold a layer's integers.

        Args:
            allow_zero: write a zero point of 0 even if readers disagree about its stored value, so that a file that
                held one can be written again.
        Raises:
            ValueError: the format cannot hold these integers.
        """

    @abstractmethod
    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        """Return the integers that stored tensors stand for; the inverse of `encode`.

        Raises:
            ValueError: the shapes do not fit each other.
        """

    def decode_shaped(self, packed: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Codes:
        """Do as `decode` does for a layer whose shape (outputs, inputs) is known.

        No number is read out of a tensor, which torch.export could not follow and the meta device does not have.
        """
        return self.decode(packed, scheme)

    @abstractmethod
    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        """The group of each input, (inputs,) int32."""

    @abstractmethod
    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        """The zero points, (outputs, groups) uint8."""

    @abstractmethod
    def stored_shape(self, source: Source, layer: str, scheme: Scheme) -> tuple[int, int]:
        """Return (outputs, inputs) of a layer whose tensors are all in the file, from tensors that show these numbers.

        Raises:
            InputError: those tensors are malformed.
        """

    def find_wrong_value(self, packed: Mapping[str, Tensor]) -> tuple[str, str] | None:
        """Return the key of a stored tensor with values that stand for no weight, and what these are; or None."""
        return None

    def explain_shape(self, info: TensorInfo, scheme: Scheme, outputs: int, inputs: int) -> str:
        """Return what is known about a tensor of the wrong shape, to be appended to a message; "" if nothing."""
        return ""

    # --- the whole file ---

    def model_notes(self, hf_config: Any) -> list[str]:
        """Return notes for the user on what the format's engine does otherwise than config.json says."""
        if hf_config.model_type not in self.ignores_windows_of:
            return []  # other models may have a window for each layer, and no common one to ask for
        window = getattr(hf_config, "sliding_window", None)
        if not window:
            return []
        return [f"engines that read {self.name} let this model attend to everything, not to the last {window} tokens"]

    def model_refusal(self, folder: Path, tensors: Collection[str]) -> str | None:
        """Return why the model in a source folder, with these tensors, cannot be written in the format, or None."""
        return None

    def file_bytes(self, tensors: dict[str, TensorInfo], folder: Path) -> int:
        """Return the bytes of the files that hold these tensors, or an upper bound, for a model in `folder`."""
        return file_bytes(tensors)

    def assembles(self, tensors: Collection[str]) -> bool:
        """Whether `assemble` makes files of these tensors, which are on the disk beside them for a while."""
        return self.is_assembled

    def disk_bytes(self, tensors: dict[str, TensorInfo], folder: Path) -> int:
        """Return how many bytes of the disk writing takes at most, for a model in `folder`."""
        parts = sum(info.nbytes for info in tensors.values())
        return parts + self.file_bytes(tensors, folder) if self.assembles(tensors) else parts

    def assemble(self, folder: Path, out: Path) -> TensorIndex | None:
        """Write the files that the engine reads into the empty folder `out`; None: it reads the files in `folder`.

        Args:
            folder: a finished folder: the safetensors files that `layout` describes, config.json, the tokenizer. It
                stays as it is; then `out` takes the place of its safetensors files.
        Returns:
            where the files hold each tensor.
        Raises:
            InputError: the engine has no place for a tensor.
        """
        return None

    # --- quantization_config ---

    @abstractmethod
    def write_config(self, linears: Linears, config: QuantConfig | None) -> dict[str, Any]:
        """Return the `quantization_config` of a file.

        Args:
            config: the options that the layers were quantized with; None if another tool quantized them.
        """

    def complete_model_config(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json, which has its `quantization_config`, with what engines want to find there besides."""
        return dict(hf_config)

    def plain_model_config(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json without what `complete_model_config` has added."""
        return dict(hf_config)

    def rename_config(self, quantization: Mapping[str, Any]) -> dict[str, Any] | None:
        """The `quantization_config` of another tool's file of the same `quant_method`, changed to name this format.

        None if the formats of this `quant_method` differ in more than the name.
        """
        return None

    @abstractmethod
    def read_config(
        self, where: str | Path, quantization: Mapping[str, Any], family: "Sequence[FileFormat]"
    ) -> Quantization:
        """Return what a `quantization_config` of this `quant_method`, found in the file or folder `where`, says.

        Args:
            family: the formats of this `quant_method`, with this one.
        Raises:
            InputError: the `quantization_config` is of another format, lacks a value, or contradicts itself.
        """
