"""Perplexity of a model on a text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gptq import calibration
from gptq.blocks import check_tokens, fitting_seq_len, read_config, read_tokenizer
from gptq.checkpoint import resolve
from gptq.errors import InputError
from gptq.linear import load

MAX_LOSS = 700.0  # its exponential is the largest that a float holds


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` predicted tokens, seq_len - 1 in each of `windows`."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int


def perplexity(
    model: str | Path,
    data: str,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity by the protocol of the GPTQ paper: the text is tokenized as one, cut into windows without overlap.

    Args:
        model: folder or Hub id, quantized or not.
        data: source of text, see `gptq.calibration`; the split `test` is taken where there are several.
        seq_len: tokens per window; shortened to the model's limit where that is smaller.
        windows: measure only the first so many.
        progress: called after each window with how many are done, of how many.

    Raises:
        InputError: model or data cannot be read, or the text is shorter than a window.
    """
    folder = resolve(str(model), revision)
    seq_len, _ = fitting_seq_len(seq_len, read_config(folder, trust_remote_code))
    tokenizer = read_tokenizer(folder, trust_remote_code)
    tokens = text_windows(data, tokenizer, seq_len, windows)
    network = load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return perplexity_of(network, tokens, progress)


def text_windows(data: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None) -> Tensor:
    if seq_len < 2 or (limit is not None and limit < 1):
        raise InputError("a perplexity needs windows of at least 2 tokens, and at least one window")
    return calibration.evaluation_windows(calibration.documents(data, "test"), tokenizer, seq_len, limit)


@torch.no_grad()
def perplexity_of(
    network: PreTrainedModel, tokens: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> Perplexity:
    """Perplexity of a loaded model on windows of tokens (windows, seq_len), log-likelihoods in float32.

    Raises:
        InputError: the model's output is not finite.
    """
    check_tokens(tokens, network)
    total = 0.0
    for done, window in enumerate(tokens):
        window = window.to(network.device)
        logits = network(input_ids=window[None], use_cache=False).logits[0, :-1].float()  # (seq_len - 1, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        total += float(loss)
        progress(done + 1, len(tokens))
    windows, seq_len = tokens.shape
    count = windows * (seq_len - 1)
    if not total / count < MAX_LOSS:
        raise InputError("the model's output holds NaN or infinity; try --dtype float32")
    return Perplexity(perplexity=math.exp(total / count), tokens=count, windows=windows, seq_len=seq_len)
