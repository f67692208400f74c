"""Tensors that say that they are on a GPU, and are on the CPU: what runs on a GPU runs without one, with real numbers.

Inside `pretend_cuda`, every function of torch is intercepted. Tensors that are made on, or moved to, the device "cuda"
become `OnCuda`; functions compute with what these hold. As on a GPU, a function refuses tensors from both devices, and
a tensor has to be copied to the host before numpy sees it. torch.cuda is replaced by what the package needs of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from gptq.checkpoint.prefetch import CopyAhead
from gptq.compute.background import Background
from gptq.models.placeholders import METADATA_READS, Placeholder, name_of

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MIXES_DEVICES = {"copy_", "__getitem__", "__setitem__", "set_", "to", "type_as", "set_data", "index_put_", "__set__"}
REPORTED = {"device": CUDA, "is_cuda": True, "is_cpu": False}


class OnCuda(Tensor):
    """Stands for `held`, a tensor on the CPU."""

    held: Tensor

    @staticmethod
    def of(held: Tensor) -> "OnCuda":
        with torch._C.DisableTorchFunction():
            made: OnCuda = torch.empty(0).as_subclass(OnCuda)
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class PretendCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, placeholders = kwargs or {}, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Placeholder)]
        if placeholders and name_of(func) in METADATA_READS:
            return Placeholder.__torch_function__(func, types, args, kwargs)
        with self if placeholders else nullcontext():  # what they read goes to the device too
            args, kwargs = tree_map(lambda x: x.value() if isinstance(x, Placeholder) else x, (args, kwargs))
        return compute(func, args, kwargs)


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = name_of(func), tree_leaves((args, kwargs))
    given = [x for x in leaves if isinstance(x, OnCuda)]
    if given and name in REPORTED and args[0] is given[0]:
        return REPORTED[name]
    if given and name in ("numpy", "__array__"):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, OnCuda) and x.ndim and not x.is_meta]
    if given and others and name not in MIXES_DEVICES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")
    if name == "pin_memory":
        return args[0]
    asked = [torch.device(x) for x in leaves if is_device(x)]
    on_cuda = asked[0].type == "cuda" if asked else bool(given) and name not in ("cpu",)
    if name in ("copy_", "to") and not asked:  # as in x.copy_(y), x.to(y)
        like = [x for x in args[:2] if isinstance(x, Tensor)]
        on_cuda = isinstance(like[-1 if name == "to" else 0], OnCuda)
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnCuda) else CPU if is_device(x) else x, (args, kwargs))
    kwargs.pop("pin_memory", None)
    if "out_dtype" in kwargs:  # a product with float32 sums, which the CPU has not
        args = [x.to(kwargs["out_dtype"]) for x in args]
        del kwargs["out_dtype"]
    found = func(*args, **kwargs)
    known = {id(x.held): x for x in given}
    return tree_map(lambda x: wrapped(x, known), found) if on_cuda else found


def wrapped(x: Any, known: dict[int, OnCuda]) -> Any:
    if not is_plain(x):
        return x
    return known[id(x)] if id(x) in known else OnCuda.of(x)


def is_device(x: Any) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] in ("cpu", "cuda"))


def is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, OnCuda | Placeholder) and not x.is_meta


def inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function for another thread, where the mode has to be entered again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with PretendCuda():
            return function(*args, **kwargs)

    return call


@contextmanager
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    event = SimpleNamespace()
    stream = SimpleNamespace(record_event=lambda: event, wait_event=lambda _: None, synchronize=lambda: None)
    with monkeypatch.context() as patch:
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: 1, "mem_get_info": lambda *_: (2**34, 2**34),
            "get_device_name": lambda *_: "a GPU that is none", "current_stream": lambda *_: stream,
            "Stream": lambda *_: stream, "stream": lambda _: nullcontext(), "device": lambda _: nullcontext(),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        patch.setattr(Background, "_run", inside(Background._run))
        patch.setattr(CopyAhead, "_fetch", inside(CopyAhead._fetch))
        with PretendCuda():
            yield
