"""Read a safetensors checkpoint one tensor at a time; every header is checked before the first weight is used."""

import copy
import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from gptq.checkpoint.header import StoredTensor, UnsupportedError, read_header
from gptq.checkpoint.tensors import INDEX, SINGLE, TensorInfo
from gptq.checkpoint.untrusted import check_path, raise_if_refused, read_json
from gptq.errors import InputError

EVERY = slice(None)  # all rows of a tensor
CHUNK_BYTES = 2**24  # bytes of a tensor that are read and converted at a time
LFS_POINTER = b"version https://git-lfs"  # begins a small text that stands for a file in a clone without LFS
CONVERT_HINT = (
    "--allow-pickle (allow_pickle=True) converts such weights to safetensors first, in a confined process of its own"
)


class Source:
    """A checkpoint folder that is read one tensor at a time."""

    notes: Sequence[str] = ()  # for the user, on how tensors are read

    def __init__(self, folder: Path, files: list[Path] | None = None) -> None:
        """Open `folder` and check every header; `files` are its safetensors files if that is known.

        Raises:
            InputError: there is no safetensors checkpoint, or a file is damaged; the message names the file.
        """
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._ranges: dict[str, tuple[int, int]] = {}  # offsets of each tensor's first byte, and of the one behind it
        listed, files = _find_shards(folder) if files is None else (set(), files)
        for file in files:
            for name, stored in _header_of(file).items():
                if name in self.tensors:
                    raise InputError(f"{file} and {self._file_of[name]} both hold the tensor {name}")
                self.tensors[name] = stored.info
                self._ranges[name] = stored.begin, stored.end
                self._file_of[name] = file
        missing = sorted(listed - set(self.tensors))
        if missing:
            raise InputError(
                f"{folder / INDEX} lists {missing[0]}, which is in none of its shards; download them again"
            )

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Return the bytes of all files, headers included."""
        return sum(file.stat().st_size for file in set(self._file_of.values()))

    def restricted_to(self, names: Collection[str]) -> "Source":
        """Return the checkpoint as if it held these tensors alone."""
        some = copy.copy(self)
        some.tensors = {name: info for name, info in self.tensors.items() if name in names}
        return some

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors in the files that are read for the tensor `name`."""
        return (name,)

    def stored_bytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in the files."""
        return self.tensors[name].nbytes

    def undivided(self, name: str) -> tuple[str, TensorInfo]:
        """Return name and entry of the stored tensor that the tensor `name` is a piece of; its own if it is none."""
        return name, self.tensors[name]

    def byte_range(self, name: str) -> tuple[int, int]:
        """Return the offsets at which a tensor's bytes begin and end in its file."""
        return self._ranges[name]

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def read(self, name: str, dtype: torch.dtype | None = None, rows: slice = EVERY) -> Tensor:
        """Copy the tensor to memory. A floating-point tensor is converted to `dtype` if that is given.

        Args:
            rows: the part of the first dimension to read (the experts of a fused tensor, say); without a step.
        Raises:
            InputError: the tensor holds NaN or infinity.
        """
        stored = self.tensors[name]
        first, shape = select_rows(rows, stored.shape)
        tensor = torch.empty(shape, dtype=(stored.dtype.is_floating_point and dtype) or stored.dtype)
        row_bytes = stored.nbytes // stored.shape[0] if stored.shape and stored.shape[0] else 0
        chunks = self._row_chunks(TensorInfo(stored.dtype, shape))
        buffer = None if tensor.dtype == stored.dtype else torch.empty_like(tensor[chunks[0]], dtype=stored.dtype)
        with _open(self._file_of[name]) as file:
            file.seek(self._ranges[name][0] + first * row_bytes)
            for part in chunks:
                within = tensor[part]
                piece = within if buffer is None else buffer[: len(within)] if part else buffer
                _read_into(piece, file)
                if stored.dtype.is_floating_point:
                    self.require_finite(piece, name)
                if piece is not within:
                    within.copy_(piece)
        return tensor

    def require_finite(self, piece: Tensor, name: str) -> None:
        """Raises InputError if a piece of the tensor `name` holds NaN or infinity."""
        if not is_finite(piece):
            raise InputError(f"{name} in {self.file_of(name)} holds NaN or infinity; the checkpoint is damaged")

    def _row_chunks(self, stored: TensorInfo) -> list[tuple[slice, ...]]:
        """Return indices of chunks of rows of about CHUNK_BYTES each; a scalar or small tensor is one chunk."""
        if stored.nbytes <= CHUNK_BYTES or not stored.shape:
            return [()]
        step, count = max(1, CHUNK_BYTES * stored.shape[0] // stored.nbytes), stored.shape[0]
        return [(slice(start, min(start + step, count)),) for start in range(0, count, step)]

    def read_unchecked(self, name: str, entry: int | None = None) -> Tensor:
        """Copy a tensor, or an entry of its first dimension, to memory as stored, without a check of its numbers."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape if entry is None else stored.shape[1:], dtype=stored.dtype)
        with _open(self._file_of[name]) as file:
            file.seek(self._ranges[name][0] + (entry or 0) * tensor.nbytes)
            _read_into(tensor, file)
        return tensor


def select_rows(rows: slice, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Return the first of these rows of a tensor, and the shape of all of them; a scalar has only EVERY."""
    if not shape:
        return 0, shape
    begin, end, _ = rows.indices(shape[0])
    return begin, (max(end - begin, 0), *shape[1:])


def is_finite(piece: Tensor) -> bool:
    """Whether no number is NaN or infinite; looks only at the smallest and the largest."""
    if not piece.numel():
        return True
    ends = (piece if piece.dtype.itemsize > 1 else piece.float()).aminmax()  # NaN if any number is NaN
    return bool(torch.isfinite(ends.min) and torch.isfinite(ends.max))


def headers_of(source: Source) -> dict[str, str]:
    """Return the SHA-256 of each file's bytes before the first tensor, by the file's name."""
    ends: dict[Path, int] = {}
    for name in source.tensors:
        file, (start, _) = source.file_of(name), source.byte_range(name)
        ends[file] = min(start, ends.get(file, start))
    found = {}
    for file, end in sorted(ends.items()):
        with file.open("rb") as opened:
            found[file.name] = hashlib.sha256(opened.read(end)).hexdigest()
    return found


def _find_shards(folder: Path) -> tuple[set[str], list[Path]]:
    """Return the tensor names in the index (none for a single file), and the safetensors files of the folder."""
    if (folder / SINGLE).is_file():  # takes precedence over an index, as in transformers
        return set(), [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        shard_of = read_index(folder)
        files = sorted(set(shard_of.values()))
        for file in files:
            if not (folder / file).is_file():
                raise InputError(f"{index} names the shard {file}, which is missing; download it again")
        return set(shard_of), [folder / file for file in files]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return set(), others
    if others:
        raise InputError(f"{folder} has several safetensors files but no {INDEX} that says which belong together")
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise InputError(
            f"{folder} holds a pickled checkpoint ({pickled[0].name}), which can run code when it is opened; "
            f"{CONVERT_HINT}"
        )
    raise InputError(f"{folder} holds no *.safetensors file; is it a model folder?")


def readable_tensors(folder: Path) -> set[str]:
    """Return the names of the tensors in all undamaged safetensors files of a folder; an index is ignored."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with suppress(InputError):
            names |= _header_of(file).keys()
    return names


def read_index(folder: Path) -> dict[str, str]:
    """Read the folder's index: the file name of the shard of each tensor.

    Raises:
        InputError: the file is not an index, or names a shard that is not a safetensors file in the same folder.
    """
    index = folder / INDEX
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(file, str) for file in shard_of.values()):
        raise InputError(f"{index} is not a safetensors index; download it again")
    for file in set(shard_of.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index} names the shard {file!r}, which is not a safetensors file beside it")
    return shard_of


def _header_of(file: Path) -> dict[str, StoredTensor]:
    """Read a file's header; see `read_header`.

    Raises:
        InputError: the file is damaged or gone, or its path is not UTF-8, which other libraries need.
        OSError: the system refuses to read the file.
    """
    check_path(file)
    try:
        return read_header(file)
    except UnsupportedError as error:
        raise InputError(f"{file} {error}") from error
    except (OSError, ValueError) as error:
        if _is_pointer(file):
            raise InputError(
                f"{file} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"
            ) from error
        raise _damaged(file, error) from error


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """Open a file of tensors; raises InputError if it is gone or ends too soon, OSError as `raise_if_refused`."""
    try:
        with file.open("rb", buffering=0) as opened:
            yield opened
    except (OSError, EOFError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    raise_if_refused(error, file)
    return InputError(f"{file} is damaged or cut short ({error}); download it again")


def _read_into(tensor: Tensor, file: BinaryIO) -> None:
    """Fill a contiguous tensor on the CPU from where the file stands; raises EOFError if the file ends before."""
    space = tensor.reshape(-1).view(torch.uint8).numpy().data
    while space:
        count = file.readinto(space)  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{len(space)} bytes of a tensor are missing")
        space = space[count:]


def _is_pointer(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER
    return False
