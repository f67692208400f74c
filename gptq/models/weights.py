"""A checkpoint's tensors into a model that was built without, and out again.

A module's tensors are read when it is about to run, and dropped when it is done.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.checkpoint.prefetch import CopyAhead, ReadAhead
from gptq.checkpoint.reader import Source
from gptq.errors import InputError
from gptq.models.blocks import Block, is_transposed
from gptq.models.tensor_names import Names


class WeightStream:
    """Moves tensors of a checkpoint into a model that was built without, and out again."""

    def __init__(self, source: Source, names: Names, device: torch.device, dtype: torch.dtype) -> None:
        self._source = source
        self._names = names
        self.device = device
        self.dtype = dtype
        self.ahead: ReadAhead | CopyAhead = ReadAhead(source)

    def fill(self, module: nn.Module, prefix: str, skip: Collection[nn.Module] = (), recurse: bool = True) -> None:
        """Give `module`, whose name in the model is `prefix`, its tensors, but not the weights of modules in `skip`.

        Raises:
            InputError: a tensor is missing or not finite.
        """
        for path, child in module.named_modules() if recurse else [("", module)]:
            name = ".".join(part for part in (prefix, path) if part)
            for key, old in child._parameters.items():
                if old is not None and not (key == "weight" and child in skip):
                    child._parameters[key] = nn.Parameter(self.read(f"{name}.{key}"), requires_grad=False)
            for key, buffer in child._buffers.items():
                if buffer is not None:
                    saved = key not in child._non_persistent_buffers_set and self._names.find(f"{name}.{key}")
                    child._buffers[key] = self.read(f"{name}.{key}") if saved else buffer.to(self.device)

    def weight(self, linear: nn.Module, name: str) -> Tensor:
        """The stored weight of a linear layer as (outputs, inputs) float32."""
        W = self.read(f"{name}.weight", torch.float32)
        return W.T.contiguous() if is_transposed(linear) else W

    def set_weight(self, linear: nn.Module, W: Tensor) -> None:
        """Put W (outputs, inputs) into a linear layer, in the dtype that the forward computes in."""
        linear.weight = nn.Parameter(self.computed_with(linear, W), requires_grad=False)

    def computed_with(self, linear: nn.Module, W: Tensor) -> Tensor:
        """W (outputs, inputs) as the linear layer holds it, in its own order and the forward's dtype."""
        return (W.T if is_transposed(linear) else W).to(self.dtype).contiguous()

    def has_own(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor called `name` in the model as one."""
        return self._names.find(name) is not None

    def as_stored(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """The checkpoint's name of the tensor called `name` in the model, and new values for it in the stored dtype."""
        stored = self._names.stored(name)
        return stored, tensor.to(self._source.tensors[stored].dtype)

    def copy_ahead(self) -> None:
        """From now on what is read ahead goes to the device, where there is room for two blocks as they are stored."""
        self.ahead.join(cancel=True)
        self.ahead = CopyAhead(self._source, self.device)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have these tensors fetched, by their names in the model, while something else is done."""
        self.ahead.start([stored for name in names for stored in self._names.all_of(name)])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor called `name` in the model, which `check_tensors` has compared with it."""
        parted, dtype = self._names.parted(name), dtype or self.dtype
        if parted is not None:
            return parted.whole(lambda stored: self._read(stored, dtype))
        return self._read(self._names.stored(name), dtype)

    def _read(self, stored: str, dtype: torch.dtype) -> Tensor:
        found = self.ahead.take(stored)
        if found is None:
            return self._source.read(stored, dtype).to(self.device)
        return found.to(dtype) if found.is_floating_point() else found

    @contextmanager
    def on_demand(self, model: PreTrainedModel, blocks: list[Block]) -> Iterator[Callable[[], None]]:
        """Inside, modules outside the blocks read their own tensors when they are called.

        Yields a function that drops what was read so far.
        """
        in_blocks = {module for block in blocks for module in block.module.modules()}
        outside = {
            name: module
            for name, module in model.named_modules()
            if module not in in_blocks and (module._parameters or module._buffers)
        }
        embedding = _embedding_of(model)
        filled: set[nn.Module] = set()
        handles = []

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                _refuse_nothing(name, inputs)
                if module not in filled:
                    self.fill(module, name, recurse=False)
                    filled.add(module)

            return hook

        def drop_all() -> None:
            for module in filled:
                drop(module)
            filled.clear()

        for name, module in outside.items():
            hook = hook_for(name)
            handles.append(module.register_forward_pre_hook(hook))
            if module is embedding:
                hook(module, ())  # before it is called: Llama 4 sends tokens to where its weight is
        try:
            yield drop_all
        finally:
            for handle in handles:
                handle.remove()


def _embedding_of(model: PreTrainedModel) -> nn.Module | None:
    try:
        found: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def _refuse_nothing(name: str, inputs: tuple[Any, ...]) -> None:
    """Raises InputError where a module is given tensors without numbers, out of which torch would make some."""
    if any(isinstance(x, Tensor) and x.is_meta for x in inputs):
        raise InputError(f"the model sends what {name} gets to where its weights are, before they are read")


def drop(module: nn.Module) -> None:
    """Forget the parameters of a module and everything in it; their shapes stay."""
    for child in module.modules():
        for key, parameter in child._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                child._parameters[key] = nn.Parameter(empty, requires_grad=False)


@contextmanager
def swapped_weights(weights: Mapping[nn.Module, nn.Parameter | None]) -> Iterator[None]:
    """Inside, layers compute with these weights instead of their own."""
    own = {linear: linear._parameters["weight"] for linear, weight in weights.items() if weight is not None}
    try:
        for linear in own:
            linear._parameters["weight"] = weights[linear]
        yield
    finally:
        for linear, weight in own.items():
            linear._parameters["weight"] = weight
