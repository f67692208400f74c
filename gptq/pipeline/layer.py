"""Quantize one layer of a block: solve it together with its siblings, and replace its weight by the dequantized one.

A `SharedInput` is the calibration input of one or more layers, `BlockState` the progress of the block.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from gptq import solver
from gptq.compute.allocator import return_freed_memory
from gptq.compute.device_profile import profile_of
from gptq.compute.distributed import ALONE
from gptq.errors import InputError
from gptq.models.blocks import Block, group_fused_siblings
from gptq.output.results import Coverage, LayerResult, weight_histogram
from gptq.pipeline.layer_inputs import DriftForm, LayerInputs
from gptq.pipeline.row_tiles import LayerFigures, StackedRows, find_corrections, round_rows, solve_rows
from gptq.pipeline.run import LayerProgress, Run
from gptq.planning.layer_plan import drifts_by_output
from gptq.solver.error_propagation import input_drift, output_drift
from gptq.solver.solve import SMALLEST_POWER


@dataclass(frozen=True)
class Solution:
    """A solved layer: codes, error figures, and the histogram of its weights."""

    solved: solver.SolvedLayer
    figures: LayerFigures
    histogram: dict[str, Any] | None  # histogram of the original weights; None if another process packs the layer


class SharedInput:
    """The calibration input of one or more layers, kept until the last of them is solved.

    Holds immutable values and replaces them. A drift of outputs is that of one layer, whose correction replaces it.
    """

    def __init__(self, inputs: LayerInputs) -> None:
        self.inputs = inputs
        self.solved_siblings: dict[str, Solution] = {}  # solved together with an earlier layer, by name
        self._has_drift = True  # False once the gathered drift was used up

    def can_solve(self, name: str) -> bool:
        """Whether a layer with this input can be solved, or has been solved with a sibling."""
        return self._has_drift or name in self.solved_siblings

    def prepare_drift(self, rows: int) -> None:
        """Convert the drift to the form that is cheapest for correcting this many rows."""
        drift = self.inputs.drift
        if drift is not None:
            self.inputs = replace(self.inputs, drift=drift.for_rows(rows, self.inputs.factor))

    def take_drift(self) -> None:
        """Forget a drift of outputs; it has to be gathered again if another layer with this input is solved."""
        if self.inputs.drift is not None and self.inputs.drift.form is DriftForm.OUTPUTS:
            self.inputs, self._has_drift = replace(self.inputs, drift=None), False


@dataclass(frozen=True)
class Outcome:
    """What solving some layers yields beside their solutions."""

    results: list[LayerResult]
    notes: list[str]


class BlockState:
    """The state of a block while its layers are solved one after the other."""

    def __init__(self, block: Block, run: Run) -> None:
        self.block = block
        self.run = run
        self.solutions: dict[str, Solution] = {}  # by layer
        self.results: list[LayerResult] = []
        self.coverage: list[Coverage] = []
        self.notes: list[str] = []
        self.siblings = {name: names for names in group_fused_siblings(block.linears) for name in names}
        self._numbers = {name: number for number, name in enumerate(block.linears)}

    def alone(self) -> "BlockState":
        """Return a state for layers that this process solves without the others; see `join_outcomes`."""
        run = replace(self.run, ranks=ALONE, observer=LayerProgress(self.run.observer))
        own = BlockState(self.block, run)
        own.solutions = self.solutions
        return own

    def take_outcome(self) -> "Outcome":
        """Return results and notes since the last call."""
        found = Outcome(self.results, self.notes)
        self.results, self.notes = [], []
        return found

    def join_outcomes(self, own: Mapping[int, "Outcome"]) -> None:
        """Add the outcomes of all processes' pieces, in the order of their numbers; each passes those of its own."""
        texts = self.run.ranks.gather_texts(json.dumps([[number, asdict(found)] for number, found in own.items()]))
        for number, found in sorted((one for text in texts for one in json.loads(text)), key=itemgetter(0)):
            results = [LayerResult(**result) for result in found["results"]]
            self.results += results
            for note in found["notes"]:
                self.note(note)
            for result in results if number not in own else ():
                plan = self.run.layers[result.name]
                self.run.observer.layer_done(self.block.index, result.name, plan.outputs * plan.inputs)

    def packs(self, name: str) -> bool:
        """Whether this process packs a layer; the others that have solved it with this one do not."""
        return self.run.ranks.owns(self._numbers[name])

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.run.observer.note(text)

    def weight(self, name: str) -> Tensor:
        """Read the original weight of a layer, (outputs, inputs) float32."""
        return self.run.weights.weight(self.block.linears[name], name)


class LayerSolver(Protocol):
    """Handles a layer that all forwards have reached, and sets the weight with which the forwards continue.

    `shared` is None for a layer that no calibration input reaches.
    """

    def __call__(self, name: str, shared: SharedInput | None, state: BlockState) -> None: ...


def quantize_layer(name: str, shared: SharedInput | None, state: BlockState) -> None:
    """Solve a layer and give it its dequantized weight; a LayerSolver."""
    began = time.monotonic()
    run, plan = state.run, state.run.layers[name]
    solution = _solve(name, shared, state)
    state.solutions[name] = solution
    run.weights.set_weight(name, state.block.linears[name], solution.solved.weight())
    seconds = time.monotonic() - began
    figures = asdict(solution.figures)
    state.results.append(LayerResult(name=name, bits=plan.bits, group_size=plan.group_size, **figures, seconds=seconds))
    run.observer.layer_done(state.block.index, name, solution.solved.codes.numel())
    if run.returns_memory:
        return_freed_memory()


