"""Open what calibrates or is measured: files, folders, data sets of the Hub, and what Python has in memory.

The command line calls a source SRC:

    book.txt                          one text
    rows.jsonl, rows.parquet          one document, chat or image per row; also .json, .csv, and these with .gz
    FOLDER, FOLDER:SPLIT              a folder that `datasets` loads, of images or sound with a metadata.jsonl too
    NAME, NAME:SPLIT, NAME:CONFIG:SPLIT   a data set on the Hub, e.g. wikitext:wikitext-2-raw-v1:test
    c4                                the part of C4 that the GPTQ paper calibrates on, its first training shard; in
                                      evaluations, or as c4:validation, its first validation shard

The columns of a source say what it is: `text` (see `text`), `messages` and the like (see `chats`), `image`, `images` or
`audio` (see `processed`). Arrays are read by `arrays`.
"""

import gzip
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gptq.errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # suffix: reader of `datasets`
BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    "json": (b"{", b"[{", b"[[", b'["', b"[]"),
    "parquet": (b"PAR1",),
}  # of a file for such a reader
ARCHIVES = (
    b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"
)  # fmt: skip
FILES = (".txt", *READERS, ".gz", ".tsv", ".zip", ".npz", ".npy", ".safetensors", ".pt", ".arrow")  # no Hub id ends so
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus", ".aac")
HUB_TIMEOUT = 5  # seconds until the Hub counts as out of reach
MAX_STREAMED_ROWS = 4096  # rows of a streamed data set that are read


@dataclass(frozen=True)
class Table:
    """Rows of a source, by column."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]] = field(repr=False)
    folder: Path | None = None  # where relative paths in the rows begin

    def where(self, row: int) -> str:
        """Return how error messages name a row, counted from 0."""
        return f"{self.name}, row {row}"

    def row(self, number: int) -> Mapping[str, Any]:
        """Return a row by column; raises InputError if it cannot be read, because a text is not UTF-8 for example."""
        try:
            return self.rows[number]
        except ValueError as error:
            raise InputError(f"{self.where(number)} cannot be read: {first_line(error)}") from error


def open_table(source: str, default_split: str) -> Table:
    """Open the rows of a source.

    Raises:
        InputError: the source does not exist, cannot be reached or read, or is empty; the message names its splits.
    """
    path, split = _local_path(source)
    if path is None:
        rows, folder = _hub_dataset(source, default_split), None
    else:
        rows, folder = _local_dataset(source, path, split or default_split), path if path.is_dir() else path.parent
    if not len(rows):
        raise InputError(f"{source} is empty")
    if isinstance(rows, list):
        return Table(source, tuple(dict.fromkeys(key for row in rows for key in row)), rows, folder)
    return Table(source, tuple(rows.column_names), _undecoded(rows), folder)


def require_file(source: str) -> None:
    """Check that a source that can only be a file or folder is there.

    Raises:
        InputError: it is not; a name that may be a data set of the Hub passes.
    """
    name, *rest = source.split(":")
    local = len(rest) > 2 or name.startswith((".", "/", "~")) or name.endswith(FILES) or name.count("/") > 1
    path = _local_path(source)[0]
    if local and path is None:
        raise InputError(f"{source}: no such file or folder")
    if path is not None and path.is_file() and not path.stat().st_size:
        raise InputError(f"{source} is empty")


def table_of(given: Iterable[Any], default_split: str) -> Table | None:
    """Return what Python gave as rows: texts, chats, dicts of columns, a data set; None if it is none of these."""
    if isinstance(given, Mapping) and given and all(hasattr(own, "column_names") for own in given.values()):
        given = _choose_split(given, default_split, "the given data set")
    if hasattr(given, "to_dict") and hasattr(given, "iterrows"):  # a DataFrame
        given = cast("list[Any]", given.to_dict("records"))
    if hasattr(given, "column_names") and hasattr(given, "take"):
        if not hasattr(given, "__len__"):  # streamed
            given = list(islice(given, MAX_STREAMED_ROWS))
        else:
            rows = cast("Dataset", given)
            return Table("the given data set", tuple(rows.column_names), _undecoded(rows)) if len(rows) else None
    items = given if isinstance(given, list) else None
    if not items:
        return None
    if all(isinstance(item, str) for item in items):
        return Table(f"{len(items)} given texts", ("text",), [{"text": item} for item in items])
    if all(isinstance(item, list) and item and isinstance(item[0], Mapping) for item in items):
        return Table(f"{len(items)} given chats", ("messages",), [{"messages": item} for item in items])
    if all(isinstance(item, Mapping) and holds_no_arrays(item) for item in items):
        return Table(f"{len(items)} given rows", tuple(dict.fromkeys(key for item in items for key in item)), items)
    return None


def holds_no_arrays(row: Mapping[str, Any]) -> bool:
    """Whether a dict is a row of a data set, and not the arguments of a model."""
    words = (str, bytes)
    return any(isinstance(value, words) or _is_chat(value) for value in row.values()) or bool(
        {"image", "images", "audio"} & row.keys()
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _local_path(source: str) -> tuple[Path | None, str]:
    """Split PATH or PATH:SPLIT into path and split; the path is None if it does not exist."""
    if Path(source).exists():
        return Path(source), ""
    path, _, split = source.rpartition(":")
    return (Path(path), split) if path and Path(path).exists() else (None, "")


def _media_folder(path: Path) -> list[dict[str, Any]]:
    """Read a folder of images or recordings with a metadata file as `datasets` describes it; [] if it is none.

    `datasets` itself needs torchcodec for recordings, though here nothing is decoded yet.
    """
    found = [file for file in (path / "metadata.jsonl", path / "metadata.csv") if file.is_file()]
    if not found:
        return []
    described = load_dataset(READERS[found[0].suffix], data_files=str(found[0]), split="train")
    rows = []
    for row in described:
        names = [row.pop("file_name", None), *(row.pop("file_names", None) or [])]
        files = [str(name) for name in names if name]
        images = [name for name in files if Path(name).suffix.lower() not in SOUND_SUFFIXES]
        sounds = [name for name in files if name not in images]
        rows.append(row | ({"images": images} if images else {}) | ({"audio": sounds[0]} if sounds else {}))
    return rows


def _local_dataset(source: str, path: Path, split: str) -> "Dataset | list[dict[str, Any]]":
    """Read a file or folder; a .txt file is one row."""
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{source} is neither a file nor a folder")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            _check_beginning(file)
        if path.is_dir():
            return _media_folder(path) or _choose_split(_load_folder(path), split, str(path))
        if path.suffix == ".txt":
            return [{"text": path.read_text(encoding="utf-8-sig")}]
        if not path.stat().st_size:
            raise InputError(f"{source} is empty")
        if suffix in READERS:
            return cast("Dataset", load_dataset(READERS[suffix], data_files=str(path), split="train"))
    except InputError:
        raise
    except Exception as error:  # datasets raises whatever its readers raise
        if "corresponds to no data" in str(error) or isinstance(error.__cause__ or error, StopIteration):
            raise InputError(f"{source} is empty") from error
        raise InputError(f"{source} could not be read as text data: {first_line(error)}") from error
    raise InputError(f"{source} is not a .txt, .jsonl, .json, .csv or .parquet file, nor a folder that datasets loads")


def _load_folder(path: Path) -> Any:
    """Let `datasets` load a folder; if it takes the .txt files, each is one row."""
    import datasets

    reads_text = hasattr(datasets.load_dataset_builder(str(path)).config, "sample_by")
    return load_dataset(str(path), **({"sample_by": "document", "encoding": "utf-8-sig"} if reads_text else {}))


def _check_beginning(file: Path) -> None:
    """Check that a file of rows begins as its ending says.

    On JSON whose first row is `null`, pyarrow 26 kills the process; and `datasets` unpacks whatever is an archive.

    Raises:
        InputError: it does not.
    """
    kind = READERS.get(Path(file.name.removesuffix(".gz")).suffix)
    if kind is None or not file.is_file():
        return
    start = b""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
        while len(start) < 4 and (piece := opened.read(4096)):
            start = b"".join((start + piece.removeprefix(b"\xef\xbb\xbf")).split())  # without blanks
    if start and (start.startswith(ARCHIVES) or not start.startswith(BEGINNINGS.get(kind, (b"",)))):
        raise InputError(f"{file} begins with {start[:8]!r}, which is no {kind}; is it another kind of file?")


def load_dataset(*args: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, imported on first use: the import takes a second and 90 MB.

    What it would log of a damaged file is in the error that it raises, which becomes our sentence.
    """
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(*args, **options)
    finally:
        datasets.logging.set_verbosity(level)


