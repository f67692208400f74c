"""Images and sound as calibration: each row of a data set goes through the model's own processor, and is one window.

image, images       an image or several: bytes, a path, or what Python has
audio               a recording: a WAV file, or {"array", "sampling_rate"}
text, or a chat     what is said of them (see `chats`); a text that is no chat becomes a user's message
"""

import importlib
import io
import re
import wave
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from gptq.calibration.arrays import Inputs, as_inputs
from gptq.calibration.chats import Message, apply_template, find_reader, read_messages
from gptq.calibration.sources import Table
from gptq.errors import InputError, first_line

MEDIA = ("image", "images", "audio")  # columns
PLACEHOLDERS = {"<image>": "image", "<audio>": "audio"}  # in texts, where the image or the sound belongs
SAMPLE_TYPES = {1: np.uint8, 2: np.int16, 4: np.int32}  # bytes of a sample in a WAV file


def needs_processor(table: Table) -> bool:
    """Whether the rows of a table hold images or sound, in columns of their own or in the messages of the first row."""
    if any(column in table.columns for column in MEDIA):
        return True
    messages = table.row(0).get("messages") if "messages" in table.columns else None
    return isinstance(messages, list) and bool(_media_in(messages, "image") + _media_in(messages, "audio"))


def _media_in(messages: list[Any], kind: str) -> list[Any]:
    """Return the images or sounds that are given inside messages."""
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    mine = [part for part in parts if isinstance(part, Mapping) and part.get("type") == kind]
    return [found for part in mine if (found := part.get(kind) or part.get("path") or part.get("url"))]


