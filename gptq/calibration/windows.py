"""Calibration windows: the inputs of the model's forward in each window, made from text, chats, images or arrays."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.calibration.arrays import Inputs, as_inputs, is_arrays, read_arrays
from gptq.calibration.chats import draw_chats, find_reader
from gptq.calibration.processed import needs_processor, process_rows
from gptq.calibration.sources import Table, open_table, table_of
from gptq.calibration.text import draw_windows, special_token_frame, text_column
from gptq.checkpoint.hub import resolve
from gptq.checkpoint.source_state import SourceState
from gptq.config import QuantConfig
from gptq.errors import InputError
from gptq.models.forward import accepted_inputs, check_tokens, text_inputs
from gptq.models.hf_config import fit_seq_len, read_config, read_processor, read_tokenizer

MAX_WINDOWS = 1024  # most windows that num_samples="auto" tries
PROCESSED_WINDOWS = 128  # windows of images or sound that num_samples="auto" takes
HELD_OUT_EVERY = 8  # one window in this many is held out: it measures the error and does not enter the solve
LAZY = ("c4",)  # sources that are known to be text, and opened only when windows are drawn


@dataclass(frozen=True)
class Calibration:
    """What calibrates a run. Exactly one of `source`, `table`, `tokens` and `inputs` is given."""

    name: str  # what a record says of it
    source: str = ""  # to be opened later
    table: Table | None = None  # rows of texts or chats, from which windows are drawn
    tokens: Tensor | None = None  # (windows, tokens)
    inputs: list[Inputs] | None = None  # the model's inputs in each window
    notes: tuple[str, ...] = ()  # for the user
    state: SourceState | None = None  # the model's files before its processor was read, if that was needed

    @property
    def sample(self) -> Inputs | None:
        """The inputs of one window, if they may be other than text."""
        return self.inputs[0] if self.inputs else None

    @property
    def is_drawn(self) -> bool:
        """Whether windows are drawn from it, so that it may have more than are asked for."""
        return bool(self.source) or self.table is not None


def read_calibration(
    given: str | Path | Tensor | Iterable[Any],
    config: QuantConfig,
    model: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Calibration:
    """Check the `calibration` argument of `gptq.quantize`; read arrays, images and sound, and open other sources.

    Args:
        model: folder or Hub id of the model, whose processor reads images and sound.

    Raises:
        InputError: the argument is none of the accepted kinds, or cannot be read.
    """
    if isinstance(given, Tensor):
        if given.ndim != 2 or given.dtype not in (torch.int64, torch.int32) or not given.numel():
            raise InputError("calibration windows are a (windows, tokens) tensor of integer token numbers")
        return Calibration(f"{tuple(given.shape)} given tokens", tokens=given.long())
    if isinstance(given, str | Path):
        source = str(given)
        if config.method != "gptq" or source in LAZY:
            return Calibration(source, source=source)
        if is_arrays(source):
            count = MAX_WINDOWS if config.num_samples == "auto" else config.num_samples
            return Calibration(source, inputs=read_arrays(source, count, config.seed))
        table = open_table(source, "train")
    else:
        items = given if hasattr(given, "column_names") else _listed(given)
        found = table_of(items, "train")
        if found is None:
            return _given_inputs(items)
        table = found
    _check_columns(table)
    if not needs_processor(table):
        return Calibration(table.name, table=table)
    folder = resolve(str(model), revision, allow_pickle)
    state = SourceState.of(folder)
    hf_config, processor = read_config(folder, trust_remote_code), read_processor(folder, trust_remote_code)
    count = PROCESSED_WINDOWS if config.num_samples == "auto" else config.num_samples
    inputs, notes = process_rows(table, processor, hf_config, count, config.seq_len, config.seed)
    return Calibration(table.name, inputs=inputs, notes=tuple(notes), state=state)


def _listed(given: Iterable[Any]) -> Any:
    if isinstance(given, Mapping) and not hasattr(given, "num_rows"):
        raise InputError("calibration is a list of dicts of arrays, one or more windows each; one dict is no list")
    return given if hasattr(given, "num_rows") else list(given)


def _given_inputs(items: Any) -> Calibration:
    inputs = as_inputs(items if isinstance(items, list) else [])
    return Calibration(f"{len(inputs)} given windows of {', '.join(inputs[0])}", inputs=inputs)


def _check_columns(table: Table) -> None:
    """Check that the rows hold text, chats, images or sound.

    Raises:
        InputError: no column fits; the message names those that there are, and those that would.
    """
    if "text" not in table.columns and find_reader(table.columns) is None and not needs_processor(table):
        raise InputError(
            f"{table.name} has no column 'text'; its columns are {', '.join(table.columns)}. Text is in `text`; chats "
            "in `messages`, `conversations`, `prompt` and `response`, or `instruction` and `output`; images in `image` "
            "or `images`, sound in `audio`"
        )


# Inputs of a text alone: beside images, a model may give tokens a meaning that have no embedding.
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


def make_windows(
    given: Calibration,
    num_samples: int,
    folder: Path,
    network: PreTrainedModel,
    config: QuantConfig,
    trust_remote_code: bool,
) -> tuple[list[Inputs], list[str]]:
    """Make the inputs of each window for `network`, whose tokenizer is in `folder`; also return notes for the user.

    Raises:
        InputError: the source cannot be read, is too short, or does not fit the model.
    """
    notes = [*given.notes]
    if given.inputs is not None:
        try:
            accepted = [accepted_inputs(window, network) for window in given.inputs]
        except InputError as error:
            raise InputError(f"{given.name}: {error}") from error
        dropped = [name for name in given.inputs[0] if name not in accepted[0]]
        for window in accepted:
            if "input_ids" in window and window.keys() <= OF_TEXT:
                check_tokens(window["input_ids"], network, f"input_ids in {given.name}")
        return accepted, notes + [f"{type(network).__name__} takes no {name}, which is left out" for name in dropped]
    if given.tokens is not None:
        drawn = list(given.tokens)
    else:
        given = given if given.table else replace(given, table=open_table(given.source, "train"))
        drawn, fitted = _draw(given, num_samples, folder, network, config, trust_remote_code)
        notes += fitted
    check_tokens(torch.cat(drawn), network)
    if network.config.is_encoder_decoder:
        notes.append("the encoder reads the first half of each window, the decoder the second")
    return [text_inputs(window, network) for window in drawn], notes


def _draw(
    given: Calibration,
    num_samples: int,
    folder: Path,
    network: PreTrainedModel,
    config: QuantConfig,
    trust_remote_code: bool,
) -> tuple[list[Tensor], list[str]]:
    """Draw windows of tokens, (tokens,) each, from texts or chats; and notes for the user."""
    if given.table is None:
        raise InputError(f"{given.name} has no rows")
    tokenizer = read_tokenizer(folder, trust_remote_code)
    seq_len, notes = fit_seq_len(config.seq_len, network.config, network)
    if "text" not in given.table.columns:
        chats = draw_chats(given.table, tokenizer, num_samples, seq_len, config.seed, config.pack_chats)
        return chats, notes
    frame = special_token_frame(tokenizer) if not network.can_generate() else []
    return list(draw_windows(text_column(given.table), tokenizer, num_samples, seq_len, config.seed, frame)), notes


def count_tokens(windows: list[Inputs]) -> int:
    """Return the number of text tokens in the windows; 0 if the windows hold only other inputs."""
    return sum(x.numel() for inputs in windows for name, x in inputs.items() if name.endswith("input_ids"))


def is_held_out(window: int, windows: int) -> bool:
    """Whether window number `window` of `windows` is held out; none is if there are fewer than HELD_OUT_EVERY."""
    return windows >= HELD_OUT_EVERY and window % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def held_out_windows(windows: int) -> list[int]:
    """Return the numbers of those that are held out of so many windows."""
    return [i for i in range(windows) if is_held_out(i, windows)]
