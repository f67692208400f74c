"""Map a model's tensor names to the checkpoint's."""

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from gptq.errors import InputError
from gptq.models.computed_tensors import compute_tensors
from gptq.models.conversions import CheckpointConverter, StoredNames
from gptq.models.experts import ExpertForm
from gptq.models.kept_in_float32 import dtype_rule
from gptq.models.stored_forms import Division, ExpertSlice, FusedTensor, SplitTensor
from gptq.models.table_lookup import (
    PACKED_MARKERS,
    divides,
    find_expert_name,
    name_in_model,
    renamed,
)


class Names:
    """Translates the names of a model's tensors to the names that a checkpoint uses.

    - A checkpoint saved from a base model lacks the prefix of the model with a head (`h.0.` for `transformer.h.0.`);
      other checkpoints have a prefix that the model lacks.
    - Of tied tensors, the checkpoint may store only one.
    - transformers' conversion table knows of other names, such as `block_sparse_moe` for `mlp`, or w1, w2 and w3 of an
      expert. Separate experts are named as in `models.experts`.
    - A tensor that this table assembles from several stored tensors has no single name: see `find_split`.
    - `dtype_of` gives the dtype in which the model computes with a tensor.
    - `computed` holds, by name in the model, the tensors that no checkpoint stores (see `models.computed_tensors`).
    """

    def __init__(self, model: PreTrainedModel, stored: Collection[str]) -> None:
        self._prefix = model.base_model_prefix + "."
        self.dtype_of = dtype_rule(model)
        self._tied = _tied_groups(getattr(model, "all_tied_weights_keys", None) or {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = get_model_conversion_mapping(model)
        self._stored = {name: name for name in stored}
        self._in_model: dict[str, str] = {}  # by stored name; for a tensor that is converted, before the conversion
        parts: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
        self.divisions: dict[str, Division] = {}  # by the name of the stored tensor
        for name in sorted(stored, key=_natural_order):
            in_model, part = name_in_model(name, table)
            if part is not None and divides(table[part[2]]):
                self.divisions[name] = Division(name, *part[:2], table[part[2]])
                continue
            self._stored.setdefault(in_model, name)
            self._in_model[name] = in_model
            if part is not None:
                whole, pattern, number = part
                parts[whole, number].append((pattern, name))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._split = {
            whole: SplitTensor(whole, tuple(own), table[number], model.config, shapes.get(whole))
            for (whole, number), own in parts.items()
        }
        self._slices: dict[str, ExpertSlice] = {}  # by the name of an expert's parameter in the model
        self._table = table
        self.computed = compute_tensors(model, [n for n, _ in model.named_parameters() if not self.find_all(n)])

    def find(self, name: str) -> str | None:
        """Return the checkpoint's name of a tensor, or of a tensor tied to it; None if neither is stored."""
        all_names = (name, *self._tied.get(name, ()))
        return next((found for one in all_names if (found := self.find_own(one)) is not None), None)

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
        split = next((self._split[s] for s in self._possible_names(name) if s in self._split), None)
        whole = self.find(name)
        if whole is None or (split is not None and whole in (stored for _, stored in split.parts)):
            return split
        return None

    def find_all(self, name: str) -> list[str]:
        """Return the checkpoint's names of a tensor or of its parts; an empty list if nothing is stored."""
        found, split, part = self.find(name), self.find_split(name), self.find_slice(name)
        if part is not None:
            return [*part.fused.stored_names]
        return [stored for _, stored in split.parts] if split else [found] if found else []

    def find_slice(self, name: str) -> ExpertSlice | None:
        """Return which part of a fused tensor a parameter of an expert is; None if it is not stored so."""
        return self._slices.get(name)

    def slices_by_tensor(self, layers: Iterable[str]) -> dict[str, dict[str, ExpertSlice]]:
        """Return, for each stored tensor that holds one of these layers with other experts', its slices by their names.

        If several stored tensors make up one of the model's, the first of them has all slices.
        """
        modules = {name.rsplit(".", 2)[0] for name in layers if f"{name}.weight" in self._slices}
        found: dict[str, dict[str, ExpertSlice]] = {}
        for name, part in self._slices.items():
            if name.rsplit(".", 3)[0] in modules:
                first, *others = part.fused.stored_names
                found.setdefault(first, {})[name] = part
                found |= {other: {} for other in others}
        return found

    def find_fused(self, name: str, shape: tuple[int, ...]) -> FusedTensor | None:
        """Return how the checkpoint stores a tensor of all experts; None if it does not, or not expert by expert."""
        split, whole = self.find_split(name), self.find_own(name)
        if split is None:
            return FusedTensor(name, shape, whole, None) if whole else None
        stacked = {type(operation).__name__ for operation in split.converter.operations} & {"MergeModulelist"}
        return None if stacked else FusedTensor(name, shape, split.parts[0][1], split)

    def add_slices(self, module: str, count: int, form: ExpertForm, fused: dict[str, FusedTensor]) -> None:
        """From now on, find the parameters of the experts called MODULE.0.up_proj.weight and so on as slices.

        Args:
            fused: the stored tensors by the names of the fused module's parameters.
        """
        for (part, key), own in form.places().items():
            pattern = self._stored_expert_name(module, part, fused[form.down].stored, f"{module}.{own}")
            for number in range(count):
                name = f"{module}.{number}.{part}.{key}"
                stored = f"{pattern.replace('*', str(number))}.{key}"
                self._slices[name] = ExpertSlice(stored, fused[own], number, part, key, form)

    def _stored_expert_name(self, module: str, part: str, stored: str, fused: str) -> str:
        """Return the name of an expert's linear layer in a file that holds experts one by one, with * for the number.

        It is the name by which transformers' table knows such files of this model (`block_sparse_moe.experts.*.w1`, for
        example). For a model whose files hold experts fused, it is `gate_proj`, `up_proj` or `down_proj` in the place
        where the fused tensor called `stored` lies; vLLM reads this (layers/fused_moe/routed_experts.py,
        `build_expert_params_mapping`).
        """
        known = find_expert_name(fused, part, self._table)
        if known:  # up to the block's number it is called as in this checkpoint, which need not have the model's prefix
            known = _split_at_block(stored)[0] + _split_at_block(known)[1]
        if known and name_in_model(known.replace("*", "0"), self._table)[0] == f"{module}.0.{part}.weight":
            return known.removesuffix(".weight")
        parent, _, own = module.rpartition(".")
        before, within, _ = stored.rpartition(f".{own}.")
        if not within:  # the fused tensor has another parent; what the two names share is the block's place
            shared = [a for a, b in zip(stored.split("."), module.split("."), strict=False) if a == b]
            begin = ".".join(shared) if stored.startswith(".".join(shared)) else parent
            before = ".".join([begin, *parent.removeprefix(begin).split(".")]).replace("..", ".").rstrip(".")
        return f"{before}.{own}.*.{part}"

    def conversions(self) -> list[Any]:
        """Return transformers' conversions for loading and saving the model, whose experts may be separate by now.

        They translate exactly the names of this checkpoint, and convert what is still fused in the model.
        """
        divided = {stored: renamed(stored, self._table) for stored in self.divisions}
        named = self._in_model | divided
        fused: list[SplitTensor | Division] = [*self._split.values(), *self.divisions.values()]
        converters = {id(one.converter): one.converter for one in fused}
        whole = {*(split.name for split in self._split.values()), *divided.values()}
        known = frozenset(possible for name in whole for possible in self._possible_names(name))
        return [
            StoredNames(named, named),
            *(CheckpointConverter.of(converter, known) for converter in converters.values()),
        ]

    def holds_packed(self) -> bool:
        """Whether a layer of the checkpoint is packed."""
        return any(name.endswith(tuple(f".{marker}" for marker in PACKED_MARKERS)) for name in self._in_model)

    def find_packed(self, layer: str) -> str | None:
        """Return the checkpoint's name of a packed layer; None if the checkpoint does not hold the layer packed."""
        found = (self.find_own(f"{layer}.{marker}") for marker in PACKED_MARKERS)
        return next((name.rpartition(".")[0] for name in found if name), None)

    def find_layer(self, layer: str) -> str:
        """Return the checkpoint's name of a layer that is not packed.

        If the checkpoint has no weight for the layer, returns the layer's name in the model.
        """
        part = self.find_slice(f"{layer}.weight")
        found = part.stored if part else self.find_own(f"{layer}.weight")
        return (found or layer).removesuffix(".weight")

    def require(self, name: str) -> str:
        """Return the checkpoint's name of a tensor.

        Raises:
            InputError: the checkpoint lacks the tensor.
        """
        found = self.find(name)
        if found is None:
            raise InputError(f"the checkpoint lacks {name}, which the model described by its config.json needs")
        return found


def _tied_groups(tied: dict[str, str]) -> dict[str, list[str]]:
    """Return, for each tied tensor, the others that are the same one: an encoder's, a decoder's and a head's."""
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        joined = [*groups.get(source, [source]), *groups.get(target, [target])]
        groups |= dict.fromkeys(joined, joined)
    return {name: [other for other in group if other != name] for name, group in groups.items()}


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _split_at_block(name: str) -> tuple[str, str]:
    """Return a name up to its first number, and the rest; all of it is the rest of a name without one."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return (found[0], name[found.end() :]) if found else ("", name)
