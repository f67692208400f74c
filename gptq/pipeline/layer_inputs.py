"""Statistics of a layer's calibration inputs: the factorized Hessian, the drift, and held-out inputs to measure errors.

All are immutable values; `layer.SharedInput` replaces them while the layers that share an input are solved.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from gptq import solver
from gptq.calibration.windows import is_held_out
from gptq.compute.matrices import diagonal_of
from gptq.errors import InputError
from gptq.pipeline.run import Run
from gptq.solver.error_propagation import divide_by_hessian, full_correction, product_by_panels
from gptq.solver.hessian import HeldOut, HessianAccumulator

TOKENS_PER_INPUT = 2  # below this many tokens per input an expert's own Hessian is blended with that of all tokens


class InputSums(NamedTuple):
    """Sums over the calibration windows that the solver learns from, and over held-out windows."""

    seen: HessianAccumulator
    held_out: HeldOut


class DriftForm(Enum):
    """What the matrix of a `Drift` is, in the names of error_propagation."""

    INPUTS = "C"
    DIVIDED = "C H^-1"
    OUTPUTS = "S"


@dataclass(frozen=True)
class Drift:
    """The drift of a layer's inputs, C (inputs, inputs), or of its outputs, S (outputs, inputs).

    If more rows are solved than the layer has inputs, C is replaced by C H^-1, computed once.
    """

    matrix: Tensor
    form: DriftForm

    def for_rows(self, rows: int, factor: solver.Factor) -> "Drift":
        """Return the drift in the form that is cheapest for this many rows; the memory of C is reused."""
        if self.form is not DriftForm.INPUTS or rows <= len(self.matrix):
            return self
        return Drift(divide_by_hessian(self.matrix, factor), DriftForm.DIVIDED)

    def correction(self, W: Tensor, rows: slice, factor: solver.Factor) -> Tensor:
        """Return the correction for a share of 1 of W (rows, inputs), these rows of the layers.

        That of S replaces its rows of S.
        """
        if self.form is DriftForm.OUTPUTS:
            return divide_by_hessian(self.matrix[rows], factor)
        if self.form is DriftForm.DIVIDED:
            return product_by_panels(W, self.matrix)
        return full_correction(W, self.matrix, factor)


@dataclass(frozen=True)
class HeldOutBlend:
    """Held-out inputs of a layer.

    An expert with few tokens has two parts: the inputs of its own tokens, and the inputs of all tokens.
    """

    parts: tuple[tuple[float, HeldOut], ...]  # (weight, inputs), weights sum to 1

    def power(self, A: Tensor) -> float:
        """Return the mean squared output of a weight A (outputs, inputs); see HeldOut.power."""
        return sum(weight * held.power(A) for weight, held in self.parts)

    def agreement(self, W: Tensor | None, A: Tensor, rows: slice) -> float | None:
        """See HeldOut.agreement; None if the last part, which has the most tokens, has no drift."""
        found = [(weight, held.agreement(W, A, rows)) for weight, held in self.parts]
        if found[-1][1] is None:
            return None
        return sum(weight * one for weight, one in found if one is not None)


@dataclass(frozen=True)
class LayerInputs:
    """Everything that solving a layer needs to know of its inputs.

    `drift` is None with one stream, and after it was freed. `held_out` is None if no window is held out.
    """

    factor: solver.Factor
    drift: Drift | None
    held_out: HeldOutBlend | None
    tokens: int


def gather_inputs(name: str, pairs: Iterable[tuple[Tensor | None, Tensor | None]], windows: int, run: Run) -> InputSums:
    """Sum the products of a layer's inputs over the windows of all processes.

    `pairs` yields one pair for each of the `windows` windows of this process: the layer's input, and its drift; None
    for what the window does not have.
    """
    total = run.ranks.total(windows)
    everyone = ((x, drift) for x, drift in run.ranks.gather_windows(pairs, total, parts=2))
    return accumulate(run.layers[name].inputs, everyone, total, run)


def accumulate(
    num_inputs: int, pairs: Iterable[tuple[Tensor | None, Tensor | None]], windows: int, run: Run
) -> InputSums:
    """Sum the products of inputs over all windows; one in HELD_OUT_EVERY windows is held out and summed separately."""
    device = run.weights.device
    given = num_inputs, device, run.ranks, run.matrices
    sums = InputSums(HessianAccumulator(*given), HeldOut(*given))
    for i, (x, drift) in enumerate(pairs):
        if x is not None:
            (sums.held_out if is_held_out(i, windows) else sums.seen).add(x, drift)
        x = drift = None  # free both before the inputs of the next window are computed
    sums.held_out.complete()
    return sums


def inputs_from_sums(name: str, own: InputSums, everyone: InputSums | None, form: DriftForm, run: Run) -> LayerInputs:
    """Return what solving a layer needs, from the sums over its inputs.

    `form` is that of the drifts that were summed. `everyone` is given for an expert: sums over the inputs of all
    tokens. If the expert saw too few tokens, its statistics are blended with these.

    Raises:
        InputError: the inputs hold NaN or infinity, or their Hessian cannot be factorized.
    """
    num_tokens = own.seen.num_tokens
    missing = 0 if everyone is None else pseudo_tokens(num_tokens, run.layers[name].inputs)
    weight = num_tokens / (num_tokens + missing) if missing else 1.0
    everyone = everyone or own
    H, C = (
        own.seen.take() if weight == 1 else blend_hessians(own.seen, everyone.seen, weight)
    )  # take() moves H out, so that a large one is not copied
    if not bool(torch.isfinite(diagonal_of(H)).all()):
        raise InputError(
            f"the input of {name} holds NaN or infinity for the calibration data; if the original model works on it, "
            "try --dtype float32"
        )
    own_weight = weight if own.held_out.num_tokens else 0.0
    parts = tuple((w, held) for w, held in ((own_weight, own.held_out), (1 - own_weight, everyone.held_out)) if w)
    return LayerInputs(
        factor=_factorize(name, H, run),
        drift=None if C is None else Drift(C, form),
        held_out=HeldOutBlend(parts) if everyone.held_out.num_tokens else None,
        tokens=num_tokens + own.held_out.num_tokens,
    )


def note_on_damping(name: str, inputs: LayerInputs, run: Run) -> list[str]:
    """Return a note for the user if a Hessian needed more damping than damp_percent."""
    asked, damp = run.config.damp_percent, inputs.factor.damp
    return [f"{name}: its Hessian needed {damp:g} of damping instead of {asked:g}"] if damp > asked else []


def _factorize(name: str, H: Tensor, run: Run) -> solver.Factor:
    perm = solver.act_order(H) if run.config.desc_act else solver.natural_order(H)
    try:
        return solver.factorize(H, perm, run.config.damp_percent, run.matrices)
    except solver.NotPositiveDefiniteError as error:
        raise InputError(f"the Hessian of {name} is {error}; use more or other calibration text") from error


def pseudo_tokens(tokens: int, inputs: int) -> int:
    """Return how many tokens of the whole layer are added to an expert with few tokens (see `blend_hessians`)."""
    return max(TOKENS_PER_INPUT * inputs - tokens, 0)


def blend_hessians(
    own: HessianAccumulator, everyone: HessianAccumulator, own_weight: float
) -> tuple[Tensor, Tensor | None]:
    """Return H and C or S of an expert: weighted means over its own tokens and over all tokens.

    With n tokens of its own and k pseudo-tokens, own_weight = n / (n + k) and so

        H = (n H_own + k H_all) / (n + k),      k = max(TOKENS_PER_INPUT * inputs - n, 0).

    H has inputs * (inputs + 1) / 2 unknowns, and n tokens give it a rank of at most n. With fewer tokens than inputs
    the solver would find directions in which errors seem to cost nothing, though other text would use them. All tokens
    of the layer are the best available guess at that text, because the router selects an expert's tokens from them. An
    expert with enough tokens (k = 0) uses only its own tokens.
    """
    if own_weight == 1:
        return own.mean(), own.drift_mean()
    H = own_weight * own.mean() + (1 - own_weight) * everyone.mean()
    C_own, C_all = own.drift_mean(), everyone.drift_mean()
    if C_all is None:
        return H, None
    return H, (1 - own_weight) * C_all + (0 if C_own is None else own_weight * C_own)
