"""Perplexity of a model on a text, and how far a quantized model's predictions are from the original's."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gptq import calibration
from gptq.checkpoint.hub import resolve
from gptq.errors import InputError
from gptq.inference.load import load
from gptq.models.blocks import find_blocks
from gptq.models.build import open_model
from gptq.models.forward import check_tokens, run_forward
from gptq.models.hf_config import choose_dtype, fit_seq_len, read_config, read_tokenizer
from gptq.models.tensor_names import check_tensors
from gptq.models.weights import WeightStream
from gptq.pipeline.block import set_original_weights
from gptq.pipeline.block_walk import BlockWalk

MAX_LOSS = 700.0  # its exponential is the largest that a float holds
RESAMPLES, BOOTSTRAP_SEED, CONFIDENCE = 2000, 0, 0.95
CHUNK = 2**23  # logits that are compared at once: 64 MB of float64


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` predicted tokens, seq_len - 1 in each of `windows`."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison(Perplexity):
    """A model beside the original it was made from, on the same `tokens` predicted tokens.

    `gap` is perplexity / original_perplexity - 1. `kl` is the mean over tokens of KL(original || model) in nats, and
    `top1_agreement` the share of tokens for which both find the same token most likely. `intervals` holds for each of
    the five numbers the ends of its 95 % paired bootstrap interval over windows; None where there is one window only.
    """

    original_perplexity: float
    gap: float
    kl: float
    top1_agreement: float
    intervals: dict[str, tuple[float, float]] | None


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
    seq_len, _ = fit_seq_len(seq_len, read_config(folder, trust_remote_code))
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
        InputError: the model is no causal language model, or its output is not finite.
    """
    if network.config.is_encoder_decoder or not network.can_generate():
        raise InputError(f"{type(network).__name__} is no causal language model, which perplexity is measured of")
    check_tokens(tokens, network)
    total = 0.0
    for done, window in enumerate(tokens):
        window = window.to(network.device)
        logits = (
            run_forward(network, input_ids=window[None], use_cache=False).logits[0, :-1].float()
        )  # (seq_len - 1, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        total += float(loss)
        progress(done + 1, len(tokens))
    windows, seq_len = tokens.shape
    count = windows * (seq_len - 1)
    if not total / count < MAX_LOSS:
        raise InputError("the model's output holds NaN or infinity; try --dtype float32")
    return Perplexity(perplexity=math.exp(total / count), tokens=count, windows=windows, seq_len=seq_len)


# --- beside the original ----------------------------------------------------------------------------------------------


