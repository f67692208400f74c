"""Checkpoints as safetensors, both ways: read one tensor at a time, write each as it comes.

Reading checks every header against its file before the first weight is used. Writing lays out all shards beforehand
(the sizes of the result are known before it is computed), so tensors go to their final place in any order and are
forgotten.
"""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq.checkpoint.atomic_folder import sync_path
from gptq.checkpoint.untrusted import check_folder, read_json
from gptq.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 2**24  # of a tensor that is read or converted at a time
CONVERT = (
    "pickled weights are not read. Convert them once, where you trust them: "
    "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER), and the tokenizer likewise"
)

# In the order in which safetensors lays tensors out: wide types first, so that every tensor is aligned.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source:
    """A checkpoint folder that is read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        """Open `folder` and check every header.

        Raises:
            InputError: there is no safetensors checkpoint, or it is damaged; says which file.
        """
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}  # with where the tensors begin behind them
        listed, files = _shards(folder)
        for file in files:
            for name, info in _header(file).items():
                if name in self.tensors:
                    raise InputError(f"{file} and {self._file_of[name]} both hold the tensor {name}")
                self.tensors[name] = info
                self._file_of[name] = file
        missing = sorted(listed - set(self.tensors))
        if missing:
            raise InputError(
                f"{folder / INDEX} lists {missing[0]}, which is in none of its shards; download them again"
            )

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in set(self._file_of.values()))

    def place_of(self, name: str) -> tuple[int, int]:
        """Where a tensor's bytes begin and end in its file, whose header was checked when the folder was opened."""
        file = self._file_of[name]
        if file not in self._headers:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                self._headers[file] = (8 + length, json.loads(opened.read(length)))
        begin, header = self._headers[file]
        start, stop = header[name]["data_offsets"]
        return begin + start, begin + stop

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, as stored or, where it holds floating-point numbers, in `dtype`.

        Raises:
            InputError: it holds NaN or infinity.
        """
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=(stored.dtype.is_floating_point and dtype) or stored.dtype)
        for rows in self._pieces(stored):
            with safe_open(self._file_of[name], framework="pt") as file:  # closed each time, so that no pages pile up
                piece: Tensor = file.get_slice(name)[rows] if rows else file.get_tensor(name)
                if stored.dtype.is_floating_point and not _is_finite(piece):
                    raise InputError(
                        f"{name} in {self._file_of[name]} holds NaN or infinity; the checkpoint is damaged"
                    )
                tensor[rows].copy_(piece)
        return tensor

    def _pieces(self, stored: TensorInfo) -> list[tuple[slice, ...]]:
        """Which rows are read at a time: about PIECE_BYTES of them, and a tensor without rows at once."""
        if stored.nbytes <= PIECE_BYTES or not stored.shape:
            return [()]
        step = max(1, PIECE_BYTES * stored.shape[0] // stored.nbytes)
        return [(slice(start, start + step),) for start in range(0, stored.shape[0], step)]

    def read_unchecked(self, name: str) -> Tensor:
        """The tensor as stored, finite or not, in memory of its own."""
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor


def _is_finite(piece: Tensor) -> bool:
    if not piece.numel():
        return True
    ends = (piece if piece.dtype.itemsize > 1 else piece.float()).aminmax()  # NaN where there is one
    return bool(torch.isfinite(ends.min) and torch.isfinite(ends.max))


def _shards(folder: Path) -> tuple[set[str], list[Path]]:
    """Names that an index lists (none for a single file), and the safetensors files of a checkpoint folder."""
    if (folder / SINGLE).is_file():  # before an index, as in transformers
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
            f"{folder} holds a pickled checkpoint ({pickled[0].name}), which can run code when it is opened; {CONVERT}"
        )
    raise InputError(f"{folder} holds no *.safetensors file; is it a model folder?")


def readable(folder: Path) -> set[str]:
    """Names of the tensors in those safetensors files of a folder that are not damaged, whatever an index lists."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with suppress(InputError):
            names |= _header(file).keys()
    return names


def read_index(folder: Path) -> dict[str, str]:
    """Names of shards by the names of the tensors that the folder's index lists.

    Raises:
        InputError: it is not an index, or names a file that could not be a shard beside it.
    """
    index = folder / INDEX
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(file, str) for file in shard_of.values()):
        raise InputError(f"{index} is not a safetensors index; download it again")
    for file in set(shard_of.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index} names the shard {file!r}, which is not a safetensors file beside it")
    return shard_of


