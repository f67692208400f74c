"""Read the header of a GGUF file, which may come from a stranger, and its tensors.

A header is (ggml/include/gguf.h): "GGUF", version, number of tensors, number of keys; each key with its type and value;
each tensor with its name, dimensions (the fastest first), type and offset; padding. Counts and lengths are checked
against the bytes that the file has left, before anything is read or allocated for them.
"""

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gptq.checkpoint.ggml import BLOCK_TYPES, BlockType
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.untrusted import raise_if_refused
from gptq.errors import InputError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER, MAX_ITEMS = 2**28, 2**22  # bytes of a header, and strings in it; 260,000 tokens take some 10 MB
MAX_TEXT, MAX_NAME, MAX_DIMENSIONS = 2**22, 256, 4  # bytes of a value and of a name; dimensions of a tensor
ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = "general.alignment", 32, 2**16
SCALARS = {  # number of a value's type: how `struct` reads it
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
PLAIN_TYPES = {  # number of a tensor's type: its dtype
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
    28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
PACKED_TYPES = {kind.number: kind for kind in BLOCK_TYPES.values()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a GGUF file."""

    info: TensorInfo  # packed blocks are uint8 (..., rows, bytes of a row)
    blocks: BlockType | None  # None: plain numbers
    begin: int  # offset of its first byte in the file

    @property
    def floats(self) -> TensorInfo:
        """Return dtype and shape of the values: float32 where blocks are stored."""
        if self.blocks is None:
            return self.info
        *rows, nbytes = self.info.shape
        return TensorInfo(torch.float32, (*rows, nbytes // self.blocks.nbytes * self.blocks.inputs))


@dataclass(frozen=True)
class GgufHeader:
    """What the header of a GGUF file says; of arrays only their lengths are kept."""

    values: dict[str, Any]
    lengths: dict[str, int]  # of arrays, by key
    tensors: dict[str, StoredTensor]


def read_gguf_header(file: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        InputError: the file is damaged, cut short, or holds a tensor of a type that is not read.
    """
    try:
        with file.open("rb") as opened:
            return _read_header(_Cursor(opened, file.stat().st_size))
    except (OSError, ValueError) as error:  # a text that is not UTF-8 is a ValueError
        raise_if_refused(error, file)
        raise InputError(f"{file} is damaged or cut short ({error}); download it again") from error


class _Cursor:
    """Reads forward in a file; never asks for more than there is.

    Raises:
        ValueError: from any method, the file ends before what it announces, or the header is larger than any.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self.position = 0
        self.items = 0  # strings read so far

    def take(self, count: int) -> bytes:
        self._advance(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, 1)

    def _advance(self, count: int) -> None:
        if count > min(self.size, MAX_HEADER) - self.position:
            raise ValueError(f"its header announces {count} bytes at {self.position}, and there are fewer")
        self.position += count

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, smallest: int) -> int:
        """Read a number of things that take at least `smallest` bytes each."""
        found: int = self.number("Q")
        if found > (min(self.size, MAX_HEADER) - self.position) // smallest:
            raise ValueError(f"its header announces {found} entries at {self.position}, and has no room for them")
        return found

    def text(self, longest: int = MAX_TEXT) -> str:
        self.items += 1
        length = self.count(1)
        if length > longest or self.items > MAX_ITEMS:
            raise ValueError(f"its header holds a text of {length} bytes, or too many texts")
        return self.take(length).decode("utf-8")

    def skip_text(self) -> None:
        self.items += 1
        if self.items > MAX_ITEMS:
            raise ValueError("its header holds too many texts")
        self.skip(self.count(1))


def _read_header(cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}; versions {' and '.join(map(str, VERSIONS))} are read")
    num_tensors, num_keys = cursor.count(24), cursor.count(13)
    values: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(num_keys):
        key = _printable(cursor.text(MAX_NAME))
        if key in values or key in lengths:
            raise ValueError(f"it holds the key {key!r} twice")
        _read_value(cursor, key, values, lengths)
    entries = [_read_tensor(cursor) for _ in range(num_tensors)]
    alignment = values.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT:
        raise ValueError(f"its alignment is {alignment!r}")
    data = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, info, blocks, offset in entries:
        if name in tensors:
            raise ValueError(f"it holds the tensor {name!r} twice")
        if offset % alignment or data + offset + info.nbytes > cursor.size:
            raise ValueError(f"{name} would lie at {data + offset}, {info.nbytes} bytes long, which the file is not")
        tensors[name] = StoredTensor(info, blocks, data + offset)
    _refuse_overlaps(tensors)
    return GgufHeader(values, lengths, tensors)


def _read_value(cursor: _Cursor, key: str, values: dict[str, Any], lengths: dict[str, int]) -> None:
    kind = cursor.number("I")
    if kind in SCALARS:
        values[key] = cursor.number(SCALARS[kind])
    elif kind == STRING:
        values[key] = cursor.text()
    elif kind == ARRAY:
        lengths[key] = _skip_array(cursor, key)
    else:
        raise ValueError(f"{key} has the type {kind}, which is unknown")


def _skip_array(cursor: _Cursor, key: str) -> int:
    """Skip an array; return its length."""
    kind = cursor.number("I")
    if kind == STRING:
        length = cursor.count(8)
        for _ in range(length):
            cursor.skip_text()
    elif kind in SCALARS:
        size = struct.calcsize(f"<{SCALARS[kind]}")
        length = cursor.count(size)
        cursor.skip(length * size)
    else:
        raise ValueError(f"{key} is an array of the type {kind}, which is unknown")
    return length


def _read_tensor(cursor: _Cursor) -> tuple[str, TensorInfo, BlockType | None, int]:
    """Read a tensor's name, dtype and shape as stored, type, and offset in the data."""
    name = _printable(cursor.text(MAX_NAME))
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if 0 in shape or math.prod(shape) > 2**62:
        raise ValueError(f"{name} has the shape {shape}")
    if kind in PLAIN_TYPES:
        return name, TensorInfo(PLAIN_TYPES[kind], shape), None, offset
    if kind not in PACKED_TYPES:
        known = ", ".join(BLOCK_TYPES)
        raise ValueError(f"{name} has ggml's type {kind}; of packed types {known} are read")
    blocks = PACKED_TYPES[kind]
    if shape[-1] % blocks.inputs:
        raise ValueError(f"{name} has {shape[-1]} columns, which blocks of {blocks.inputs} do not divide")
    return name, TensorInfo(torch.uint8, (*shape[:-1], blocks.row_bytes(shape[-1]))), blocks, offset


def _printable(text: str) -> str:
    if not text.isprintable() or not text:
        raise ValueError(f"it holds the name {text!r}")
    return text


def _refuse_overlaps(tensors: dict[str, StoredTensor]) -> None:
    ordered = sorted(tensors.items(), key=lambda entry: entry[1].begin)
    for (name, one), (other, two) in pairwise(ordered):
        if one.begin + one.info.nbytes > two.begin:
            raise ValueError(f"{name} and {other} overlap")


class GgufFiles:
    """GGUF files, as a `Container` of `checkpoint.assembled`."""

    def __init__(self, files: list[Path]) -> None:
        """Read all headers.

        Raises:
            InputError: a file is damaged, or two hold the same tensor.
        """
        self._stored: dict[str, StoredTensor] = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            for name, stored in read_gguf_header(file).tensors.items():
                if name in self._stored:
                    raise InputError(f"{file} and {self._file_of[name]} both hold the tensor {name}")
                self._stored[name], self._file_of[name] = stored, file
        self.tensors = {name: stored.info for name, stored in self._stored.items()}
        self.floats = {n: s.floats for n, s in self._stored.items() if s.floats.dtype.is_floating_point}

    def read(self, name: str, entry: int | None) -> Tensor:
        stored = self._stored[name]
        shape, begin, nbytes = stored.info.shape, stored.begin, stored.info.nbytes
        if entry is not None:
            shape, nbytes = shape[1:], nbytes // shape[0]
            begin += entry * nbytes
        content = bytearray(nbytes)
        with self._file_of[name].open("rb") as file:
            file.seek(begin)
            if file.readinto(content) != nbytes:
                raise InputError(f"{self._file_of[name]} was cut short while it was read")
        return torch.frombuffer(content, dtype=torch.uint8).view(stored.info.dtype).reshape(shape)

    def read_floats(self, name: str, entry: int | None) -> Tensor:
        found, blocks = self.read(name, entry), self._stored[name].blocks
        if blocks is None:
            return found
        rows: Tensor = blocks.dequantize(found.reshape(-1, found.shape[-1]))  # (rows, values of a row)
        return rows.reshape(*found.shape[:-1], -1)

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def byte_range(self, name: str) -> tuple[int, int]:
        stored = self._stored[name]
        return stored.begin, stored.begin + stored.info.nbytes
