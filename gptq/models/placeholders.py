"""Parameters that stand in for weights that are not in memory: they have a shape, a dtype and a device, and no values.

A model on the meta device says that its weights are on "meta", and torch may turn a product with one of them into
uninitialized memory instead of an error. A placeholder says where its weight will be, and computing with it reads the
weight (`DeferredWeight`) or is an error (`UnsolvedWeight`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gptq.errors import InputError

METADATA_READS = {  # functions of torch that read a tensor's shape, dtype or device, but not its values
    "device", "dim", "dtype", "empty_like", "is_complex", "is_contiguous", "is_cpu", "is_cuda", "element_size",
    "is_floating_point", "is_meta", "is_quantized", "is_sparse", "itemsize", "layout", "nbytes", "ndim", "nelement",
    "numel", "requires_grad", "shape", "size", "stride",
}  # fmt: skip


def name_of(function: Any) -> str:
    """Return the name of a function of torch, or of a method or property of tensors."""
    name = getattr(function, "__name__", "")
    return getattr(function.__self__, "__name__", "") if name == "__get__" else name


def flat_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield all arguments of a call, and the elements of those that are lists or tuples."""
    for x in (*args, *kwargs.values()):
        yield from x if isinstance(x, list | tuple) else (x,)


class Placeholder(nn.Parameter):
    """A parameter on the meta device that reports the device on which its weight will be."""

    reported_device: torch.device

    def value(self) -> Tensor:
        """Return the weight."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), name_of(func)
        if name in _REPORTED and isinstance(args[0], Placeholder):
            return _REPORTED[name](args[0].reported_device)
        if name not in METADATA_READS:
            args, kwargs = tree_map(lambda x: x.value() if isinstance(x, Placeholder) else x, (args, kwargs))
        elif name == "empty_like":
            kwargs.setdefault("device", args[0].reported_device)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_REPORTED: dict[str, Callable[[torch.device], Any]] = {  # models move a layer's input to the device of its weight
    "device": lambda device: device,
    "is_meta": lambda device: False,
    "is_cpu": lambda device: device.type == "cpu",
    "is_cuda": lambda device: device.type == "cuda",
}


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class DeferredWeight(Placeholder):
    """Stands in for a parameter that is read when the model first computes with it, whichever module does."""

    read: Callable[[], Tensor]  # reads the parameter, and puts it in the place of this one

    @classmethod
    def of(
        cls, parameter: Tensor, dtype: torch.dtype, device: torch.device, read: Callable[[], Tensor]
    ) -> "DeferredWeight":
        """Stand in for `parameter`, which will be of type `dtype` if it holds floating-point numbers."""
        kept = dtype if parameter.is_floating_point() else parameter.dtype
        placeholder = cls(_empty(parameter.shape, kept), requires_grad=False)
        placeholder.read, placeholder.reported_device = read, device
        return placeholder

    def value(self) -> Tensor:
        return self.read()


class UnsolvedWeight(Placeholder):
    """Stands in for the weight of a layer that is not solved yet; computing with it is an error.

    Raises:
        InputError: the model computes with the weight.
    """

    layer: str  # the layer's name in the model

    @classmethod
    def of(cls, linear: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> "UnsolvedWeight":
        weight: Tensor = linear.weight  # type: ignore[assignment]
        placeholder = cls(_empty(weight.shape, dtype), requires_grad=False)
        placeholder.layer, placeholder.reported_device = name, device
        return placeholder

    def value(self) -> Tensor:
        raise InputError(
            f"the model computes with the weight of {self.layer} without calling the layer, so what the layer gets is "
            f"not known; leave it as it is: --override '{self.layer.rpartition('.')[2]}:skip'"
        )
