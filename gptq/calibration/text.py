"""Read text sources and cut them into windows of tokens, for calibration and for perplexity.

The command line calls a source SRC:

    book.txt                          one text
    rows.jsonl, rows.parquet          the column `text`, one document per row; also .json.gz and .jsonl.gz
    FOLDER, FOLDER:SPLIT              a folder that `datasets` loads
    NAME, NAME:SPLIT, NAME:CONFIG:SPLIT   a data set on the Hub, e.g. wikitext:wikitext-2-raw-v1:test
    c4                                the part of C4 that the GPTQ paper calibrates on, its first training shard; in
                                      evaluations, or as c4:validation, its first validation shard

For calibration also (see `gptq.calibration.arrays`)

    images.npz, pairs.safetensors     arrays named after the model's arguments (pixel_values, input_features,
                                      input_ids, attention_mask, decoder_input_ids ...), first dimension: windows
    FOLDER                            a folder of such files
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq.errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SMALL_SOURCE = 16_000_000  # characters; of a source with more, only the rows that are drawn are tokenized
C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


def load_dataset(*args: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, imported on first use: the import takes a second and 90 MB."""
    import datasets

    return datasets.load_dataset(*args, **options)


def documents(source: str, default_split: str, column: str = "text") -> Sequence[str]:
    """Return the rows of text of a source, in order.

    Raises:
        InputError: the source does not exist, cannot be reached, or has no text; the message names its splits or
            columns.
    """
    file, split = _local_path(source)
    if file is None:
        return _text_column(_hub_dataset(source, default_split), source, column)
    if not file.is_dir() and not file.is_file():
        raise InputError(f"{source} is neither a file nor a folder")
    try:
        if file.is_dir():
            rows = _choose_split(load_dataset(str(file)), split or default_split, str(file))
            return _text_column(rows, source, column)
        if file.suffix == ".txt":
            return [file.read_text(encoding="utf-8")]
        if file.name.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet")):
            kind = "parquet" if file.suffix == ".parquet" else "json"
            return _text_column(load_dataset(kind, data_files=str(file), split="train"), source, column)
    except InputError:
        raise
    except Exception as error:  # datasets raises whatever its readers raise
        raise InputError(f"{source} could not be read as text data: {first_line(error)}") from error
    raise InputError(f"{source} is not a .txt, .jsonl or .parquet file, nor a folder that datasets loads")


def _local_path(source: str) -> tuple[Path | None, str]:
    """Split PATH or PATH:SPLIT into path and split; the path is None if it does not exist."""
    if Path(source).exists():
        return Path(source), ""
    path, _, split = source.rpartition(":")
    return (Path(path), split) if path and Path(path).exists() else (None, "")


