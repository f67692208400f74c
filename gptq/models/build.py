"""Build a model on the meta device; refuse a model that is far larger than its checkpoint."""

import copy
import math
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from gptq.checkpoint.reader import Source
from gptq.compute.torch_state import BUILDING
from gptq.errors import InputError
from gptq.models.blocks import Block
from gptq.models.divided_tensors import show_divided
from gptq.models.experts import Experts, StaysFusedError, unfuse_experts
from gptq.models.hf_config import all_configs, read_config
from gptq.models.tensor_names import Names

# Limits on what config.json may ask for, relative to the checkpoint's safetensors files.
TENSORS_PER_STORED_TENSOR = 40
WEIGHTS_PER_STORED_BYTE = 8  # one bit per weight
BUFFER_ELEMENTS = 2**26  # elements allowed for buffers (masks, position tables), which no file holds
FACTORIES = (  # functions of torch that allocate a tensor
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange,
)  # fmt: skip


def find_model_class(config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    """Return the class that builds this configuration's model.

    In this order: the Auto class for the checkpoint's own code (if trusted); the transformers class that config.json
    names; AutoModelForCausalLM; AutoModel.
    """
    name = next(iter(getattr(config, "architectures", None) or []), "")
    own_code: dict[str, str] = getattr(config, "auto_map", None) or {}
    if trust_remote_code and own_code:
        autos = [auto for auto, where in own_code.items() if auto != "AutoConfig" and where.endswith(f".{name}")]
        return getattr(transformers, autos[0]) if autos else AutoModelForCausalLM
    named = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and _is_class_of(named, config):
        return named
    known = AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if type(config) in known else AutoModel


def _is_class_of(named: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether a class is made for this configuration: by itself, or by one of the Auto classes (as Glmga's is)."""
    kinds: list[Any] = [
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    ]
    return named.config_class is type(config) or any(
        type(config) in kind._model_mapping and kind._model_mapping[type(config)] is named for kind in kinds
    )


def build_empty_model(
    config: PreTrainedConfig, trust_remote_code: bool, source: Source | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the model in evaluation mode, with parameters on the meta device and buffers in memory.

    It is built in `dtype`, by default in that of its configuration. What no file holds, and is not made again, keeps
    that precision: the factor of Gemma's embeddings, for one.

    Raises:
        InputError: transformers cannot build a model from this configuration, or the model is far larger than `source`.
    """
    try:
        own = copy.deepcopy(config)
        if dtype is not None:
            for part in all_configs(own):
                part.dtype = dtype
        size_guard = _SizeGuard(source) if source else nullcontext()
        with size_guard, parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights on the meta device cannot be initialized
            kind = find_model_class(config, trust_remote_code)
            if issubclass(kind, PreTrainedModel):
                model: PreTrainedModel = kind._from_config(own)
            else:
                model = kind.from_config(own, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # any type, depending on what config.json says
        reason = " ".join(str(error).split())[:200]
        where = f"{source.folder / 'config.json'}: " if source else ""
        raise InputError(f"{where}no model could be made for model_type {config.model_type!r}: {reason}") from error
    model.eval()
    return model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, modules that this thread builds have their parameters on the meta device, and their buffers in memory.

    Modules of other threads are built as always. Only one thread is inside at a time: transformers changes the default
    dtype of the whole process while it builds a model.
    """
    with BUILDING:
        builder, register = threading.get_ident(), nn.Module.register_parameter

        def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None and threading.get_ident() == builder:
                empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                vars(empty).update(vars(parameter))
                module._parameters[name] = empty

        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint, and the model that its config.json describes, on the meta device."""

    source: Source
    hf_config: PreTrainedConfig
    network: PreTrainedModel
    names: Names
    notes: list[str]  # for the user, on experts that stay fused


def open_model(source: Source, trust_remote_code: bool, dtype: torch.dtype | None = None) -> OpenModel:
    """Read a checkpoint's config.json, and build the model on the meta device, in `dtype` if one is given.

    Experts that the checkpoint stores one by one become separate modules.

    Raises:
        InputError: config.json is missing or damaged, or describes no model, or one far larger than the files.
    """
    with BUILDING:
        hf_config = read_config(source.folder, trust_remote_code)
        network = build_empty_model(hf_config, trust_remote_code, source, dtype)
        source, names, notes = match_checkpoint(source, network)
    return OpenModel(source, hf_config, network, names, notes)


def match_checkpoint(source: Source, network: PreTrainedModel) -> tuple[Source, Names, list[str]]:
    """Take a model's fused experts apart, and a checkpoint's fused tensors, so that each layer has a weight of its own.

    Returns the checkpoint, its names of the model's tensors, and notes for the user on what stays fused.
    """
    names = Names(network, set(source.tensors))
    if divisions := names.divisions:
        source = show_divided(source, network, names)
        names = Names(network, set(source.tensors))
        names.divisions = divisions
    return source, names, unfuse_all_experts(network, names)


class _SizeGuard(TorchFunctionMode):
    """While active, refuses to allocate a model much larger than its checkpoint.

    The limits are one bit per weight, and TENSORS_PER_STORED_TENSOR. A hostile config.json of a few bytes could ask for
    any number of tensors of any size.

    Raises:
        InputError: from the call that would exceed a limit.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._elements_left = WEIGHTS_PER_STORED_BYTE * source.nbytes + BUFFER_ELEMENTS
        self._tensors_left = TENSORS_PER_STORED_TENSOR * (len(source.tensors) + 10)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in FACTORIES:
            listed = args and isinstance(args[0], Iterable) and not isinstance(args[0], Tensor)
            size = kwargs.get("size", args[0] if listed else args)
            numbers = [int(number) for number in size if isinstance(number, int | float)]
            self._elements_left -= max(map(abs, numbers), default=0) if function is torch.arange else math.prod(numbers)
            self._tensors_left -= 1
            if min(self._elements_left, self._tensors_left) < 0:
                raise InputError(
                    f"config.json in {self._source.folder} describes a much larger model than its safetensors files "
                    f"hold ({len(self._source.tensors)} tensors of {self._source.nbytes:,} bytes); are they another's?"
                )
        return function(*args, **kwargs)


def unfuse_all_experts(model: nn.Module, names: Names) -> list[str]:
    """Replace each module of fused experts by separate experts, if they compute the same.

    Their parameters are then found one by one in the checkpoint, or as slices of its tensors. Returns notes for the
    user on modules that stay fused.
    """
    reasons: dict[str, list[str]] = {}
    for name, module in list(model.named_modules()):
        stacks = [p for p in module._parameters.values() if p is not None and p.ndim == 3 and len(p) > 1]
        if len(stacks) < 2:
            continue
        try:
            experts = _unfuse(name, module, names)
        except StaysFusedError as reason:
            reasons.setdefault(str(reason), []).append(name)
        else:
            parent, _, child = name.rpartition(".")
            dtype = next(module.parameters()).dtype
            setattr(model.get_submodule(parent), child, experts.to(dtype).eval())
    return [
        f"fused tensors of {len(of)} modules ({of[0]} ...) stay as they are: {reason}" for reason, of in reasons.items()
    ]


def _unfuse(name: str, module: nn.Module, names: Names) -> Experts:
    """Return separate experts for the fused experts called `name`, with parameters that the checkpoint has.

    Raises:
        StaysFusedError: there are no such experts, or the checkpoint stores them in another way.
    """
    experts, form = unfuse_experts(module)
    single = (f"{name}.{number}.down_proj" for number in range(len(experts)))
    if any(names.find_own(f"{layer}.weight") or names.find_packed(layer) for layer in single):
        return experts
    if names.holds_packed():
        raise StaysFusedError("the packed checkpoint holds them so")
    shapes = {own: tuple(parameter.shape) for own, parameter in module.named_parameters()}
    fused = {own: found for own, shape in shapes.items() if (found := names.find_fused(f"{name}.{own}", shape))}
    if len(fused) < len(shapes):
        raise StaysFusedError("the checkpoint holds the experts neither one by one nor all in one tensor")
    names.add_slices(name, len(experts), form, fused)
    return experts


def check_untied(config: PreTrainedConfig, head: Block, names: Names, trust_remote_code: bool) -> None:
    """Check that a variant of the model with an untied output head can be described by config.json.

    Raises:
        InputError: the configuration ties the head anyway, or the untied model needs a tensor that the checkpoint
        lacks.
    """
    values = config.to_dict()
    for part in (values, values.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    apart = type(config).from_dict(values)
    model = build_empty_model(apart, trust_remote_code)
    unfuse_all_experts(model, names)
    needed = {name for name, _ in model.named_parameters()} - {f"{head.name}.weight"}
    if apart.get_text_config().tie_word_embeddings or any(
        names.find_own(name) is None and names.find_slice(name) is None for name in needed
    ):
        raise InputError(f"a {config.model_type} model cannot have an output head of its own; leave out --lm-head")
