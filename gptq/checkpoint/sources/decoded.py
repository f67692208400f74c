"""`DecodedSource`, a checkpoint that stores some weights encoded and shows them as plain floating-point tensors.

A weight is decoded when it is read, a few rows at a time, so that memory holds it once. The product of a code and its
scale is computed in float32 and rounded once, to the dtype that config.json names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoint.reader import EVERY, Source, select_rows
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.untrusted import read_json
from gptq.errors import InputError

CHUNK_WEIGHTS = 2**22  # weights that are decoded at a time, 16 MiB in float32
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
E8M0 = getattr(torch, "float8_e8m0fnu", None)  # powers of two, one byte each; from torch 2.7 on
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Suffixes of scales that concern activations or the key-value cache, which weights alone do not need.
OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale", "input_zero_point", "output_scale")
OF_CACHE = ("k_scale", "v_scale", "q_scale", "prob_scale")


@dataclass(frozen=True)
class Encoded(ABC):
    """A weight that one or more stored tensors stand for."""

    parts: tuple[str, ...]  # names of the stored tensors; the first holds the codes
    shape: tuple[int, ...]  # of the weight

    @abstractmethod
    def decode(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        """Yield the weight's rows in order, a few at a time: (which, their values, (rows, ...) float32).

        Raises:
            InputError: a stored tensor holds NaN or infinity.
        """


@dataclass(frozen=True)
class Declared:
    """What a checkpoint's configuration says of its quantization; `values` is empty if it says nothing."""

    where: Path
    values: Mapping[str, Any]

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The blocks (rows, columns) that share a scale: of the whole checkpoint, and of compressed-tensors' groups."""
        groups = self.values.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        said: list[Any] = [self.values.get("weight_block_size")]
        for own in (own for own in weights if isinstance(own, dict)):
            said += [own.get("block_structure"), [1, own.get("group_size")]]
        return tuple((size[0], size[1]) for size in said if _is_block(size))


def _is_block(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)


@dataclass(frozen=True)
class Kind:
    """A way to store weights encoded."""

    name: str  # for a note to the user: "12 weights are stored as NAME"
    find: Callable[[Source, Declared], Mapping[str, Encoded]]
    """Return the encoded weights of a checkpoint by the name of the weight.

    Raises:
        InputError: tensors that belong together are missing or do not fit; the message names tensor and file.
    """
    caution: str = ""  # a further remark for that note


class DecodedSource(Source):
    """A checkpoint with its encoded weights shown under their own names, in the floating-point dtype `dtype`."""

    def __init__(self, stored: Source, encoded: Mapping[str, Encoded], dtype: torch.dtype, notes: list[str]) -> None:
        self.folder = stored.folder
        self._stored = stored
        self._encoded = encoded
        self.notes = [*stored.notes, *notes]
        shown = {codes.parts[0]: name for name, codes in encoded.items()}
        hidden = {part for codes in encoded.values() for part in codes.parts} | {*activation_scales(stored, encoded)}
        self.tensors = {
            shown.get(name, name): TensorInfo(dtype, encoded[shown[name]].shape) if name in shown else info
            for name, info in stored.tensors.items()
            if name in shown or name not in hidden
        }

    def file_of(self, name: str) -> Path:
        return self._stored.file_of(self.stored_names(name)[0])

    def byte_range(self, name: str) -> tuple[int, int]:
        return self._stored.byte_range(name)

    def stored_names(self, name: str) -> tuple[str, ...]:
        return self._encoded[name].parts if name in self._encoded else (name,)

    def stored_bytes(self, name: str) -> int:
        return sum(self._stored.tensors[part].nbytes for part in self.stored_names(name))

    @property
    def files(self) -> list[Path]:
        return self._stored.files

    @property
    def file_bytes(self) -> int:
        return self._stored.file_bytes

    def read(self, name: str, dtype: torch.dtype | None = None, rows: slice = EVERY) -> Tensor:
        codes = self._encoded.get(name)
        if codes is None:
            return self._stored.read(name, dtype, rows)
        info = self.tensors[name]
        begin, shape = select_rows(rows, info.shape)
        tensor = torch.empty(shape, dtype=dtype or info.dtype)
        for which, piece in codes.decode(self._stored, range(begin, begin + shape[0])):
            rounded = piece.to(info.dtype)
            self.require_finite(rounded, name)
            tensor[which.start - begin : which.stop - begin].copy_(rounded)
        return tensor

    def read_unchecked(self, name: str, entry: int | None = None) -> Tensor:
        if name not in self._encoded:
            return self._stored.read_unchecked(name, entry)
        return self.read(name) if entry is None else self.read(name, rows=slice(entry, entry + 1))[0]


