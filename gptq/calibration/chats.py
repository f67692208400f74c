"""Chats as calibration: rows of a data set become messages, and messages go through the tokenizer's chat template.

messages                        a list of {"role", "content"}
conversations                   a list of {"from", "value"}
prompt, response                one question and its answer; `completion` counts as `response`
instruction, output             the same, with a column `input` that the instruction is about
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq.calibration.sources import Table
from gptq.errors import InputError, first_line

Message = dict[str, Any]  # {"role": ..., "content": a text, or a list of parts such as {"type": "text", "text": ...}}
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool"}


def _messages(row: Mapping[str, Any]) -> Any:
    return row["messages"]


def _conversations(row: Mapping[str, Any]) -> Any:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return turns
    return [
        {"role": SPEAKERS.get(speaker, speaker), "content": turn.get("value")} if isinstance(speaker, str) else turn
        for turn in turns
        for speaker in [turn.get("from")]
    ]


def _question_and_answer(question: str, answer: str) -> Callable[[Mapping[str, Any]], Any]:
    def read(row: Mapping[str, Any]) -> Any:
        asked, said = row[question], row[answer]
        if isinstance(asked, list) and isinstance(said, list):
            return [*asked, *said]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    return read


def _instruction(row: Mapping[str, Any]) -> Any:
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    asked = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


KINDS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Any]], ...] = (  # columns, and what reads them
    (("messages",), _messages),
    (("conversations",), _conversations),
    (("prompt", "response"), _question_and_answer("prompt", "response")),
    (("prompt", "completion"), _question_and_answer("prompt", "completion")),
    (("instruction", "output"), _instruction),
)


def find_reader(columns: Collection[str]) -> Callable[[Mapping[str, Any]], Any] | None:
    """Return the function that makes messages of a row with these columns; None if they hold no chats."""
    return next((read for needed, read in KINDS if set(needed) <= set(columns)), None)


def read_messages(row: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Any], where: str) -> list[Message]:
    """Return the messages of a row.

    Raises:
        InputError: they are no list of roles and contents, or no message is a user's.
    """
    found = read(row)
    if not isinstance(found, list) or not found:
        raise InputError(f"{where}: a chat is a list of messages, and this is {str(found)[:60]!r}")
    messages = [
        {key: value for key, value in one.items() if value is not None} if isinstance(one, Mapping) else {}
        for one in found
    ]  # a table has each column in each row, and an absent value is None
    for number, message in enumerate(messages):
        silent = "" if message.get("role") == "assistant" else None  # an assistant may call a tool and say nothing
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content", silent), str | list):
            raise InputError(f"{where}: message {number} is {str(found[number])[:60]!r}, without a role and a content")
    if not any(message["role"] == "user" for message in messages):
        raise InputError(f"{where}: the chat has no message of a user")
    return messages


def apply_template(owner: Any, messages: list[Message], where: str, **options: Any) -> Any:
    """Return what the chat template of a tokenizer or processor makes of messages.

    Raises:
        InputError: the template refuses the messages.
    """
    try:
        return owner.apply_chat_template(messages, **options)
    except Exception as error:  # of any type: a template is a program
        raise InputError(f"{where}: the chat template fails: {first_line(error)}") from error


def _plain_text(message: Message, where: str) -> Message:
    """Join the parts of a message, which have to be text."""
    content = message.get("content", "")
    if isinstance(content, str):
        return message
    other = [part for part in content if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]
    if other:
        raise InputError(f"{where}: a message has a part {str(other[0])[:60]!r}, and the rows have no column of images")
    return {**message, "content": "".join(part["text"] for part in content)}


def tokenized_chats(table: Table, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Tensor]:
    """Yield the tokens (tokens,) of each chat as the model's chat template writes it, in an order from the seed.

    Raises:
        InputError: the tokenizer has no chat template, or a row is no chat.
    """
    read = find_reader(table.columns)
    if read is None:
        raise InputError(f"{table.name} has no column of chats; its columns are {', '.join(table.columns)}")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{table.name} holds chats, and the model's tokenizer has no chat template; give a column `text` instead"
        )
    for row in torch.randperm(len(table.rows), generator=torch.Generator().manual_seed(seed)).tolist():
        where = table.where(row)
        messages = [_plain_text(message, where) for message in read_messages(table.row(row), read, where)]
        found = apply_template(tokenizer, messages, where, tokenize=True, return_dict=True)
        if found["input_ids"]:  # a template may make nothing of empty messages
            yield torch.tensor(found["input_ids"], dtype=torch.int64)


def draw_chats(
    table: Table, tokenizer: PreTrainedTokenizerBase, num_samples: int, seq_len: int, seed: int, packed: bool
) -> list[Tensor]:
    """Draw calibration windows, (tokens,) each, from chats; no chat is used twice.

    Packed windows have seq_len tokens: each begins where a chat begins, and is filled up with further chats. Otherwise
    each chat is a window of its own, without padding, cut at seq_len.

    Raises:
        InputError: there are too few chats.
    """
    windows: list[Tensor] = []
    pieces: list[Tensor] = []
    chats = tokens = 0
    for ids in tokenized_chats(table, tokenizer, seed):
        chats, tokens = chats + 1, tokens + len(ids)
        pieces.append(ids)
        if not packed or sum(map(len, pieces)) >= seq_len:
            windows.append(torch.cat(pieces)[:seq_len])
            pieces = []
        if len(windows) == num_samples:
            return windows
    need = f"enough for {len(windows)} windows of {seq_len}" if packed else f"one a window, for {num_samples} windows"
    raise InputError(
        f"{table.name} has {chats} chats of {tokens} tokens, {need}; give more chats, or fewer --samples"
        + (f" than {num_samples}, or a shorter --seq-len" if packed else "")
    )
