"""Calibration inputs given as arrays, from files or from Python, named after the arguments of the model's forward."""

import zipfile
from collections.abc import Iterable, Mapping
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
    windows = as_inputs(_load_arrays(file) for file in files)
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


def as_inputs(batches: Iterable[Mapping[str, Any]]) -> list[Inputs]:
    """Split dicts of arrays (windows, ...) into windows; padding at the end, given by attention_mask, is cut off.

    Raises:
        InputError: a value is not an array, the arrays of a dict differ in length, or the dicts differ in names.
    """
    windows: list[Inputs] = []
    for batch in batches:
        try:
            arrays = {name: torch.as_tensor(values) for name, values in batch.items()}
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"calibration inputs are dicts of arrays by argument name: {error}") from error
        counts = {name: x.shape[0] if x.ndim else 0 for name, x in arrays.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise InputError(f"calibration arrays have to hold the same number of windows, one at least, not {counts}")
        count = next(iter(counts.values()))
        windows += [_trim_padding({name: x[i : i + 1] for name, x in arrays.items()}) for i in range(count)]
        if windows[-1].keys() != windows[0].keys():
            raise InputError(f"calibration inputs are {list(windows[0])} first and {list(windows[-1])} later")
    if not windows:
        raise InputError("there is not one calibration input")
    return windows


def _trim_padding(window: Inputs) -> Inputs:
    """Convert integers to int64, and cut off the padding at the end, which attention_mask marks.

    Padding would otherwise enter the Hessian, although no output depends on it.
    """
    whole = {name: x.long() if x.dtype in (torch.int32, torch.int16, torch.uint8) else x for name, x in window.items()}
    mask = whole.get("attention_mask")
    if mask is None or mask.ndim != 2 or not mask.any():
        return whole
    end = int(mask[0].nonzero().max()) + 1
    return {name: x[:, :end] if x.shape == mask.shape else x for name, x in whole.items()}
