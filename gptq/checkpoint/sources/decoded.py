"""What the kinds of quantized checkpoints share: how they are described, and the decoding of small numbers.

A weight is decoded when it is read, a few rows at a time, so that memory holds it once. The product of a code and its
scale is computed in float32 and rounded once, to the dtype that config.json names.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptq.checkpoint.derived import Derived
from gptq.checkpoint.reader import Source
from gptq.checkpoint.untrusted import read_json
from gptq.errors import InputError

CHUNK_WEIGHTS = 2**22  # weights that are decoded at a time, 16 MiB in float32
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Suffixes of scales that concern activations or the key-value cache, which weights alone do not need.
OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale", "input_zero_point", "output_scale")
OF_CACHE = ("k_scale", "v_scale", "q_scale", "prob_scale")


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
    find: Callable[[Source, Declared], Mapping[str, Derived]]
    """Return the encoded weights of a checkpoint by the name of the weight.

    Raises:
        InputError: tensors that belong together are missing or do not fit; the message names tensor and file.
    """
    caution: str = ""  # a further remark for that note


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


def activation_scales(stored: Source, encoded: Mapping[str, Derived]) -> list[str]:
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
