"""One linear layer: what its inputs tell, and its codes; and what a run carries along from layer to layer."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptq import solver
from gptq.blocks import Block, WeightStream, fused_siblings, return_freed_memory
from gptq.checkpoint import ShardWriter
from gptq.config import QuantConfig
from gptq.drift import best_share, full_correction
from gptq.errors import InputError
from gptq.experts import blend, pseudo_tokens
from gptq.heldout import HeldOut, HeldOutAccumulator, Means, taken_means
from gptq.hessian import HessianAccumulator
from gptq.plan import LayerPlan
from gptq.record import BlockError, Coverage, LayerResult, weight_histogram
from gptq.refine import refine
from gptq.shelf import Shelf

HELD_OUT = 8  # one calibration window in so many measures what the solver learned from the others
FULL_SHARE = 0.5  # of the drift that is made up for, where too few windows leave none to find it by (QEP's choice)
TINY = 1e-30  # instead of a layer's output power where that is zero


class Observer:
    """Is told how a run goes on; does nothing by itself."""

    def started(self, num_blocks: int, weights: int) -> None: ...

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def layer_done(self, block: int, name: str, weights: int) -> None: ...

    def finished(self) -> None: ...


@dataclass
class Job:
    """What the walk through the blocks carries along."""

    config: QuantConfig
    plans: dict[str, LayerPlan]
    stream: WeightStream
    writer: ShardWriter | None  # None where nothing is written yet
    observer: Observer
    results: list[LayerResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weight_checksums: dict[str, str] = field(default_factory=dict)
    solved: dict[str, solver.SolvedLayer] = field(default_factory=dict)  # of the block at hand
    changed: dict[str, Tensor] = field(default_factory=dict)  # tuned tensors that are not packed, by stored name
    block_errors: list[BlockError] = field(default_factory=list)
    finish: Callable[..., None] = field(default_factory=lambda: finish_layer)  # what is done with a layer it stands at
    spreads: dict[str, dict[str, Any]] = field(default_factory=dict)  # histograms of weights and codes
    coverage: list[Coverage] = field(default_factory=list)
    shelf: Shelf = field(default_factory=Shelf)  # for activations between blocks

    @property
    def keeps_weights(self) -> bool:
        """Whether a solved block is run again, so that its layers' weights have to stay."""
        return self.writer is None or bool(self.config.tune_steps)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.observer.note(text)


@dataclass
class LayerInputs:
    """What is known of the inputs of a layer; each part is None where there is none of its kind."""

    factor: solver.Factor
    drift: Tensor | None  # (inputs, inputs) mean of (x~ - x) x^T, see gptq.drift
    unseen: HeldOut | None  # windows that neither of the above has seen
    tokens: int
    spent: bool = False  # the drift was given up after the layer that needed it, so this serves no other


Sums = tuple[HessianAccumulator, HeldOutAccumulator]  # over windows to learn from, and over those held out


def look_at_inputs(
    name: str, arriving: Iterable[tuple[Tensor | None, Tensor | None]], windows: int, job: Job
) -> LayerInputs:
    """Average over the windows; one in HELD_OUT is kept out of what the solver works with, to measure it."""
    return known_from(name, accumulated(job.plans[name].inputs, arriving, windows, job), None, job)


def accumulated(inputs: int, arriving: Iterable[tuple[Tensor | None, Tensor | None]], windows: int, job: Job) -> Sums:
    seen, unseen = HessianAccumulator(inputs, job.stream.device), HeldOutAccumulator(inputs, job.stream.device)
    for i, (x, original) in enumerate(arriving):
        if x is not None:
            (unseen if is_held_out(i, windows) else seen).add(x, original)
        x = original = None  # before the next window makes its own
    return seen, unseen


def known_from(name: str, own: Sums, everyone: Sums | None, job: Job) -> LayerInputs:
    """A layer's input sums as the solver wants them; where those of `everyone` are given, blended with them.

    Its own sums are used up.
    """
    seen, unseen = own
    missing = 0 if everyone is None else pseudo_tokens(seen.num_tokens, job.plans[name].inputs)
    held: HeldOut | None
    if everyone is None or not missing:
        (H, C), held = taken_means(seen), unseen.known()
    else:
        share, (all_seen, all_unseen) = seen.num_tokens / (seen.num_tokens + missing), everyone
        H, C = blend(seen, all_seen, share)
        held = None
        if all_unseen.num_tokens:
            held = Means(*blend(unseen.sums(), all_unseen.sums(), share if unseen.num_tokens else 0.0))
    if not bool(torch.isfinite(H.diagonal()).all()):
        raise InputError(
            f"the input of {name} holds NaN or infinity for the calibration data; if the original model works on it, "
            "try --dtype float32"
        )
    return LayerInputs(_factorize(name, H, job), C, held, seen.num_tokens + unseen.num_tokens)


def is_held_out(window: int, windows: int) -> bool:
    return windows >= HELD_OUT and window % HELD_OUT == HELD_OUT - 1


