"""Checks on a checkpoint folder that may come from a stranger, and the reading of its JSON files.

`check_folder` runs before anything, transformers included, opens a file of the folder. Otherwise a named pipe could
block the process, and a link could lead to a private file elsewhere, which a run would copy into its result and perhaps
upload.
"""

import errno
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptq.checkpoint.atomic_folder import is_utf8
from gptq.checkpoint.companions import companions
from gptq.errors import InputError, first_line

MAX_JSON_BYTES = 2**28  # limit of a JSON file; the largest known JSON file, a tokenizer of 260,000 tokens, has 33 MB
OF_THE_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}  # errors that tell what is there, or nothing
TEMPLATES = "additional_chat_templates"  # the folder below a checkpoint that transformers reads whatever is in it
MAX_DEPTH = 64  # levels of nested JSON; much deeper nesting overflows the stack of recursive readers


def local_folder(model: str) -> Path | None:
    """Return the folder of a model that is named by its path; None for what may be an id on the Hub.

    Raises:
        InputError: it is a file, or can only be a path and leads nowhere.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{model} is a file; give the folder that holds config.json and the safetensors files")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"{model}: no such folder")
    return None


def check_folder(folder: Path) -> None:
    """Check every entry of a checkpoint folder, and every file below it that comes along or is read, before any is.

    A link may lead to a file inside the folder. In the Hub's cache, whose snapshots consist of links, it may also lead
    to a file in the cache's `blobs`.

    Raises:
        InputError: something is neither a file nor a folder (a pipe, a device), a link leads elsewhere, a name holds
            control characters, or a JSON file is too large; the message names the entry.
    """
    if folder.is_dir():
        templates = sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*"))
        check_files(folder, [*sorted(path.name for path in folder.iterdir()), *templates, *companions(folder)[0]])


def check_path(path: Path) -> None:
    """Raises InputError if the path is not UTF-8, which other libraries need."""
    if not is_utf8(path):
        raise InputError(f"{path} cannot be opened, because its path is not UTF-8; rename the folder")


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Check these entries of a checkpoint folder, given relative to it, as `check_folder` does."""
    folder = folder.resolve()
    inside = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    for name in dict.fromkeys(names):
        _check_entry(folder / name, inside)


def _check_entry(path: Path, inside: list[Path]) -> None:
    if not path.name.isprintable():
        raise InputError(f"{path.parent} holds a file whose name has control characters: {path.name!r}")
    try:
        target = path.resolve()
        found, is_file = target.stat(), target.is_file()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise InputError(f"{path} cannot be opened: {error}") from error
        return  # gone since the folder was listed: another process replaces files by renaming temporary ones
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        raise_if_refused(error, path)
        raise InputError(f"{path} cannot be opened: {error}") from error
    if not any(target.is_relative_to(place) for place in inside):
        raise InputError(f"{path} is a link to {target}, outside its folder; copy that file into the folder instead")
    if not is_file and not target.is_dir():
        raise InputError(f"{path} is neither a file nor a folder; remove it")
    if path.suffix == ".json" and is_file and found.st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} has {found.st_size / 1e6:,.0f} MB, which no JSON file of a checkpoint has")


def read_json(file: Path) -> dict[str, Any]:
    """Read the object that a JSON file holds.

    Raises:
        InputError: the file is missing, is not JSON in UTF-8, is nested too deeply, or does not hold an object.
        OSError: the system refuses to read the file.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file} is {'no plain file' if file.exists() or file.is_symlink() else 'missing'}")
        if not (size := file.stat().st_size):
            raise InputError(f"{file} is empty")
        if size > MAX_JSON_BYTES:
            raise InputError(f"{file} has {size / 1e6:,.0f} MB, which no JSON file of a checkpoint has")
        content = json.loads(file.read_text(encoding="utf-8"))
        _check_values(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise_if_refused(error, file)
        raise InputError(f"{file} could not be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object, which begins with {{")
    return content


def raise_if_refused(error: Exception, file: Path) -> None:
    """Raise OSError with the file's name if the system refused to read it (no more open files, a failing disk).

    Nothing is known of the content then, so that this may not be taken for damage.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_THE_PATH:
        raise OSError(error.errno, error.strerror, str(file)) from error


def _check_values(content: Any) -> None:
    """Raises ValueError for values that are nested too deeply, and for texts that UTF-8 cannot hold."""
    level = [content]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode("utf-8")
            elif isinstance(value, dict):
                deeper += value.keys()
                deeper += value.values()
            elif isinstance(value, list):
                deeper += value
        level = deeper
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
