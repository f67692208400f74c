"""Activations between blocks in files instead of memory.

A tensor on the shelf keeps its place in the model's own variables; what changes is the memory behind it, which becomes
a mapped file. The file has no name, so that however the process ends, nothing is left on the disk. The operating system
brings pages back when they are read; `release` gives back those that are resident.
"""

import ctypes
import mmap
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST = 2**16  # bytes of a tensor that is worth a file
DESCRIPTORS = Path("/proc/self/fd")


class Shelf:
    """Where tensors go that nobody needs for a while; without a folder they stay where they are."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._mapped: dict[int, weakref.ref[Tensor]] = {}  # by address

    def put(self, value: Any) -> Any:
        """Move the tensors of host memory in `value` (a tensor, or containers of them) to files; returns `value`.

        Raises:
            OSError: the disk is full.
        """
        for tensor in _tensors(value) if self._folder is not None else ():
            whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
            if tensor.device.type == "cpu" and whole and tensor.nbytes >= LEAST and not self._holds(tensor):
                tensor.data = self._map(tensor)
                self._mapped[tensor.data_ptr()] = weakref.ref(tensor)
        return value

    def release(self) -> None:
        """Give back the memory of all that is on the shelf; what it holds stays."""
        for address, reference in list(self._mapped.items()):
            tensor = reference()
            if tensor is None or tensor.data_ptr() != address:  # perhaps unmapped, and another's memory by now
                del self._mapped[address]
            else:
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(address), ctypes.c_size_t(tensor.nbytes), int(mmap.MADV_DONTNEED)
                )

    def releasing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that begins with `release`."""
        return function if self._folder is None else partial(self._release_and_call, function)

    def _release_and_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.release()
        return function(*args, **kwargs)

    def _holds(self, tensor: Tensor) -> bool:
        reference = self._mapped.get(tensor.data_ptr())
        held = None if reference is None else reference()
        return held is not None and held.data_ptr() == tensor.data_ptr()

    def _map(self, tensor: Tensor) -> Tensor:
        content = tensor.detach().reshape(-1).view(torch.uint8)
        nameless = DESCRIPTORS.is_dir()
        make = tempfile.TemporaryFile if nameless else tempfile.NamedTemporaryFile
        with make(dir=self._folder) as file:  # written and not just mapped, so that a full disk is an error here
            file.write(content.numpy().data)
            file.flush()
            name = str(DESCRIPTORS / str(file.fileno()) if nameless else file.name)
            mapped = torch.from_file(name, shared=True, size=len(content), dtype=torch.uint8)
        return mapped.view(tensor.dtype).view(tensor.shape)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors([*value.values()])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
