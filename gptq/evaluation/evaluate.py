"""Measure a model's perplexity on a text, and compare a quantized model's predictions with those of the original."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gptq import calibration
from gptq.checkpoint.hub import resolve
from gptq.compute.torch_state import fresh_torch_state
from gptq.errors import InputError
from gptq.evaluation.original_logits import compute_original_logits, require_blind_to_later, require_causal
from gptq.inference.load import load
from gptq.models.attention import attention_by_products
from gptq.models.forward import check_tokens, run_forward
from gptq.models.hf_config import fit_seq_len, read_config, read_tokenizer

logger = logging.getLogger(__name__)
MAX_LOSS = 69.0  # nats per token; records hold perplexities up to 1e30
USELESS = f"holds NaN or infinity, or has a loss of {MAX_LOSS:.0f} nats per token or more; try --dtype float32"
RESAMPLES, BOOTSTRAP_SEED, CONFIDENCE = 2000, 0, 0.95  # settings of the bootstrap intervals
CHUNK_LOGITS = 2**23  # logits compared at a time: 64 MiB in float64


@dataclass(frozen=True)
class Perplexity:
    """Perplexity: exp of the mean negative log-likelihood over `tokens` predicted tokens, seq_len - 1 per window."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison(Perplexity):
    """A quantized model compared with its original on the same predicted tokens.

    `gap` is perplexity / original_perplexity - 1. `kl` is the mean over tokens of KL(original || model) in nats, and
    `top1_agreement` the fraction of tokens for which both models rank the same token first. `intervals` holds for
    each of the five figures the ends of its 95 % paired bootstrap interval over windows; None with a single window.
    """

    original_perplexity: float
    gap: float
    kl: float
    top1_agreement: float
    intervals: dict[str, tuple[float, float]] | None


@fresh_torch_state()
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
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Measure perplexity as the GPTQ paper does: tokenize the text as a whole, cut it into windows without overlap.

    Args:
        model: folder or Hub id, quantized or not.
        data: source of text, see `gptq.calibration`; if it has several splits, `test` is used.
        seq_len: tokens per window, at most the model's limit.
        windows: how many windows to measure, from the start of the text; all by default.
        allow_pickle: as for `gptq.quantize`.
        progress: called after each window with the number done and the total.

    Raises:
        InputError: model or data cannot be read, or the text is shorter than a window.
    """
    folder = resolve(str(model), revision, allow_pickle)
    seq_len, _ = fit_seq_len(seq_len, read_config(folder, trust_remote_code))
    tokenizer = read_tokenizer(folder, trust_remote_code)
    tokens = read_windows(data, tokenizer, seq_len, windows)
    network = load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return measure_perplexity(network, tokens, progress)


def read_windows(data: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None) -> Tensor:
    """Read a text and cut it into windows of tokens (windows, seq_len), at most `limit` of them."""
    if seq_len < 2 or (limit is not None and limit < 1):
        raise InputError("a perplexity needs windows of at least 2 tokens, and at least one window")
    return calibration.evaluation_windows(calibration.documents(data, "test"), tokenizer, seq_len, limit)


@torch.no_grad()
@attention_by_products()
def measure_perplexity(
    network: PreTrainedModel, tokens: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> Perplexity:
    """Measure the perplexity of a loaded model on windows of tokens (windows, seq_len); log-likelihoods are float32.

    Raises:
        InputError: the model is not a causal language model, or its output is not finite.
    """
    _require_predictions(network, tokens)
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
        name = network.config.name_or_path or "the model"
        raise InputError(f"the output of {name} {USELESS}")
    return Perplexity(perplexity=math.exp(total / count), tokens=count, windows=windows, seq_len=seq_len)


def _require_predictions(network: PreTrainedModel, tokens: Tensor) -> None:
    """Check that a model predicts each of its tokens (windows, seq_len) from those before it alone.

    Raises:
        InputError: it does not.
    """
    require_causal(network)
    check_tokens(tokens, network)
    require_blind_to_later(network, tokens[0])


# --- comparison with the original -------------------------------------------------------------------------------------


@fresh_torch_state()
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
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure perplexity of a model and of its original, and KL divergence and agreement between them, in one pass.

    The original is loaded by transformers where it fits into the free memory beside `model`. Otherwise it is read one
    block at a time, and memory holds one block of it and the hidden states of all windows, (windows, seq_len, hidden).

    Args:
        model: folder or Hub id (then at `revision`), quantized or not.
        original: folder or Hub id of the checkpoint that `model` was made from, with the same tokenizer.
        data, seq_len, windows, device, dtype, allow_pickle: as for `perplexity`.
        progress: called with the steps done and the total; a step is one window, or one window in one block.

    Raises:
        InputError: model, original or data cannot be read, or do not belong together.
    """
    folder, original_folder = resolve(str(model), revision, allow_pickle), resolve(str(original), None, allow_pickle)
    configs = [read_config(where, trust_remote_code) for where in (folder, original_folder)]
    for config in configs:
        seq_len, _ = fit_seq_len(seq_len, config)
    tokens = read_windows(data, read_tokenizer(folder, trust_remote_code), seq_len, windows)
    if not torch.equal(
        tokens, read_windows(data, read_tokenizer(original_folder, trust_remote_code), seq_len, windows)
    ):
        raise InputError(f"the tokenizers of {model} and {original} give different tokens; is it the original?")
    kinds = [str(config.model_type) for config in configs]
    if kinds[0] != kinds[1]:
        logger.warning("%s is of type %s, and %s of type %s; is it the original?", model, kinds[0], original, kinds[1])
    network = load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return summarize(measure_windows(network, original_folder, tokens, dtype, trust_remote_code, progress), seq_len)


