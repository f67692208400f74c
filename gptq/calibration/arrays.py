"""Calibration inputs given as arrays, from files or from Python, named after the arguments of the model's forward."""

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq.errors import InputError, first_line

ARRAY_SUFFIXES = (".npz", ".safetensors")
MAX_COMPRESSION = 100  # largest accepted ratio of unpacked size to file size of a compressed file
UNPACKED_ALLOWANCE = 2**28  # unpacked bytes, 256 MiB, that are accepted at any ratio
IMAGES = ("pixel", "image", "video")  # beginnings of the names of arrays that a mask of the tokens is not about
Inputs = dict[str, Tensor]  # the arguments of the model's forward for one window, by name; (1, ...) each


def is_arrays(source: str) -> bool:
    """Whether a source is a file of arrays, or a folder that contains only such files."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
        return bool(files) and all(file.suffix in ARRAY_SUFFIXES for file in files)
    return path.suffix in ARRAY_SUFFIXES


def read_arrays(source: str, num_samples: int, seed: int) -> list[Inputs]:
    """Read windows from a file or folder of arrays; draw num_samples of them with the seed.

    Raises:
        InputError: a file cannot be read, or its arrays have different numbers of windows.
    """
    path = Path(source)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    windows = as_inputs((_load_arrays(file) for file in files), [str(file) for file in files])
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:num_samples]
    return [windows[i] for i in chosen.tolist()]


def _load_arrays(file: Path) -> Mapping[str, Any]:
    """Read the arrays of a file by name; raises InputError if the file cannot be read."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        _check_unpacked_size(file)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except InputError:
        raise
    except Exception as error:  # numpy, zipfile and safetensors raise many types
        raise InputError(f"{file} could not be read as arrays: {first_line(error)}") from error


def _check_unpacked_size(file: Path) -> None:
    """Raises InputError if the unpacked size is too large (a zip bomb), other errors if the file is not an archive."""
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > max(MAX_COMPRESSION * file.stat().st_size, UNPACKED_ALLOWANCE):
        raise InputError(f"{file} would unpack to {size / 1e9:,.1f} GB; save its arrays without compression")


def as_inputs(batches: Iterable[Mapping[str, Any]], names: Sequence[str] = ()) -> list[Inputs]:
    """Split dicts of arrays into windows, without the positions that an attention_mask masks.

    The first dimension of each array counts the windows of the dict. A dict of one window, such as a processor returns,
    may hold arrays that count something else, patches of images for example; and tokens without that dimension.

    Args:
        batches: arrays by argument name; lists of numbers count as arrays.
        names: what error messages call each dict.
    Raises:
        InputError: a value is not an array or is empty, the arrays of a dict differ in length, a mask does not fit its
            tokens or masks all of them, or the dicts differ in names.
    """
    windows: list[Inputs] = []
    first: Iterable[str] = ()
    for number, batch in enumerate(batches):
        where = names[number] if number < len(names) else f"calibration input {number}"
        rows: list[Inputs] = []
        for arrays in _read_batch(batch, where):
            first = first or list(arrays)
            if arrays.keys() != set(first):
                raise InputError(f"calibration inputs are {list(first)} first and {list(arrays)} later, in {where}")
            rows += _split(arrays, where)
        places = [f"{where}, row {row}" for row in range(len(rows))] if len(rows) > 1 else [where]
        windows += [without_masked(window, place) for window, place in zip(rows, places, strict=True)]
    if not windows:
        raise InputError("there is not one calibration input")
    return windows


def _read_batch(batch: Mapping[str, Any], where: str) -> list[dict[str, Tensor]]:
    """Return the arrays of a dict; rows of lists that differ in length are given one by one."""
    try:
        given = {name: values for name, values in batch.items() if values is not None}
        lists = [values for values in given.values() if isinstance(values, list) and isinstance(values[0], list)]
        if len(lists) == len(given) and len({len(row) for rows in lists for row in rows}) > 1:
            rows = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
            return [arrays for row in rows for arrays in _read_batch(row, where)]
        arrays = {name: torch.as_tensor(values) for name, values in given.items()}
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(f"calibration inputs are dicts of arrays by argument name: {where}: {error}") from error
    integers = (torch.int32, torch.int16, torch.uint8)
    arrays = {name: x.long() if x.dtype in integers else x for name, x in arrays.items()}
    tokens = arrays.get("input_ids")
    if tokens is not None and tokens.ndim == 1 and not where.endswith(ARRAY_SUFFIXES):
        arrays = {name: x[None] if x.ndim == 1 else x for name, x in arrays.items()}
    for name, x in arrays.items():
        if not x.numel() or not x.ndim:
            raise InputError(f"{name} in {where} holds no windows: its shape is {tuple(x.shape)}")
        if name.endswith("input_ids") and (x.ndim != 2 or x.dtype != torch.int64):
            raise InputError(f"{name} in {where} is {tuple(x.shape)} {x.dtype}; it is (windows, tokens) integers")
    return [arrays]