# --- what kinds share -------------------------------------------------------------------------------------------------


def row_chunks(rows: range, shape: tuple[int, ...], multiple: int = 1) -> Iterator[range]:
    """Split rows of a weight of this shape into chunks of about CHUNK_WEIGHTS weights that begin at a multiple."""
    per_row = max(1, torch.Size(shape[1:]).numel())
    step = max(multiple, CHUNK_WEIGHTS // per_row // multiple * multiple)
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // multiple) * multiple + step)
        yield range(start, stop)
        start = stop


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return 2^(e - 127), float32, of bytes e (E8M0 scales, in that dtype or as uint8); infinity for 255, their NaN."""
    e = exponents.view(torch.uint8).int()
    return torch.where(e == 0, 0x00400000, e << 23).view(torch.float32)  # 2^-127 is not a normal number


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Unpack E2M1 numbers, two per byte with the first in the low half: (..., n) bytes -> (..., 2 n) float32."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = packed.view(torch.uint8)
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1).int()  # (..., n, 2)
    return table[pairs].flatten(-2)


def require_part(stored: Source, name: str, weight: str, expected: tuple[int, ...], why: str) -> None:
    """Raises InputError if the tensor `name`, which belongs to `weight`, is missing or does not have this shape."""
    if name not in stored.tensors:
        raise InputError(f"{weight} in {stored.file_of(weight)} is stored quantized, but {name} is missing")
    found = stored.tensors[name].shape
    if found != expected:
        raise InputError(f"{name} in {stored.file_of(name)} has the shape {found}, not {expected} as {why}")


def groups_of(stored: Source, name: str, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a weight and of its scales: two inputs per byte of the codes, `size` inputs per scale.

    Raises:
        InputError: the inputs are not whole groups.
    """
    *rows, half = stored.tensors[name].shape
    if half * 2 % size:
        raise InputError(
            f"{name} in {stored.file_of(name)} has {half * 2} inputs, which groups of {size} do not divide"
        )
    return (*rows, half * 2), (*rows, half * 2 // size)


def require_dtype(stored: Source, name: str, dtypes: tuple[torch.dtype | None, ...]) -> None:
    """Raises InputError if a tensor has none of these dtypes."""
    found = stored.tensors[name].dtype
    if found not in dtypes:
        known = " or ".join(str(dtype) for dtype in dtypes if dtype is not None)
        raise InputError(f"{name} in {stored.file_of(name)} holds {found}, not {known}")


def activation_scales(stored: Source, encoded: Mapping[str, Encoded]) -> list[str]:
    """Return the names of scales of activations and of the key-value cache, which a decoded checkpoint leaves out."""
    stems = {name.removesuffix("weight") if name.endswith(".weight") else f"{name}_" for name in encoded}
    own = {stem + suffix for stem in stems for suffix in OF_ACTIVATIONS}
    return [
        name
        for name, info in stored.tensors.items()
        if name in own or (name.endswith(OF_CACHE) and torch.Size(info.shape).numel() == 1)
    ]


def dtype_of_config(folder: Path) -> torch.dtype:
    """Return the floating-point dtype that config.json names, to which weights are decoded; else bfloat16."""
    values: dict[str, Any] = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    text = values.get("text_config")
    for part in (values, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if str(part.get(key)) in FLOATS:
                return FLOATS[str(part[key])]
    return torch.bfloat16
