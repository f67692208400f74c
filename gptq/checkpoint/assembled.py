"""Read a checkpoint whose file holds its tensors under an engine's names: stacked experts, rows in another order.

A format that assembles such files (`FileFormat.assemble`) writes `tensor_index.json` beside them, which says for each
tensor of the checkpoint where it is. `AssembledSource` presents the tensors of the checkpoint, so that everything that
reads a `Source` reads these folders too.
"""

from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from gptq.checkpoint.gguf import GgufFiles
from gptq.checkpoint.json_objects import Count, IfPresent, JsonObject, Printable, read_object
from gptq.checkpoint.reader import EVERY, Source, is_finite
from gptq.checkpoint.tensors import DTYPES, TensorInfo
from gptq.checkpoint.untrusted import read_json
from gptq.errors import InputError

INDEX_FILE = "tensor_index.json"


def _require_file_name(name: str) -> str:
    if Path(name).name != name or name.startswith("."):
        raise ValueError("a path")
    return name


def _require_float(code: str) -> str:
    if code not in DTYPES or not DTYPES[code].is_floating_point:
        raise ValueError("dtype")
    return code


class Place(JsonObject):
    """Where a file holds a tensor, and how to undo what was done to it. Absent fields: nothing was done.

    The values in the file are the tensor's, in this order: plus `added`, with the rows of each of `heads` heads
    interleaved (row 2 i + j of a head is its row j rows / 2 + i), in turn with another tensor's rows (row i is row
    2 i + `alternate`), as entry `entry` of a stack, as `dtype`.
    """

    tensor: Printable  # name in the file
    entry: IfPresent[Count] = None
    alternate: IfPresent[Annotated[int, Field(ge=0, le=1)]] = None
    heads: IfPresent[Annotated[int, Field(ge=1, le=2**20)]] = None
    added: IfPresent[Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]] = None
    dtype: IfPresent[Annotated[str, AfterValidator(_require_float)]] = None  # safetensors' name of the tensor's dtype


class TensorIndex(JsonObject):
    """The files that hold a checkpoint's tensors, and the place of each tensor."""

    files: Annotated[list[Annotated[Printable, AfterValidator(_require_file_name)]], Field(min_length=1)]
    tensors: dict[Printable, Place]


class Container(Protocol):
    """The files that hold the tensors, opened; every header was checked."""

    tensors: dict[str, TensorInfo]  # as they are stored; packed blocks are uint8 (..., rows, bytes of a row)
    floats: dict[str, TensorInfo]  # as `read_floats` returns them, where they can be read as floating point

    def read(self, name: str, entry: int | None) -> Tensor:
        """Return a tensor as it is stored, or one entry of its first dimension."""

    def read_floats(self, name: str, entry: int | None) -> Tensor:
        """Return the same in floating point, where packed blocks are stored."""

    def file_of(self, name: str) -> Path: ...

    def byte_range(self, name: str) -> tuple[int, int]:
        """Return the offsets at which a tensor's bytes begin and end in its file."""


class SafetensorsFiles:
    """Safetensors files, as a `Container`."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self._source = Source(folder, files)
        self.tensors = self._source.tensors
        self.floats = {name: info for name, info in self.tensors.items() if info.dtype.is_floating_point}

    def read(self, name: str, entry: int | None) -> Tensor:
        return self._source.read_unchecked(name, entry)

    read_floats = read

    def file_of(self, name: str) -> Path:
        return self._source.file_of(name)

    def byte_range(self, name: str) -> tuple[int, int]:
        return self._source.byte_range(name)


class AssembledSource(Source):
    """A checkpoint whose files were assembled for an engine, presented as the checkpoint that they were made of."""

    def __init__(self, folder: Path) -> None:
        """Open the files that the folder's index names, and check every header and the index.

        Raises:
            InputError: a file is missing or damaged, or the index does not fit the files; the message names the file.
        """
        where = folder / INDEX_FILE
        index = read_object(TensorIndex, read_json(where), str(where))
        self.folder = folder
        self.places = index.tensors
        self._container = _open_container(folder, index.files)
        self.tensors = {
            name: _presented(f"{where}, {name},", place, self._container) for name, place in self.places.items()
        }

    @property
    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def files(self) -> list[Path]:
        return sorted({self._container.file_of(name) for name in self._container.tensors})

    def file_of(self, name: str) -> Path:
        return self._container.file_of(self.places[name].tensor)

    def byte_range(self, name: str) -> tuple[int, int]:
        return self._container.byte_range(self.places[name].tensor)

    def read(self, name: str, dtype: torch.dtype | None = None, rows: slice = EVERY) -> Tensor:
        tensor = self.read_unchecked(name)
        if rows != EVERY:
            tensor = tensor[rows]
        if not tensor.is_floating_point():
            return tensor
        if not is_finite(tensor):
            raise InputError(f"{name} in {self.file_of(name)} holds NaN or infinity; the checkpoint is damaged")
        return tensor.to(dtype or tensor.dtype)

    def read_unchecked(self, name: str, entry: int | None = None) -> Tensor:
        place, stored = self.places[name], self._container
        tensor = (stored.read_floats if place.dtype else stored.read)(place.tensor, place.entry)
        if place.alternate is not None:
            tensor = tensor[place.alternate :: 2].contiguous()
        if place.heads:
            tensor = split_halves(tensor, place.heads)
        if place.added:
            tensor = tensor - place.added
        if place.dtype:
            tensor = tensor.to(DTYPES[place.dtype])
        return tensor if entry is None else tensor[entry]


def open_source(folder: Path) -> Source:
    """Open a checkpoint folder, whether its files hold the checkpoint's own tensors or were assembled from these.

    Raises:
        InputError: there is no checkpoint, or a file is damaged; the message names the file.
    """
    return AssembledSource(folder) if (folder / INDEX_FILE).is_file() else Source(folder)


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Interleave the two halves of each head's rows: row j n / 2 + i of the n rows of a head becomes row 2 i + j."""
    mixed: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return mixed.contiguous()


def split_halves(rows: Tensor, heads: int) -> Tensor:
    """Undo `interleave`."""
    apart: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return apart.contiguous()


def _open_container(folder: Path, names: list[str]) -> Container:
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder / INDEX_FILE} names the file {file.name}, which is missing; download it again")
    return GgufFiles(files) if files[0].suffix == ".gguf" else SafetensorsFiles(folder, files)


def _presented(where: str, place: Place, container: Container) -> TensorInfo:
    """Return dtype and shape of a tensor as the checkpoint had it.

    Raises:
        InputError: the file does not hold what the index says.
    """
    info = (container.floats if place.dtype else container.tensors).get(place.tensor)
    if info is None:
        raise InputError(f"{where} is said to be {place.tensor!r}, which the file does not hold so")
    shape = info.shape
    if place.entry is not None:
        if len(shape) < 2 or place.entry >= shape[0]:
            raise InputError(f"{where} is said to be entry {place.entry} of {place.tensor!r} with the shape {shape}")
        shape = shape[1:]
    if place.alternate is not None:
        if not shape or shape[0] % 2:
            raise InputError(f"{where} is said to be every other row of {place.tensor!r} with the shape {shape}")
        shape = (shape[0] // 2, *shape[1:])
    if place.heads and (not shape or shape[0] % (2 * place.heads) or not shape[0]):
        raise InputError(f"{where} is said to have {place.heads} heads, and its shape is {shape}")
    if place.added and not place.dtype:
        raise InputError(f"{where} is said to have {place.added} added, and no dtype")
    return TensorInfo(DTYPES[place.dtype] if place.dtype else info.dtype, shape)
