"""Weights that a model computes with itself, where others call the layer: Mamba's `dt_proj`, some routers.

What such a layer gets is never seen, so it cannot be quantized. A forward without numbers finds most of them before a
run, and the layers stay as they are; any other ends the run when its weight is asked for.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from gptq.errors import InputError
from gptq.models.blocks import Block, fused_siblings, shape
from gptq.models.experts import Experts
from gptq.models.forward import to_device, with_defaults

DEVICE = torch.Tensor.device.__get__
LOOKS = {  # at a weight's outside
    "device", "dim", "dtype", "element_size", "empty_like", "is_complex", "is_contiguous", "is_cpu", "is_cuda",
    "is_floating_point", "is_meta", "is_quantized", "is_sparse", "itemsize", "layout", "nbytes", "ndim", "nelement",
    "numel", "requires_grad", "shape", "size", "stride",
}  # fmt: skip
ANSWERS = 10_000  # that a forward without numbers is given when it asks for one; some ask until they like it


def _name_of(function: Any) -> str:
    """Of a function of torch, a method or a property of tensors."""
    name = getattr(function, "__name__", "")
    return getattr(function.__self__, "__name__", "") if name == "__get__" else name


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """What a function of torch is called on, and what lists of its arguments hold."""
    for x in (*args, *kwargs.values()):
        yield from x if isinstance(x, list | tuple) else (x,)


class _Watch(TorchFunctionMode):
    """Takes down which of some layers' weights are computed with before the layer is called."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._answers = 0
        self._weights = {id(linear.weight): name for name, linear in linears.items()}
        for linear in linears.values():
            linear.register_forward_pre_hook(self._let)

    def _let(self, linear: nn.Module, _: Any) -> None:
        self._weights.pop(id(linear.weight), None)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, _name_of(function)
        if name not in LOOKS:
            self.found |= {self._weights[id(x)] for x in _given(args, kwargs) if id(x) in self._weights}
        if name == "__bool__" and args[0].is_meta and self._answers < ANSWERS:
            self._answers += 1
            return False  # whichever way it goes, the forward goes on
        return function(*args, **kwargs)


def not_called(network: PreTrainedModel, blocks: Iterable[Block], inputs: Mapping[str, Tensor]) -> list[str]:
    """Names of linear layers with whose weights a model on the meta device computes before it calls them, if it does.

    Found are those that a forward comes by before it wants to know a number, those of the same name in modules of the
    same class, and what engines fuse with them. Only models run whose code mentions such a weight.

    Args:
        inputs: what the model is called on, of any device.
    """
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    modules = dict(network.named_modules())
    homes = {name: _home(name, modules) for name in linears}
    if not any(_mentions(kind, own) for kind, own in set(homes.values())):
        return []
    tried = _copied(network)
    if tried is None:
        return []
    watch = _Watch({name: module for name, module in tried.named_modules() if name in linears})
    shapes = to_device(inputs, torch.device("meta"), next(tried.parameters()).dtype)
    with torch.no_grad(), watch, suppress(InputError):  # it may want a number; of the rest the run will tell
        with_defaults(tried)(**shapes)
    found = {homes[name] for name in watch.found}
    alone = []
    for names in fused_siblings(linears):  # by name: RWKV calls layers key and value that have other inputs
        widths = {shape(linears[name])[1] for name in names if homes[name] in found}
        alone += [name for name in names if shape(linears[name])[1] in widths]
    return alone


def _copied(network: PreTrainedModel) -> PreTrainedModel | None:
    """A copy to try things with, as models keep some; its lists of experts are empty and give back what they get.

    None where there is no copy of something that the model holds.
    """
    stubs = {id(module): _without_experts(module) for module in network.modules() if isinstance(module, Experts)}
    try:
        tried: PreTrainedModel = copy.deepcopy(network, stubs).to("meta")  # type: ignore[arg-type]
    except Exception:  # of any type, depending on the model's code
        return None
    return tried


def _without_experts(experts: Experts) -> Experts:
    stub = copy.copy(experts)  # who is sent to which depends on numbers
    vars(stub).update(_modules={}, forward=lambda x, *_, **__: torch.empty_like(x))
    return stub


def _home(name: str, modules: Mapping[str, nn.Module]) -> tuple[type[nn.Module], str]:
    """The class of the module around a layer, and what it calls the layer."""
    parent, _, own = name.rpartition(".")
    return type(modules[parent]), own


def _mentions(kind: type[nn.Module], layer: str) -> bool:
    """Whether a file that has a part in the class of a module speaks of the weight of what it calls `layer`."""
    for base in kind.__mro__:
        if base not in (nn.Module, object):
            try:
                code = _text_of(inspect.getfile(base))
            except (OSError, TypeError):
                return True  # it cannot be looked at
            if re.search(rf"\.{re.escape(layer)}\.weight\b", code):
                return True
    return False


@cache
def _text_of(file: str) -> str:
    return Path(file).read_text(encoding="utf-8", errors="replace")


class UnsolvedWeight(nn.Parameter):
    """The weight of a layer that is still to be solved; it has a shape, and nothing computes with it.

    torch would: a product with a tensor on the meta device is made of whatever lies in memory. So the model is stopped.
    """

    layer: str
    home: torch.device  # where it will be

    @classmethod
    def of(cls, linear: nn.Module, name: str, device: torch.device) -> "UnsolvedWeight":
        empty = torch.empty_like(linear.weight, device="meta")  # type: ignore[arg-type]
        unread = cls(empty, requires_grad=False)
        unread.layer, unread.home = name, device
        return unread

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == DEVICE:  # models send there what the layer gets
            return args[0].home
        if _name_of(func) not in LOOKS:
            name = next(x.layer for x in _given(args, kwargs or {}) if isinstance(x, UnsolvedWeight))
            raise InputError(
                f"the model computes with the weight of {name} without calling the layer, so what the layer gets is "
                f"not known; leave it as it is: --override '{name.rpartition('.')[2]}:skip'"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