def _factorize(name: str, H: Tensor, job: Job) -> solver.Factor:
    perm = solver.act_order(H) if job.config.desc_act else solver.natural_order(H)
    try:
        factor = solver.factorize(H, perm, job.config.damp_percent)
    except solver.NotPositiveDefiniteError as error:
        raise InputError(f"the Hessian of {name} is {error}; use more or other calibration text") from error
    if factor.damp > job.config.damp_percent:
        job.note(f"{name}: its Hessian needed {factor.damp:g} of damping instead of {job.config.damp_percent:g}")
    return factor


def finish_layer(index: int, block: Block, name: str, known: LayerInputs | None, job: Job) -> None:
    """Solve one layer and let the forward go on with the weight that its codes stand for."""
    began = time.monotonic()
    plan, linear = job.plans[name], block.linears[name]
    W = job.stream.weight(linear, name)  # (outputs, inputs) float32
    try:
        solved, figures = _solve_layer(W, plan, known, job.config, last=_is_last(name, block, job))
    except ValueError as problem:
        raise InputError(f"{name}: {problem}; its largest weight is {float(W.abs().max()):.3g}") from problem
    job.solved[name] = solved
    job.spreads[name] = weight_histogram(W)
    job.stream.set_weight(linear, solved.weight())
    result = LayerResult(
        name=name, bits=plan.bits, group_size=plan.group_size, **figures, seconds=time.monotonic() - began
    )
    job.results.append(result)
    job.observer.layer_done(index, name, W.numel())
    return_freed_memory()


def _is_last(name: str, block: Block, job: Job) -> bool:
    """Whether no other layer is expected on the input of this one, and what is known of it is large.

    Only siblings that engines fuse are; if another comes after all, its input is looked at once more.
    """
    if job.plans[name].inputs <= job.plans[name].outputs:
        return False
    return next(group for group in fused_siblings(block.linears) if name in group)[-1] == name


def _solve_layer(
    W: Tensor, plan: LayerPlan, known: LayerInputs | None, config: QuantConfig, last: bool
) -> tuple[solver.SolvedLayer, dict[str, Any]]:
    """The codes of W (outputs, inputs), and the figures of its LayerResult.

    After the `last` layer on an input, what is known of its drift is given up.
    """
    nearest = solver.round_to_nearest(W, plan.bits, plan.group_size, plan.sym)
    if known is None:
        error = nearest.error / max(float(W.double().square().sum()), TINY)
        figures = {"error": error, "rtn_error": error, "heldout_error": None, "share": None, "damp": None, "tokens": 0}
        return nearest, figures
    factor, unseen, share, target = known.factor, known.unseen, None, W
    power = max(solver.output_power(W, factor.H), TINY)
    unseen_power = None if unseen is None else max(unseen.power(W), TINY)
    if known.drift is not None:
        correction = full_correction(W, known.drift, factor)
        if last:
            known.drift, known.spent = None, True
        agreement = None if unseen is None else unseen.agreement(W, correction)
        share = FULL_SHARE
        if unseen is not None and agreement is not None:
            share = best_share(agreement, unseen.power(correction))
        target = correction.mul_(share).add_(W)
    rtn_power = _error_of(nearest, target, factor.H)
    del nearest  # as everything here is as large as the layer
    solved = solver.solve(
        target, factor, plan.bits, plan.group_size, plan.sym, config.static_groups, bool(config.search)
    )
    if config.sweeps:
        solved = refine(target, solved, factor, plan.bits, config.sweeps)

    off = solved.weight().neg_().add_(target)
    figures = {
        "error": solver.output_power(off, factor.H) / power,
        "rtn_error": rtn_power / power,
        "heldout_error": unseen.power(off) / unseen_power if unseen is not None and unseen_power else None,
        "share": share,
        "damp": factor.damp,
        "tokens": known.tokens,
    }
    return solved, figures


def _error_of(solved: solver.SolvedLayer, target: Tensor, H: Tensor) -> float:
    return solver.output_power(solved.weight().neg_().add_(target), H)


def heldout_excess(results: list[LayerResult]) -> float:
    """How much larger the sum of the layers' errors is on windows held out than on those learned from."""
    both = [(r.error, r.heldout_error) for r in results if r.heldout_error is not None]
    return sum(held for _, held in both) / max(sum(error for error, _ in both), TINY) - 1 if both else 0.0


def original_weights(stop: nn.Module, block: Block, job: Job) -> dict[nn.Module, nn.Parameter | None]:
    """What the original model computes with where a forward stands, of what is quantized there."""
    names = {linear: name for name, linear in block.linears.items()}
    return {
        linear: nn.Parameter(job.stream.computed_with(linear, job.stream.weight(linear, names[linear])), False)
        for linear in stop.modules()
        if linear in names
    }


@contextmanager
def swapped(weights: Mapping[nn.Module, nn.Parameter | None]) -> Iterator[None]:
    """Inside, layers compute with these weights instead of their own."""
    own = {linear: linear._parameters["weight"] for linear, weight in weights.items() if weight is not None}
    try:
        for linear in own:
            linear._parameters["weight"] = weights[linear]
        yield
    finally:
        for linear, weight in own.items():
            linear._parameters["weight"] = weight
