"""The files beside a checkpoint's weights: tokenizer, templates, code, settings of its parts, licence."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from gptq.checkpoint.atomic_folder import MARKER
from gptq.errors import InputError

WEIGHTS = (  # of any tool; archives too
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".ggml", ".tflite", ".ot", ".pkl", ".pickle", ".mlmodel", ".nemo", ".npz", ".distcp", ".params", ".zip", ".tar",
    ".gz",
)  # fmt: skip
RECORD, REPORT = "quantization_record.json", "report"  # what a result has, and what is drawn of it
ADAPTER = "adapter_config.json"
MODULES, MODULE_WEIGHTS = "modules.json", "model.safetensors"  # of sentence-transformers
MAX_LISTING = 2**20  # bytes of `modules.json`
MAX_FILES = 1000  # in a folder inside the checkpoint; one with more is no part of it
MAX_DEPTH = 8


def companions(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files that are neither weights nor hidden, and the weights and folders that are left out.

    Both are paths relative to `folder`, folders with a slash at their end. Files at the top come first. A folder is
    left out if it is a link, holds more than MAX_FILES files, or is the work or the result of a run of its own. Indexes
    of weights count as a part of these; the report on a result is not looked at. The weights of a sentence encoder's
    further modules belong to the model, and are not left out.
    """
    modules = _further_modules(folder)
    taken: list[str] = []
    left: list[str] = []
    entries = sorted(path for path in folder.iterdir() if _is_visible(path))
    for path in entries:
        if path.is_file():
            _sort_in(path.name, taken, left)
    for path in entries:
        if path.is_dir() and not (path.name == REPORT and (folder / RECORD).exists()):
            inside = None if path.is_symlink() or _is_of_a_run(path) else _files_below(path)
            for file in inside or ():
                name = file.relative_to(folder).as_posix()
                if name in modules:
                    taken.append(name)
                elif _is_of_a_run(file):
                    left.append(f"{name}/")
                else:
                    _sort_in(name, taken, left)
            if inside is None:
                left.append(f"{path.name}/")
    return taken, left


def _further_modules(folder: Path) -> set[str]:
    """Return the names of the files that may hold the weights of modules that sentence-transformers runs after a model.

    `modules.json` lists their folders, such as 2_Dense.
    """
    listing = folder / MODULES
    try:
        if not listing.is_file() or listing.stat().st_size > MAX_LISTING:
            return set()
        listed = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    paths = [one.get("path") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    folders = [path for path in paths if isinstance(path, str) and path and path.isprintable()]
    return {(PurePosixPath(path) / MODULE_WEIGHTS).as_posix() for path in folders}


def _sort_in(name: str, taken: list[str], left: list[str]) -> None:
    if name.lower().endswith(WEIGHTS):
        left.append(name)
    elif not name.endswith(".index.json"):
        taken.append(name)


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".") and path.name != "__pycache__"


def _is_of_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MARKER, RECORD))


def _files_below(folder: Path) -> list[Path] | None:
    """Return the visible files in a folder and its folders; None if there are too many, or they lie too deep.

    A folder that is the work or the result of a run is one of them.
    """
    found: list[Path] = []
    for file in _walk(folder, MAX_DEPTH):
        if file is None or len(found) == MAX_FILES:
            return None
        found.append(file)
    return found


def _walk(folder: Path, depth: int) -> Iterator[Path | None]:
    """Yield the visible files below a folder; None where they lie deeper than `depth` folders."""
    if not depth:
        yield None
        return
    for path in sorted(filter(_is_visible, folder.iterdir())):
        if path.is_dir() and not path.is_symlink() and not _is_of_a_run(path):
            yield from _walk(path, depth - 1)
        else:
            yield path


def copy_companions(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """Copy the files beside the weights whose name, relative to `source`, passes `wanted`."""
    for name in filter(wanted, companions(source)[0]):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def note_on_left_out(source: Path, used: set[str]) -> list[str]:
    """Return a note for the user on the files and folders that are left out, but for those in `used`, if any."""
    left = [name for name in companions(source)[1] if name not in used]
    if not left:
        return []
    others = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return [f"not copied, because they hold weights or are no part of the model: {', '.join(left[:3])}{others}"]


def refuse_adapter(folder: Path) -> None:
    """Raises InputError if a checkpoint has an adapter beside it, which transformers would add to the model."""
    if (folder / ADAPTER).is_file():
        raise InputError(f"{folder} holds an adapter ({ADAPTER}); merge it into its model and save that")