def process_rows(
    table: Table, processor: Any, hf_config: PreTrainedConfig, num_samples: int, seq_len: int, seed: int
) -> tuple[list[Inputs], list[str]]:
    """Return the windows of up to num_samples rows in an order from the seed; and notes for the user.

    Rows without an image or sound, and rows of more than seq_len tokens, are left out.

    Raises:
        InputError: a row holds no image or sound that can be read, or the processor or its chat template refuses it.
    """
    rows = _Rows(table, processor, hf_config, seq_len)
    batches: list[Mapping[str, Any]] = []
    names: list[str] = []
    empty = long = 0
    for row in torch.randperm(len(table.rows), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(batches) == num_samples:
            break
        found = rows.process(row)
        if found is None:
            empty += 1
        elif max((x.shape[-1] for name, x in found.items() if name.endswith("input_ids")), default=0) > seq_len:
            long += 1
        else:
            batches.append(found)
            names.append(table.where(row))
    if not batches:
        raise InputError(
            f"{table.name} has no row for calibration: {empty} have neither image nor sound, {long} have more than "
            f"{seq_len} tokens, which --seq-len decides on"
        )
    counts = ((long, f"have more than {seq_len} tokens"), (empty, "have neither image nor sound"))
    notes = [f"{count} rows of {table.name} are left out: they {why}" for count, why in counts if count]
    if len(batches) < num_samples:
        notes.append(f"{table.name} gives {len(batches)} windows of the {num_samples} that were asked for")
    return as_inputs(batches, names), notes


class _Rows:
    """The rows of a table, each as the inputs that a processor makes of it."""

    def __init__(self, table: Table, processor: Any, hf_config: PreTrainedConfig, seq_len: int) -> None:
        self._table = table
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", None)
        self._seq_len = seq_len
        self._reader = find_reader(table.columns)
        self._is_encoder_decoder = bool(getattr(hf_config, "is_encoder_decoder", False))
        self._start = getattr(hf_config, "decoder_start_token_id", None)
        owners = [one for one in (processor, self._tokenizer) if getattr(one, "chat_template", None)]
        self._template = owners[0] if owners else None

    def process(self, number: int) -> dict[str, Any] | None:
        """Return the inputs of a row; None if it has neither an image nor sound."""
        row, where = self._table.row(number), self._table.where(number)
        for column, kinds in (("text", (str,)), ("images", (list, tuple))):
            if row.get(column) is not None and not isinstance(row[column], kinds):
                raise InputError(f"{where}: {column} is {type(row[column]).__name__}, not {kinds[0].__name__}")
        chat = row.get("messages")
        messages: list[Any] = chat if isinstance(chat, list) else []
        given = [row.get("image"), *(row.get("images") or _media_in(messages, "image"))]
        heard = [row.get("audio"), *_media_in(messages, "audio")]
        images = [read_image(one, self._table.folder, where) for one in given if one is not None]
        sounds = [read_sound(one, self._table.folder, where) for one in heard if one is not None]
        text = self._text(row, images, sounds, where)
        if not images and not sounds:
            return None
        options: dict[str, Any] = {"return_tensors": "pt"}
        if images:
            options["images"] = images
        if sounds:
            options |= self._sound_options(sounds, where)
        if text is not None and self._tokenizer is not None:
            options["text"] = text
        found = self._call(options, where)
        return self._with_decoder_inputs(found, row, where) if self._is_encoder_decoder else found

    def _call(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        try:
            if self._tokenizer is None and "audio" in options:  # a feature extractor has no such argument
                found = self._processor(options.pop("audio"), **options)
            else:
                found = self._processor(**options)
        except Exception as error:  # of any type, depending on the processor's code
            raise InputError(f"{where}: {type(self._processor).__name__} fails: {first_line(error)}") from error
        return {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}

    def _text(self, row: Mapping[str, Any], images: list[Any], sounds: list[Any], where: str) -> str | None:
        """Return the text of a row with a place for each image and sound; None if there is no text."""
        plain = row.get("text")
        if self._reader is None and plain is None and (self._template is None or self._tokenizer is None):
            return None
        media = {"image": len(images), "audio": len(sounds)}
        if self._reader is not None:
            messages = read_messages(row, self._reader, where)
        elif self._template is not None:
            messages = [{"role": "user", "content": plain or ""}]
        else:
            return self._with_places(plain or "", media)
        if self._template is None:
            raise InputError(f"{where}: a chat, and the model's processor has no chat template; give a column `text`")
        if self._reader is None and any(count and self._place(kind) in (plain or "") for kind, count in media.items()):
            return plain  # has the processor's own places
        told = with_media(messages, media, where)
        text: str = apply_template(self._template, told, where, tokenize=False)
        return text

    def _place(self, kind: str) -> str:
        """Return the token that stands for an image or a sound in a text; a NUL, which no text has, if none does."""
        token = getattr(self._processor, f"{kind}_token", None) or getattr(self._tokenizer, f"{kind}_token", None)
        return str(token or "\0")

    def _with_places(self, text: str, media: Mapping[str, int]) -> str:
        """Put the token of each image and sound in front of a text that has none."""
        missing = [self._place(kind) * n for kind, n in media.items() if n and self._place(kind) not in text]
        return "".join(missing).replace("\0", "") + text

    def _sound_options(self, sounds: list[tuple[np.ndarray, int]], where: str) -> dict[str, Any]:
        extractor = getattr(self._processor, "feature_extractor", self._processor)
        wanted = getattr(extractor, "sampling_rate", sounds[0][1])
        other = [rate for _, rate in sounds if rate != wanted]
        if other:
            raise InputError(f"{where}: the sound has {other[0]} samples a second, the model reads {wanted}")
        arrays = [array for array, _ in sounds]
        return {"audio": arrays[0] if len(arrays) == 1 else arrays, "sampling_rate": wanted}

    def _with_decoder_inputs(self, found: dict[str, Any], row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Give the decoder of an encoder-decoder what it would read: its first token, and the row's text, cut."""
        labels = found.pop("labels", None)
        if "decoder_input_ids" in found or self._start is None:
            return found
        if labels is None and self._tokenizer is not None and row.get("text"):
            labels = self._tokenizer(row["text"], return_tensors="pt")["input_ids"]
        start = torch.full((1, 1), self._start, dtype=torch.int64)
        ids = start[:, :0] if labels is None else labels[:, :-1]  # (1, tokens); the last token is only predicted
        given = ids.shape[1] and int(ids[0, 0]) == self._start
        ids = ids if given else torch.cat([start, ids], dim=1)
        return {**found, "decoder_input_ids": ids[:, : self._seq_len]}


def with_media(messages: list[Message], media: Mapping[str, int], where: str) -> list[Message]:
    """Return messages whose content is parts, with one part for each image and sound.

    Where a chat does not say where they belong, they come first in the first message of the user.

    Raises:
        InputError: the chat has places for another number of them.
    """
    told = [{**message, "content": list(_parts(message.get("content", "")))} for message in messages]
    for kind, count in media.items():
        places = sum(part.get("type") == kind for message in told for part in message["content"])
        if count and not places:
            first = next(message for message in told if message["role"] == "user")
            first["content"] = [{"type": kind}] * count + first["content"]
        elif places != count:
            raise InputError(f"{where}: the chat has places for {places} of {kind}, and the row has {count}")
    return told


def _parts(content: Any) -> Iterator[Message]:
    """Yield the parts of a message's content; a text is split at its placeholders."""
    if isinstance(content, str):
        for piece in re.split(f"({'|'.join(PLACEHOLDERS)})", content):
            if piece in PLACEHOLDERS:
                yield {"type": PLACEHOLDERS[piece]}
            elif piece.strip("\n"):
                yield {"type": "text", "text": piece.strip("\n") if piece != content else piece}
        return
    for part in content:
        if isinstance(part, Mapping):  # a table has each key in each part, and an absent value is None
            yield {key: value for key, value in part.items() if value is not None}
        else:
            yield {"type": "text", "text": str(part)}


def read_image(given: Any, folder: Path | None, where: str) -> Any:
    """Return an image in RGB from bytes, a path, a data set's {"bytes", "path"}, an array or an image.

    Raises:
        InputError: it is none of these, or cannot be read.
    """

    def read() -> Any:
        from PIL import Image  # which only images need

        if isinstance(given, Image.Image):
            return given.convert("RGB")
        if isinstance(given, np.ndarray):
            return Image.fromarray(given).convert("RGB")
        with Image.open(_open(given, folder)) as opened:
            return opened.convert("RGB")

    return _read(read, "image", where)


def read_sound(given: Any, folder: Path | None, where: str) -> tuple[np.ndarray, int]:
    """Return a recording as float32 samples in [-1, 1] of one channel, and its samples a second.

    Raises:
        InputError: it cannot be read.
    """

    def read() -> tuple[np.ndarray, int]:
        if isinstance(given, Mapping) and given.get("array") is not None:
            return np.asarray(given["array"], dtype=np.float32), int(given.get("sampling_rate") or 0)
        opened = _open(given, folder)
        try:
            return _read_wav(opened)
        except wave.Error as error:
            try:
                soundfile: Any = importlib.import_module("soundfile")
            except ImportError:
                raise InputError(f"{error}; other files than WAV need the package soundfile") from error
            opened.seek(0)
            samples, rate = soundfile.read(opened, dtype="float32", always_2d=True)
            return samples.mean(axis=1), rate

    found: tuple[np.ndarray, int] = _read(read, "sound", where)
    return found


def _read(read: Callable[[], Any], kind: str, where: str) -> Any:
    try:
        return read()
    except Exception as error:  # PIL and soundfile raise many types
        raise InputError(f"{where}: the {kind} cannot be read: {first_line(error)}") from error


def _open(given: Any, folder: Path | None) -> io.BytesIO:
    """Return the bytes of a file, from bytes, a path or {"bytes", "path"}."""
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes):
        return io.BytesIO(given)
    if not isinstance(given, str | Path):
        raise TypeError(f"a {type(given).__name__} is neither bytes nor a path")
    if "://" in str(given):
        raise ValueError(f"{given} is an address; download it first")
    file = (folder or Path()) / given
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"there is no file {file}")
    return io.BytesIO(file.read_bytes())


def _read_wav(opened: io.BytesIO) -> tuple[np.ndarray, int]:
    with wave.open(opened) as recording:
        width, channels, rate = recording.getsampwidth(), recording.getnchannels(), recording.getframerate()
        if width not in SAMPLE_TYPES:
            raise wave.Error(f"samples of {8 * width} bits")
        samples = np.frombuffer(recording.readframes(recording.getnframes()), SAMPLE_TYPES[width]).astype(np.float32)
    half = np.float32(2 ** (8 * width - 1))  # samples of one byte have no sign
    samples = samples / half - np.float32(width == 1)
    return samples.reshape(-1, channels).mean(axis=1), rate