def _split(arrays: dict[str, Tensor], where: str) -> Iterable[Inputs]:
    """Yield the windows of a dict of arrays.

    Raises:
        InputError: the arrays hold different numbers of windows.
    """
    counts = {name: x.shape[0] for name, x in arrays.items()}
    texts = {count for name, count in counts.items() if name.endswith(("input_ids", "attention_mask"))}
    if len(set(counts.values())) == 1:
        count = next(iter(counts.values()))
        return ({name: x[i : i + 1] for name, x in arrays.items()} for i in range(count))
    if texts == {1} or (not texts and _counts_patches(arrays)):
        return [arrays]
    raise InputError(
        f"calibration arrays have to hold the same number of windows, one at least, not {counts} as in {where}; arrays "
        "that count something else, such as patches of images, are given one window at a time"
    )


def _counts_patches(arrays: Mapping[str, Tensor]) -> bool:
    """Whether a grid (images, 2 or 3) says how many patches the first dimension of another array counts."""
    grids = [x for x in arrays.values() if x.ndim == 2 and x.shape[1] in (2, 3) and x.dtype == torch.int64]
    return any(int(grid.prod(1).sum()) == x.shape[0] for grid in grids for x in arrays.values())


def without_masked(window: Inputs, where: str) -> Inputs:
    """Return a window without the positions that attention_mask, or decoder_attention_mask, masks.

    Their tokens must not enter the Hessian, and padding on the left would move the others. The mask of a text is left
    out when it has no more to say.

    Raises:
        InputError: a mask has another length than what it masks, or masks everything.
    """
    for name in [name for name in window if name in ("attention_mask", "decoder_attention_mask")]:
        mask, tokens = window[name], window.get(name.replace("attention_mask", "input_ids"))
        _check_mask(name, mask, tokens, window, where)
        if mask.ndim != 2:
            continue
        kept = mask[0] != 0  # (tokens,)
        own = [other for other in window if other.startswith("decoder_") == name.startswith("decoder_")]
        masked = {other for other in own if _is_masked_by(other, window[other], mask, tokens is not None)}
        if masked == {name}:  # a mask of something that cannot be cut, such as the frames of a spectrogram
            continue
        window = {
            other: x[:, kept] if other in masked else x[..., kept] if _are_positions(other, x, mask) else x
            for other, x in window.items()
        }
        if all(other.endswith(("input_ids", "_mask", "token_type_ids", "position_ids")) for other in window):
            del window[name]
    return window


def _is_masked_by(name: str, x: Tensor, mask: Tensor, has_tokens: bool) -> bool:
    if x.shape[:2] != mask.shape or name.startswith(IMAGES):
        return False
    return x.ndim == 2 or not has_tokens or name.endswith(("inputs_embeds", "bbox"))


def _are_positions(name: str, x: Tensor, mask: Tensor) -> bool:
    """Whether an array is the positions of the masked tokens on several axes, (axes, 1, tokens)."""
    return name == "position_ids" and x.ndim == 3 and x.shape[-1] == mask.shape[-1]


def _check_mask(name: str, mask: Tensor, tokens: Tensor | None, window: Inputs, where: str) -> None:
    length = mask.shape[-1]
    if tokens is not None and length != tokens.shape[-1]:
        raise InputError(f"{name} in {where} is {length} long, and masks {tokens.shape[-1]} tokens")
    if tokens is None and not any(length in x.shape for other, x in window.items() if other != name):
        raise InputError(f"{name} in {where} is {length} long, which no other array there is")
    if not bool(mask.any()):
        raise InputError(f"{name} in {where} masks every position")
