"""Results of quantizing a layer or a block, and the names of the files that hold them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoint.companions import RECORD, REPORT
from gptq.compute.device_profile import profile_of

__all__ = [
    "CARD", "CODE_BINS", "QUALITY", "RECORD", "REPORT", "WEIGHT_BINS", "BlockError", "Coverage", "LayerResult",
    "code_histogram", "weight_histogram",
]  # fmt: skip

QUALITY = "quality.json"  # the file with measurements of `gptq eval --save`
CARD = "README.md"
WEIGHT_BINS, CODE_BINS = 40, 64  # largest numbers of bins in the record's histograms


@dataclass(frozen=True)
class LayerResult:
    """Errors and settings of one quantized linear layer.

    `error` is the exact relative output error on the calibration tokens, ||(T - Q) X||^2 / ||W X||^2. X are the inputs;
    W is the original weight; T is W, or with two streams W plus a `share` of the correction for the error of the layers
    before (see `solver.error_propagation`); Q is the weight that the solver chose, before any tuning of the block.
    `heldout_error` is the same error on windows that the solver has not seen, `rtn_error` the error of round-to-nearest
    on the tokens that the solver has seen. For a layer with many rows, these two are estimated: `error`, times the
    ratio of that error to the solver's error on a few hundred rows. If no calibration token was used (method "rtn", or
    a layer that no token reached), X is the identity. For an expert that few tokens reached, H = X X^T is the blend of
    `pipeline.layer_inputs`, and `tokens` counts the expert's own tokens.
    """

    name: str
    bits: int
    group_size: int
    error: float
    rtn_error: float
    heldout_error: float | None
    share: float | None
    damp: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class BlockError:
    """Mean squared error of a block's output on held-out windows, relative to the original output's mean square.

    A token's error is divided by the size of its output (see `BlockToTune.distance`).
    """

    name: str
    solved: float
    tuned: float


@dataclass(frozen=True)
class Coverage:
    """How many of `all_tokens` calibration tokens each expert of a layer saw.

    `blended` lists the numbers of the experts that saw too few tokens.
    """

    name: str
    all_tokens: int
    tokens: list[int]
    blended: list[int]


def weight_histogram(W: Tensor) -> dict[str, Any]:
    """Count a layer's weights (outputs, inputs) in 40 equal bins over [-weight_range, weight_range].

    The last bin also counts weights at its upper end.
    """
    largest = max(abs(float(end)) for end in W.aminmax())
    half = WEIGHT_BINS / 2
    counts = torch.zeros(WEIGHT_BINS, dtype=torch.int64, device=W.device)
    for part in W.split(profile_of(W.device).copied_rows):
        bin_of = (part * (half / (largest or 1.0)) + half).clamp_(0, WEIGHT_BINS - 1).to(torch.uint8)  # rounds down
        counts += torch.bincount(bin_of.flatten(), minlength=WEIGHT_BINS)
    return {"weight_range": largest, "weight_histogram": counts.tolist()}


def code_histogram(codes: Tensor, bits: int) -> dict[str, Any]:
    """Count a layer's codes by value; above 6 bits, several neighbouring values share one of 64 bins."""
    code_bins = min(2**bits, CODE_BINS)
    return {"code_histogram": torch.bincount(codes.flatten() // (2**bits // code_bins), minlength=code_bins).tolist()}
