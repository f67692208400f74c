"""A tokenizer in the words of llama.cpp, which knows two kinds: byte-level BPE ("gpt2") and SentencePiece's ("llama").

How text is split before BPE is compiled into llama.cpp under a name, `tokenizer.ggml.pre`. Here that name follows from
the splits that the tokenizer itself lists (src/llama-vocab.cpp names the expression of each).
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gptq.errors import InputError
from gptq.models.hf_config import read_tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0
SPACE = "\u2581"  # stands for a space in SentencePiece's tokens
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
LOWER_END, UPPER_START = f"{BEFORE}{UPPER}*{LOWER}+", f"{BEFORE}{UPPER}+{LOWER}*"
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_2, DIGITS = "GPT-2's own", "digits one by one"
SPLITS: dict[tuple[str, ...], str] = {  # the steps of a pre-tokenizer: its name in llama.cpp
    (GPT_2,): "gpt-2",
    (DIGITS, GPT_2): "smollm",
    (rf"{WORDS}|\p{{N}}{{1,3}}|{REST}",): "llama-bpe",
    (rf"{WORDS}|\p{{N}}|{REST}",): "qwen2",
    (rf"{LOWER_END}{SUFFIX}|{UPPER_START}{SUFFIX}|\p{{N}}{{1,3}}|{CASED_REST}",): "gpt-4o",
    (rf"{LOWER_END}|{UPPER_START}|\p{{N}}|{CASED_REST}",): "tekken",
}
WITH_MERGES = {"llama-bpe": "dbrx"}  # the same split, for tokenizers that merge even where a word is a token


def explain_unknown(folder: Path) -> str | None:
    """Return why llama.cpp would not read text as the folder's tokenizer does, as far as is known here; or None."""
    try:
        for _ in list_keys(folder, None):
            pass
    except InputError as error:
        return str(error)
    except Exception as error:  # any type, depending on what the files hold
        return f"the tokenizer in {folder} could not be used: {' '.join(str(error).split())[:200]}"
    return None


def list_keys(folder: Path, rows: int | None) -> Iterator[tuple[str, Any]]:
    """Yield the keys that describe a folder's tokenizer, without `tokenizer.` in front, and their values.

    Args:
        rows: of the embedding, and so the number of tokens in the file; None leaves the number as it is.
    Raises:
        InputError: llama.cpp has no such tokenizer.
    """
    if not any((folder / name).is_file() for name in FILES):
        yield "ggml.model", "none"
        return
    tokenizer = read_tokenizer(folder, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"the tokenizer in {folder} is not one of the library tokenizers, which llama.cpp is known by")
    described: dict[str, Any] = json.loads(backend.to_str())
    if described["model"].get("type") != "BPE":
        raise InputError(f"llama.cpp is not known to read a tokenizer of type {described['model'].get('type')!r}")
    steps = _steps(described.get("pre_tokenizer"))
    by_bytes = any(step.get("type") == "ByteLevel" for step in steps)
    if not by_bytes and not described["model"].get("byte_fallback"):
        raise InputError(f"the tokenizer in {folder} is neither byte-level BPE nor SentencePiece's")
    if by_bytes and (lost := _explain_lost(described, steps)):
        raise InputError(f"llama.cpp does not {lost}, which the tokenizer in {folder} does")
    yield "ggml.model", "gpt2" if by_bytes else "llama"
    yield "ggml.pre", _name_of_split(steps, described["model"]) if by_bytes else "default"
    tokens = _list_tokens(described, tokenizer, rows, by_bytes)
    yield "ggml.tokens", [text for text, _, _ in tokens]
    yield "ggml.token_type", [kind for _, kind, _ in tokens]
    if by_bytes:
        yield "ggml.merges", [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
    else:
        yield "ggml.scores", [score for _, _, score in tokens]
        yield "ggml.add_space_prefix", _prepends_space(described, steps)
    yield from _list_special(tokenizer, len(tokens))


@lru_cache(maxsize=4)
def count_bytes(folder: Path, rows: int | None) -> int:
    """Return the bytes that the keys of `list_keys` take in a file."""
    return sum(8 + len(f"tokenizer.{key}") + 4 + _value_bytes(value) for key, value in list_keys(folder, rows))


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode())
    if isinstance(value, list):
        return 12 + sum(map(_value_bytes, value))
    return 1 if isinstance(value, bool) else 4


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer, which may be nested."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    return [pre_tokenizer]


