"""Write an output folder atomically: the folder gets its name OUT only when all its bytes are on disk.

Until then the files are in OUT.partial/checkpoint. OUT.partial also holds what a later run needs to resume (see
`gptq.pipeline.journal`).
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gptq.checkpoint.small_files import sync_path
from gptq.errors import InputError

MARKER = ".unfinished"  # file in OUT.partial that shows that we made the folder and may empty it
CONTENT = "checkpoint"  # subfolder of OUT.partial that is renamed to OUT
SHARDS = "shards"  # subfolder of OUT.partial with the finished blocks, where CONTENT holds other files made of them


@dataclass
class PartialFolder:
    """The working folder of a run, OUT.partial.

    When the run fails, `describe_kept` returns a sentence about what the folder keeps for resuming; it is shown with
    the error. An empty string means that nothing is kept, and the folder is removed. Until a run has cleared the folder
    or looked into it, what an earlier run has left there is kept.
    """

    root: Path
    content: Path  # subfolder that is renamed to OUT; a last step may name another one
    describe_kept: Callable[[], str] = str  # str() is empty
    descriptor: int | None = None  # of the folder that this run has locked
    is_marked: bool = False  # with MARKER, by this run

    def is_ours(self) -> bool:
        """Whether the folder at `root` is still the one that this run has locked, and not removed or replaced."""
        if self.descriptor is None:
            return True
        with suppress(OSError):
            return os.path.samestat(os.fstat(self.descriptor), self.root.stat())
        return False

    def require_ours(self) -> None:
        """Raises InputError if the folder was removed or replaced, so that nothing is written into another run's."""
        if not self.is_ours():
            raise InputError(f"{self.root} was removed or replaced while this run was writing into it; run again")

    def clear(self) -> None:
        """Remove all files of an earlier run."""
        self.describe_kept = str
        _empty(self.root)
        self.content.mkdir()
        sync_path(self.root)

    def keep_shards(self) -> None:
        """Keep the shards of an earlier run; remove the other files, so that they do not look like a checkpoint."""
        if (kept := self.root / SHARDS).is_dir():
            shutil.rmtree(self.content, ignore_errors=True)
            kept.rename(self.content)
        self.content.mkdir(exist_ok=True)
        for file in self.content.iterdir():
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            elif file.suffix != ".safetensors":
                file.unlink()

    def keep_only(self, names: Collection[str]) -> None:
        """Remove the shards that are not called so, which would become part of the output."""
        for file in self.content.glob("*.safetensors"):
            if file.name not in names:
                file.unlink()

    def require_disk_space(self, needed_bytes: int) -> None:
        """Raises InputError if the free disk space and the space of `content` together are less than `needed_bytes`."""
        here = sum(512 * file.stat().st_blocks for file in self.content.iterdir())  # shards are sparse files
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes - here:
            more = f"{(needed_bytes - here) / 1e6:,.1f} MB{' more' if here else ''}"
            raise InputError(f"{self.root} needs {more} and the disk has {free / 1e6:,.1f} MB free")


def partial_folder_of(out: Path) -> PartialFolder:
    """The working folder for `out`, which may not exist yet; the folder is not locked."""
    root = _resolve(out).with_name(out.name + ".partial")
    return PartialFolder(root, root / CONTENT)


@contextmanager
def partial_folder(out: Path) -> Iterator[PartialFolder]:
    """Lock and yield a working folder beside `out`; rename its content to `out` when the body succeeds.

    When the body fails, the folder is removed, unless it keeps something for resuming; then the error says so.

    Raises:
        InputError: `out` exists and is not empty, cannot be made, or the disk is too small or gets full; another run
            has locked the folder.
    """
    out = _resolve(out)
    made = [parent for parent in out.parents if not parent.exists()]
    root = partial_folder_of(out).root
    with ExitStack() as stack:
        try:
            require_unused(out)
            root.mkdir(parents=True, exist_ok=True)
            working = partial_folder_of(out)
            working.descriptor = stack.enter_context(_exclusive_lock(root, out))
            if any(file.name != MARKER for file in root.iterdir()):
                working.describe_kept = lambda: f"{root} keeps what an earlier run has left there"
        except InputError:
            raise  # the folder may be another run's
        except BaseException as error:
            _remove_empty(root, *made)
            if isinstance(error, OSError):
                raise InputError(f"{out} cannot be written: {error.strerror}") from error
            raise
        try:
            require_unused(out)  # again, now that the folder is locked
            _remove_links(root)
            (root / MARKER).touch()
            working.is_marked = True
            yield working
            working.require_ours()
            for file in (*working.content.rglob("*"), working.content):
                sync_path(file)
            os.rename(working.content.name, out, src_dir_fd=working.descriptor)
            sync_path(out.parent)
            _remove(root)
        except BaseException as error:
            if not working.is_ours():
                _raise_if_replaced(error, working)
                raise
            kept = _clean_up(working, out, made)
            _raise_with_remedy(error, out, root, kept)
            raise


