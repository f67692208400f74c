"""What a checkpoint calls a model's tensors, and whether it has them all."""

import re
import warnings
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from gptq.checkpoint import TensorInfo
from gptq.errors import InputError
from gptq.experts import PARTS


class Names:
    """Translates names of a model's tensors to the names a checkpoint uses.

    Checkpoints saved from a bare model lack the head model's prefix (`h.0.` for `transformer.h.0.`) and the other way
    round, and of tied tensors only one may be stored. Beyond that, transformers' own table is asked, which knows of
    `block_sparse_moe` for `mlp`, or of experts called w1, w2 and w3; single experts are named as in `gptq.experts`.
    """

    def __init__(self, model: PreTrainedModel, stored: Collection[str]) -> None:
        self._prefix = model.base_model_prefix + "."
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._tied = {**tied, **{v: k for k, v in tied.items()}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = get_model_conversion_mapping(model)
        self._stored = {name: name for name in stored}
        for name in stored:
            self._stored.setdefault(_name_in_model(name, table), name)

    def find(self, name: str) -> str | None:
        found = self.find_own(name)
        return self.find_own(self._tied[name]) if found is None and name in self._tied else found

    def find_own(self, name: str) -> str | None:
        """Under its own name, not under that of a tensor it is tied to."""
        spelled = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((self._stored[s] for s in spelled if s in self._stored), None)

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


def _name_in_model(name: str, table: Collection[Any]) -> str:
    """What transformers calls a checkpoint's tensor; a matrix of one expert gets the name it has in `gptq.experts`."""
    suffix = PACKED.search(name)
    key = PACKED.sub("weight", name)
    for renaming in table:
        if isinstance(renaming, WeightRenaming):
            key, _ = renaming.rename_source_key(key)
    for converter in table:
        fused, pattern = converter.rename_source_key(key) if isinstance(converter, WeightConverter) else (key, None)
        if pattern is not None:
            key = _name_of_part(key, fused, str(pattern), converter) or key
            break
    return key.removesuffix("weight") + suffix[0] if suffix else key


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
        stored = names.stored(name)
        used.add(stored)
        found, expected = tensors[stored], tuple(tensor.shape)
        if found.shape != expected:
            raise InputError(
                f"{stored} has the shape {found.shape}, but config.json describes a model where it is {expected}"
            )
        if tensor.is_floating_point() and not found.dtype.is_floating_point:
            raise InputError(f"{stored} holds {found.dtype}, not floating-point weights; is the checkpoint quantized?")
    used |= {names.find(name) for name in getattr(network, "all_tied_weights_keys", None) or {}}
    return [name for name in tensors if name not in used]


def note_on_left_over(extra: list[str]) -> list[str]:
    """What is said of tensors that `check_tensors` has left over."""
    if not extra:
        return []
    return [f"{len(extra)} tensors that the model does not use ({extra[0]} ...) are copied as they are"]
