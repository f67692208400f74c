"""Run a model's forward on weights that are all zero, and record what it computes with, before a weight is read.

Zeros take no memory, and their products are not computed, so that the cost does not depend on the size of the model.
Which modules run depends on the inputs, not on the weights: a text does not reach an image encoder.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from gptq.errors import InputError
from gptq.models.blocks import is_linear
from gptq.models.experts import Experts
from gptq.models.forward import forward_without_cache, to_device
from gptq.models.placeholders import METADATA_READS, flat_arguments, name_of

PRODUCTS = {  # functions of torch whose result is zero if one of their factors is
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "einsum", "linear",
    "matmul", "mm", "__matmul__", "__rmatmul__",
}  # fmt: skip
COPIES = {"bfloat16", "clone", "contiguous", "double", "float", "half", "to", "type", "type_as"}  # of a whole tensor
SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
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
            if name.endswith("_") and not name.endswith("__") and isinstance(args[0], cls):
                return args[0]  # scaled in place, as RWKV does
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


@dataclass
class Trial:
    """What a forward has done; all names are the model's."""

    called: Counter[str] = field(default_factory=Counter)  # modules, and how often
    used: set[str] = field(default_factory=set)  # parameters and buffers that it computed with; no experts'
    direct: set[str] = field(default_factory=set)  # linear layers whose weight it computed with outside their call
    added_to: dict[str, str] = field(default_factory=dict)  # linear layer -> module, to whose input it adds its output
    failure: str = ""  # why it did not come to its end


class _Recorder(TorchFunctionMode):
    """While active, records in a trial the parameters and buffers of a model that are computed with."""

    def __init__(self, network: nn.Module, trial: Trial) -> None:
        super().__init__()
        self._trial = trial
        self._names: dict[int, list[str]] = defaultdict(list)  # by the id of a tensor
        self._weights: dict[int, str] = {}  # the linear layer of a weight, by its id
        self._running: set[int] = set()  # ids of the weights whose layer is being called
        self._sums = _SumRecorder(trial.added_to)
        tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            self._names[id(tensor)].append(name)
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda _, __, name=name: trial.called.update([name]))
            module.register_forward_pre_hook(partial(self._sums.enter, name), with_kwargs=True)
            if is_linear(module):
                weight = id(module.weight)
                self._weights[weight] = name
                module.register_forward_pre_hook(lambda _, __, weight=weight: self._running.add(weight))
                module.register_forward_hook(lambda _, __, ___, weight=weight: self._running.discard(weight))
                module.register_forward_hook(partial(self._sums.leave, name))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if name_of(function) not in METADATA_READS:
            for number in map(id, flat_arguments(args, kwargs)):
                self._trial.used.update(self._names.get(number, ()))
                if number in self._weights and number not in self._running:
                    self._trial.direct.add(self._weights[number])
            if name_of(function) in SUMS:
                self._sums.add(*args[:2])
        return function(*args, **kwargs)


class _SumRecorder:
    """Finds linear layers whose output is added to what is also the input of a module, as residual connections do."""

    def __init__(self, added_to: dict[str, str]) -> None:
        self._added_to = added_to
        self._inputs: MutableMapping[Tensor, str] = WeakIdKeyDictionary()  # the last module that was called on it
        self._outputs: MutableMapping[Tensor, str] = WeakIdKeyDictionary()  # of linear layers

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(first, Tensor):
            self._inputs[first] = name

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._outputs[output] = name

    def add(self, *terms: Any) -> None:
        if len(terms) == 2 and all(isinstance(x, Tensor) for x in terms) and terms[0].shape == terms[1].shape:
            for base, output in (terms, terms[::-1]):
                if base in self._inputs and output in self._outputs:
                    self._added_to[self._outputs[output]] = self._inputs[base]


def run_trial(network: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Trial:
    """Run a copy of a model, whose weights may be on the meta device, with zeros for its weights.

    Experts are not run: which of them a token goes to depends on the weights.

    Args:
        inputs: the model's inputs in one window, on any device.
    """
    trial = Trial()
    try:
        probe = _copy_with_zero_weights(network)
    except Exception as error:  # of any type, depending on the model's code
        trial.failure = f"the model cannot be copied: {type(error).__name__}: {error}"
        return trial
    recorder = _Recorder(probe, trial)
    try:
        with torch.no_grad(), recorder:
            forward_without_cache(probe)(**to_device(inputs, CPU, torch.float32))
    except (InputError, RuntimeError, MemoryError) as error:
        trial.failure = " ".join(str(error).split())
    return trial


def _copy_with_zero_weights(network: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, because some keep state from a forward, and make the copy's weights zero."""
    stubs = {id(module): _StubExperts() for module in network.modules() if isinstance(module, Experts)}
    probe: PreTrainedModel = copy.deepcopy(network, stubs)
    for module in probe.modules():
        for key, parameter in [*module._parameters.items()]:
            if parameter is not None:
                setattr(module, key, ZeroWeight.like(parameter))
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return probe