def _clean_up(working: PartialFolder, out: Path, made: Iterable[Path]) -> str:
    """Remove the folder of a run that failed, unless it keeps something; return a sentence on what is left."""
    root = working.root
    if working.is_marked and not working.content.exists() and out.is_dir() and any(out.iterdir()):
        _remove(root)
        return f"{out} is complete"
    kept = working.describe_kept()
    if not kept:
        _remove(root)
        _remove_empty(*made)
        if root.exists():  # each folder to empty takes a descriptor
            kept = f"{root} could not be removed; the next command with the same OUT removes it"
    if working.is_marked and root.exists():
        with suppress(OSError):
            (root / MARKER).touch()  # again: somebody who tried to remove the folder meanwhile may have removed it
    return kept


def _raise_if_replaced(error: BaseException, working: PartialFolder) -> None:
    """Raise InputError for an error that follows from a working folder that is gone."""
    if isinstance(error, OSError):
        try:
            working.require_ours()
        except InputError as gone:
            raise gone from error


def _raise_with_remedy(error: BaseException, out: Path, root: Path, kept: str) -> None:
    """Raise InputError for an error that the user can fix; attach the sentence on what is kept to any other error."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        problem = f"writing {out} failed ({where}{error.strerror or error})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = (
                f"writing {out} failed: the disk at {_mount_point(root)} is full ({error.strerror}); free some of it"
            )
        raise InputError(f"{problem}; {kept or 'nothing is left there'}") from error
    if kept and isinstance(error, InputError):
        raise InputError(f"{error}; {kept}") from error
    if kept:  # does what BaseException.add_note does, which Python 3.10 lacks
        vars(error)["__notes__"] = [*getattr(error, "__notes__", []), kept]


def _mount_point(path: Path) -> Path:
    """The mount point of the file system that holds the path."""
    return next(p for p in (path, *path.parents) if p.is_mount() or p == p.parent)


def _empty(root: Path) -> None:
    """Remove all but the marker, so that after a kill in the middle the folder is still recognized as ours."""
    for left_over in root.iterdir():
        if left_over.is_dir() and not left_over.is_symlink():
            shutil.rmtree(left_over)
        elif left_over.name != MARKER:
            left_over.unlink()


def _remove_links(root: Path) -> None:
    """Remove what is neither a plain file nor a folder, so that no run writes or deletes elsewhere through a link."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            path.unlink()


def _remove(root: Path) -> None:
    """Remove the working folder, the marker last; give up silently if the system refuses a second time.

    What is left of a finished run's is removed by the next command with the same OUT (`require_unused`).
    """
    for _ in range(2):
        with suppress(OSError):
            _empty(root)
            (root / MARKER).unlink(missing_ok=True)
            root.rmdir()
            return


def _remove_empty(*folders: Path) -> None:
    """Remove these folders, as far as they are there and empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def atomic_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `out` when the body succeeds, and removed when it fails.

    Raises:
        InputError: as `partial_folder`, or the disk has less than `needed_bytes` free.
    """
    with partial_folder(out) as working:
        working.clear()
        working.require_disk_space(needed_bytes)
        yield working.content


def is_utf8(path: Path) -> bool:
    """Whether the bytes of the path are UTF-8, which safetensors and other libraries need."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def _resolve(out: Path) -> Path:
    """Return the path without links; raises InputError if they lead to each other."""
    try:
        found = out.resolve()
    except (OSError, RuntimeError) as error:  # until Python 3.12 of such links
        raise InputError(f"{out} cannot be made: {' '.join(str(error).split())}") from error
    if found.is_symlink():  # since Python 3.13
        raise InputError(f"{out} cannot be made: its links lead to each other")
    return found


def require_unused(out: Path) -> None:
    """Raises InputError if `out` exists and is not empty, cannot be made or read, or OUT.partial was not made by us."""
    where = _resolve(out)
    if not is_utf8(where):
        raise InputError(f"{where} is a path that is not UTF-8, which readers need; choose another name")
    if not where.name:
        raise InputError(f"{out} is the root of the file system, which cannot be replaced; name a folder inside it")
    partial = where.with_name(where.name + ".partial")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        remove_finished(partial)
        raise InputError(f"{out} exists and is not empty; choose another name or remove it")
    parent = next(path for path in where.parents if path.exists())
    if not parent.is_dir():
        raise InputError(f"{out} cannot be made, because {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be made: writing to {parent} is not allowed")
    if out.is_mount():
        raise InputError(f"{out} is a mount point, which cannot be replaced; name a folder inside it")
    if partial.exists() and any(partial.iterdir()) and not (partial / MARKER).is_file():
        raise InputError(f"{partial} is in the way, and no left-over of an earlier run; rename or remove it")


def remove_finished(root: Path) -> None:
    """Remove a working folder, if it is there, whose content is a result now; its run was killed right afterwards."""
    with suppress(OSError):
        root.rmdir()  # if the run was killed before the last step of removing it
        return
    if not (root / MARKER).is_file() or (root / CONTENT).exists():
        return
    with suppress(OSError, InputError), _exclusive_lock(root, root):
        _remove(root)


def require_unused_beside(out: Path, names: Iterable[str]) -> None:
    """Raises InputError if a folder beside `out` is used, unless a stopped run for `out` can have written it."""
    if not partial_folder_of(out).root.exists():
        for name in names:
            require_unused(out.with_name(name))


@contextmanager
def _exclusive_lock(folder: Path, out: Path) -> Iterator[int]:
    """Hold an flock on the folder, which ends with the process; raises InputError if another run holds it.

    Yields the folder's descriptor.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError as error:
        raise InputError(f"another run is writing {out}") from error
    finally:
        os.close(descriptor)
