"""What the calibration inputs of a layer tell: Hessian, factor, drift, held-out inputs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptq import solver
from gptq.calibration.windows import is_held_out
from gptq.errors import InputError
from gptq.pipeline.job import Job
from gptq.solver.hessian import HeldOut, HessianAccumulator

TOKENS_PER_INPUT = 2  # below so many tokens for each input, an expert's own Hessian is too poor to stand alone
Sums = tuple[HessianAccumulator, HeldOut]  # over windows to learn from, and over those held out


def pseudo_tokens(tokens: int, inputs: int) -> int:
    """How many tokens of the whole layer make up for those that an expert did not see."""
    return max(TOKENS_PER_INPUT * inputs - tokens, 0)


def blend(own: HessianAccumulator, everyone: HessianAccumulator, own_weight: float) -> tuple[Tensor, Tensor | None]:
    """H and C (see `HessianAccumulator`) of an expert: own_weight of its own tokens' mean, the rest of all tokens'.

    With n tokens of its own and k pseudo-tokens, own_weight = n / (n + k) and so

        H = (n H_own + k H_all) / (n + k),      k = max(TOKENS_PER_INPUT * inputs - n, 0).

    H has inputs * (inputs + 1) / 2 unknowns, and n tokens give it a rank of at most n. With fewer tokens than inputs
    the solver would find directions in which errors seem to cost nothing, though other text would use them. All tokens
    of the layer are the best guess at hand of what that text looks like: the router sends an expert some of them. An
    expert with enough tokens (k = 0) is judged by its own only.
    """
    if own_weight == 1:
        return own.mean(), own.drift_mean()
    H = own_weight * own.mean() + (1 - own_weight) * everyone.mean()
    C_own, C_all = own.drift_mean(), everyone.drift_mean()
    if C_all is None:
        return H, None
    return H, (1 - own_weight) * C_all + (0 if C_own is None else own_weight * C_own)


@dataclass(frozen=True)
class Solution:
    """What is known of a layer once its codes are chosen."""

    solved: solver.SolvedLayer
    figures: dict[str, Any]  # of its LayerResult
    spread: dict[str, Any]  # histogram of the weights


@dataclass(frozen=True)
class Unseen:
    """Inputs held out of what the solver works with: a weighted mean of an expert's own and of all tokens."""

    parts: tuple[tuple[float, HeldOut], ...]

    def power(self, A: Tensor) -> float:
        """See HeldOut.power."""
        return sum(share * held.power(A) for share, held in self.parts)

    def agreement(self, W: Tensor, A: Tensor) -> float | None:
        """See HeldOut.agreement; None where the last part, which has most tokens, knows nothing of the originals."""
        found = [(share, held.agreement(W, A)) for share, held in self.parts]
        if found[-1][1] is None:
            return None
        return sum(share * one for share, one in found if one is not None)


@dataclass
class LayerInputs:
    """What is known of the inputs of a layer; each part is None where there is none of its kind."""

    factor: solver.Factor
    drift: Tensor | None  # (inputs, inputs) C, the mean of (x~ - x) x^T, see gptq.solver.error_propagation
    unseen: Unseen | None
    tokens: int
    divided: bool = False  # whether `drift` is C H^-1 instead
    spent: bool = False  # the drift is forgotten, so that only the layers solved `ahead` can still use this
    ahead: dict[str, Solution] = field(default_factory=dict)  # siblings solved with a layer, expected to get the same


def look_at_inputs(
    name: str, arriving: Iterable[tuple[Tensor | None, Tensor | None]], windows: int, job: Job
) -> LayerInputs:
    """Average over the windows; one in HELD_OUT is kept out of what the solver works with, to measure it.

    `arriving` brings this process's windows only, of which there are so many.
    """
    total = job.ranks.total(windows)
    pairs = ((x, original) for x, original in job.ranks.in_order(arriving, total, parts=2))
    return known_from(name, accumulated(job.plans[name].inputs, pairs, total, job), None, job)


def accumulated(inputs: int, arriving: Iterable[tuple[Tensor | None, Tensor | None]], windows: int, job: Job) -> Sums:
    seen, unseen = HessianAccumulator(inputs, job.stream.device, job.ranks), HeldOut(inputs, job.stream.device)
    for i, (x, original) in enumerate(arriving):
        if x is not None:
            (unseen if is_held_out(i, windows) else seen).add(x, original)
        x = original = None  # before the next window makes its own
    return seen, unseen


def known_from(name: str, own: Sums, everyone: Sums | None, job: Job) -> LayerInputs:
    """A layer's input sums as the solver wants them; where those of `everyone` are given, blended with them."""
    seen, unseen = own
    missing = 0 if everyone is None else pseudo_tokens(seen.num_tokens, job.plans[name].inputs)
    share = seen.num_tokens / (seen.num_tokens + missing) if missing else 1.0
    all_seen, all_unseen = everyone or own
    H, C = seen.take() if share == 1 else blend(seen, all_seen, share)  # a large H is not there twice
    if not bool(torch.isfinite(H.diagonal()).all()):
        raise InputError(
            f"the input of {name} holds NaN or infinity for the calibration data; if the original model works on it, "
            "try --dtype float32"
        )
    share_unseen = share if unseen.num_tokens else 0.0
    parts = tuple((part, held) for part, held in ((share_unseen, unseen), (1 - share_unseen, all_unseen)) if part)
    return LayerInputs(
        factor=_factorize(name, H, job),
        drift=C,
        unseen=Unseen(parts) if all_unseen.num_tokens else None,
        tokens=seen.num_tokens + unseen.num_tokens,
    )


def _factorize(name: str, H: Tensor, job: Job) -> solver.Factor:
    perm = solver.act_order(H) if job.config.desc_act else solver.natural_order(H)
    try:
        factor = solver.factorize(H, perm, job.config.damp_percent)
    except solver.NotPositiveDefiniteError as error:
        raise InputError(f"the Hessian of {name} is {error}; use more or other calibration text") from error
    if factor.damp > job.config.damp_percent:
        job.note(f"{name}: its Hessian needed {factor.damp:g} of damping instead of {job.config.damp_percent:g}")
    return factor
