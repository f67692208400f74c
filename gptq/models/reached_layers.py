"""Find the layers that a model's forward reaches for given inputs, before a weight is read.

A forward runs on weights that are all zero. They take no memory, and their products are not computed, so that the cost
does not depend on the size of the model. Which modules run depends on the inputs, not on the weights: a text does not
reach an image encoder.
"""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from gptq.errors import InputError
from gptq.models.blocks import Block, takes_one_of
from gptq.models.experts import Experts
from gptq.models.forward import forward_without_cache, to_device

PRODUCTS = {  # functions of torch whose result is zero if one of their factors is
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "einsum", "linear",
    "matmul", "mm", "__matmul__", "__rmatmul__",
}  # fmt: skip
COPIES = {"bfloat16", "clone", "contiguous", "double", "float", "half", "to", "type", "type_as"}  # of a whole tensor
CPU = torch.device("cpu")


class ZeroWeight(nn.Parameter):
    """A weight of any shape that is zero everywhere and takes the memory of one number."""

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype) -> "ZeroWeight":
        return cls(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)

    @classmethod
    def like(cls, parameter: Tensor) -> "ZeroWeight":
        return cls.of(parameter.shape, torch.float32 if parameter.is_floating_point() else parameter.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in COPIES and isinstance(args[0], cls):
                dtypes = [getattr(x, "dtype", x) for x in (*args[1:], *kwargs.values())]
                return cls.of(args[0].shape, next((x for x in dtypes if isinstance(x, torch.dtype)), args[0].dtype))
            if "grouped_mm" in name:  # x (tokens, in) and one W (in, out) for each group of tokens
                return args[0].new_zeros(len(args[0]), args[1].shape[-1])
            if name in PRODUCTS:
                on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
                found = func(*on_meta[0], **on_meta[1])
                return torch.zeros(found.shape, dtype=found.dtype)
            return tree_map(_keep_zero, func(*args, **kwargs))


def _keep_zero(x: Any) -> Any:
    """Make a view of a ZeroWeight a ZeroWeight too, so that its products are not computed either."""
    is_view = type(x) is Tensor and x.numel() > 1 and x.untyped_storage().nbytes() == x.element_size()
    return ZeroWeight(x, requires_grad=False) if is_view else x


class _StubExperts(Experts):
    """Experts whose output is zero: which of them a token goes to depends on the weights."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def find_unreached_layers(
    network: PreTrainedModel, blocks: list[Block], inputs: Mapping[str, Tensor] | None
) -> set[str]:
    """Return the names of the blocks' layers that no input reaches.

    A layer of a block that is called counts as reached if a layer of the same name but for its numbers is called
    anywhere: which experts of a list are called depends on the weights. Where the forward on zeros fails, only those
    parts are left out that say that they take none of the inputs.

    Args:
        inputs: the model's inputs in one window; None if the layers need no inputs.
    Raises:
        InputError: no layer is reached.
    """
    if inputs is None:
        return set()
    called = _called_modules(network, inputs)
    if called is None:
        missed = {name for block in blocks if not takes_one_of(network, block.name, inputs) for name in block.linears}
    else:
        missed = set(_unreached(blocks, called))
    if all(name in missed for block in blocks for name in block.linears):
        kind, wanted = type(network).__name__, getattr(network, "main_input_name", "other inputs")
        raise InputError(f"{kind} is called on {wanted}, so it needs arrays of them for calibration, not text")
    return missed


def _called_modules(network: PreTrainedModel, inputs: Mapping[str, Tensor]) -> set[str] | None:
    """Return the names of the modules that a forward on zero weights calls; None if that forward fails."""
    probe = _copy_with_zero_weights(network)
    if probe is None:
        return None
    called: set[str] = set()
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: called.add(name))
    try:
        with torch.no_grad():
            forward_without_cache(probe)(**to_device(inputs, CPU, torch.float32))
    except (InputError, RuntimeError, MemoryError):
        return None
    return called


def _unreached(blocks: Iterable[Block], called: Collection[str]) -> Iterator[str]:
    kinds = {re.sub(r"\d+", "*", name) for name in called}
    for block in blocks:
        in_experts = {
            f"{block.name}.{path}.{inner}"
            for path, module in block.module.named_modules()
            if isinstance(module, Experts) and f"{block.name}.{path}" in called
            for inner, _ in module.named_modules()
        }
        for name in block.linears:
            alike = block.name in called and re.sub(r"\d+", "*", name) in kinds
            if not alike and name not in in_experts:
                yield name


def _copy_with_zero_weights(network: PreTrainedModel) -> PreTrainedModel | None:
    """Copy a model and make its weights zero; None if it cannot be copied. Some models keep state from a forward."""
    stubs = {id(module): _StubExperts() for module in network.modules() if isinstance(module, Experts)}
    try:
        probe: PreTrainedModel = copy.deepcopy(network, stubs)
    except Exception:  # of any type, depending on the model's code
        return None
    for module in probe.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = ZeroWeight.like(parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return probe