@torch.no_grad()
@attention_by_products()
def measure_windows(
    network: PreTrainedModel,
    original: Path,
    tokens: Tensor,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Compare a model with its original on each window of tokens (windows, seq_len).

    Returns (windows, 4) float64, one row of `compare_logits` per window.
    """
    _require_predictions(network, tokens)
    rows = []
    for window, reference in zip(
        tokens,
        compute_original_logits(original, tokens, network.device, dtype, trust_remote_code, progress),
        strict=True,
    ):
        window = window.to(network.device)
        logits = run_forward(network, input_ids=window[None], use_cache=False).logits[
            0, :-1
        ]  # (seq_len - 1, vocabulary)
        if logits.shape != reference.shape:
            found, expected = logits.shape[1], reference.shape[1]
            raise InputError(f"the model has {found} logits, {original} has {expected}; is it the original?")
        rows.append(compare_logits(reference, logits, window[1:]))
    return torch.stack(rows)


def compare_logits(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return means over tokens, (4,) float64: the model's loss, the original's, KL(original || model), agreement.

    Args:
        reference: logits of the original, (tokens, vocabulary); softmaxes are computed in float64.
        logits: logits of the model, (tokens, vocabulary).
        targets: the next tokens, (tokens,).
    """
    total = torch.zeros(4, dtype=torch.float64, device=logits.device)
    step = max(1, CHUNK_LOGITS // logits.shape[1])
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        log_p, log_q = (x[part].double().log_softmax(-1) for x in (reference, logits))  # (step, vocabulary)
        losses = [-x.gather(1, targets[part, None]).sum() for x in (log_q, log_p)]
        # Where the original gives probability 0, the term is 0 (the limit of p log p), not 0 * infinity.
        divergence = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum()
        agreement = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        total += torch.stack([*losses, divergence, agreement])
    return (total / len(targets)).cpu()


def summarize(numbers: Tensor, seq_len: int) -> Comparison:
    """Summarize the rows of `measure_windows`, (windows, 4).

    Intervals are percentiles over resamples of whole windows, drawn with replacement from a fixed seed and the same for
    all figures. Windows are resampled, not tokens: tokens of one window depend on each other, windows hardly do (Koehn
    2004, "Statistical significance tests for machine translation evaluation", pairs them in the same way).

    Raises:
        InputError: a loss is not finite.
    """
    if not bool((numbers < MAX_LOSS).all()):  # also False for NaN
        raise InputError(f"the output of the model or of the original {USELESS}")
    windows = len(numbers)
    found = _derive_figures(numbers.mean(0))
    intervals = None
    if windows > 1:
        draw = torch.Generator().manual_seed(BOOTSTRAP_SEED)
        means = [numbers[torch.randint(windows, (windows,), generator=draw)].mean(0) for _ in range(RESAMPLES)]
        resampled = torch.stack(list(_derive_figures(torch.stack(means)).values()))  # (5, resamples)
        tail = (1 - CONFIDENCE) / 2
        ends = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=1).T.tolist()
        intervals = {name: (low, high) for name, (low, high) in zip(found, ends, strict=True)}
    values = {name: float(value) for name, value in found.items()}
    return Comparison(**values, intervals=intervals, tokens=windows * (seq_len - 1), windows=windows, seq_len=seq_len)


def _derive_figures(means: Tensor) -> dict[str, Tensor]:
    """Return the five figures of a comparison from the means (..., 4) of `compare_logits`."""
    loss, original_loss, kl, agreement = means.unbind(-1)
    return {
        "perplexity": loss.exp(),
        "original_perplexity": original_loss.exp(),
        "gap": (loss - original_loss).expm1(),
        "kl": kl,
        "top1_agreement": agreement,
    }
