"""Read the header of a safetensors file, which may come from a stranger; no other byte of the file is read or mapped.

A header is its length in 8 bytes, little-endian, then JSON: the dtype, shape and data_offsets of each tensor. Offsets
are counted from the end of the header. Tensors fill the rest of the file without gaps or overlaps. Mapping a whole file
of 140 GB fails on machines with less memory, because the safetensors library asks for a private mapping.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq.checkpoint.tensors import DTYPES, TensorInfo

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
MAX_DIMENSIONS, MAX_COUNT = 64, 2**60  # of a tensor; elements where empty dimensions count as 1, and offsets
METADATA = "__metadata__"


class UnsupportedError(ValueError):
    """A file is as it should be, and holds what is not supported."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry, and its place in the file."""

    info: TensorInfo
    begin: int  # offset of its first byte in the file
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, sorted by name.

    Raises:
        OSError: the file cannot be read.
        UnsupportedError: a tensor has a dtype or a name that is not supported.
        ValueError: the file is damaged.
    """
    with file.open("rb") as opened:
        size, length = file.stat().st_size, int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(MAX_HEADER, size - LENGTH_BYTES):
            raise ValueError(f"its header of {length} bytes does not fit into {size} bytes")
        text = opened.read(length).decode("utf-8")
    try:
        header = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not (isinstance(header, dict) and _is_metadata(header.pop(METADATA, None))):
        raise ValueError("its header is no object of tensors and texts")
    data = LENGTH_BYTES + length
    found = {name: _entry(name, header[name], data) for name in sorted(header)}
    _check_places(found, data, size)
    return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("its header has a key twice")
    return made


def _refuse(constant: str) -> None:
    raise ValueError(f"its header holds {constant}")


def _is_metadata(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(text, str) for text in value.values()))


def _entry(name: str, entry: Any, data: int) -> StoredTensor:
    if not name.isprintable():
        raise UnsupportedError(f"holds the tensor {name!r}, a name with control characters")
    entry = entry if isinstance(entry, dict) else {}
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(code, str) and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"its entry of {name} is not a dtype, a shape and two offsets")
    if code not in DTYPES:
        raise UnsupportedError(
            f"holds {name} with the type {code}, which is not supported; known are {', '.join(DTYPES)}"
        )
    if len(shape) > MAX_DIMENSIONS or math.prod(max(count, 1) for count in shape) > MAX_COUNT:
        raise ValueError(f"its tensor {name} has more elements than any")
    return StoredTensor(TensorInfo(DTYPES[code], tuple(shape)), data + offsets[0], data + offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_COUNT for value in values)


def _check_places(tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    """Raises ValueError if the tensors do not fill the bytes from `data` to `size`, each with those of its shape."""
    end = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != end or stored.end - stored.begin != stored.info.nbytes:
            raise ValueError(
                f"its tensor {name} lies at {stored.begin} to {stored.end}, not in {stored.info.nbytes} bytes at {end}"
            )
        end = stored.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, and it has {size}")
