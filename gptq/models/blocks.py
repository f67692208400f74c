"""Where a Hugging Face model's repeated blocks and their linear layers are, found from its structure.

This file and `names` are what knows how transformers models are built. A model is made without weights (`stream` has
them).
"""

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from gptq.checkpoint.reader import Source
from gptq.checkpoint.untrusted import read_json
from gptq.errors import InputError
from gptq.models.experts import Experts, take_apart, tried
from gptq.models.tensor_names import Names

LINEAR = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear layer whose weight is stored as (inputs, outputs)
PLAIN = [kind.forward for kind in LINEAR]
FUSED = (  # what engines make one layer of, and its name there (`packed_modules_mapping` in vLLM's models)
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)
COUNTED = re.compile(r"(^|_)(layers?|blocks?|labels?|experts?|heads?|stages?|depths?|codebooks?)($|_)")
MOST = 2**20  # of what config.json counts: transformers makes lists and modules of them before a weight is looked at
TENSORS_PER_TENSOR, BITS_PER_BYTE = 40, 8  # at most so many in a model for one in the file it is in
SMALL_BUFFERS = 2**26  # numbers that a model may hold beside its weights (masks, tables of positions)
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange)


@dataclass(frozen=True)
class Block:
    """One of the model's repeated blocks, or its output head, which is its own only layer.

    `linears` are its quantizable layers by their full name in the model.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Module]

    def is_head(self) -> bool:
        return is_linear(self.module)

    def stops(self) -> dict[nn.Module, str]:
        """Where a forward is stopped, with names: the layers, but lists of experts as one."""
        experts = {m: f"{self.name}.{path}" for path, m in self.module.named_modules() if isinstance(m, Experts)}
        inside = {layer for m in experts for layer in m.modules()}
        alone = {m: name for name, m in self.linears.items() if m not in inside}
        found = alone | {
            m: name for m, name in experts.items() if not set(self.linears.values()).isdisjoint(m.modules())
        }
        return {module: found[module] for module in self.module.modules() if module in found}


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Raises InputError where config.json is missing, broken, or of a model that transformers does not know."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; is it a model folder?")
    _check_config(folder / "config.json", read_json(folder / "config.json"))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any type, depending on what the file holds
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder / 'config.json'} could not be used: {reason}") from error
    return config


def _check_config(file: Path, values: dict[str, Any]) -> None:
    """Raises InputError for what transformers would make millions of objects of, or load code for."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_config(file, value)
        elif isinstance(value, int | float) and COUNTED.search(key) and value > MOST:
            raise InputError(f"{file} says {key} {value}; no model has so many")
        elif key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise InputError(f"{file} asks for {key} {value!r}, which would be code from the Hub; delete that line")


def choose_device(device: str) -> torch.device:
    """Raises InputError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise InputError(f"the device is {device!r}; it is auto, cpu, cuda, or cuda:N")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def choose_dtype(dtype: str, hf_config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward passes; see `quantize`."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise InputError(f"dtype is {dtype!r}; it is auto, float32, bfloat16 or float16")
    stored = getattr(hf_config, "dtype", None) or torch.float32
    native = device.type != "cpu" or (stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return stored if native and stored in known.values() else torch.float32


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Raises InputError if the folder has none that works."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any type, depending on what the files hold
        raise InputError(f"{folder} has no usable tokenizer: {' '.join(str(error).split())[:200]}") from error
    return tokenizer


def fitting_seq_len(seq_len: int, hf_config: PreTrainedConfig, model: nn.Module | None = None) -> tuple[int, list[str]]:
    """seq_len, or the model's limit where that is smaller, and a note that says so.

    A position embedding with a padding row (RoBERTa's) starts counting behind it, which only `model` can tell.
    """
    limit = getattr(hf_config, "max_position_embeddings", None)
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings")] if model is not None else []
    padding = max(
        (m.padding_idx for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None), default=-1
    )
    if not isinstance(limit, int) or limit - padding - 1 >= seq_len:
        return seq_len, []
    limit -= padding + 1
    if limit < 2:
        raise InputError(f"config.json leaves room for windows of {limit} tokens; a window has at least 2")
    return limit, [f"windows are {limit} tokens, the model's limit, instead of {seq_len}"]


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


def find_blocks(model: nn.Module, inputs: Collection[str] | None = None) -> tuple[list[Block], list[str]]:
    """The model's blocks, those of each outermost list of alike modules with linear layers; and notes.

    Lists inside a part of the model (an image encoder, say) that takes none of `inputs`, the names of what the model is
    called on, are left out, because nothing will reach them.

    Raises:
        InputError: the model has no repeated blocks with linear layers.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _repeats(module) and _linears(module, name)
    }
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outermost:
        raise InputError(f"{type(model).__name__} has no list of repeated blocks with linear layers to quantize")
    reached = {n: m for n, m in outermost.items() if inputs is None or _takes(model, n, inputs)}
    notes = [f"{n} stays as it is: the calibration has no inputs for it" for n in outermost if n not in reached]
    if not reached:
        kind, wanted = type(model).__name__, getattr(model, "main_input_name", "other inputs")
        raise InputError(f"{kind} is called on {wanted}, so it needs arrays of them for calibration, not text")
    blocks = [(f"{n}.{i}", child) for n, m in reached.items() for i, child in enumerate(m)]
    return [Block(name, module, _linears(module, name)) for name, module in blocks], notes


