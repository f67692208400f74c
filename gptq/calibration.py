"""Text -> seeded windows of tokens, for calibration and for perplexity.

A source is written SRC on the command line:

    book.txt                          one text
    rows.jsonl, rows.parquet          the column `text`, one document a row
    FOLDER, FOLDER:SPLIT              a folder that `datasets` loads
    NAME, NAME:SPLIT, NAME:CONFIG:SPLIT   a data set on the Hub, e.g. wikitext:wikitext-2-raw-v1:test
    c4                                the slice of C4 that the GPTQ paper calibrates on (its first training shard)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq.errors import InputError

SMALL_SOURCE = 16_000_000  # characters: up to here a source is tokenized whole, beyond it only the rows drawn
C4_SHARD = {"train": "en/c4-train.00000-of-01024.json.gz"}


def documents(source: str, default_split: str) -> Sequence[str]:
    """The rows of text of a source, in its own order.

    Raises:
        InputError: it does not exist, cannot be reached, or has no text; with the choices there are.
    """
    file, split = _local_path(source)
    if file is None:
        return _text_column(_hub_dataset(source, default_split), source)
    try:
        if file.is_dir():
            return _text_column(_choose_split(load_dataset(str(file)), split or default_split, str(file)), source)
        if file.suffix == ".txt":
            return [file.read_text(encoding="utf-8")]
        if file.suffix in (".jsonl", ".json", ".parquet"):
            kind = "parquet" if file.suffix == ".parquet" else "json"
            return _text_column(load_dataset(kind, data_files=str(file), split="train"), source)
    except InputError:
        raise
    except Exception as error:  # datasets raises whatever its readers raise
        raise InputError(f"{source} could not be read as text data: {_first_line(error)}") from error
    raise InputError(f"{source} is not a .txt, .jsonl or .parquet file, nor a folder that datasets loads")


def _local_path(source: str) -> tuple[Path | None, str]:
    """PATH or PATH:SPLIT, where PATH exists."""
    if Path(source).exists():
        return Path(source), ""
    path, _, split = source.rpartition(":")
    return (Path(path), split) if path and Path(path).exists() else (None, "")


def _hub_dataset(source: str, default_split: str) -> Dataset:
    name, *rest = source.split(":")
    config, split = ("", "") if not rest else ("", rest[0]) if len(rest) == 1 else (rest[0], rest[1])
    if len(rest) > 2 or name.startswith((".", "/", "~")) or name.endswith((".txt", ".jsonl", ".json", ".parquet")):
        raise InputError(f"{source}: no such file or folder")
    try:
        c4 = name == "c4"
        loaded = load_dataset("allenai/c4", data_files=C4_SHARD) if c4 else load_dataset(name, config or None)
    except Exception as error:  # offline, unknown name, gated, broken: many types, one remedy
        raise InputError(
            f"the data set {name!r} is neither a local path nor could it be fetched from the Hub "
            f"({_first_line(error)}). Pass a local .txt, .jsonl or .parquet file or a folder of those instead"
        ) from error
    return _choose_split(loaded, split or default_split, f"{name}:{config}" if config else name)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error  # datasets wraps what went wrong in a sentence that says nothing
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]


def _choose_split(loaded: Any, split: str, source: str) -> Dataset:
    splits = cast(DatasetDict, loaded)
    if split in splits:
        return splits[split]
    if len(splits) == 1:
        return next(iter(splits.values()))
    names = list(splits)
    raise InputError(f"{source} has no split {split!r}; name one of {', '.join(names)}, as in {source}:{names[0]}")


def _text_column(rows: Dataset, source: str) -> Sequence[str]:
    if "text" not in rows.column_names:
        raise InputError(f"{source} has no column 'text'; its columns are {', '.join(rows.column_names)}")
    kind = getattr(rows.features["text"], "dtype", "no text")
    if kind not in ("string", "large_string"):
        raise InputError(f"the column 'text' of {source} holds {kind}, not strings")
    return cast(Sequence[str], rows["text"])


def draw_windows(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_samples: int, seq_len: int, seed: int
) -> Tensor:
    """Draw calibration windows: (num_samples, seq_len) int64 tokens, without padding and without overlap.

    A small source is tokenized as one text, cut into windows, and a seeded choice of them taken in seeded order. From
    a large one, rows are visited in seeded order, and each window starts at a row and runs on into the next ones.

    Raises:
        InputError: the text is too short; says how many tokens it has and how many are needed.
    """
    draw = torch.Generator().manual_seed(seed)
    if len(rows) == 1 or _at_most(rows, SMALL_SOURCE):
        tokens = tokenize(rows, tokenizer)
        whole = len(tokens) // seq_len
        _require_tokens(len(tokens), num_samples, seq_len, whole)
        chosen = torch.randperm(whole, generator=draw)[:num_samples]
        return tokens[: whole * seq_len].view(whole, seq_len)[chosen]
    return _draw_from_rows(rows, tokenizer, num_samples, seq_len, draw)


def _at_most(rows: Sequence[str], characters: int) -> bool:
    total = 0
    for row in rows:
        total += len(row or "")
        if total > characters:
            return False
    return True


def _draw_from_rows(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_samples: int, seq_len: int, draw: torch.Generator
) -> Tensor:
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
            ids.append(tokenize([(rows[row] or "") + "\n\n"], tokenizer, special_tokens=not ids))
            row += 1
        seen_tokens += sum(map(len, ids))
        if sum(map(len, ids)) >= seq_len:
            found.append(torch.cat(ids)[:seq_len])
    _require_tokens(seen_tokens, num_samples, seq_len, len(found))
    return torch.stack(found)


def _require_tokens(tokens: int, num_samples: int, seq_len: int, whole: int) -> None:
    if whole < num_samples:
        raise InputError(
            f"the calibration text has {tokens} tokens, enough for {whole} windows of {seq_len}; {num_samples} windows "
            f"need {num_samples * seq_len}. Give more text, or fewer --samples, or a shorter --seq-len"
        )


def tokenize(rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool = True) -> Tensor:
    """Rows joined by blank lines as one run of tokens (tokens,), a beginning-of-text token at most at the start."""
    text = "\n\n".join(row or "" for row in rows)  # a missing value is an empty row
    ids = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def evaluation_windows(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None
) -> Tensor:
    """The papers' perplexity windows: the whole text in order, cut without overlap, (windows, seq_len).

    Raises:
        InputError: the text is shorter than one window.
    """
    tokens = tokenize(rows, tokenizer)
    whole = len(tokens) // seq_len
    if whole == 0:
        have = f"the text has {len(tokens)} tokens; one window needs {seq_len}"
        raise InputError(f"{have}. Give more text, or a shorter --seq-len")
    return tokens[: whole * seq_len].view(whole, seq_len)[:limit]
