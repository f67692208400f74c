"""Calibration windows: the inputs of the model's forward in each window, made from text, arrays or tokens."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.calibration.arrays import Inputs, as_inputs, is_arrays, read_arrays
from gptq.calibration.text import documents, draw_windows, special_token_frame
from gptq.config import QuantConfig
from gptq.errors import InputError
from gptq.models.forward import check_tokens
from gptq.models.hf_config import fit_seq_len, read_tokenizer

MAX_WINDOWS = 1024  # most windows that num_samples="auto" tries
HELD_OUT_EVERY = 8  # one window in this many is held out: it measures the error and does not enter the solve

Calibration = str | Tensor | list[Inputs]  # a source of text, token windows (windows, tokens), or the model's inputs


def read_calibration(
    calibration: str | Path | Tensor | Iterable[Mapping[str, Any]], config: QuantConfig
) -> Calibration:
    """Check the `calibration` argument of `gptq.quantize`, and read it if it is a file of arrays.

    Raises:
        InputError: the argument is none of the accepted kinds, or cannot be read.
    """
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.dtype not in (torch.int64, torch.int32) or not calibration.numel():
            raise InputError("calibration windows are a (windows, tokens) tensor of integer token numbers")
        return calibration.long()
    if not isinstance(calibration, str | Path):
        return as_inputs(calibration)
    if config.method == "gptq" and is_arrays(str(calibration)):
        return read_arrays(
            str(calibration), MAX_WINDOWS if config.num_samples == "auto" else config.num_samples, config.seed
        )
    return str(calibration)


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
    if isinstance(given, list):
        return given, []
    notes: list[str] = []
    if isinstance(given, str):
        tokenizer = read_tokenizer(folder, trust_remote_code)
        seq_len, notes = fit_seq_len(config.seq_len, network.config, network)
        frame = special_token_frame(tokenizer) if not network.can_generate() else []
        rows = documents(given, "train")
        given = draw_windows(rows, tokenizer, num_samples, seq_len, config.seed, frame)
    check_tokens(given, network)
    if not network.config.is_encoder_decoder:
        return [{"input_ids": window[None]} for window in given], notes
    half = given.shape[1] // 2
    notes.append("the encoder reads the first half of each window, the decoder the second")
    return [{"input_ids": w[None, :half], "decoder_input_ids": w[None, half:]} for w in given], notes


def describe_calibration(given: Calibration) -> str:
    """Return the source's name, or the kind and number of the given windows."""
    if isinstance(given, str):
        return given
    if isinstance(given, Tensor):
        return f"{tuple(given.shape)} given tokens"
    return f"{len(given)} given windows of {', '.join(given[0])}"


def count_tokens(windows: list[Inputs]) -> int:
    """Return the number of text tokens in the windows; 0 if the windows hold only other inputs."""
    return sum(x.numel() for inputs in windows for name, x in inputs.items() if name.endswith("input_ids"))


def is_held_out(window: int, windows: int) -> bool:
    """Whether window number `window` of `windows` is held out; none is if there are fewer than HELD_OUT_EVERY."""
    return windows >= HELD_OUT_EVERY and window % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