def _header(file: Path) -> dict[str, TensorInfo]:
    """Of each tensor; safetensors itself checks that they fill the file, without a gap or an overlap."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            odd = next((name for name in names if not name.isprintable()), None)
            if odd is not None:
                raise InputError(f"{file} holds the tensor {odd!r}, a name with control characters")
            slices = {name: opened.get_slice(name) for name in names}
            return {n: TensorInfo(_dtype(s.get_dtype(), n, file), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or cut short ({error}); download it again") from error


def _dtype(code: str, name: str, file: Path) -> torch.dtype:
    if code not in DTYPES:
        raise InputError(f"{name} in {file} has the type {code}, which is not supported; known are {', '.join(DTYPES)}")
    return DTYPES[code]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as safetensors stores them: row-major, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def sha256_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


class ShardWriter:
    """Writes a checkpoint whose tensors are known in advance, one tensor at a time, in any order.

    Shards are what `safetensors.torch.save_file` makes of the same tensors, byte for byte, with the Hub's names.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorInfo],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        shards: list[list[str]] | None = None,
        going_on: bool = False,
        muted: bool = False,
    ) -> None:
        """Lay out `shards`, lists of names, or shards of at most so many bytes that do not part a layer's tensors.

        With `going_on` shards that an earlier writer laid out alike are opened as they are; which of their tensors were
        written is for `adopt` to say. With `muted` another process writes what this one computes as well.
        """
        self.folder = folder
        self._muted = muted
        self.checksums: dict[str, str] = {}
        self._tensors = tensors
        self._offsets: dict[str, tuple[int, int]] = {}  # name -> (shard, byte in its file)
        self._files: list[BinaryIO] = []
        self.checksums.update(dict.fromkeys(tensors, ""))
        shards = shards or _split_into_shards(tensors, max_shard_bytes)
        try:
            for number, names in enumerate(shards):
                single = len(shards) == 1
                file_name = SINGLE if single else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
                self._open_shard(self.folder / file_name, number, names, going_on)
            if len(shards) > 1 and not muted:
                self._write_index(shards)
        except BaseException:
            self.abandon()
            raise

    def _open_shard(self, path: Path, number: int, names: list[str], going_on: bool) -> None:
        header, offset = _encode_header({name: self._tensors[name] for name in names})
        size = len(header) + sum(self._tensors[name].nbytes for name in names)
        going_on = going_on and path.is_file() and path.stat().st_size == size and _begins_with(path, header)
        file: Any = path.open("rb" if self._muted else "r+b" if going_on else "w+b")  # closed by `close` or `abandon`
        self._files.append(file)
        for name, begin in offset.items():
            self._offsets[name] = (number, len(header) + begin)
        if not going_on and not self._muted:
            file.write(header)
            file.truncate(size)

    def _write_index(self, shards: list[list[str]]) -> None:
        weight_map = {n: Path(self._files[i].name).name for i, names in enumerate(shards) for n in names}
        total = sum(info.nbytes for info in self._tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place.

        Raises:
            ValueError: it is not the tensor that was announced, or comes a second time.
        """
        announced = self._tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (announced.dtype, announced.shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {announced}")
        if self.checksums[name]:
            raise ValueError(f"{name} was written already")
        shard, offset = self._offsets[name]
        content = tensor_bytes(tensor)
        if not self._muted:
            self._files[shard].seek(offset)
            self._files[shard].write(content)
        self.checksums[name] = hashlib.sha256(content).hexdigest()

    def adopt(self, checksums: dict[str, str]) -> bool:
        """Take tensors that an earlier writer wrote for written, if all of them have these checksums."""
        if any(name not in self._tensors or self._digest(name) != checksum for name, checksum in checksums.items()):
            return False
        self.checksums.update(checksums)
        return True

    def _digest(self, name: str) -> str:
        shard, offset = self._offsets[name]
        self._files[shard].seek(offset)
        digest, left = hashlib.sha256(), self._tensors[name].nbytes
        while left and (chunk := self._files[shard].read(min(left, 2**24))):
            digest.update(chunk)
            left -= len(chunk)
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """A tensor that was written."""
        info, (shard, offset) = self._tensors[name], self._offsets[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        self._files[shard].seek(offset)
        content = bytearray(self._files[shard].read(info.nbytes))
        return torch.frombuffer(content, dtype=torch.uint8).view(info.dtype).reshape(info.shape)

    def sync(self) -> None:
        """Make what was written so far survive a power cut."""
        if self._muted:
            return
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        sync_path(self.folder)

    def close(self) -> None:
        """Raises ValueError if an announced tensor never came."""
        missing = [name for name, checksum in self.checksums.items() if not checksum]
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, the first is {missing[0]}")
        self.sync()
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are; a full disk has been reported by then."""
        for file in self._files:
            with suppress(OSError):
                file.close()


def _begins_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _split_into_shards(tensors: dict[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for _, together in groupby(tensors, key=lambda name: name.rpartition(".")[0] or name):
        names = list(together)
        nbytes = sum(tensors[name].nbytes for name in names)
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += names
        size += nbytes
    return shards


def file_bytes(tensors: dict[str, TensorInfo]) -> int:
    """What the safetensors files that `ShardWriter` makes of these tensors take together."""
    shards = _split_into_shards(tensors, MAX_SHARD_BYTES)
    headers = sum(len(_encode_header({name: tensors[name] for name in names})[0]) for names in shards)
    return headers + sum(info.nbytes for info in tensors.values())


def _encode_header(tensors: dict[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """A shard's header and each tensor's offset behind it."""
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    rank = {dtype: i for i, dtype in enumerate(DTYPES.values())}
    for name in sorted(tensors, key=lambda n: (rank[tensors[n].dtype], n)):
        info = tensors[name]
        offsets[name] = end
        end += info.nbytes
        entries[name] = {
            "dtype": DTYPE_CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def resolve(model: str, revision: str | None) -> Path:
    """A local checkpoint folder, or the local copy of a Hub repository (safetensors, configuration and tokenizer only).

    Raises:
        InputError: neither exists, or the folder holds what may not be opened (see `check_folder`).
    """
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a local folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = Path(model)
    if folder.is_dir():
        check_folder(folder)
        return folder
    if folder.exists():
        raise InputError(f"{model} is a file; give the folder that holds config.json and the safetensors files")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"{model}: no such folder")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE", "NOTICE"]
    doubles = ["consolidated*", "original/*"]  # the same weights once more, in their makers' own layout
    try:
        copy = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=doubles))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        which = f"{model} at {revision}" if revision else model
        raise InputError(f"{which} is neither a folder nor a model that the Hub could give ({reason})") from error
    if not any(copy.glob("*.safetensors")):
        raise InputError(f"{model} has no safetensors weights on the Hub; {CONVERT}")
    check_folder(copy)
    return copy