def _hub_dataset(source: str, default_split: str) -> "Dataset":
    """Load NAME, NAME:SPLIT or NAME:CONFIG:SPLIT from the Hub."""
    name, *rest = source.split(":")
    config, split = ("", "") if not rest else ("", rest[0]) if len(rest) == 1 else (rest[0], rest[1])
    if (
        len(rest) > 2
        or name.startswith((".", "/", "~"))
        or name.endswith((".txt", ".jsonl", ".json", ".parquet", ".gz"))
    ):
        raise InputError(f"{source}: no such file or folder")
    try:
        if name == "c4":
            part = "train" if (split or default_split) == "train" else "validation"
            loaded = load_dataset("allenai/c4", data_files={part: C4_SHARDS[part]})
        else:
            loaded = load_dataset(name, config or None)
    except Exception as error:  # offline, unknown name, gated, broken: many types, one remedy
        raise InputError(
            f"the data set {name!r} is neither a local path nor could it be fetched from the Hub "
            f"({first_line(error)}). Pass a local .txt, .jsonl or .parquet file or a folder of those instead"
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


def _text_column(rows: "Dataset", source: str, column: str) -> Sequence[str]:
    """Return a column of strings, checked to be valid UTF-8."""
    if column not in rows.column_names:
        raise InputError(f"{source} has no column {column!r}; its columns are {', '.join(rows.column_names)}")
    kind = getattr(rows.features[column], "dtype", "no text")
    if kind not in ("string", "large_string"):
        raise InputError(f"the column {column!r} of {source} holds {kind}, not strings")
    try:
        rows.data.column(column).validate(full=True)
    except ValueError as error:  # invalid UTF-8 fails only here: pyarrow does not check it while reading
        raise InputError(f"the column {column!r} of {source} cannot be read: {first_line(error)}") from error
    return cast(Sequence[str], rows[column])


def special_token_frame(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the two special tokens around every text of an encoder (such as BERT's [CLS] and [SEP]); or []."""
    ends = _token_ids("", tokenizer, special_tokens=True)
    return ends if len(ends) == 2 else []


def draw_windows(
    rows: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    seed: int,
    frame: Sequence[int] = (),
) -> Tensor:
    """Draw calibration windows: (num_samples, seq_len) int64 tokens, without padding and without overlap.

    A small source is tokenized as one text and cut into windows, which are drawn at random with the seed. Of a large
    source, rows are visited in random order; each window starts at a row and continues into the next rows. With a
    `frame` of two tokens, every window begins with the first and ends with the second.

    Raises:
        InputError: the text is too short; the message says how many tokens it has, and how many are needed.
    """
    draw = torch.Generator().manual_seed(seed)
    if frame:
        if seq_len < 3:
            raise InputError(f"seq_len is {seq_len}; between this tokenizer's two special tokens is no room for text")
        inner = _draw_windows(rows, tokenizer, num_samples, seq_len - 2, draw, special_tokens=False)
        first, last = (inner.new_full((len(inner), 1), token) for token in frame)
        return torch.cat([first, inner, last], dim=1)
    return _draw_windows(rows, tokenizer, num_samples, seq_len, draw, special_tokens=True)


def _draw_windows(
    rows: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    draw: torch.Generator,
    special_tokens: bool,
) -> Tensor:
    """Draw (num_samples, seq_len) tokens: from the whole text if the source is small, otherwise from rows."""
    if len(rows) == 1 or _is_small(rows, SMALL_SOURCE):
        tokens = tokenize(rows, tokenizer, special_tokens)
        whole = len(tokens) // seq_len
        _require_tokens(len(tokens), num_samples, seq_len, whole)
        chosen = torch.randperm(whole, generator=draw)[:num_samples]
        return tokens[: whole * seq_len].view(whole, seq_len)[chosen]
    return _draw_from_rows(rows, tokenizer, num_samples, seq_len, draw, special_tokens)


def _is_small(rows: Sequence[str], characters: int) -> bool:
    """Whether the rows have at most this many characters; stops reading at the limit."""
    total = 0
    for row in rows:
        total += len(row or "")
        if total > characters:
            return False
    return True


def _draw_from_rows(
    rows: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    draw: torch.Generator,
    special_tokens: bool,
) -> Tensor:
    """Draw windows that start at random rows. No row is used twice; rows that do not fill a window are dropped."""
    found: list[Tensor] = []
    used: set[int] = set()
    seen_tokens = 0
    for start in torch.randperm(len(rows), generator=draw).tolist():
        if len(found) == num_samples:
            break
        ids: list[Tensor] = []
        row = start
        while row < len(rows) and row not in used and sum(map(len, ids)) < seq_len:
            used.add(row)
            ids.append(tokenize([(rows[row] or "") + "\n\n"], tokenizer, special_tokens=special_tokens and not ids))
            row += 1
        seen_tokens += sum(map(len, ids))
        if sum(map(len, ids)) >= seq_len:
            found.append(torch.cat(ids)[:seq_len])
    _require_tokens(seen_tokens, num_samples, seq_len, len(found))
    return torch.stack(found)


def _require_tokens(tokens: int, num_samples: int, seq_len: int, whole: int) -> None:
    """Raises InputError if there are fewer whole windows than num_samples."""
    if whole < num_samples:
        raise InputError(
            f"the calibration text has {tokens} tokens, enough for {whole} windows of {seq_len}; {num_samples} windows "
            f"need {num_samples * seq_len}. Give more text, or fewer --samples, or a shorter --seq-len"
        )


def tokenize(rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool = True) -> Tensor:
    """Join rows by blank lines and tokenize them as one text: (tokens,). Special tokens occur only at its ends."""
    text = "\n\n".join(row or "" for row in rows)  # a missing value counts as an empty row
    return torch.tensor(_token_ids(text, tokenizer, special_tokens), dtype=torch.int64)


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase, special_tokens: bool) -> list[int]:
    """Tokenize a text; raises InputError if the tokenizer fails."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    except Exception as error:  # of any type, depending on the tokenizer's files
        raise InputError(f"the tokenizer fails on the text: {first_line(error)}") from error
    return ids


def evaluation_windows(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None
) -> Tensor:
    """Return windows for perplexity as in the papers: the whole text in order, cut without overlap, (windows, seq_len).

    Raises:
        InputError: the text is shorter than one window.
    """
    tokens = tokenize(rows, tokenizer)
    whole = len(tokens) // seq_len
    if whole == 0:
        have = f"the text has {len(tokens)} tokens; one window needs {seq_len}"
        raise InputError(f"{have}. Give more text, or a shorter --seq-len")
    return tokens[: whole * seq_len].view(whole, seq_len)[:limit]
