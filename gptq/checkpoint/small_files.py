"""Write small files so that a reader, or a later run, finds the old content or the new, and never a part of it."""

import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def write_file(path: Path, content: str) -> None:
    """Write a text in UTF-8 at once: into a file beside `path`, which then takes its name. A link is replaced.

    Such files that killed processes left behind are removed.

    Raises:
        OSError: the file cannot be written; `filename` is `path`, and what was there stays.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_path(path.parent)
        _remove_abandoned(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_folder(path: Path, contents: Mapping[str, str]) -> None:
    """Write texts as files of a folder, by their names. A new folder appears with all of them.

    In a folder that exists each of these files is replaced as by `write_file`, and others stay.

    Raises:
        OSError: the folder or a file in it cannot be written.
    """
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            for name, content in contents.items():
                write_file(temporary / name, content)
            temporary.rename(path)
            sync_path(path.parent)
        except OSError as error:
            if not path.is_dir():  # else another process was quicker
                raise OSError(error.errno, error.strerror, str(path)) from error
        else:
            contents = {}
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for name, content in contents.items():
        write_file(path / name, content)
    _remove_abandoned(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")


def _remove_abandoned(path: Path) -> None:
    """Remove files and folders in which processes that live no more were writing `path`, as far as that is allowed."""
    with suppress(OSError):
        for left in path.parent.iterdir():
            found = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)-\d+", left.name)
            if found and not _is_alive(int(found[1])):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def sync_path(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Wait until no other process changes what it has read from this folder, and keep others waiting meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
