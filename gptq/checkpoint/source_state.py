"""Notice that a checkpoint's files change while they are read: a result would be a mixture of two checkpoints."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gptq.checkpoint.companions import companions
from gptq.errors import InputError

MAX_HASHED_WHOLE = 2**26  # bytes; of larger files only pieces are hashed
PIECE_BYTES, PIECE_STRIDE = 2**16, 2**24  # length of a piece, and distance from one to the next
TENSOR_FILES = (".safetensors", ".gguf")
Stamp = tuple[int, int, int]  # size, time of the last change in nanoseconds, number of the file


def fingerprint(file: Path) -> str:
    """Return a file's size and checksum; of a large file only pieces are read, so that 140 GB take seconds.

    The modification time is ignored: a model that was downloaded again is the same.
    """
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        if size <= MAX_HASHED_WHOLE:
            digest.update(opened.read())
        else:
            for start in [*range(0, size, PIECE_STRIDE), size - PIECE_BYTES]:
                opened.seek(start)
                digest.update(opened.read(PIECE_BYTES))
    return f"{size} {digest.hexdigest()}"


@dataclass(frozen=True)
class SourceState:
    """A checkpoint's files as they were before the first was read."""

    folder: Path
    stamps: dict[str, Stamp]
    fingerprints: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> "SourceState":
        """Look at the files that hold tensors, and at those that come along."""
        names = {*companions(folder)[0], *(path.name for path in folder.iterdir() if path.suffix in TENSOR_FILES)}
        stamps = {name: _stamp(folder / name) for name in sorted(names)}
        small = (name for name in names if stamps[name][0] <= MAX_HASHED_WHOLE)
        return cls(folder, stamps, {name: fingerprint(folder / name) for name in small})

    def require_same(self, files: Iterable[Path] | None = None) -> None:
        """Check that these files of the folder, by default all, are as they were.

        A file that only looks newer is read again.

        Raises:
            InputError: a file has changed or is gone; the message names it.
        """
        names = self.stamps if files is None else [file.relative_to(self.folder).as_posix() for file in files]
        changed = self._find_change(names)
        if changed is not None:
            raise InputError(
                f"{self.folder / changed} was changed, replaced or removed while it was in use, so the result would be "
                "a mixture; run again on files that stay as they are"
            )

    def _find_change(self, names: Iterable[str]) -> str | None:
        for name in names:
            try:
                now = _stamp(self.folder / name)
                if now == self.stamps.get(name):
                    continue
                known = self.fingerprints.get(name)  # of a large file not every byte is known, so its time counts
                if known is None or fingerprint(self.folder / name) != known:
                    return name
            except OSError:
                return name
            self.stamps[name] = now
        return None


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
