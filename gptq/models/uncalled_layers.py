"""Find linear layers whose weight the model uses directly, without calling the layer: Mamba's `dt_proj`, some routers.

The input of such a layer cannot be observed, so the layer cannot be quantized. A forward pass on the meta device finds
most of them before a run, and they stay as they are. The run stops with an error where the model uses any other
unsolved weight directly (`UnsolvedWeight`).
"""

import copy
import inspect
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from gptq.errors import InputError
from gptq.models.blocks import Block, group_fused_siblings, shape_of
from gptq.models.experts import Experts
from gptq.models.forward import forward_without_cache, to_device
from gptq.models.placeholders import METADATA_READS, flat_arguments, name_of

MAX_FALSE_ANSWERS = 10_000  # comparisons that come out False on the meta device; some models loop until one is True


class _WeightUseRecorder(TorchFunctionMode):
    """While active, records the layers whose weight is used before the layer is called."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: set[str] = set()  # names of the recorded layers
        self._false_answers = 0
        self._not_called = {id(linear.weight): name for name, linear in linears.items()}
        for linear in linears.values():
            linear.register_forward_pre_hook(self._forget)

    def _forget(self, linear: nn.Module, _: Any) -> None:
        self._not_called.pop(id(linear.weight), None)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(function)
        if name not in METADATA_READS:
            used = (id(x) for x in flat_arguments(args, kwargs))
            self.found |= {self._not_called[x] for x in used if x in self._not_called}
        if name == "__bool__" and args[0].is_meta and self._false_answers < MAX_FALSE_ANSWERS:
            self._false_answers += 1
            return False  # a meta tensor has no value, and bool() would raise; either answer lets the forward continue
        return function(*args, **kwargs)


def find_uncalled_layers(network: PreTrainedModel, blocks: Iterable[Block], inputs: Mapping[str, Tensor]) -> list[str]:
    """Return the names of linear layers whose weight the model uses before it calls the layer, or without calling it.

    Runs a forward on the meta device, which may stop early because it needs a tensor's value. For each layer found, the
    result also has the layers of the same name in other modules of the same class, and the layers that engines fuse
    with these. A model whose source code mentions no layer's `.weight` is not run.

    Args:
        inputs: the model's inputs, on any device.
    """
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    modules = dict(network.named_modules())
    attributes = {name: _class_and_attribute(name, modules) for name in linears}
    if not any(_source_mentions_weight(kind, own) for kind, own in set(attributes.values())):
        return []
    probe = _copy_without_experts(network)
    if probe is None:
        return []
    recorder = _WeightUseRecorder({name: module for name, module in probe.named_modules() if name in linears})
    shapes = to_device(inputs, torch.device("meta"), next(probe.parameters()).dtype)
    with torch.no_grad(), recorder, suppress(InputError):  # UnsolvedWeight finds what lies beyond an early stop
        forward_without_cache(probe)(**shapes)
    found = {attributes[name] for name in recorder.found}
    uncalled = []
    for names in group_fused_siblings(linears):  # grouped by name only: RWKV's key and value have different inputs
        num_inputs = {shape_of(linears[name])[1] for name in names if attributes[name] in found}
        uncalled += [name for name in names if shape_of(linears[name])[1] in num_inputs]
    return uncalled


def _copy_without_experts(network: PreTrainedModel) -> PreTrainedModel | None:
    """Copy a model to the meta device, because some models keep state from a forward; None if it cannot be copied.

    Each list of experts is replaced by an empty list whose output has the shape of its input: routing needs values.
    """
    stubs = {id(module): _stub_experts(module) for module in network.modules() if isinstance(module, Experts)}
    try:
        probe: PreTrainedModel = copy.deepcopy(network, stubs).to("meta")  # type: ignore[arg-type]
    except Exception:  # of any type, depending on the model's code
        return None
    return probe


def _stub_experts(experts: Experts) -> Experts:
    stub = copy.copy(experts)
    vars(stub).update(_modules={}, forward=lambda x, *_, **__: torch.empty_like(x))
    return stub


def _class_and_attribute(name: str, modules: Mapping[str, nn.Module]) -> tuple[type[nn.Module], str]:
    """Return the class of the module that contains a layer, and the layer's attribute name there."""
    parent, _, own = name.rpartition(".")
    return type(modules[parent]), own


def _source_mentions_weight(kind: type[nn.Module], layer: str) -> bool:
    """Whether a source file of a module's class, or of a base class, contains `.<layer>.weight`."""
    for base in kind.__mro__:
        if base not in (nn.Module, object):
            try:
                code = _read_source(inspect.getfile(base))
            except (OSError, TypeError):
                return True  # no source to search
            if re.search(rf"\.{re.escape(layer)}\.weight\b", code):
                return True
    return False


@cache
def _read_source(file: str) -> str:
    return Path(file).read_text(encoding="utf-8", errors="replace")