def load_from_hub(name: str, *args: Any, **options: Any) -> Any:
    """Load a data set of the Hub; fails soon where the Hub is out of reach and the data set is in no cache.

    `datasets` alone tries for half a minute.
    """
    import datasets
    import huggingface_hub

    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if not cached.exists():
        with suppress(huggingface_hub.errors.HfHubHTTPError):  # the Hub has answered; `datasets` says what is wrong
            huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    return load_dataset(name, *args, **options)


def _hub_dataset(source: str, default_split: str) -> "Dataset":
    """Load NAME, NAME:SPLIT or NAME:CONFIG:SPLIT from the Hub."""
    require_file(source)
    name, *rest = source.split(":")
    config, split = ("", "") if not rest else ("", rest[0]) if len(rest) == 1 else (rest[0], rest[1])
    try:
        if name == "c4":
            part = "train" if (split or default_split) == "train" else "validation"
            loaded = load_from_hub("allenai/c4", data_files={part: C4_SHARDS[part]})
        else:
            loaded = load_from_hub(name, config or None)
    except Exception as error:  # offline, unknown name, gated, broken: many types, one remedy
        from gptq.checkpoint.hub import explain

        raise InputError(
            f"{name!r} is neither a file or folder here nor a data set that the Hub could give: {explain(error)}. Name "
            "a local .txt, .jsonl, .csv or .parquet file, or a folder of those, with --calibration (eval: --data)"
        ) from error
    return _choose_split(loaded, split or default_split, f"{name}:{config}" if config else name)


def _choose_split(loaded: Any, split: str, source: str) -> "Dataset":
    """Return the named split, or the only split of the source."""
    splits = cast("DatasetDict", loaded)
    if split in splits:
        return splits[split]
    if len(splits) == 1:
        return next(iter(splits.values()))
    names = list(splits)
    raise InputError(f"{source} has no split {split!r}; name one of {', '.join(names)}, as in {source}:{names[0]}")


def _undecoded(rows: "Dataset") -> "Dataset":
    """Have images and sound stay bytes or paths: what cannot be decoded is then known by its row."""
    import datasets

    rows, media = rows.with_format(None), (datasets.Image, datasets.Audio)
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", None)  # of a list
        if isinstance(feature, media):
            rows = rows.cast_column(name, type(feature)(decode=False))
        elif isinstance(inner, media):
            rows = rows.cast_column(name, datasets.List(type(inner)(decode=False)))
    return rows
