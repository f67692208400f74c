"""Tokenize texts and cut them into windows of tokens, for calibration and for perplexity."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq.calibration.sources import Table, open_table
from gptq.errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

SMALL_SOURCE = 16_000_000  # characters; of a source with more, only the rows that are drawn are tokenized
PIECE = 2**18  # characters that are tokenized at a time: a tokenizer needs some 200 bytes for each
OVERLAP = 2**10  # characters that two neighbouring pieces share, to find a place where both have the same tokens
AGREEMENT = 8  # tokens around that place that have to be the same in both


def documents(source: str, default_split: str, column: str = "text") -> Sequence[str]:
    """Return the rows of text of a source (see `sources`), in order.

    Raises:
        InputError: the source does not exist, cannot be reached, or has no text; the message names its splits or
            columns.
    """
    return text_column(open_table(source, default_split), column)


def text_column(table: Table, column: str = "text") -> Sequence[str]:
    """Return a column of strings, checked to be valid UTF-8.

    Raises:
        InputError: there is no such column, or it holds something else.
    """
    if column not in table.columns:
        raise InputError(f"{table.name} has no column {column!r}; its columns are {', '.join(table.columns)}")
    if isinstance(table.rows, list):
        for number, row in enumerate(table.rows):
            if not isinstance(row.get(column), str | None):
                raise InputError(f"{table.where(number)}: {column} is {type(row[column]).__name__}, not a string")
        return [row.get(column) or "" for row in table.rows]
    rows = cast("Dataset", table.rows)
    kind = getattr(rows.features[column], "dtype", "no text")
    if kind not in ("string", "large_string"):
        raise InputError(f"the column {column!r} of {table.name} holds {kind}, not strings")
    try:
        rows.data.column(column).validate(full=True)
    except ValueError as error:  # invalid UTF-8 fails only here: pyarrow does not check it while reading
        raise InputError(f"the column {column!r} of {table.name} cannot be read: {first_line(error)}") from error
    return cast(Sequence[str], rows[column])


def special_token_frame(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the two special tokens around every text of an encoder (such as BERT's [CLS] and [SEP]); or []."""
    ends = _token_ids("", tokenizer, special_tokens=True)
    return ends if len(ends) == 2 else []


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after every text."""
    plain, framed = (_token_ids("a", tokenizer, special_tokens) for special_tokens in (False, True))
    starts = (i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    at = next(starts, 0) if plain else 0
    return framed[:at], framed[at + len(plain) :]


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
    `frame` of two tokens, every window begins with the first and ends with the second. Without one, every window begins
    with what the tokenizer puts before a text: models learn to see this token first, and nowhere else.

    Raises:
        InputError: the text is too short; the message says how many tokens it has, and how many are needed.
    """
    draw = torch.Generator().manual_seed(seed)
    before, after = (list(frame[:1]), list(frame[1:])) if frame else (special_ends(tokenizer)[0], [])
    room = seq_len - len(before) - len(after)
    if room < 1:
        raise InputError(f"seq_len is {seq_len}; beside this tokenizer's special tokens is no room for text")
    inner = _draw_windows(rows, tokenizer, num_samples, room, draw)
    first, last = (inner.new_tensor(tokens).expand(len(inner), len(tokens)) for tokens in (before, after))
    return torch.cat([first, inner, last], dim=1)