def _name_of_split(steps: list[dict[str, Any]], model: dict[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level BPE's splits.

    Raises:
        InputError: no name is known.
    """
    split: list[str] = []
    for step in steps:
        if step["type"] == "ByteLevel":
            split += [GPT_2] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            split.append(DIGITS)
        else:
            split.append(str((step.get("pattern") or {}).get("Regex", step["type"])))
    name = SPLITS.get(tuple(split))
    if name is None:
        raise InputError(f"the tokenizer splits text by {split}, for which no name in llama.cpp is known")
    return name if model.get("ignore_merges") else WITH_MERGES.get(name, name)


def _list_tokens(
    described: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int | None, by_bytes: bool
) -> list[tuple[str, int, float]]:
    """Return text, type and score of each token that the embedding has a row for, by number."""
    model = described["model"]
    by_number: dict[int, tuple[str, int, float]] = {}
    scores = {} if by_bytes else _scores(model["merges"])
    for text, number in model["vocab"].items():
        kind = NORMAL
        if not by_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kind = BYTE
        by_number[number] = text, kind, scores.get(text, 0.0)
    for added in described.get("added_tokens") or []:
        by_number[added["id"]] = _describe_added(added, by_bytes)
    unknown = tokenizer.unk_token_id
    if not by_bytes and unknown in by_number:
        by_number[unknown] = by_number[unknown][0], UNKNOWN, 0.0
    count = max(by_number, default=-1) + 1 if rows is None else rows
    return [by_number.get(number, (f"[PAD{number}]", UNUSED, UNUSED_SCORE)) for number in range(count)]


def _describe_added(added: dict[str, Any], by_bytes: bool) -> tuple[str, int, float]:
    text = added["content"]
    special = added.get("special") or (text.startswith("<|") and text.endswith("|>"))
    if not by_bytes and not special:
        text = text.replace(SPACE, " ")
    return text, CONTROL if special else USER_DEFINED, ADDED_SCORE


def _scores(merges: list[Any]) -> dict[str, float]:
    """Return SentencePiece's scores: the earlier a token is merged, the higher; single characters come first of all."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), -float(rank + 1))
    return scores


def _prepends_space(described: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether a space is put in front of a text."""
    normalizer = described.get("normalizer") or {}
    parts = normalizer.get("normalizers") or [normalizer]
    prepended = any(part.get("type") == "Prepend" for part in parts)
    return prepended or any(s.get("type") == "Metaspace" and s.get("prepend_scheme") != "never" for s in steps)


def _explain_lost(described: dict[str, Any], steps: list[dict[str, Any]]) -> str | None:
    """Return what a byte-level tokenizer does to a text that no key of a file says, or None."""
    normalizer = described.get("normalizer") or {}
    parts = {part.get("type") for part in normalizer.get("normalizers") or [normalizer]} - {None, "NFC"}
    if parts:
        return f"normalize text by {' and '.join(sorted(map(str, parts)))}"
    spaced = any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps)
    return "put a space in front of a text" if spaced else None


def _list_special(tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[tuple[str, Any]]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    for own, name in names.items():
        number = getattr(tokenizer, f"{own}_token_id", None)
        if number is not None and number < count:
            yield f"ggml.{name}_token_id", int(number)
    read = tokenizer("a")["input_ids"]
    yield "ggml.add_bos_token", tokenizer.bos_token_id is not None and read[:1] == [tokenizer.bos_token_id]
    yield "ggml.add_eos_token", tokenizer.eos_token_id is not None and read[-1:] == [tokenizer.eos_token_id]
    if isinstance(tokenizer.chat_template, str):
        yield "chat_template", tokenizer.chat_template
