"""Read one pickled checkpoint file after another and write each as safetensors; runs in a process of its own.

The process reads a request from its standard input and writes a reply to its standard output, both JSON. Before it
opens a pickle it confines itself (`gptq.checkpoint.confinement`); the files it writes were opened by its parent.
"""

import codecs
import io
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoint.confinement import confine
from gptq.checkpoint.tensors import DTYPE_CODES, NUMBERED, TensorInfo, tensor_bytes
from gptq.checkpoint.writer import encode_header

CHUNK_BYTES = 2**24  # bytes that are written at a time
ZIP = b"PK\x03\x04"  # at the start of what torch has written since 1.6
GRACE_SECONDS = 10  # of the processor, from the sentence that it took too long until the process is killed
COPIES = 4  # of a tensor under several names that are written: T5's encoder, decoder and head share embeddings
ROOM = 2**32  # bytes of addresses beyond the files: unpickling itself needs little


class UnreadableError(Exception):
    """A file that holds something else than tensors; the message is a sentence about the file."""


class TooLongError(BaseException):
    """The conversion took more time of the processor than it may; no handler of Exception stops it."""


def main() -> None:
    request = json.load(sys.stdin)
    files = [Path(name) for name in request["files"]]
    torch.set_num_threads(1)
    _rehearse()
    _limit_resources(files, request["seconds"])
    reply: dict[str, Any] = {"confined": confine(files), "left_out": []}
    try:
        for file, descriptor in zip(files, request["descriptors"], strict=True):
            with os.fdopen(descriptor, "wb") as opened:
                reply["left_out"] += convert(file, opened, drop_tied=request["drop_tied"])
    except UnreadableError as error:
        reply["error"] = f"{file} {error}"
    except TooLongError:
        reply["error"] = (
            f"{file} keeps the processor busy for more than {request['seconds']} s, as no file of tensors does"
        )
    except MemoryError:
        reply["error"] = f"{file} asks for more memory than its size explains"
    except OSError as error:
        reply["error"] = f"{file} could not be converted: {error.strerror or error}"
    json.dump(reply, sys.stdout)


def _rehearse() -> None:
    """Load small files as `convert` does, so that all modules are imported while that is allowed."""
    codecs.lookup("cp437")  # decodes names in archives that torch has not written
    values = {"a": torch.zeros(2, dtype=torch.float32), "b": torch.zeros(2, dtype=torch.bfloat16)}
    for zipped in (True, False):
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            torch.save(values, file.name, _use_new_zipfile_serialization=zipped)
            for tensor in _load(Path(file.name)).values():
                tensor_bytes(tensor)
        with io.BytesIO(b"not a pickle") as bad:
            try:
                torch.load(bad, weights_only=True)
            except Exception as error:  # any type; what is needed to make its message is imported now
                str(error)


def _limit_resources(files: list[Path], seconds: int) -> None:
    """Limit this process to what the conversion of files of this size needs, and to seconds of the processor."""
    size = sum(file.stat().st_size for file in files)
    busy = math.ceil(time.process_time()) + seconds
    for kind, soft, limit in (
        (resource.RLIMIT_FSIZE, 0, COPIES * size + 2**26),  # bytes of one file that is written
        (resource.RLIMIT_CPU, busy, busy + GRACE_SECONDS),
        (resource.RLIMIT_AS, 0, _address_space() + 2 * max(file.stat().st_size for file in files) + ROOM),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with suppress(ValueError, OSError):  # macOS does not take every limit
            resource.setrlimit(kind, (min(soft or limit, limit), limit))
    signal.signal(signal.SIGXCPU, _stop)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # it comes every second from now on
    raise TooLongError


def _address_space() -> int:
    """Return the bytes of addresses that this process has mapped."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 2**36


def _load(file: Path) -> Any:
    _require_plain_archive(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used with files saved with" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)  # written by torch before 1.6


def _require_plain_archive(file: Path) -> None:
    """Raises UnreadableError for a zip archive with compressed members, which torch would map as if they were not.

    A few compressed bytes can also be a program of many.
    """
    with file.open("rb") as opened:
        if opened.read(len(ZIP)) != ZIP:
            return
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # torch says what is wrong with it
        return
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise UnreadableError(f"holds {member.filename!r} compressed, as torch never writes it; save it again")


def convert(file: Path, out: io.BufferedWriter, drop_tied: bool) -> list[str]:
    """Write the tensors of a pickled file as safetensors; return the names of those that are left out.

    Args:
        drop_tied: of tensors that are the same memory, write the first only.
    Raises:
        UnreadableError: the file cannot be unpickled without running code, or holds something else than tensors.
    """
    try:
        loaded = _load(file)
    except (UnreadableError, MemoryError, OSError):
        raise
    except Exception as error:  # of any type: torch interprets the pickle's opcodes as they come
        reason = _reason(error)
        raise UnreadableError(
            f"is damaged, or holds something else than tensors, which was not run: {reason}"
        ) from None
    tensors = _check(loaded, file.stat().st_size)
    kept, left_out = _without_copies(tensors) if drop_tied else (tensors, [])
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    header, offsets = encode_header(infos)
    out.write(header)
    for name in sorted(offsets, key=lambda name: offsets[name]):
        content = tensor_bytes(kept[name])
        for start in range(0, len(content), CHUNK_BYTES):
            out.write(content[start : start + CHUNK_BYTES])
    return left_out


def _reason(error: Exception) -> str:
    """Return what an error of torch.load says, without its advice to load the file nevertheless."""
    lines = (line.strip().rpartition("WeightsUnpickler error:")[2] for line in str(error).splitlines())
    useful = (
        line for line in lines if line and not line.startswith(("Weights only load failed", "Please file", "Check"))
    )
    return " ".join(next(useful, type(error).__name__).split())[:120]


def _check(loaded: Any, size: int) -> dict[str, Tensor]:
    """Return the tensors by name; raises UnreadableError if the file holds anything else, or larger tensors than it."""
    if not isinstance(loaded, Mapping) or not loaded:
        raise UnreadableError(f"holds {type(loaded).__name__}, not a table of tensors")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not name.isprintable():
            raise UnreadableError(f"calls a tensor {name!r}, which is no name")
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise UnreadableError(f"holds {name!r}, which is {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in DTYPE_CODES or tensor.is_meta:
            raise UnreadableError(f"holds {name!r} as {tensor.dtype}, {tensor.layout}, which safetensors cannot hold")
        if math.prod(tensor.shape) * tensor.dtype.itemsize > size:
            raise UnreadableError(f"holds {name!r} of the shape {tuple(tensor.shape)}, which is larger than the file")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _without_copies(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that are not the same memory as an earlier one, and the names of those that are.

    What a model ties are embeddings and heads. Tensors of numbered blocks are kept: each block needs its own.
    """
    seen: set[Any] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
        if not tensor.numel() or place not in seen or NUMBERED.search(name):
            kept[name] = tensor
        seen.add(place)
    return kept, [name for name in tensors if name not in kept]


if __name__ == "__main__":
    main()
