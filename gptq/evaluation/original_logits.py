"""The logits of an original model: by transformers where all of it fits into memory, else one block at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.calibration.arrays import Inputs
from gptq.checkpoint.reader import Source
from gptq.errors import InputError
from gptq.formats.original import open_original
from gptq.inference.load import load
from gptq.models.blocks import find_blocks
from gptq.models.build import OpenModel, open_model
from gptq.models.check_tensors import check_tensors
from gptq.models.forward import check_tokens, run_forward
from gptq.models.hf_config import choose_dtype, read_config
from gptq.models.reached_layers import find_unreached_layers
from gptq.models.trial_forward import run_trial
from gptq.models.weights import WeightStream
from gptq.pipeline.block_walk import BlockWalk
from gptq.planning.memory import free_bytes
from gptq.planning.plan import without_blocks_of

PROBED_TOKENS, PROBED_DIFFERENCE = 16, 0.01  # the second relative to the largest logit
MOST_OF_MEMORY = 0.7  # of what is free, that the original may take when all of it is loaded


def require_causal(network: PreTrainedModel) -> None:
    """Raises InputError if a model's logits do not predict the next token of its input."""
    if network.config.is_encoder_decoder or not network.can_generate():
        raise InputError(f"{type(network).__name__} is no causal language model, which perplexity is measured of")


@torch.no_grad()
def require_blind_to_later(network: PreTrainedModel, window: Tensor) -> None:
    """Check a loaded model on the first tokens of a window, (tokens,): those before the last may not depend on it.

    Raises:
        InputError: they do, as in BERT without `is_decoder`, which would be measured on tokens that it sees.
    """
    ids = window[:PROBED_TOKENS][None].to(network.device)
    other = ids.clone()
    other[0, -1] = 0 if ids[0, -1] else 1
    one, changed = (run_forward(network, input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, other))
    if float((one - changed).abs().max()) > PROBED_DIFFERENCE * float(one.abs().max()):
        raise InputError(
            f"{type(network).__name__} predicts tokens from those that follow, so it is no causal language model, "
            "which perplexity is measured of; is `is_decoder` missing in its config.json?"
        )


@torch.no_grad()
def compute_original_logits(
    folder: Path,
    tokens: Tensor,
    device: torch.device,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Tensor]:
    """Yield logits (seq_len - 1, vocabulary) of each window of tokens (windows, seq_len).

    transformers reads the model and computes where all of it fits into the free memory, so that the judge shares no
    fault with what it judges; otherwise see `compute_logits_by_block`.
    """
    if not _fits_into_memory(folder, device, dtype, trust_remote_code):
        yield from compute_logits_by_block(folder, tokens, device, dtype, trust_remote_code, progress)
        return
    network = load(folder, device=str(device), dtype=dtype, trust_remote_code=trust_remote_code)
    require_causal(network)
    check_tokens(tokens, network)
    for done, window in enumerate(tokens.to(device)):
        yield run_forward(network, input_ids=window[None], use_cache=False).logits[0, :-1]
        progress(done + 1, len(tokens))


def _fits_into_memory(folder: Path, device: torch.device, dtype: str, trust_remote_code: bool) -> bool:
    """Whether a checkpoint takes less than MOST_OF_MEMORY of the device's free memory, all of it loaded."""
    compute = choose_dtype(dtype, read_config(folder, trust_remote_code), device)
    needed = _bytes_of_all(open_original(folder), compute)
    return needed < MOST_OF_MEMORY * free_bytes(device)


def _bytes_of_all(source: Source, dtype: torch.dtype) -> int:
    return sum(dtype.itemsize * math.prod(info.shape) for info in source.tensors.values())


@torch.no_grad()
def compute_logits_by_block(
    folder: Path,
    tokens: Tensor,
    device: torch.device,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Tensor]:
    """Yield what `compute_original_logits` yields, with one block in memory at a time.

    All windows run through a block before the next one is read. The output head runs window by window at the end.
    """
    compute = choose_dtype(dtype, read_config(folder, trust_remote_code), device)
    opened = open_model(open_original(folder), trust_remote_code, compute)
    require_causal(opened.network)
    check_tokens(tokens, opened.network)
    for output in run_by_block(opened, [{"input_ids": window[None]} for window in tokens], device, compute, progress):
        yield output.logits[0, :-1]


@torch.no_grad()
def run_by_block(
    opened: OpenModel,
    windows: Sequence[Inputs],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Any]:
    """Yield a model's output on each window of inputs, with one block in memory at a time.

    Raises:
        InputError: a forward runs a block several times, as ALBERT's do; or it fails.
    """
    network = opened.network
    check_tensors(network, opened.names, opened.source.tensors)
    weights = WeightStream(opened.source, opened.names, device, dtype)
    every_block = find_blocks(network)
    trial = run_trial(network, windows[0])
    for block in every_block:
        if trial.called[block.name] > 1:
            free = _bytes_of_all(opened.source, dtype) / MOST_OF_MEMORY / 1e6
            raise InputError(
                f"{block.name} of {opened.source.folder} runs {trial.called[block.name]} times in a forward, so that "
                "the model cannot be read block by block; to be read whole in "
                f"{str(dtype).removeprefix('torch.')}, it needs {free:,.1f} MB of free memory"
            )
    unreached = find_unreached_layers(network, every_block, windows[0], trial)
    blocks = [replace(block, linears={}) for block in without_blocks_of(unreached, every_block)]  # none is held back
    done, total = 0, 2 * len(windows) * len(blocks)  # the caller runs its own model as each window is yielded
    with BlockWalk(network, blocks, windows, 1, weights) as walk:
        for _, (calls,) in walk:
            outputs = []
            for call in calls:
                outputs.append(call())
                done += 1
                progress(done, total)
            walk.resume_with([outputs])
        for _, output in walk.outputs():
            yield output
            done += len(blocks)
            progress(done, total)
