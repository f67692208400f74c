"""Notice that a checkpoint's files change while they are read: a result would be a mixture of two checkpoints."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gptq.checkpoint.companions import companions
from gptq.errors import InputError

MAX_HASHED_WHOLE = 2**26  # bytes; of larger files only pieces are hashed
PIECE_BYTES, PIECE_STRIDE = 2**16, 2**24  # length of a piece, and distance from one to the next
OF_TENSORS = (".safetensors", ".gguf", ".index.json")  # how names of files end that hold tensors, or list them
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
        stamps = {name: _stamp(folder / name) for name in _names(folder)}
        small = (name for name in stamps if stamps[name][0] <= MAX_HASHED_WHOLE)
        return cls(folder, stamps, {name: fingerprint(folder / name) for name in small})

    def require_same(self, files: Iterable[Path] | None = None) -> None:
        """Check that these files of the folder are as they were; by default all, and that there are no others.

        A file that only looks newer is read again.

        Raises:
            InputError: a file has changed, is gone or was added; the message names it.
        """
        if files is None:
            names = {**self.stamps, **dict.fromkeys(_names(self.folder))} if self.folder.is_dir() else self.stamps
            changed = self._find_change(names)
        else:
            changed = self._find_change(file.relative_to(self.folder).as_posix() for file in files)
        if changed is not None:
            did = "changed, replaced or removed" if changed in self.stamps else "added"
            raise InputError(
                f"{self.folder / changed} was {did} while the folder was in use, so the result would be a mixture; "
                "run again on files that stay as they are"
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


def _names(folder: Path) -> list[str]:
    of_tensors = (path.name for path in folder.iterdir() if path.name.endswith(OF_TENSORS) and path.is_file())
    return sorted({*companions(folder)[0], *of_tensors})


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