def _solve(name: str, shared: SharedInput | None, state: BlockState) -> Solution:
    """Return a layer's solution; a layer is solved together with its siblings, when the first of them is reached."""
    if shared is None:
        return _solve_together([name], None, state)[name]
    if name not in shared.solved_siblings:
        shared.solved_siblings |= _solve_together(_unsolved_siblings(name, state), shared, state)
    return shared.solved_siblings.pop(name)


def _unsolved_siblings(name: str, state: BlockState) -> list[str]:
    """Return a layer, and its unsolved siblings with the same scheme and number of inputs.

    Siblings are layers that engines fuse. In every known architecture, siblings with the same number of inputs have the
    same input. A sibling that turns out to have another input is solved again on that input.
    """
    layers = state.run.layers
    if layers[name].grid.joins_rows:
        return [name]
    together = state.siblings[name]
    own = layers[name]
    alike = {n for n in together if (layers[n].scheme, layers[n].inputs) == (own.scheme, own.inputs)}
    return [name] + [n for n in together if n != name and n not in state.solutions and n in alike]


class Arrival(NamedTuple):
    """What reaches a layer in one window, and the same in the original model; None for what the window does not have.

    `base` is what the layer's outputs are added to, if it is known.
    """

    x: Tensor | None
    original: Tensor | None
    base: Tensor | None = None
    original_base: Tensor | None = None


def drift_form(name: str, state: BlockState) -> DriftForm:
    """Return the form in which a layer's drift is summed."""
    fused = [state.run.layers[sibling] for sibling in state.siblings[name]]
    return DriftForm.OUTPUTS if drifts_by_output(fused) else DriftForm.INPUTS


def find_drifts(
    name: str, arrivals: Iterable[Arrival], form: DriftForm, state: BlockState
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Yield for each window the layer's input, and its drift in the given form."""
    run = state.run
    compare = profile_of(run.weights.device).compares_windows
    of_outputs = run.config.streams > 1 and form is DriftForm.OUTPUTS
    W = state.weight(name).to(run.weights.dtype_of(f"{name}.weight")) if of_outputs else None  # (outputs, inputs)
    for arrival in arrivals:
        yield arrival.x, _drift_of(arrival, W, compare)
        del arrival  # free it before the inputs of the next window are computed


def _drift_of(arrival: Arrival, W: Tensor | None, compare: bool) -> Tensor | None:
    if arrival.x is None:
        return None
    drift = input_drift(arrival.x, arrival.original, compare)
    if W is None:
        return drift
    base = arrival.base
    return output_drift(W, drift, None if base is None else input_drift(base, arrival.original_base, compare))


def _solve_together(names: list[str], shared: SharedInput | None, state: BlockState) -> dict[str, Solution]:
    """Solve layers that share an input and a scheme as one matrix.

    Raises:
        InputError: a layer's scales do not fit the dtype in which they are stored; the message names the layer.
    """
    run = state.run
    rows = StackedRows.of(map(state.weight, names), sum(run.layers[name].outputs for name in names), run.ranks)
    weights = [rows.W[layer] for layer in rows.layers]  # (outputs, inputs) float32 each
    grid = grid_of(names, weights, state)
    try:
        if shared is None:
            found = [round_rows(W, run.layers[name], grid) for name, W in zip(names, weights, strict=True)]
        else:
            found = _solve_with_input(shared, rows, names, grid, state)
    except ValueError as problem:
        if len(names) > 1 and run.ranks.size == 1:  # so that the error names the layer that fails
            return _solve_together(names[:1], shared, state)
        raise InputError(
            f"{names[0]}: {problem}; its largest weight is {float(weights[0].abs().max()):.3g}"
        ) from problem
    return {
        name: Solution(solved, figures, weight_histogram(W) if state.packs(name) else None)
        for name, W, (solved, figures) in zip(names, weights, found, strict=True)
    }


def grid_of(names: list[str], weights: list[Tensor], state: BlockState) -> solver.Grid:
    """The grid of layers with one scheme, for which a grid may look at the weights of all layers fused with them.

    Args:
        weights: of the layers, (outputs, inputs) float32 each.
    """
    together = state.siblings[names[0]]
    known = dict(zip(names, weights, strict=True))
    every = (known[name] if name in known else state.weight(name) for name in together)
    return state.run.layers[names[0]].grid.for_layers(every)


def _solve_with_input(
    shared: SharedInput, rows: StackedRows, names: list[str], grid: solver.Grid, state: BlockState
) -> list[tuple[solver.SolvedLayer, LayerFigures]]:
    run, plan = state.run, state.run.layers[names[0]]
    shared.prepare_drift(len(rows.W))
    corrections = find_corrections(rows, shared.inputs, run.config, run.ranks)
    shared.take_drift()
    return solve_rows(rows, corrections, plan, grid, shared.inputs, run.config, run.ranks)


def read_original_weights(stop: nn.Module, state: BlockState) -> dict[nn.Module, nn.Parameter | None]:
    """Read the original weights of the quantized layers inside the module `stop`, in the forward's dtype."""
    weights, names = state.run.weights, {linear: name for name, linear in state.block.linears.items()}
    return {linear: weights.original_parameter(names[linear]) for linear in stop.modules() if linear in names}


def held_out_excess(results: Iterable[LayerResult]) -> float:
    """Return by which fraction the layers' summed error on held-out windows exceeds that on the other windows.

    Only layers with a held-out error count; 0 if there is none.
    """
    both = [(r.error, r.heldout_error) for r in results if r.heldout_error is not None]
    return sum(held for _, held in both) / max(sum(error for error, _ in both), SMALLEST_POWER) - 1 if both else 0.0
