"""Where a Hugging Face model's repeated blocks and their linear layers are, found from its structure.

This is the one file that knows how transformers models are built. A model is made without weights; a module's tensors
are read from the checkpoint when it is about to run, and dropped when it is done.
"""

import ctypes
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from gptq.checkpoint import Source, TensorInfo
from gptq.errors import InputError

LINEAR = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear layer whose weight is stored as (inputs, outputs)


@dataclass(frozen=True)
class Block:
    """One of the model's repeated blocks; `linears` are its quantizable layers by their full name in the model."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Module]


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Raises InputError where config.json is missing, broken, or of a model that transformers does not know."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; is it a model folder?")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any type, depending on what the file holds
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder / 'config.json'} could not be used: {reason}") from error
    return config


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


def fitting_seq_len(seq_len: int, hf_config: PreTrainedConfig) -> tuple[int, list[str]]:
    """seq_len, or the model's limit where that is smaller, and a note that says so."""
    limit = getattr(hf_config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit >= seq_len:
        return seq_len, []
    if limit < 2:
        raise InputError(f"config.json says max_position_embeddings {limit}; a window has at least 2 tokens")
    return limit, [f"windows are {limit} tokens, the model's limit, instead of {seq_len}"]


def empty_model(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model in evaluation mode with parameters on the meta device and real (computed) buffers.

    Raises:
        InputError: transformers has no causal language model for this configuration.
    """
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # initial values that do not exist cannot be set
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, AttributeError, ImportError, RuntimeError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no causal language model for model_type {config.model_type!r}: {reason}") from error
    model.config.use_cache = False
    model.eval()
    return model


def find_blocks(model: nn.Module) -> list[Block]:
    """The model's blocks: of the outermost lists of alike modules, the one with most linear weights.

    Raises:
        InputError: the model has no repeated blocks with linear layers.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    weights = {n: sum(math.prod(shape(w)) for w in _linears(m, n).values()) for n, m in outermost.items()}
    if not any(weights.values()):
        raise InputError(f"{type(model).__name__} has no list of repeated blocks with linear layers to quantize")
    name = max(weights, key=lambda n: weights[n])
    return [Block(f"{name}.{i}", m, _linears(m, f"{name}.{i}")) for i, m in enumerate(outermost[name])]


def _linears(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    return {f"{prefix}.{n}": m for n, m in module.named_modules() if isinstance(m, LINEAR)}


def shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def check_tokens(windows: Tensor, network: PreTrainedModel) -> None:
    """Raises InputError if a token has no embedding; then tokenizer and model do not belong together."""
    vocabulary = int(network.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"tokens run from {low} to {high}, but the model has {vocabulary}; is the tokenizer another model's?"
        )


class Names:
    """Translates names of a model's tensors to the names a checkpoint uses.

    Checkpoints saved from a bare model lack the head model's prefix (`h.0.` for `transformer.h.0.`) and the other way
    round, and of tied tensors only one may be stored.
    """

    def __init__(self, model: PreTrainedModel, stored: set[str]) -> None:
        self._stored = stored
        self._prefix = model.base_model_prefix + "."
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._tied = {**tied, **{v: k for k, v in tied.items()}}

    def find(self, name: str) -> str | None:
        for candidate in (name, self._tied.get(name)):
            if candidate is None:
                continue
            for spelled in (candidate, candidate.removeprefix(self._prefix), self._prefix + candidate):
                if spelled in self._stored:
                    return spelled
        return None

    def stored(self, name: str) -> str:
        """Raises InputError if the checkpoint has no such tensor."""
        found = self.find(name)
        if found is None:
            raise InputError(f"the checkpoint lacks {name}, which the model described by its config.json needs")
        return found


def check_tensors(network: PreTrainedModel, names: Names, tensors: dict[str, TensorInfo]) -> list[str]:
    """Compare what a model needs with what a checkpoint's headers say it holds; returns notes on what is left over.

    Raises:
        InputError: a tensor is missing, has another shape, or does not hold floating-point numbers.
    """
    used = {names.find(name) for name, _ in network.named_buffers()}
    for name, parameter in network.named_parameters():
        stored = names.stored(name)
        used.add(stored)
        found, needed = tensors[stored], tuple(parameter.shape)
        if found.shape != needed:
            raise InputError(
                f"{stored} has the shape {found.shape}, but config.json describes a model where it is {needed}"
            )
        if not found.dtype.is_floating_point:
            raise InputError(f"{stored} holds {found.dtype}, not floating-point weights; is the checkpoint quantized?")
    used |= {names.find(name) for name in getattr(network, "all_tied_weights_keys", None) or {}}
    extra = [name for name in tensors if name not in used]
    if not extra:
        return []
    return [f"{len(extra)} tensors that the model does not use ({extra[0]} ...) are copied as they are"]


class WeightStream:
    """Moves tensors of a checkpoint into a model that was built without, and out again."""

    def __init__(self, source: Source, names: Names, device: torch.device, dtype: torch.dtype) -> None:
        self._source = source
        self._names = names
        self.device = device
        self._dtype = dtype

    def fill(self, module: nn.Module, prefix: str, skip: Collection[nn.Module] = (), recurse: bool = True) -> None:
        """Give `module`, whose name in the model is `prefix`, its tensors, but not the weights of modules in `skip`.

        Raises:
            InputError: a tensor is missing, has another shape, or is not finite.
        """
        for path, child in module.named_modules() if recurse else [("", module)]:
            name = ".".join(part for part in (prefix, path) if part)
            for key, old in child._parameters.items():
                if old is not None and not (key == "weight" and child in skip):
                    child._parameters[key] = nn.Parameter(self.read(f"{name}.{key}", old), requires_grad=False)
            for key, buffer in child._buffers.items():
                if buffer is not None:
                    saved = key not in child._non_persistent_buffers_set and self._names.find(f"{name}.{key}")
                    child._buffers[key] = self.read(f"{name}.{key}", buffer) if saved else buffer.to(self.device)

    def weight(self, linear: nn.Module, name: str) -> Tensor:
        """The stored weight of a linear layer as (outputs, inputs) float32."""
        W = self.read(f"{name}.weight", linear.weight, torch.float32)  # type: ignore[arg-type]
        return W.T.contiguous() if isinstance(linear, Conv1D) else W

    def set_weight(self, linear: nn.Module, W: Tensor) -> None:
        """Put W (outputs, inputs) into a linear layer, in the dtype that the forward computes in."""
        stored = (W.T if isinstance(linear, Conv1D) else W).to(self._dtype).contiguous()
        linear.weight = nn.Parameter(stored, requires_grad=False)

    def read(self, name: str, old: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor called `name` in the model, which has to have the shape of `old`."""
        stored = self._names.stored(name)
        tensor = self._source.read(stored)
        if tensor.shape != old.shape:
            found, needed = tuple(tensor.shape), tuple(old.shape)
            raise InputError(f"{stored} has the shape {found}, but config.json describes a model where it is {needed}")
        dtype = (dtype or self._dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype)

    @contextmanager
    def on_demand(self, model: nn.Module, blocks: list[Block]) -> Iterator[Callable[[], None]]:
        """Inside, modules outside the blocks read their own tensors when they are called.

        Yields a function that drops what was read so far.
        """
        in_blocks = {module for block in blocks for module in block.module.modules()}
        filled: set[nn.Module] = set()
        handles = []

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, _: object) -> None:
                if module not in filled:
                    self.fill(module, name, recurse=False)
                    filled.add(module)

            return hook

        def drop_all() -> None:
            for module in filled:
                drop(module)
            filled.clear()

        for name, module in model.named_modules():
            if module not in in_blocks and (module._parameters or module._buffers):
                handles.append(module.register_forward_pre_hook(hook_for(name)))
        try:
            yield drop_all
        finally:
            for handle in handles:
                handle.remove()


def drop(module: nn.Module) -> None:
    """Forget the parameters of a module and everything in it; their shapes stay."""
    for child in module.modules():
        for key, parameter in child._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                child._parameters[key] = nn.Parameter(empty, requires_grad=False)


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library would keep it.

    glibc holds freed tensors of up to 32 MB in a heap that fragments, so that a process grows with every block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
