"""`DerivedSource`, a checkpoint that shows tensors computed from stored ones (decoded, or cut from a fused one)."""

import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq.checkpoint.reader import EVERY, Source, select_rows
from gptq.checkpoint.tensors import TensorInfo


@dataclass(frozen=True)
class Derived(ABC):
    """A floating-point tensor that is computed from stored tensors when it is read."""

    parts: tuple[str, ...]  # names of the stored tensors; the first is the one that the tensor takes the place of
    shape: tuple[int, ...]

    @abstractmethod
    def compute(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        """Yield these rows of the tensor in order, some at a time: (which, values in any floating-point dtype).

        Raises:
            InputError: a stored tensor holds NaN or infinity.
        """


class DerivedSource(Source):
    """A checkpoint that shows derived tensors under their own names, in place of those that they are computed from."""

    def __init__(
        self,
        stored: Source,
        derived: Mapping[str, Derived],
        dtype: torch.dtype | None = None,
        left_out: Collection[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Show `derived` tensors by name, and no tensor of `left_out`.

        Args:
            dtype: of the derived tensors; by default the dtype of their first part.
        """
        self.folder = stored.folder
        self.notes = (*stored.notes, *notes)
        self._stored = stored
        self._derived = derived
        first: dict[str, list[str]] = defaultdict(list)
        self._elements: Counter[tuple[str, ...]] = Counter()  # of all tensors that are computed from the same parts
        for name, tensor in derived.items():
            first[tensor.parts[0]].append(name)
            self._elements[tensor.parts] += math.prod(tensor.shape)
        hidden = {part for tensor in derived.values() for part in tensor.parts} | {*left_out}
        self.tensors = {}
        for name, info in stored.tensors.items():
            if name not in hidden:
                self.tensors[name] = info
            for own in first[name]:
                self.tensors[own] = TensorInfo(dtype or info.dtype, derived[own].shape)

    def file_of(self, name: str) -> Path:
        return self._stored.file_of(self.stored_names(name)[0])

    def byte_range(self, name: str) -> tuple[int, int]:
        return self._stored.byte_range(name)

    def stored_names(self, name: str) -> tuple[str, ...]:
        parts = self._derived[name].parts if name in self._derived else (name,)
        return tuple(deep for part in parts for deep in self._stored.stored_names(part))

    def stored_bytes(self, name: str) -> int:
        if name not in self._derived:
            return self._stored.stored_bytes(name)
        own = self._derived[name]
        nbytes = sum(self._stored.stored_bytes(part) for part in own.parts)
        return nbytes * math.prod(own.shape) // max(1, self._elements[own.parts])

    @property
    def files(self) -> list[Path]:
        return self._stored.files

    @property
    def file_bytes(self) -> int:
        return self._stored.file_bytes

    def read(self, name: str, dtype: torch.dtype | None = None, rows: slice = EVERY) -> Tensor:
        own = self._derived.get(name)
        if own is None:
            return self._stored.read(name, dtype, rows)
        info = self.tensors[name]
        begin, shape = select_rows(rows, info.shape)
        tensor = torch.empty(shape, dtype=dtype or info.dtype)
        for which, piece in own.compute(self._stored, range(begin, begin + shape[0])):
            rounded = piece.to(info.dtype)
            self.require_finite(rounded, name)
            tensor[which.start - begin : which.stop - begin].copy_(rounded)
        return tensor

    def read_unchecked(self, name: str, entry: int | None = None) -> Tensor:
        if name not in self._derived:
            return self._stored.read_unchecked(name, entry)
        return self.read(name) if entry is None else self.read(name, rows=slice(entry, entry + 1))[0]
