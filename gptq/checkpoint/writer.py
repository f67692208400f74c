"""Write a safetensors checkpoint: lay out all shards first, then write each tensor to its place, in any order.

The layout needs only dtypes and shapes, which are known before the tensors are computed; so no tensor is kept in
memory.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gptq.checkpoint.small_files import sync_path, write_file
from gptq.checkpoint.tensors import DTYPE_CODES, DTYPES, INDEX, SINGLE, TensorInfo, tensor_bytes

MAX_SHARD_BYTES = 5_000_000_000  # bytes of tensors in a shard


class ShardWriter:
    """Writes a checkpoint whose tensors are known in advance, one tensor at a time, in any order.

    The shards equal those of `safetensors.torch.save_file` byte for byte, and have the file names of the Hub.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorInfo],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        shards: list[list[str]] | None = None,
        reuse_shards: bool = False,
        read_only: bool = False,
    ) -> None:
        """Lay out the shards.

        Args:
            shards: names of the tensors in each shard. By default tensors are split in order into shards of at most
                `max_shard_bytes`, and the tensors of one layer stay together.
            reuse_shards: keep the content of shards that an earlier writer laid out identically; `adopt` marks the
                tensors that these contain already.
            read_only: another process writes these files, and this one reads them.
        """
        self.folder = folder
        self._read_only = read_only
        self.checksums: dict[str, str] = {}
        self.tensors = tensors
        self._offsets: dict[str, tuple[int, int]] = {}  # name -> (shard, byte in its file)
        self._files: list[BinaryIO] = []
        self.checksums.update(dict.fromkeys(tensors, ""))
        shards = shards or _split_into_shards(tensors, max_shard_bytes)
        try:
            for number, names in enumerate(shards):
                single = len(shards) == 1
                file_name = SINGLE if single else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
                self._open_shard(self.folder / file_name, number, names, reuse_shards)
            if len(shards) > 1 and not read_only:
                self._write_index(shards)
        except BaseException:
            self.abandon()
            raise

    def _open_shard(self, path: Path, number: int, names: list[str], reuse_shards: bool) -> None:
        """Open a shard's file, keep its content if it may be reused, and otherwise write its header and full size."""
        header, offset = encode_header({name: self.tensors[name] for name in names})
        size = len(header) + sum(self.tensors[name].nbytes for name in names)
        reuse_shards = reuse_shards and path.is_file() and path.stat().st_size == size and _begins_with(path, header)
        mode = "rb" if self._read_only else "r+b" if reuse_shards else "w+b"
        file: Any = path.open(mode)  # closed by `close` or `abandon`
        self._files.append(file)
        for name, begin in offset.items():
            self._offsets[name] = (number, len(header) + begin)
        if not reuse_shards and not self._read_only:
            file.write(header)
            file.truncate(size)

    def file_names(self) -> list[str]:
        """Return the names of the shards."""
        return [Path(file.name).name for file in self._files]

    def _write_index(self, shards: list[list[str]]) -> None:
        """Write the index file that names the shard of each tensor."""
        weight_map = {n: file for file, names in zip(self.file_names(), shards, strict=True) for n in names}
        total = sum(info.nbytes for info in self.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place.

        Raises:
            ValueError: the tensor's dtype or shape differs from the layout, or the tensor was written before.
        """
        announced = self.tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (announced.dtype, announced.shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {announced}")
        if self.checksums[name]:
            raise ValueError(f"{name} was written already")
        shard, offset = self._offsets[name]
        content = tensor_bytes(tensor)
        self._files[shard].seek(offset)
        self._files[shard].write(content)
        self.checksums[name] = hashlib.sha256(content).hexdigest()

    def adopt(self, checksums: Mapping[str, str]) -> bool:
        """Mark tensors of an earlier writer as written if all have these checksums on disk; return whether so."""
        if any(name not in self.tensors or self._digest(name) != checksum for name, checksum in checksums.items()):
            return False
        self.checksums.update(checksums)
        return True

    def _digest(self, name: str) -> str:
        """Return the SHA-256 of a tensor's bytes on disk."""
        shard, offset = self._offsets[name]
        self._files[shard].seek(offset)
        digest, left = hashlib.sha256(), self.tensors[name].nbytes
        while left and (chunk := self._files[shard].read(min(left, 2**24))):
            digest.update(chunk)
            left -= len(chunk)
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """Read back a tensor that was written."""
        info, (shard, offset) = self.tensors[name], self._offsets[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        self._files[shard].seek(offset)
        content = bytearray(self._files[shard].read(info.nbytes))
        return torch.frombuffer(content, dtype=torch.uint8).view(info.dtype).reshape(info.shape)

    def sync(self) -> None:
        """Flush all written bytes to the disk, so that it survives a power failure."""
        if self._read_only:
            return
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        sync_path(self.folder)

    def close(self) -> None:
        """Sync and close all files; raises ValueError if a tensor of the layout was never written."""
        missing = [name for name, checksum in self.checksums.items() if not checksum]
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, the first is {missing[0]}")
        self.sync()
        self.abandon()

    def abandon(self) -> None:
        """Close all files without checks; errors are ignored, because a full disk was reported by the write."""
        for file in self._files:
            with suppress(OSError):
                file.close()


def _begins_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _split_into_shards(tensors: dict[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    """Split the names in order into shards; tensors of one layer stay together."""
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
    """Return the total size of the files that `ShardWriter` writes for these tensors."""
    shards = _split_into_shards(tensors, MAX_SHARD_BYTES)
    headers = sum(len(encode_header({name: tensors[name] for name in names})[0]) for names in shards)
    return headers + sum(info.nbytes for info in tensors.values())


def encode_header(tensors: dict[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """Return a shard's header and the offset of each tensor after it."""
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