def _takes(model: nn.Module, name: str, inputs: Collection[str]) -> bool:
    """Whether all models inside `model` and around the module called `name` take one of `inputs`.

    A decoder's input_ids are its whole model's decoder_input_ids.
    """
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    wanted = [m.main_input_name for m in around if isinstance(m, PreTrainedModel)]
    return all(any(given.endswith(want) for given in inputs) for want in wanted)


def _repeats(modules: nn.ModuleList) -> bool:
    """Whether these are blocks: alike, or such as transformers makes of several kinds, with attention and without."""
    alike = len({type(child) for child in modules}) == 1 and not is_linear(modules[0])
    return alike or (len(modules) > 0 and all(isinstance(child, GradientCheckpointingLayer) for child in modules))


def find_head(model: PreTrainedModel) -> Block:
    """The layer that turns hidden states into scores of tokens; raises InputError where the model has none."""
    head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), None)
    if name is None or not is_linear(head):
        raise InputError(f"{type(model).__name__} has no linear output head to quantize")
    return Block(name, head, {name: head})


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


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether x W^T + b is all that it computes: some routers are linear layers that go on from there."""
    return isinstance(module, LINEAR) and (type(module).forward in PLAIN or _computes_product(module))


def _computes_product(module: nn.Module) -> bool:
    """Whether a linear layer with a forward of its own gives x W^T + b for a small W; Falcon's does."""
    draw = torch.Generator().manual_seed(0)
    W, x = torch.randn(3, 4, generator=draw), torch.randn(2, 4, generator=draw)
    bias = None if module._parameters["bias"] is None else nn.Parameter(torch.randn(3, generator=draw))
    weight = nn.Parameter(W.T.contiguous() if is_transposed(module) else W)
    found = tried(module, {"weight": weight, "bias": bias}, x)
    return found is not None and torch.allclose(found, nn.functional.linear(x, W, bias), atol=1e-5)


def _linears(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    return {f"{prefix}.{n}": m for n, m in module.named_modules() if is_linear(m)}


def fused_siblings(layers: Iterable[str]) -> list[list[str]]:
    """The layers, those together that engines fuse into one: parts of one FUSED entry inside the same module."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in layers:
        parent, _, own = name.rpartition(".")
        fused = next((parts for _, parts in FUSED if own in parts), own)
        groups.setdefault((parent, fused), []).append(name)
    return list(groups.values())


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is stored as (inputs, outputs)."""
    return isinstance(linear, Conv1D)


def shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (columns, rows) if is_transposed(linear) else (rows, columns)


def check_tokens(windows: Tensor, network: PreTrainedModel) -> None:
    """Raises InputError if a token has no embedding; then tokenizer and model do not belong together."""
    vocabulary = int(network.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"tokens run from {low} to {high}, but the model has {vocabulary}; is the tokenizer another model's?"
        )


def check_inputs(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Raises InputError for an argument that the model does not take."""
    known = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise InputError(f"{type(model).__name__} takes no {unknown[0]}; it takes {', '.join(known)}")


def sent(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model is called on, on a device, numbers that are not whole in the forward's dtype."""
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def with_defaults(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward without a cache of keys and values, where it has one."""
    cached = "use_cache" in inspect.signature(model.forward).parameters
    return partial(run, model, use_cache=False) if cached else partial(run, model)


def run(model: PreTrainedModel, **inputs: Any) -> Any:
    """The model's forward.

    Raises:
        InputError: it fails, on what config.json or the inputs say and no shape could show (heads that do not divide
            the width, tokens without an embedding).
    """
    try:
        return model(**inputs)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any type, depending on the model's code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"a forward pass of {type(model).__name__} failed ({reason}); do its config.json and the inputs fit it?"
        ) from error
