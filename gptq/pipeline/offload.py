"""Move activations that wait between blocks from memory to files, to reduce peak memory.

An offloaded tensor stays the same object; its storage becomes a memory-mapped file. The file has no name, so that
nothing is left on the disk however the process ends. Reading the tensor loads pages of the file into memory; `release`
frees the pages that are loaded.
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

MIN_BYTES = 2**16  # smaller tensors stay in memory
DESCRIPTORS = Path("/proc/self/fd")  # links by which a file without a name can be opened again


class ActivationOffload:
    """Moves tensors to memory-mapped files in a folder; without a folder it leaves them in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._mapped: dict[int, weakref.ref[Tensor]] = {}  # by address

    def put(self, value: Any) -> Any:
        """Offload the CPU tensors in `value`, a tensor or nested containers of tensors; return `value`.

        Raises:
            OSError: the disk is full.
        """
        for tensor in _tensors(value) if self._folder is not None else ():
            whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
            if tensor.device.type == "cpu" and whole and tensor.nbytes >= MIN_BYTES and not self._holds(tensor):
                tensor.data = self._map(tensor)
                self._mapped[tensor.data_ptr()] = weakref.ref(tensor)
        return value

    def release(self) -> None:
        """Free the resident pages of all offloaded tensors; their contents stay in the files."""
        for address, reference in list(self._mapped.items()):
            tensor = reference()
            if tensor is None or tensor.data_ptr() != address:  # the address may belong to other memory by now
                del self._mapped[address]
            else:
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(address), ctypes.c_size_t(tensor.nbytes), int(mmap.MADV_DONTNEED)
                )

    def release_before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` preceded by a call of `release`."""
        return function if self._folder is None else partial(self._release_and_call, function)

    def _release_and_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.release()
        return function(*args, **kwargs)

    def _holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is offloaded already."""
        reference = self._mapped.get(tensor.data_ptr())
        held = None if reference is None else reference()
        return held is not None and held.data_ptr() == tensor.data_ptr()

    def _map(self, tensor: Tensor) -> Tensor:
        """Write a tensor to a file, and return a tensor that maps it."""
        content = tensor.detach().reshape(-1).view(torch.uint8)
        nameless = DESCRIPTORS.is_dir()
        make = tempfile.TemporaryFile if nameless else tempfile.NamedTemporaryFile
        with make(
            dir=self._folder
        ) as file:  # write instead of filling the mapping: a full disk is then an OSError, not SIGBUS
            file.write(content.numpy().data)
            file.flush()
            name = str(DESCRIPTORS / str(file.fileno()) if nameless else file.name)
            mapped = torch.from_file(name, shared=True, size=len(content), dtype=torch.uint8)
        return mapped.view(tensor.dtype).view(tensor.shape)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors([*value.values()])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
