"""Build a model without weights, within what its checkpoint can hold."""

import copy
import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gptq.checkpoint.reader import Source
from gptq.errors import InputError
from gptq.models.blocks import Block
from gptq.models.experts import take_apart
from gptq.models.hf_config import read_config
from gptq.models.tensor_names import Names

TENSORS_PER_TENSOR, BITS_PER_BYTE = 40, 8  # at most so many in a model for one in the file it is in
SMALL_BUFFERS = 2**26  # numbers that a model may hold beside its weights (masks, tables of positions)
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange)


def model_class(config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    """The class that config.json names, or an Auto class that finds one: code of its own, causal model, base model."""
    name = next(iter(getattr(config, "architectures", None) or []), "")
    own_code: dict[str, str] = getattr(config, "auto_map", None) or {}
    if trust_remote_code and own_code:
        autos = [auto for auto, where in own_code.items() if auto != "AutoConfig" and where.endswith(f".{name}")]
        return getattr(transformers, autos[0]) if autos else AutoModelForCausalLM
    named = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.config_class is type(config):
        return named
    known = AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if type(config) in known else AutoModel


def empty_model(config: PreTrainedConfig, trust_remote_code: bool, source: Source | None = None) -> PreTrainedModel:
    """The model in evaluation mode with parameters on the meta device and real (computed) buffers.

    Raises:
        InputError: transformers has no model for this configuration, or it is far larger than what `source` holds.
    """
    try:
        fits = _NoLargerThan(source) if source else nullcontext()
        with fits, init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # initial values that do not exist cannot be set
            kind = model_class(config, trust_remote_code)
            if issubclass(kind, PreTrainedModel):
                model: PreTrainedModel = kind._from_config(copy.deepcopy(config))
            else:
                model = kind.from_config(config, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # any type, depending on what config.json says
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no model could be made for model_type {config.model_type!r}: {reason}") from error
    model.config.use_cache = False
    model.eval()
    return model


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint, and the model that its config.json describes, without weights."""

    source: Source
    hf_config: PreTrainedConfig
    network: PreTrainedModel
    names: Names
    notes: list[str]  # on experts that stay fused


def open_model(folder: Path, trust_remote_code: bool) -> OpenModel:
    """Read a checkpoint's headers and config.json, and build the model; experts that are stored one by one stand alone.

    Raises:
        InputError: a file is missing or damaged, or config.json describes no model, or a far larger one.
    """
    source = Source(folder)
    hf_config = read_config(folder, trust_remote_code)
    network = empty_model(hf_config, trust_remote_code, source)
    names = Names(network, set(source.tensors))
    return OpenModel(source, hf_config, network, names, take_experts_apart(network, names))


class _NoLargerThan(TorchFunctionMode):
    """Stops the making of a model that has more weights than the checkpoint has bits, or far more parameters than it
    has tensors, before they are allocated: config.json is a few bytes, and could ask for any number of any size.

    Raises:
        InputError: from inside the making.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._numbers = BITS_PER_BYTE * source.nbytes + SMALL_BUFFERS
        self._tensors = TENSORS_PER_TENSOR * (len(source.tensors) + 10)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in FACTORIES:
            size = kwargs.get("size", args[0] if args and isinstance(args[0], Iterable) else args)
            numbers = [int(number) for number in size if isinstance(number, int | float)]
            self._numbers -= max(map(abs, numbers), default=0) if function is torch.arange else math.prod(numbers)
            self._tensors -= 1
            if min(self._numbers, self._tensors) < 0:
                raise InputError(
                    f"config.json in {self._source.folder} describes a much larger model than its safetensors files "
                    f"hold ({len(self._source.tensors)} tensors of {self._source.nbytes:,} bytes); are they another's?"
                )
        return function(*args, **kwargs)


def take_experts_apart(model: nn.Module, names: Names) -> list[str]:
    """Put single experts where `model` has fused ones and the checkpoint has single ones; returns notes on the rest."""
    fused = []
    for name, module in list(model.named_modules()):
        stacks = [p for p in module._parameters.values() if p is not None and p.ndim == 3 and len(p) > 1]
        if len(stacks) < 2:
            continue
        single = names.find(f"{name}.0.down_proj.weight") or names.find_packed(f"{name}.0.down_proj")
        experts = take_apart(module) if single else None
        if experts is None:
            fused.append(name)
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, experts.eval())
    if not fused:
        return []
    why = "the checkpoint does not hold experts one by one, or the model computes with them in another way"
    return [f"fused tensors of {len(fused)} modules ({fused[0]} ...) stay as they are: {why}"]


def check_untied(config: PreTrainedConfig, head: Block, names: Names, trust_remote_code: bool) -> None:
    """Raises InputError where a model with an output head of its own cannot be described, or needs more than that."""
    values = config.to_dict()
    for part in (values, values.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    apart = type(config).from_dict(values)
    model = empty_model(apart, trust_remote_code)
    take_experts_apart(model, names)
    needed = {name for name, _ in model.named_parameters()} - {f"{head.name}.weight"}
    if apart.get_text_config().tie_word_embeddings or any(names.find_own(name) is None for name in needed):
        raise InputError(f"a {config.model_type} model cannot have an output head of its own; leave out --lm-head")
