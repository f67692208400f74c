"""One linear layer: what its inputs tell, and its codes; and what a run carries along from layer to layer."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gptq import solver
from gptq.checkpoint.reader import ShardWriter
from gptq.compute.allocator import return_freed_memory
from gptq.compute.distributed import Ranks
from gptq.compute.matmul import product
from gptq.config import QuantConfig
from gptq.errors import InputError
from gptq.models.blocks import Block, fused_siblings
from gptq.models.experts import blend, pseudo_tokens
from gptq.models.weights import WeightStream
from gptq.output.record import BlockError, Coverage, LayerResult, weight_histogram
from gptq.pipeline.journal import Journal
from gptq.pipeline.offload import Shelf
from gptq.planning.plan import LayerPlan
from gptq.solver.coordinate_descent import refine
from gptq.solver.error_propagation import best_share, divide, full_correction
from gptq.solver.hessian import ALONE, HeldOut, HessianAccumulator, output_power

HELD_OUT = 8  # one calibration window in so many measures what the solver learned from the others
ROWS = 2048  # of one or several weights that are solved at a time: bounds the memory, and what a unit of work is
SAMPLE = 256  # about so many rows of a layer compare its error with other errors
FULL_SHARE = 0.5  # of the drift that is made up for, where too few windows leave none to find it by (QEP's choice)
EXACT = 1e-10  # a relative error that is mere rounding
TINY = 1e-30  # instead of a layer's output power where that is zero


class Observer:
    """Is told how a run goes on; does nothing by itself."""

    def started(self, num_blocks: int, weights: int) -> None: ...

    def going_on(self, blocks: int, weights: int) -> None:
        """So much was done by an earlier run; comes after `started`."""

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
    tuned: dict[str, Tensor] = field(default_factory=dict)  # of the block at hand, not packed, by name in the model
    block_errors: list[BlockError] = field(default_factory=list)
    finish: Callable[..., None] = field(default_factory=lambda: finish_layer)  # what is done with a layer it stands at
    spreads: dict[str, dict[str, Any]] = field(default_factory=dict)  # histograms of weights and codes
    coverage: list[Coverage] = field(default_factory=list)
    shelf: Shelf = field(default_factory=Shelf)  # for activations between blocks
    ranks: Ranks = field(default_factory=Ranks)
    frugal: bool = True  # whether memory is short, so that what is freed goes back to the system
    journal: Journal | None = None
    notes_kept: int = 0  # of `notes`, in the journal

    @property
    def keeps_weights(self) -> bool:
        """Whether a solved block is run again, so that its layers' weights have to stay."""
        return self.writer is None or bool(self.config.tune_steps)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.observer.note(text)


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


Sums = tuple[HessianAccumulator, HeldOut]  # over windows to learn from, and over those held out


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
    ahead = {} if known is None else known.ahead
    if name not in ahead:
        ahead |= _solve_together(_siblings(name, block, job) if known else [name], block, known, job)
    found = ahead.pop(name)
    job.solved[name], job.spreads[name] = found.solved, found.spread
    job.stream.set_weight(linear, found.solved.weight())
    result = LayerResult(
        name=name, bits=plan.bits, group_size=plan.group_size, **found.figures, seconds=time.monotonic() - began
    )
    job.results.append(result)
    job.observer.layer_done(index, name, found.solved.codes.numel())
    if job.frugal:
        return_freed_memory()


def _siblings(name: str, block: Block, job: Job) -> list[str]:
    """A layer and those that engines fuse with it, which so have its options, as far as none of them is solved.

    They get the same input in every architecture that is known, unless it is of another width, as RWKV's key and value
    do. Where one of the same width does not, it is not found in `ahead` of what is known of its own input, and is
    solved for that.
    """
    together = next(names for names in fused_siblings(block.linears) if name in names)
    own = job.plans[name]
    alike = {n for n in together if (job.plans[n].scheme, job.plans[n].inputs) == (own.scheme, own.inputs)}
    return [name] + [n for n in together if n != name and n not in job.solved and n in alike]


def _last_on_input(name: str, block: Block, job: Job) -> str | None:
    """The layer, if it has more inputs than outputs and all that engines fuse with it are solved.

    Then C is larger than the layer, and nobody is expected to need it; who does makes it once more.
    """
    together = next(names for names in fused_siblings(block.linears) if name in names)
    alone = all(sibling == name or sibling in job.solved for sibling in together)
    return name if alone and job.plans[name].inputs > job.plans[name].outputs else None


