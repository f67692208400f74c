"""Convert a pickled checkpoint (`pytorch_model*.bin`) to safetensors, in a confined process, into a cache.

A pickle is a program. torch's `weights_only=True` runs only what makes tensors; on Linux the process that does so has
no network besides, and can write nothing but the converted files (`gptq.checkpoint.unpickle`).
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from gptq.checkpoint.companions import companions, copy_companions
from gptq.checkpoint.small_files import sync_path
from gptq.checkpoint.tensors import INDEX, SINGLE
from gptq.checkpoint.untrusted import read_json
from gptq.errors import InputError
from gptq.version import __version__

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
PICKLES_ON_HUB = "pytorch_model*.bin"
CONVERSION = ".conversion"  # JSON file in a converted folder: what was converted, how the process was confined
CONVERTED = "converted"  # folder of the cache, in that of the Hub's client
# The process begins without the current folder among those it imports from (-I): that may be the checkpoint's.
CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gptq.checkpoint.unpickle import main; main()"
SECONDS, BYTES_PER_SECOND = 60, 10_000_000  # what a conversion may take of the processor: so long, and for its size
ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL")  # what the process gets of ours


def find_pickles(folder: Path) -> list[Path]:
    """Return the files of a pickled checkpoint in a folder; none if the folder has no such checkpoint.

    Raises:
        InputError: the index is not one, or names a file that is missing or elsewhere.
    """
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    index = folder / PICKLE_INDEX
    if not index.is_file():
        return []
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(name, str) for name in shard_of.values()):
        raise InputError(f"{index} is not an index of tensors; download it again")
    names = sorted(set(shard_of.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".bin"):
            raise InputError(f"{index} names the shard {name!r}, which is not a .bin file beside it")
        if not (folder / name).is_file():
            raise InputError(f"{index} names the shard {name}, which is missing; download it again")
    return [folder / name for name in names]


def is_only_pickled(folder: Path) -> bool:
    """Whether a folder holds pickled weights and no safetensors."""
    return not any(folder.glob("*.safetensors")) and any(any(folder.glob(pattern)) for pattern in PICKLES)


def convert_pickles(folder: Path) -> Path:
    """Return a folder with the checkpoint as safetensors, and the other files of `folder`; made unless it is there.

    It is in the cache, under a name that changes with the pickled files.

    Raises:
        InputError: there is no `pytorch_model*.bin`, or it holds something else than tensors; or the cache cannot be
            written.
    """
    files = find_pickles(folder)
    if not files:
        raise InputError(f"{folder} holds no {PICKLE}, nor an index of such files; other pickled weights are not read")
    converted = Path(HF_HOME) / "gptq" / CONVERTED / _key(folder, files)
    partial = converted.with_name(f"{converted.name}.partial")
    try:
        converted.parent.mkdir(parents=True, exist_ok=True)
        with _lock(converted.with_name(f"{converted.name}.lock")):
            if not converted.is_dir():
                with _removed_on_failure(partial):
                    _require_disk_space(partial, sum(file.stat().st_size for file in files))
                    _convert(folder, files, partial)
                    partial.replace(converted)
                sync_path(converted.parent)
    except OSError as error:
        raise InputError(
            f"{error.filename or partial}: {error.strerror or error}; the converted checkpoint is written there, set "
            "HF_HOME to a folder with room"
        ) from error
    return converted


def notes_on_conversion(folder: Path) -> list[str]:
    """Return a note for the user if a folder was made by `convert_pickles`."""
    if not (folder / CONVERSION).is_file():
        return []
    said = read_json(folder / CONVERSION)
    by = " and ".join(map(str, said.get("confined") or []))
    how = f"confined by {by}" if by else "not confined, because this system offers neither seccomp nor Landlock"
    tied = said.get("left_out") or []
    without = f", without {', '.join(map(str, tied))}, which is the same memory as another tensor" if tied else ""
    where = f"{folder}, which may be deleted after use"
    return [f"{said.get('source')} was pickled; it was converted by a process {how}{without}, to {where}"]


def _key(folder: Path, files: list[Path]) -> str:
    """Return a name for the conversion of these files as they are now, and of the small files beside them."""
    digest = hashlib.sha256(__version__.encode())
    for path in [*files, *(folder / name for name in companions(folder)[0])]:
        found = path.stat()
        digest.update(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
    return f"{folder.resolve().name[:60]}-{digest.hexdigest()[:16]}"


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Make a folder anew, and remove it if what is inside fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock, then hold it."""
    with path.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _require_disk_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder} needs {needed / 1e6:,.1f} MB for the converted checkpoint, and {free / 1e6:,.1f} MB are free "
            "there; set HF_HOME to a folder with room"
        )


def _convert(folder: Path, files: list[Path], out: Path) -> None:
    """Convert `files` to safetensors in `out`, and copy the other files of `folder` there."""
    copy_companions(folder, out, lambda name: True)
    single = len(files) == 1
    names = [SINGLE if single else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    with ExitStack() as stack:
        opened = [stack.enter_context((out / name).open("wb")) for name in names]
        descriptors = [file.fileno() for file in opened]
        seconds = SECONDS + sum(file.stat().st_size for file in files) // BYTES_PER_SECOND
        request = {"files": [str(file.resolve()) for file in files], "descriptors": descriptors, "seconds": seconds}
        reply = _run({**request, "drop_tied": _may_tie(folder)}, descriptors, folder)
    if not single:
        weight_map = {name: file for file in names for name in _names_in(out / file)}
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (out / CONVERSION).write_text(json.dumps({"source": str(folder), **reply}) + "\n", encoding="utf-8")
    for path in out.iterdir():
        sync_path(path)


def _may_tie(folder: Path) -> bool:
    """Whether config.json lets the model tie tensors to each other, as most models do that say nothing of it."""
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return values.get("tie_word_embeddings") is not False


def _names_in(file: Path) -> list[str]:
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


def _run(request: dict[str, Any], descriptors: list[int], folder: Path) -> dict[str, Any]:
    """Run the process that unpickles, with no module of the checkpoint in `folder`; return its reply.

    Raises:
        InputError: a file holds something else than tensors, or the process died.
    """
    environment = {name: value for name in ENVIRONMENT if (value := os.getenv(name)) is not None}
    places = [*(Path(path or ".").resolve() for path in sys.path), Path(__file__).resolve().parents[2]]
    strange = {folder.resolve(), *(Path(file).parent for file in request["files"])}
    modules = [str(place) for place in places if place not in strange]
    done = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, json.dumps(modules)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        pass_fds=descriptors,
        env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    try:
        reply = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip() or "no message").splitlines()[-1][:200]
        raise InputError(
            f"{request['files'][0]} could not be converted: its process ended with {done.returncode} ({last})"
        ) from error
    if not isinstance(reply, dict) or "error" in reply:
        raise InputError(str(reply["error"]) if isinstance(reply, dict) else f"{request['files'][0]}: no reply")
    return reply
