"""Stream a checkpoint's tensors into a model on the meta device, and drop them again.

A module's tensors are read just before it runs, and dropped when it is done.
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
    """Reads a checkpoint's tensors into a model that was built on the meta device."""

    def __init__(self, source: Source, names: Names, device: torch.device, dtype: torch.dtype) -> None:
        self._source = source
        self._names = names
        self.device = device
        self.dtype = dtype
        self.prefetcher: ReadAhead | CopyAhead = ReadAhead(source)

    def fill(self, module: nn.Module, prefix: str, skip: Collection[nn.Module] = (), recurse: bool = True) -> None:
        """Read the tensors of `module`, whose name in the model is `prefix`, except weights of modules in `skip`.

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
        """Read the weight of a linear layer as (outputs, inputs) float32."""
        W = self.read(f"{name}.weight", torch.float32)
        return W.T.contiguous() if is_transposed(linear) else W

    def set_weight(self, linear: nn.Module, W: Tensor) -> None:
        """Make W (outputs, inputs) the weight of a linear layer, in the forward's dtype."""
        linear.weight = nn.Parameter(self.to_forward_layout(linear, W), requires_grad=False)

    def to_forward_layout(self, linear: nn.Module, W: Tensor) -> Tensor:
        """Return W (outputs, inputs) as the layer holds it: transposed for a Conv1D, and in the forward's dtype."""
        return (W.T if is_transposed(linear) else W).to(self.dtype).contiguous()

    def is_stored_whole(self, name: str) -> bool:
        """Whether the tensor called `name` in the model is one tensor of the checkpoint, not assembled from parts."""
        return self._names.find(name) is not None

    def to_stored(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """Return the checkpoint's name for the tensor called `name` in the model, and `tensor` in the stored dtype."""
        stored = self._names.require(name)
        return stored, tensor.to(self._source.tensors[stored].dtype)

    def prefetch_to_device(self) -> None:
        """From now on, prefetch to the device, which must have room for two blocks in their stored dtype."""
        self.prefetcher.join(cancel=True)
        self.prefetcher = CopyAhead(self._source, self.device)

    def prefetch(self, names: Iterable[str]) -> None:
        """Start to read these tensors, by their names in the model, in the background."""
        self.prefetcher.start([stored for name in names for stored in self._names.find_all(name)])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor called `name` in the model; `check_tensors` has to have accepted the checkpoint before."""
        split, dtype = self._names.find_split(name), dtype or self.dtype
        if split is not None:
            return split.assemble(lambda stored: self._read(stored, dtype))
        return self._read(self._names.require(name), dtype)

    def _read(self, stored: str, dtype: torch.dtype) -> Tensor:
        found = self.prefetcher.take(stored)
        if found is None:
            return self._source.read(stored, dtype).to(self.device)
        return found.to(dtype) if found.is_floating_point() else found

    @contextmanager
    def read_on_demand(self, model: PreTrainedModel, blocks: list[Block]) -> Iterator[Callable[[], None]]:
        """Inside, each module outside the blocks reads its tensors when it is first called.

        Yields a function that drops the tensors read so far.
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
                _refuse_meta_inputs(name, inputs)
                if module not in filled:
                    self.fill(module, name, recurse=False)
                    filled.add(module)

            return hook

        def drop_all() -> None:
            for module in filled:
                drop_parameters(module)
            filled.clear()

        for name, module in outside.items():
            hook = hook_for(name)
            handles.append(module.register_forward_pre_hook(hook))
            if module is embedding:
                hook(module, ())  # fill it before the call: Llama 4 moves tokens to the device of its weight
        try:
            yield drop_all
        finally:
            for handle in handles:
                handle.remove()


def _embedding_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the model's token embedding, if it names one."""
    try:
        found: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def _refuse_meta_inputs(name: str, inputs: tuple[Any, ...]) -> None:
    """Check that a module is not called on meta tensors, which torch may silently turn into uninitialized memory.

    Raises:
        InputError: an input is a meta tensor.
    """
    if any(isinstance(x, Tensor) and x.is_meta for x in inputs):
        raise InputError(f"the model sends what {name} gets to where its weights are, before they are read")


def drop_parameters(module: nn.Module) -> None:
    """Free the parameters of a module and its submodules; their shapes stay, on the meta device."""
    for child in module.modules():
        for key, parameter in child._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                child._parameters[key] = nn.Parameter(empty, requires_grad=False)


@contextmanager
def swapped_weights(weights: Mapping[nn.Module, nn.Parameter | None]) -> Iterator[None]:
    """Inside, layers compute with these weights instead of their own; None leaves a layer as it is."""
    own = {linear: linear._parameters["weight"] for linear, weight in weights.items() if weight is not None}
    try:
        for linear in own:
            linear._parameters["weight"] = weights[linear]
        yield
    finally:
        for linear, weight in own.items():
            linear._parameters["weight"] = weight