def _solve_together(names: list[str], block: Block, known: LayerInputs | None, job: Job) -> dict[str, Solution]:
    """Layers with one input and one way of storing: their rows are those of one matrix, which is solved once."""
    weights = [job.stream.weight(block.linears[name], name) for name in names]  # (outputs, inputs) float32 each
    plan = job.plans[names[0]]
    try:
        if known is None:
            solved = [_round(W, plan) for W in weights]
        else:
            last = names == [_last_on_input(names[0], block, job)]
            solved = solve_rows(weights, plan, known, job.config, last, job.ranks)
    except ValueError as problem:
        if len(names) > 1 and job.ranks.size == 1:  # find out which
            return _solve_together(names[:1], block, known, job)
        raise InputError(
            f"{names[0]}: {problem}; its largest weight is {float(weights[0].abs().max()):.3g}"
        ) from problem
    return {
        name: Solution(one, figures, weight_histogram(W))
        for name, W, (one, figures) in zip(names, weights, solved, strict=True)
    }


def _round(W: Tensor, plan: LayerPlan) -> tuple[solver.SolvedLayer, dict[str, Any]]:
    """The nearest codes of W (outputs, inputs), of whose input nothing is known."""
    nearest = solver.round_to_nearest(W, plan.bits, plan.group_size, plan.sym)
    error = nearest.error / max(float(W.double().square().sum()), TINY)
    none = {"heldout_error": None, "share": None, "damp": None, "tokens": 0}
    return nearest, {"error": error, "rtn_error": error, **none}


def solve_rows(
    weights: list[Tensor], plan: LayerPlan, known: LayerInputs, config: QuantConfig, last: bool = False,
    ranks: Ranks = ALONE,
) -> list[tuple[solver.SolvedLayer, dict[str, Any]]]:  # fmt: skip
    """Codes of the weights (outputs, inputs) of layers with one input, and the figures of their LayerResults.

    What is known of the drift is forgotten once the `last` layer has its correction.

    Rows do not know of each other, so they are taken ROWS at a time, whichever layers they belong to, by `ranks` in
    turns.
    """
    W = torch.cat(weights) if len(weights) > 1 else weights[0]  # (rows, inputs)
    tiles = [slice(start, min(start + ROWS, len(W))) for start in range(0, len(W), ROWS)]
    bounds = [0, *accumulate(len(one) for one in weights)]
    of_layers = [slice(start, stop) for start, stop in pairwise(bounds)]
    own_tiles = {n: tile for n, tile in enumerate(tiles) if ranks.owns(n)}
    undrifted = 0.0 if config.two_streams else None
    corrections, shares = _corrections(W, own_tiles, of_layers, known, ranks, undrifted)
    if last:
        known.drift, known.spent = None, True
    shared = torch.cat([one.new_full((len(one), 1), share or 0.0) for one, share in zip(weights, shares, strict=True)])
    parts: dict[int, solver.SolvedLayer] = {}
    measured: dict[int, Tensor] = {}
    for number, rows in own_tiles.items():
        target = W[rows] + shared[rows] * corrections.pop(number) if corrections else W[rows]
        own_rows = [(_common(rows, layer), _sample(rows, layer)) for layer in of_layers]
        parts[number], measured[number] = _solve_tile(W[rows], target, own_rows, plan, known, config)
    solved = _stacked(parts, len(tiles), ranks)
    figures = torch.stack(ranks.exchange(measured, len(tiles))).sum(0)  # (layers, figures)
    found = []
    for rows, share, sums in zip(of_layers, shares, figures.tolist(), strict=True):
        own = {"share": share, "damp": known.factor.damp, "tokens": known.tokens}
        found.append((solved.take(rows), _errors(*sums) | own))
    return found


def _errors(
    error: float, power: float, some_error: float, some_power: float, some_nearest: float, *held_out: float
) -> dict[str, float | None]:
    """The errors of a LayerResult from what `_solve_tile` has found.

    A sample of rows tells how much larger or smaller than the error of the solve other errors are. Taken by themselves
    they would be those of other rows: few rows can have most of a layer's power.
    """
    relative, of_some = error / max(power, TINY), some_error / max(some_power, TINY)
    scaled = relative / of_some if min(relative, of_some) > EXACT else 1.0
    return {
        "error": relative,
        "rtn_error": scaled * some_nearest / max(some_power, TINY),
        "heldout_error": scaled * held_out[0] / max(held_out[1], TINY) if held_out else None,
    }


def _common(tile: slice, layer: slice) -> slice:
    """The rows of a tile that belong to a layer, counted from where the tile begins; perhaps none."""
    start, stop = max(tile.start, layer.start), min(tile.stop, layer.stop)
    return slice(start - tile.start, max(stop, start) - tile.start)


