"""Map a model's tensor names to the checkpoint's, and check that the checkpoint has every tensor."""

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
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
from gptq.models.experts import FUSED_PARTS, ExpertForm


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
    shape: tuple[int, ...] | None  # in the model; some conversions depend on it

    def assemble(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the whole tensor; `read` returns a part by its name in the checkpoint."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            converter.add_tensor(self.name, stored, pattern, partial(read, stored))
        found = converter.convert(self.name, model=_ModelOfOne(self.shape), config=self.config)
        (made,) = (found[0] if isinstance(found, tuple) else found).values()  # transformers 5.0 returns errors too
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole


@dataclass(frozen=True)
class _ModelOfOne:
    """Stands for the model in a conversion that looks up the shape of its result."""

    shape: tuple[int, ...] | None

    def get_parameter(self, name: str) -> Tensor:
        if self.shape is None:
            raise AttributeError(name)
        return torch.empty(self.shape, device="meta")


@dataclass(frozen=True)
class FusedTensor:
    """A tensor of all experts of a layer, as the checkpoint stores it: whole, or in a way that `split` undoes."""

    name: str  # in transformers' model
    shape: tuple[int, ...]  # there; the first dimension is the expert
    stored: str
    split: SplitTensor | None

    @property
    def stored_names(self) -> tuple[str, ...]:
        return tuple(stored for _, stored in self.split.parts) if self.split else (self.stored,)

    def read_expert(self, number: int, read: Callable[[str, int], Tensor]) -> Tensor:
        """Return one expert's slice; `read` returns an entry of a stored tensor."""
        if self.split is None:
            return read(self.stored, number)
        one = replace(self.split, shape=(1, *self.shape[1:]))
        return one.assemble(lambda stored: read(stored, number)[None])[0]


@dataclass(frozen=True)
class ExpertSlice:
    """A parameter of one expert, which the checkpoint stores in a tensor with those of the other experts."""

    stored: str  # the name that it gets in a checkpoint of its own
    fused: FusedTensor
    number: int
    part: str  # the linear layer: gate_proj, up_proj or down_proj
    key: str  # weight or bias
    form: ExpertForm

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter as its linear layer holds it."""
        whole = torch.empty(self.fused.shape[1:], device="meta")
        return tuple(self.form.take(self.part, self.key, whole).shape)

    def read(self, read: Callable[[str, int], Tensor]) -> Tensor:
        """Return the parameter as its linear layer holds it; `read` returns an entry of a stored tensor."""
        return self.form.take(self.part, self.key, self.fused.read_expert(self.number, read))


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
        self._in_model: dict[str, str] = {}  # by stored name; for a tensor that is converted, before the conversion
        parts: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
        self.divisions: dict[str, Division] = {}  # by the name of the stored tensor
        for name in sorted(stored, key=_natural_order):
            in_model, part = _name_in_model(name, table)
            if part is not None and _divides(table[part[2]]):
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
        known = _known_expert_name(fused, part, self._table)
        if known:  # up to the block's number it is called as in this checkpoint, which need not have the model's prefix
            known = _split_at_block(stored)[0] + _split_at_block(known)[1]
        if known and _name_in_model(known.replace("*", "0"), self._table)[0] == f"{module}.0.{part}.weight":
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
        exact = dict(self._in_model)
        for stored, in_model in self._in_model.items():  # transformers 5.0 applies its own renamings before these
            exact.setdefault(_renamed(stored, self._table), in_model)
        divided = {stored: _renamed(stored, self._table) for stored in self.divisions}
        fused: list[SplitTensor | Division] = [*self._split.values(), *self.divisions.values()]
        converters = {id(one.converter): one.converter for one in fused}
        whole = {*(split.name for split in self._split.values()), *divided.values()}
        known = frozenset(possible for name in whole for possible in self._possible_names(name))
        return [
            StoredNames(exact | divided, self._in_model | divided),
            *(CheckpointConverter.of(converter, known) for converter in converters.values()),
        ]

    def find_converted(self) -> str | None:
        """Return a packed tensor that transformers' own table would convert, if it were used; None without one."""
        converters = [entry for entry in self._table if isinstance(entry, WeightConverter)]
        for stored, key in self._in_model.items():
            if PACKED.search(stored) and any(one.rename_source_key(key)[1] is not None for one in converters):
                return stored
        return None

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


class StoredNames(WeightRenaming):
    """A renaming for transformers' tables: looks up the names of one checkpoint's tensors."""

    def __init__(self, forward: Mapping[str, str], pairs: Mapping[str, str]) -> None:
        """`forward` maps names to new names; the inverse maps what `pairs` has in both ways."""
        super().__init__("stored name", "name in the model")
        self.forward, self.pairs = dict(forward), dict(pairs)

    def rename_source_key(self, source_key: str) -> tuple[str, None]:
        return self.forward.get(source_key, source_key), None

    def was_used(self) -> bool:
        return True

    def reverse_transform(self) -> "StoredNames":
        back = {new: old for old, new in self.pairs.items()}
        return StoredNames(back, back)


class CheckpointConverter(WeightConverter):
    """A conversion of transformers' table that, on saving, is applied to the tensors of one checkpoint alone.

    transformers searches names for its patterns, and a pattern such as `gate_proj` is found in packed layers' too.
    """

    whole: frozenset[str] = frozenset()  # the tensors that are taken apart on loading or on saving
    saves: bool = False

    @classmethod
    def of(cls, converter: Any, whole: frozenset[str], saves: bool = False) -> "CheckpointConverter":
        """Return a converter like transformers' `converter`."""

        def patterns(side: str) -> list[str]:
            return [*(getattr(converter, f"_original_{side}_patterns", None) or getattr(converter, f"{side}_patterns"))]

        own = cls(patterns("source"), patterns("target"), copy.deepcopy(converter.operations))
        for attribute in ("scope_prefix", "base_model_prefix", "force_cpu"):
            if hasattr(converter, attribute):
                setattr(own, attribute, getattr(converter, attribute))
        own.whole, own.saves = whole, saves
        return own

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed, pattern = super().rename_source_key(source_key)
        if self.saves and self.whole.isdisjoint((source_key, renamed)):
            return source_key, None
        return renamed, pattern

    def reverse_transform(self) -> "CheckpointConverter":
        return self.of(super().reverse_transform(), self.whole, not self.saves)


# Keys of which a packed layer has at least one.
PACKED_MARKERS = ("qweight", "weight_packed", "weight_ggml", "scales", "weight_scale", "weight_scale_inv")
PACKED = re.compile(  # suffixes of a packed layer's tensors beside or instead of `weight`
    r"(?<=\.)(qweight|qzeros|scales|biases|g_idx|"
    r"weight_(?:packed|ggml|(?:global_)?scale|scale_inv|zero_point|shape|g_idx))$"
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
    key = _renamed(PACKED.sub("weight", name), table)
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


def _renamed(name: str, table: list[Any]) -> str:
    for renaming in table:
        if isinstance(renaming, WeightRenaming):
            name, _ = renaming.rename_source_key(name)
    return name


def _name_of_expert_matrix(key: str, fused: str, pattern: str, converter: Any) -> str | None:
    """Return the name in `models.experts` of a matrix that is part of `fused`; None if it is not an expert's."""
    experts, _, parameter = fused.rpartition(".")
    parts = FUSED_PARTS.get(parameter, ())
    plain = pattern.replace("\\", "")  # some patterns escape their first dot
    number = re.search(re.escape(plain).replace(r"\*", r"(\d+)"), key)
    stacked = {type(operation).__name__ for operation in converter.operations} <= STACKING
    if not number or not stacked or len(parts) != len(converter.source_patterns):
        return None
    return f"{experts}.{number[1]}.{parts[converter.source_patterns.index(pattern)]}.weight"


def _split_at_block(name: str) -> tuple[str, str]:
    """Return a name up to its first number, and the rest; all of it is the rest of a name without one."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return (found[0], name[found.end() :]) if found else ("", name)


def _known_expert_name(fused: str, part: str, table: list[Any]) -> str | None:
    """Return how transformers' table names a matrix of one expert that it stacks to `fused`, with * for the number."""
    for converter in table:
        sources = getattr(converter, "_original_source_patterns", None) or getattr(converter, "source_patterns", [])
        parts = FUSED_PARTS.get(fused.rpartition(".")[2], ())
        if not isinstance(converter, WeightConverter) or part not in parts or len(sources) != len(parts):
            continue
        if {type(operation).__name__ for operation in converter.operations} <= STACKING:
            key, pattern = converter.reverse_transform().rename_source_key(fused)
            if pattern is not None:
                first, wanted = (sources[i].replace("\\", "") for i in (0, parts.index(part)))
                key = key.replace("\\", "").replace(first, wanted)
                for renaming in reversed(table):
                    if isinstance(renaming, WeightRenaming) and type(renaming).__name__ != "PrefixChange":
                        key, _ = renaming.reverse_transform().rename_source_key(key)
                return key
    return None


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
        split, part = names.find_split(name), names.find_slice(name)
        own = names.find_all(name) or [names.require(name)]
        if part is not None and used.issuperset(own):
            continue  # another expert's slice of the same tensor
        used |= {*own}
        shape = _assembled_shape(split, tensors) if split else tensors[own[0]].shape
        expected = tuple(tensor.shape)
        if part is not None:
            shape, expected = _fused_shape(part, tensors), part.fused.shape
        if shape != expected:
            raise InputError(
                f"{own[0]} has the shape {shape}, but config.json describes a model where it is {expected}"
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


def _fused_shape(part: ExpertSlice, tensors: dict[str, TensorInfo]) -> tuple[int, ...]:
    """Return the shape, as in the model, of a tensor of all experts.

    Raises:
        InputError: its parts do not hold as many experts, or transformers cannot assemble one expert of them.
    """
    fused = part.fused
    if fused.split is None:
        return tensors[fused.stored].shape
    counts = {tensors[stored].shape[:1] for stored in fused.stored_names}
    try:
        one = tuple(fused.read_expert(0, partial(_empty_slice, tensors)).shape)
    except Exception as error:  # any type, depending on the operation
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{fused.stored} and its like do not make up a {fused.name}: {reason}") from error
    return (*(counts.pop() if len(counts) == 1 else ()), *one)


def _empty_slice(tensors: dict[str, TensorInfo], stored: str, number: int) -> Tensor:
    return torch.empty(tensors[stored].shape, device="meta")[number]