def _draw_windows(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_samples: int, seq_len: int, draw: torch.Generator
) -> Tensor:
    """Draw (num_samples, seq_len) tokens: from the whole text if the source is small, otherwise from rows."""
    if len(rows) == 1 or _is_small(rows, SMALL_SOURCE):
        tokens = tokenize(rows, tokenizer, special_tokens=False)
        whole = len(tokens) // seq_len
        _require_tokens(len(tokens), num_samples, seq_len, whole)
        chosen = torch.randperm(whole, generator=draw)[:num_samples]
        return tokens[: whole * seq_len].view(whole, seq_len)[chosen]
    return _draw_from_rows(rows, tokenizer, num_samples, seq_len, draw)


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
            ids.append(tokenize([(rows[row] or "") + "\n\n"], tokenizer, special_tokens=False))
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
    """Join rows by blank lines and tokenize them as one text: (tokens,). Special tokens occur only at its ends.

    A long text is tokenized in pieces, so that memory does not grow with it but for the tokens themselves.
    """
    text = "\n\n".join(row or "" for row in rows)  # a missing value counts as an empty row
    pieces = _tokenize_in_pieces(text, tokenizer) if len(text) > PIECE and tokenizer.is_fast else None
    if pieces is None:
        return torch.tensor(_token_ids(text, tokenizer, special_tokens), dtype=torch.int64)
    before, after = special_ends(tokenizer) if special_tokens else ([], [])
    return torch.cat([torch.tensor(before, dtype=torch.int64), *pieces, torch.tensor(after, dtype=torch.int64)])


def _tokenize_in_pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Tensor] | None:
    """Return the tokens of a text in pieces (tokens,); None if two neighbouring pieces nowhere agree.

    Neighbours overlap. They are joined in the middle of the overlap, at a token around which both have the same tokens
    at the same places: a tokenizer looks a few words ahead and back, not further.
    """
    found: list[Tensor] = []
    ids, spans = _tokens_and_spans(text, 0, tokenizer)
    for end in range(PIECE, len(text), PIECE - OVERLAP):
        next_ids, next_spans = _tokens_and_spans(text, end - OVERLAP, tokenizer)
        here = _tokens_at(spans, end - OVERLAP, end)
        there = {next_spans[j]: j for j in reversed(_tokens_at(next_spans, end - OVERLAP, end))}
        joints = [(i, there[spans[i]]) for i in here if spans[i] in there]
        joints = [(i, j) for i, j in joints if _agree(ids, spans, i, next_ids, next_spans, j)]
        if not joints:
            return None
        i, j = min(joints, key=lambda joint: abs(spans[joint[0]][0] - (end - OVERLAP // 2)))
        found.append(torch.tensor(ids[:i], dtype=torch.int64))
        ids, spans = next_ids[j:], next_spans[j:]
    return [*found, torch.tensor(ids, dtype=torch.int64)]


def _tokens_and_spans(
    text: str, start: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize the piece of a text from character `start` on; return ids, and the characters that each stands for."""
    encoded = _encode(text[start : start + PIECE], tokenizer, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [(start + a, start + b) for a, b in encoded["offset_mapping"]]


def _tokens_at(spans: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Return the numbers of the tokens that begin between two characters."""
    low = bisect_left(spans, start, key=lambda span: span[0])
    return list(range(low, bisect_left(spans, end, lo=low, key=lambda span: span[0])))


def _agree(
    ids: list[int], spans: list[tuple[int, int]], i: int,
    next_ids: list[int], next_spans: list[tuple[int, int]], j: int,
) -> bool:  # fmt: skip
    """Whether two pieces have the same AGREEMENT tokens before and after token i of the one, j of the other."""
    if min(i, j) < AGREEMENT or max(i - len(ids), j - len(next_ids)) > -AGREEMENT:
        return False
    here, there = slice(i - AGREEMENT, i + AGREEMENT), slice(j - AGREEMENT, j + AGREEMENT)
    return ids[here] == next_ids[there] and spans[here] == next_spans[there]


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase, special_tokens: bool) -> list[int]:
    """Tokenize a text; raises InputError if the tokenizer fails."""
    ids: list[int] = _encode(text, tokenizer, add_special_tokens=special_tokens)["input_ids"]
    return ids


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """Call a tokenizer; raises InputError if it fails."""
    try:
        return tokenizer(text, verbose=False, **options)
    except Exception as error:  # of any type, depending on the tokenizer's files
        raise InputError(f"the tokenizer fails on the text: {first_line(error)}") from error


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