def _sample(tile: slice, layer: slice) -> slice:
    """Of these some, as far apart in all tiles; by an odd number, as rows of attention repeat by powers of two."""
    rows, step = _common(tile, layer), (layer.stop - layer.start) // SAMPLE | 1
    skipped = (layer.start - tile.start - rows.start) % step  # from the layer's first row on, every step-th
    return slice(min(rows.start + skipped, rows.stop), rows.stop, step)


def _solve_tile(
    W: Tensor,
    target: Tensor,
    layers: list[tuple[slice, slice]],
    plan: LayerPlan,
    known: LayerInputs,
    config: QuantConfig,
) -> tuple[solver.SolvedLayer, Tensor]:
    """Codes for some rows of W (rows, inputs), and (layers, figures) float64 what `_errors` wants summed over tiles.

    Args:
        layers: which of the rows belong to each, and which of these are in its sample.
    """
    factor, unseen = known.factor, known.unseen
    solved = solver.solve(
        target, factor, plan.bits, plan.group_size, plan.sym, config.static_groups, bool(config.search)
    )
    if config.sweeps:
        solved = refine(target, solved, factor, plan.bits, config.sweeps)
    off = target - solved.weight()
    undamped = (solved.row_errors - factor.ridge * off.square().sum(1, dtype=torch.float64)).clamp(min=0)
    figures = torch.zeros(len(layers), 5 if unseen is None else 7, dtype=torch.float64, device=W.device)
    for own, (rows, sample) in zip(figures, layers, strict=True):
        if len(W[rows]):
            own[0], own[1] = undamped[rows].sum(), output_power(W[rows], factor.H)
        some = W[sample].contiguous()  # (sampled rows, inputs)
        if not len(some):
            continue
        own[2] = undamped[sample].sum()
        own[3] = own[1] if len(some) == len(W[rows]) else output_power(some, factor.H)
        nearest = solver.round_to_nearest(some, plan.bits, plan.group_size, plan.sym).weight()
        own[4] = output_power(target[sample] - nearest, factor.H)
        if unseen is not None:
            own[5], own[6] = unseen.power(off[sample].contiguous()), unseen.power(some)
    return solved, figures


def _stacked(parts: dict[int, solver.SolvedLayer], count: int, ranks: Ranks) -> solver.SolvedLayer:
    """All rows, one tile below the other, wherever they were solved."""
    names = [one.name for one in fields(solver.SolvedLayer)]
    columns = [ranks.exchange({n: getattr(part, name) for n, part in parts.items()}, count) for name in names]
    return solver.SolvedLayer.stack([solver.SolvedLayer(*tile) for tile in zip(*columns, strict=True)])


def _corrections(
    W: Tensor, own: dict[int, slice], layers: list[slice], known: LayerInputs, ranks: Ranks, none: float | None
) -> tuple[dict[int, Tensor], list[float | None]]:
    """What would make up for the drift in this process's `own` tiles of W (rows, inputs), by number.

    And how much of it each of the `layers` is to take, which is `none` where nothing has drifted.
    """
    if known.drift is None:
        return {}, [none] * len(layers)
    if len(W) > len(known.drift) and not known.divided:
        known.drift, known.divided = divide(known.drift, known.factor), True
    corrections: dict[int, Tensor] = {}
    gains: dict[int, Tensor] = {}
    for number, rows in own.items():
        if known.divided:
            corrections[number] = product(W[rows], known.drift)
        else:
            corrections[number] = full_correction(W[rows], known.drift, known.factor)
        if known.unseen is not None:
            found = [_gain(W[rows], corrections[number], _common(rows, layer), known.unseen) for layer in layers]
            if None not in found:
                gains[number] = torch.tensor(found, dtype=torch.float64, device=W.device)  # (layers, 2)
    everywhere = ranks.exchange(gains, -(-len(W) // ROWS))
    if not everywhere:
        return corrections, [FULL_SHARE] * len(layers)
    return corrections, [best_share(*gain) for gain in torch.stack(everywhere).sum(0).tolist()]


def _gain(W: Tensor, correction: Tensor, rows: slice, unseen: Unseen) -> tuple[float, float] | None:
    """What `best_share` wants to know of some rows; None where the original inputs are not known."""
    if not len(W[rows]):
        return 0.0, 0.0
    agreement = unseen.agreement(W[rows], correction[rows])
    return None if agreement is None else (unseen.power(correction[rows]), agreement)


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
