"""What a checkpoint calls a model's tensors, and whether it has them all."""

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
from gptq.models.experts import PARTS


@dataclass(frozen=True)
class Parted:
    """A tensor of a model that its checkpoint holds in parts: three convolutions for one, or experts one by one."""

    name: str  # in the model
    parts: tuple[tuple[str, str], ...]  # names in the checkpoint, each behind the pattern of the converter it fits
    converter: Any  # transformers' WeightConverter
    config: PreTrainedConfig  # of the model

    def whole(self, read: Callable[[str], Tensor]) -> Tensor:
        """What transformers makes of the parts, which `read` gives."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            converter.add_tensor(self.name, stored, pattern, partial(read, stored))
        (made,) = converter.convert(self.name, config=self.config).values()
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole


class Names:
    """Translates names of a model's tensors to the names a checkpoint uses.

    Checkpoints saved from a bare model lack the head model's prefix (`h.0.` for `transformer.h.0.`) and the other way
    round, and of tied tensors only one may be stored. Beyond that, transformers' own table is asked, which knows of
    `block_sparse_moe` for `mlp`, or of experts called w1, w2 and w3; single experts are named as in `experts`.
    What it makes of several tensors has no one name: it is `parted`.
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
        for name in sorted(stored, key=_in_order):
            in_model, part = _name_in_model(name, table)
            self._stored.setdefault(in_model, name)
            if part is not None:
                whole, pattern, number = part
                parts[whole, number].append((pattern, name))
        self._parted = {
            whole: Parted(whole, tuple(own), table[number], model.config) for (whole, number), own in parts.items()
        }

    def find(self, name: str) -> str | None:
        found = self.find_own(name)
        return self.find_own(self._tied[name]) if found is None and name in self._tied else found

    def find_own(self, name: str) -> str | None:
        """Under its own name, not under that of a tensor it is tied to."""
        return next((self._stored[s] for s in self._spelled(name) if s in self._stored), None)

    def _spelled(self, name: str) -> tuple[str, ...]:
        return name, name.removeprefix(self._prefix), self._prefix + name

    def parted(self, name: str) -> Parted | None:
        """How a tensor is made of several, where the checkpoint holds no such one."""
        if self.find(name) is not None:
            return None
        return next((self._parted[s] for s in self._spelled(name) if s in self._parted), None)

    def all_of(self, name: str) -> list[str]:
        """What the checkpoint calls a tensor, or its parts; nothing where it has neither."""
        found, parted = self.find(name), self.parted(name)
        return [found] if found else [stored for _, stored in parted.parts] if parted else []

    def find_packed(self, layer: str) -> str | None:
        """What the checkpoint calls a layer that it holds packed."""
        found = (self.find_own(f"{layer}.{marker}") for marker in PACKED_WEIGHTS)
        return next((name.rpartition(".")[0] for name in found if name), None)

    def find_layer(self, layer: str) -> str:
        """What the checkpoint calls a layer that it holds as it is; its name in the model where that has no weight."""
        return (self.find_own(f"{layer}.weight") or layer).removesuffix(".weight")

    def stored(self, name: str) -> str:
        """Raises InputError if the checkpoint has no such tensor."""
        found = self.find(name)
        if found is None:
            raise InputError(f"the checkpoint lacks {name}, which the model described by its config.json needs")
        return found


PACKED_WEIGHTS = ("qweight", "weight_packed")
PACKED = re.compile(  # stands where a linear layer's `weight` was
    r"(?<=\.)(qweight|qzeros|scales|g_idx|weight_(?:packed|scale|zero_point|shape|g_idx))$"
)
STACKING = {"MergeModulelist", "Concatenate", "Force16BytesAlignment"}  # what makes fused experts of single ones


def _in_order(name: str) -> list[tuple[int, str]]:
    """For sorting: expert 10 comes after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _name_in_model(name: str, table: list[Any]) -> tuple[str, tuple[str, str, int] | None]:
    """What transformers calls a checkpoint's tensor; a matrix of one expert gets the name it has in `experts`.

    Where it is a part of another, also that one's name, and the pattern that it fits of which entry of the table.
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
            single = _name_of_part(key, fused, str(pattern), converter)
            if not suffix and len(converter.target_patterns) == 1:
                part = fused, str(pattern), number
            key = single or key
            break
    return key.removesuffix("weight") + suffix[0] if suffix else key, part


def _name_of_part(key: str, fused: str, pattern: str, converter: Any) -> str | None:
    experts, _, parameter = fused.rpartition(".")
    parts = PARTS.get(parameter, ())
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    stacked = {type(operation).__name__ for operation in converter.operations} <= STACKING
    if not number or not stacked or len(parts) != len(converter.source_patterns):
        return None
    return f"{experts}.{number[1]}.{parts[converter.source_patterns.index(pattern)]}.weight"


def check_tensors(
    network: PreTrainedModel, names: Names, tensors: dict[str, TensorInfo], packed: Collection[str] = ()
) -> list[str]:
    """Compare what a model needs with what a checkpoint's headers say it holds; returns the tensors left over.

    Args:
        packed: layers of the model whose weight is not looked for.
    Raises:
        InputError: a tensor is missing, has another shape, or does not hold floating-point numbers.
    """
    used: set[str | None] = set()
    without = {f"{name}.weight" for name in packed}
    needed = [(name, tensor) for name, tensor in network.named_parameters() if name not in without]
    for name, tensor in [*needed, *((n, b) for n, b in network.named_buffers() if names.find(n))]:
        parted = names.parted(name)
        own = names.all_of(name) or [names.stored(name)]
        used |= {*own}
        shape = _shape_of(parted, tensors) if parted else tensors[own[0]].shape
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


def _shape_of(parted: Parted, tensors: dict[str, TensorInfo]) -> tuple[int, ...]:
    """Raises InputError where transformers cannot make the tensor of its parts."""
    try:
        return tuple(parted.whole(lambda stored: torch.empty(tensors[stored].shape, device="meta")).shape)
    except Exception as error:  # any type, depending on the operation
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{parted.parts[0][1]} and its like do not make up a {parted.name}: {reason}") from error


def note_on_left_over(extra: list[str]) -> list[str]:
    """What is said of tensors that `check_tensors` has left over."""
    if not extra:
        return []
    return [f"{len(extra)} tensors that the model does not use ({extra[0]} ...) are copied as they are"]
