"""Hessians and other sums of wide layers: in memory, or in mapped files whose pages are released once they were used.

A Hessian of 28,672 inputs takes 3.3 GB; its factor and the sums of a second stream take as much each. Code that may get
such a matrix goes through it by panels of rows, and calls `release` after each. A file has no name, so that nothing is
left on the disk however the process ends.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

WIDE = 2**14  # inputs; wider matrices are read and written by panels on a CPU, and can live in files
DIAGONAL_ROWS = 512  # whose diagonal is read at a time: the system maps 64 KiB around each number

_mapped: "weakref.WeakValueDictionary[int, mmap.mmap]" = weakref.WeakValueDictionary()  # by address


class Matrices:
    """Makes matrices; those of many rows in files of a folder, if one is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def zeros(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return zeros (rows, columns), in a file if there are more than WIDE rows.

        Raises:
            OSError: the disk is full.
        """
        if self._folder is None or device.type != "cpu" or rows <= WIDE:
            return torch.zeros(rows, columns, dtype=dtype, device=device)
        nbytes = rows * columns * dtype.itemsize
        with tempfile.TemporaryFile(dir=self._folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is then an OSError, and not SIGBUS later
            mapped = mmap.mmap(file.fileno(), nbytes)
        matrix = torch.frombuffer(mapped, dtype=dtype).view(rows, columns)  # keeps `mapped` alive
        _mapped[matrix.data_ptr()] = mapped
        return matrix


IN_MEMORY = Matrices()


def is_wide(matrix: Tensor) -> bool:
    """Whether a matrix is used by panels of rows; results then differ by rounding, wherever the matrix lives."""
    return len(matrix) > WIDE and matrix.device.type == "cpu"


def release(matrix: Tensor) -> None:
    """Free the resident pages of a matrix in a file, or of the matrix that this is a view of; its numbers stay."""
    mapped = _mapped.get(matrix.untyped_storage().data_ptr()) if _mapped else None
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def diagonal_of(matrix: Tensor) -> Tensor:
    """Return the diagonal (n,), a copy if the matrix is wide."""
    return torch.cat([part.clone() for part in _diagonal_parts(matrix)]) if is_wide(matrix) else matrix.diagonal()


def set_diagonal(matrix: Tensor, values: Tensor) -> None:
    """Replace the diagonal by values (n,)."""
    start = 0
    for part in _diagonal_parts(matrix) if is_wide(matrix) else [matrix.diagonal()]:
        part.copy_(values[start : start + len(part)])
        start += len(part)


def _diagonal_parts(matrix: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(matrix), DIAGONAL_ROWS):
        yield matrix.diagonal()[start : start + DIAGONAL_ROWS]
        release(matrix)
