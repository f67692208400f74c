"""Map a model's tensor names to the checkpoint's, and check that the checkpoint has every tensor."""

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from gptq.checkpoint.tensors import TensorInfo
from gptq.errors import InputError
from gptq.models.computed_tensors import compute_tensors
from gptq.models.experts import FUSED_PARTS


@dataclass(frozen=True)
class Division:
    """A stored tensor that transformers divides into several of the model (see `models.divided_tensors`)."""

    stored: str  # name in the checkpoint
    first: str  # name in the model of the first piece
    pattern: str  # of the converter, that matches the stored name
    converter: Any  # transformers' WeightConverter


@dataclass(frozen=True)
class SplitTensor:
    """A tensor of the model that the checkpoint stores in parts, one per expert, say; transformers joins the parts."""

    name: str  # in the model
    parts: tuple[tuple[str, str], ...]  # for each part: (converter pattern that matches, name in the checkpoint)
    converter: Any  # transformers' WeightConverter
    config: PreTrainedConfig  # the model's configuration

    def assemble(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the whole tensor; `read` returns a part by its name in the checkpoint."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            converter.add_tensor(self.name, stored, pattern, partial(read, stored))
        (made,) = converter.convert(self.name, config=self.config).values()
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole


class Names:
    """Translates the names of a model's tensors to the names that a checkpoint uses.

    - A checkpoint saved from a base model lacks the prefix of the model with a head (`h.0.` for `transformer.h.0.`);
      other checkpoints have a prefix that the model lacks.
    - Of tied tensors, the checkpoint may store only one.
    - transformers' conversion table knows of other names, such as `block_sparse_moe` for `mlp`, or w1, w2 and w3 of an
      expert. Separate experts are named as in `models.experts`.
    - A tensor that this table assembles from several stored tensors has no single name: see `find_split`.
    - `computed` holds, by name in the model, the tensors that no checkpoint stores (see `models.computed_tensors`).
    """

    def __init__(self, model: PreTrainedModel, stored: Collection[str]) -> None:
        self._prefix = model.base_model_prefix + "."
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._tied = {**tied, **{v: k for k, v in tied.items()}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = get_model_conversion_mapping(model)
        self._stored = {name: name for name in stored}
        parts: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
        self.divisions: dict[str, Division] = {}  # by the name of the stored tensor
        for name in sorted(stored, key=_natural_order):
            in_model, part = _name_in_model(name, table)
            if part is not None and _divides(table[part[2]]):
                self.divisions[name] = Division(name, *part[:2], table[part[2]])
                continue
            self._stored.setdefault(in_model, name)
            if part is not None:
                whole, pattern, number = part
                parts[whole, number].append((pattern, name))
        self._split = {
            whole: SplitTensor(whole, tuple(own), table[number], model.config) for (whole, number), own in parts.items()
        }
        self.computed = compute_tensors(model, [n for n, _ in model.named_parameters() if not self.find_all(n)])

    def find(self, name: str) -> str | None:
        """Return the checkpoint's name of a tensor, or of a tensor tied to it; None if neither is stored."""
        found = self.find_own(name)
        return self.find_own(self._tied[name]) if found is None and name in self._tied else found

    def find_own(self, name: str) -> str | None:
        """Return the checkpoint's name of a tensor; None if it is not stored, even if a tensor tied to it is."""
        return next((self._stored[s] for s in self._possible_names(name) if s in self._stored), None)

    def is_tied(self, name: str) -> bool:
        """Whether the model's configuration ties a tensor to another one."""
        return name in self._tied

    def _possible_names(self, name: str) -> tuple[str, ...]:
        """Return a name unchanged, with the base model's prefix removed, and with it added."""
        return name, name.removeprefix(self._prefix), self._prefix + name

    def find_split(self, name: str) -> SplitTensor | None:
        """Return how to assemble a tensor from parts; None if the checkpoint stores it whole, or not at all."""
        if self.find(name) is not None:
            return None
        return next((self._split[s] for s in self._possible_names(name) if s in self._split), None)

    def find_all(self, name: str) -> list[str]:
        """Return the checkpoint's names of a tensor or of its parts; an empty list if nothing is stored."""
        found, split = self.find(name), self.find_split(name)
        return [found] if found else [stored for _, stored in split.parts] if split else []

    def find_packed(self, layer: str) -> str | None:
        """Return the checkpoint's name of a packed layer; None if the checkpoint does not hold the layer packed."""
        found = (self.find_own(f"{layer}.{marker}") for marker in PACKED_MARKERS)
        return next((name.rpartition(".")[0] for name in found if name), None)

    def find_layer(self, layer: str) -> str:
        """Return the checkpoint's name of a layer that is not packed.

        If the checkpoint has no weight for the layer, returns the layer's name in the model.
        """
        return (self.find_own(f"{layer}.weight") or layer).removesuffix(".weight")

    def require(self, name: str) -> str:
        """Return the checkpoint's name of a tensor.

        Raises:
            InputError: the checkpoint lacks the tensor.
        """
        found = self.find(name)
        if found is None:
            raise InputError(f"the checkpoint lacks {name}, which the model described by its config.json needs")
        return found


PACKED_MARKERS = ("qweight", "weight_packed", "scales", "weight_scale")  # keys of which a packed layer has at least one
PACKED = re.compile(  # suffixes of a packed layer's tensors beside or instead of `weight`
    r"(?<=\.)(qweight|qzeros|scales|biases|g_idx|weight_(?:packed|scale|zero_point|shape|g_idx))$"
)
STACKING = {"MergeModulelist", "Concatenate", "Force16BytesAlignment"}  # conversions that fuse separate experts


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _name_in_model(name: str, table: list[Any]) -> tuple[str, tuple[str, str, int] | None]:
    """Return the name in the model of a stored tensor, and how the table assembles it into a whole tensor.

    A matrix of one expert is named as in `models.experts`. The second value is the name of the whole tensor, the
    pattern that matched, and the number of the table's entry; None if the stored tensor is not a part of another.
    If the table makes several tensors of the stored one, the name is that of the first of these.
    """
    part = None
    suffix = PACKED.search(name)
    key = PACKED.sub("weight", name)
    for renaming in table:
        if isinstance(renaming, WeightRenaming):
            key, _ = renaming.rename_source_key(key)
    for number, converter in enumerate(table):
        fused, pattern = converter.rename_source_key(key) if isinstance(converter, WeightConverter) else (key, None)
        if pattern is not None:
            single = _name_of_expert_matrix(key, fused, str(pattern), converter)
            if not suffix and (len(converter.target_patterns) == 1 or _divides(converter)):
                part = fused, str(pattern), number
            key = single or key
            break
    return key.removesuffix("weight") + suffix[0] if suffix else key, part


def _divides(converter: Any) -> bool:
    """Whether a conversion makes several tensors of one."""
    return len(converter.source_patterns) == 1 and len(converter.target_patterns) > 1


def _name_of_expert_matrix(key: str, fused: str, pattern: str, converter: Any) -> str | None:
    """Return the name in `models.experts` of a matrix that is part of `fused`; None if it is not an expert's."""
    experts, _, parameter = fused.rpartition(".")
    parts = FUSED_PARTS.get(parameter, ())
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    stacked = {type(operation).__name__ for operation in converter.operations} <= STACKING
    if not number or not stacked or len(parts) != len(converter.source_patterns):
        return None
    return f"{experts}.{number[1]}.{parts[converter.source_patterns.index(pattern)]}.weight"


def check_tensors(
    network: PreTrainedModel, names: Names, tensors: dict[str, TensorInfo], packed: Collection[str] = ()
) -> list[str]:
    """Check that a checkpoint's headers announce every tensor that a model needs; return the tensors left over.

    Args:
        packed: names of the model's layers whose weight is stored packed and so not checked.
    Raises:
        InputError: a tensor is missing, has another shape, or is not of a floating-point dtype.
    """
    used: set[str | None] = set()
    without = {f"{name}.weight" for name in packed}
    without |= names.computed.keys()
    needed = [(name, tensor) for name, tensor in network.named_parameters() if name not in without]
    for name, tensor in [*needed, *((n, b) for n, b in network.named_buffers() if names.find(n))]:
        split = names.find_split(name)
        own = names.find_all(name) or [names.require(name)]
        used |= {*own}
        shape = _assembled_shape(split, tensors) if split else tensors[own[0]].shape
        if shape != tuple(tensor.shape):
            raise InputError(
                f"{own[0]} has the shape {shape}, but config.json describes a model where it is {tuple(tensor.shape)}"
            )
        for stored in own:
            dtype = tensors[stored].dtype
            if tensor.is_floating_point() and not dtype.is_floating_point:
                raise InputError(f"{stored} holds {dtype}, not floating-point weights; is the checkpoint quantized?")
    used |= {names.find(name) for name in getattr(network, "all_tied_weights_keys", None) or {}}
    return [name for name in tensors if name not in used]


def _assembled_shape(split: SplitTensor, tensors: dict[str, TensorInfo]) -> tuple[int, ...]:
    """Return the shape of a tensor assembled from its parts, on the meta device.

    Raises:
        InputError: transformers cannot assemble the tensor.
    """
    try:
        return tuple(split.assemble(lambda stored: torch.empty(tensors[stored].shape, device="meta")).shape)
    except Exception as error:  # any type, depending on the operation
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{split.parts[0][1]} and its like do not make up a {split.name}: {reason}") from error


def note_on_unused(extra: list[str]) -> list[str]:
    """Return a note for the user on the tensors left over by `check_tensors`, if any."""
    if not extra:
        return []
    return [f"{len(extra)} tensors that the model does not use ({extra[0]} ...) are copied as they are"]
