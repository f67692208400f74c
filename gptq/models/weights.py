"""Stream a checkpoint's tensors into a model on the meta device, and drop them again.

A module's tensors are read just before it runs, and dropped when it is done.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.checkpoint.prefetch import CopyAhead, ReadAhead
from gptq.checkpoint.reader import Source
from gptq.errors import InputError
from gptq.models.blocks import Block, is_transposed
from gptq.models.placeholders import DeferredWeight, Placeholder, UnsolvedWeight
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
            for key, old in child._parameters.items():
                if old is not None and not (key == "weight" and child in skip):
                    child._parameters[key] = self._read_parameter(join_names(prefix, path, key))
            self._fill_buffers(child, join_names(prefix, path))

    def _fill_buffers(self, module: nn.Module, prefix: str) -> None:
        """Read the buffers of `module` alone that the checkpoint holds; move the others to the device."""
        for key, buffer in module._buffers.items():
            if buffer is not None:
                stored = self._names.find(join_names(prefix, key))
                if stored and key not in module._non_persistent_buffers_set:
                    buffer = self._source.read_unchecked(stored)  # a mask holds infinity
                    dtype = self.dtype_of(join_names(prefix, key))
                    buffer = buffer.to(dtype) if buffer.is_floating_point() else buffer
                module._buffers[key] = buffer.to(self.device)

    def _read_parameter(self, name: str) -> nn.Parameter:
        return nn.Parameter(self.read(name), requires_grad=False)

    def defer(self, module: nn.Module, prefix: str, unsolved: Collection[nn.Module] = ()) -> None:
        """Replace the parameters of `module` by placeholders, which read themselves when the model computes with them.

        The weights of the linear layers in `unsolved` become placeholders that the model may not compute with.
        """
        for path, child in module.named_modules():
            self._defer_own(child, join_names(prefix, path), is_unsolved=child in unsolved)

    def _defer_own(self, module: nn.Module, name: str, is_unsolved: bool = False) -> None:
        for key, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, Placeholder):
                continue
            if key == "weight" and is_unsolved:
                module._parameters[key] = self.unsolved(name, module)
            else:
                own = join_names(name, key)
                read = partial(self._read_in_place, module, key, own)
                module._parameters[key] = DeferredWeight.of(parameter, self.dtype_of(own), self.device, read)

    def _read_deferred(self, module: nn.Module, name: str) -> None:
        """Read the parameters of `module` alone that are not read yet."""
        for key, parameter in module._parameters.items():
            if isinstance(parameter, DeferredWeight):
                self._read_in_place(module, key, join_names(name, key))

    def _read_in_place(self, module: nn.Module, key: str, name: str) -> Tensor:
        held = module._parameters[key]
        if held is None or isinstance(held, DeferredWeight):
            module._parameters[key] = held = self._read_parameter(name)
        return held

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which the model computes with the tensor called `name` in the model."""
        return self._names.dtype_of(name, self.dtype)

    def weight(self, linear: nn.Module, name: str) -> Tensor:
        """Read the weight of a linear layer as (outputs, inputs) float32."""
        W = self.read(f"{name}.weight", torch.float32)
        return W.T.contiguous() if is_transposed(linear) else W

    def original_parameter(self, name: str) -> nn.Parameter:
        """Read the weight of a linear layer as the layer holds it, in the forward's dtype."""
        return nn.Parameter(self.read(f"{name}.weight").contiguous(), requires_grad=False)

    def unsolved(self, name: str, linear: nn.Module) -> UnsolvedWeight:
        """Return what stands in for the weight of the layer called `name` until it is solved."""
        return UnsolvedWeight.of(linear, name, self.dtype_of(f"{name}.weight"), self.device)

    def set_weight(self, name: str, linear: nn.Module, W: Tensor) -> None:
        """Make W (outputs, inputs) the weight of the linear layer called `name`, in the forward's dtype."""
        linear.weight = nn.Parameter(self.to_forward_layout(name, linear, W), requires_grad=False)

    def to_forward_layout(self, name: str, linear: nn.Module, W: Tensor) -> Tensor:
        """Return W (outputs, inputs) as the layer called `name` holds it: in its dtype, transposed for a Conv1D."""
        return (W.T if is_transposed(linear) else W).to(self.dtype_of(f"{name}.weight")).contiguous()

    def is_stored_whole(self, name: str) -> bool:
        """Whether the tensor called `name` in the model is one tensor of the checkpoint: no more, and no less."""
        found = self._names.find(name)
        whole = found is not None and self._names.find_split(name) is None
        return whole and self._source.undivided(self._names.require(name))[0] == found

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
        part, split, dtype = self._names.find_slice(name), self._names.find_split(name), dtype or self.dtype_of(name)
        if name in self._names.computed:
            return self._names.computed[name].to(self.device, dtype)
        if part is not None:
            one = part.read(lambda stored, at: self._source.read(stored, dtype, slice(at, at + 1))[0])
            return one.to(self.device).contiguous()
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

        A parameter that the model computes with in another way is read at that moment. Until then, all parameters say
        that they are on the device of the forward. Buffers outside the blocks are read at once.

        Yields a function that drops the parameters read so far, except those of modules that contain a block: their
        forward goes on after the block.
        """
        in_blocks = {module for block in blocks for module in block.module.modules()}
        outside = {module: name for name, module in model.named_modules() if module not in in_blocks}
        ended = {module: name for module, name in outside.items() if in_blocks.isdisjoint(module.modules())}

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            _refuse_meta_inputs(outside[module], inputs)
            self._read_deferred(module, outside[module])

        def drop_all() -> None:
            for module, name in ended.items():
                self._defer_own(module, name)

        for module, name in outside.items():
            self._defer_own(module, name)
            self._fill_buffers(module, name)
        for block in blocks:
            self.defer(block.module, block.name, block.linears.values())
        handles = [m.register_forward_pre_hook(hook) for m in outside if m._parameters or m._buffers]
        try:
            yield drop_all
        finally:
            for handle in handles:
                handle.remove()
            drop_parameters(model)


def join_names(*parts: str) -> str:
    """Join the parts of a tensor's name; the outermost module's own is empty."""
    return ".".join(part for part in parts if part)


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
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
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