def compare(
    model: str | Path,
    original: str | Path,
    data: str,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Perplexity of a model and of its original, KL divergence and agreement between them, in one pass over the text.

    The original is read one block at a time, so that only `model` has to fit into memory; beside it stand one block
    of the original and the hidden states of all windows, (windows, seq_len, width).

    Args:
        model: folder or Hub id (then at `revision`), quantized or not.
        original: folder or Hub id of an unquantized safetensors checkpoint with the same tokenizer.
        data, seq_len, windows, device, dtype: as for `perplexity`.
        progress: called with how many steps are done, of how many; a step is one window in one block of either.

    Raises:
        InputError: model, original or data cannot be read, or do not belong together.
    """
    folder, original_folder = resolve(str(model), revision), resolve(str(original), None)
    configs = [read_config(where, trust_remote_code) for where in (folder, original_folder)]
    if getattr(configs[1], "quantization_config", None):
        raise InputError(f"{original} is quantized itself; compare with the checkpoint that {model} was made from")
    for config in configs:
        seq_len, _ = fit_seq_len(seq_len, config)
    tokens = text_windows(data, read_tokenizer(folder, trust_remote_code), seq_len, windows)
    if not torch.equal(
        tokens, text_windows(data, read_tokenizer(original_folder, trust_remote_code), seq_len, windows)
    ):
        raise InputError(f"the tokenizers of {model} and {original} give different tokens; is it the original?")
    network = load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return summarize(per_window(network, original_folder, tokens, dtype, trust_remote_code, progress), seq_len)


@torch.no_grad()
def per_window(
    network: PreTrainedModel,
    original: Path,
    tokens: Tensor,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """What `summarize` needs of windows of tokens (windows, seq_len): (windows, 4) float64, see `differences`."""
    check_tokens(tokens, network)
    rows = []
    for window, reference in zip(
        tokens, original_logits(original, tokens, network.device, dtype, trust_remote_code, progress), strict=True
    ):
        window = window.to(network.device)
        logits = run_forward(network, input_ids=window[None], use_cache=False).logits[
            0, :-1
        ]  # (seq_len - 1, vocabulary)
        if logits.shape != reference.shape:
            found, expected = logits.shape[1], reference.shape[1]
            raise InputError(f"the model has {found} logits, {original} has {expected}; is it the original?")
        rows.append(differences(reference, logits, window[1:]))
    return torch.stack(rows)


def differences(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Means over tokens, (4,) float64: the model's and the original's loss, KL(original || model), agreement.

    Args:
        reference, logits: of the original and of the model, (tokens, vocabulary); softmaxes are taken in float64.
        targets: (tokens,) what comes next.
    """
    total = torch.zeros(4, dtype=torch.float64, device=logits.device)
    step = max(1, CHUNK // logits.shape[1])
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        log_p, log_q = (x[part].double().log_softmax(-1) for x in (reference, logits))  # (step, vocabulary)
        surprise = [-x.gather(1, targets[part, None]).sum() for x in (log_q, log_p)]
        # A token that the original holds impossible counts 0, the limit of p log p, not 0 * -infinity.
        divergence = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum()
        agreement = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        total += torch.stack([*surprise, divergence, agreement])
    return (total / len(targets)).cpu()


def summarize(numbers: Tensor, seq_len: int) -> Comparison:
    """A comparison from its windows' `differences`, (windows, 4).

    Intervals are percentiles over resamples of whole windows, drawn with replacement from a fixed seed and the same
    for all numbers; tokens of one window depend on each other, windows hardly (Koehn 2004, "Statistical significance
    tests for machine translation evaluation", pairs them in the same way).

    Raises:
        InputError: a number is not finite.
    """
    if not bool((numbers < MAX_LOSS).all()):  # NaN is not smaller either
        raise InputError("the output of the model or of the original holds NaN or infinity; try --dtype float32")
    windows = len(numbers)
    found = _derived(numbers.mean(0))
    intervals = None
    if windows > 1:
        draw = torch.Generator().manual_seed(BOOTSTRAP_SEED)
        means = [numbers[torch.randint(windows, (windows,), generator=draw)].mean(0) for _ in range(RESAMPLES)]
        resampled = torch.stack(list(_derived(torch.stack(means)).values()))  # (5, resamples)
        tail = (1 - CONFIDENCE) / 2
        ends = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=1).T.tolist()
        intervals = {name: (low, high) for name, (low, high) in zip(found, ends, strict=True)}
    values = {name: float(value) for name, value in found.items()}
    return Comparison(**values, intervals=intervals, tokens=windows * (seq_len - 1), windows=windows, seq_len=seq_len)


def _derived(means: Tensor) -> dict[str, Tensor]:
    """The five numbers of a comparison from mean differences (..., 4)."""
    loss, original_loss, kl, agreement = means.unbind(-1)
    return {
        "perplexity": loss.exp(),
        "original_perplexity": original_loss.exp(),
        "gap": (loss - original_loss).expm1(),
        "kl": kl,
        "top1_agreement": agreement,
    }


@torch.no_grad()
def original_logits(
    folder: Path,
    tokens: Tensor,
    device: torch.device,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Tensor]:
    """Logits (seq_len - 1, vocabulary) of each window of tokens (windows, seq_len), with one block in memory at a time.

    All windows go through a block before the next one is read; the head is run window by window at the end.
    """
    opened = open_model(folder, trust_remote_code)
    network = opened.network
    check_tensors(network, opened.names, opened.source.tensors)
    check_tokens(tokens, network)
    weights = WeightStream(opened.source, opened.names, device, choose_dtype(dtype, opened.hf_config, device))
    blocks, _ = find_blocks(network, {"input_ids"})
    done, total = 0, 2 * len(tokens) * len(blocks)  # what takes each window yielded goes through as many blocks
    with BlockWalk(network, blocks, [{"input_ids": window[None]} for window in tokens], 1, weights) as walk:
        for block, (calls,) in walk:
            set_original_weights(block, weights)
            outputs = []
            for call in calls:
                outputs.append(call())
                done += 1
                progress(done, total)
            walk.resume_with([outputs])
        for _, output in walk.outputs():
            yield output.logits[0, :-1]
            done += len(blocks)
            progress(done, total)
