"""One layer of a block: solved together with its siblings, and swapped for the weight that its codes stand for.

A `Station` is the input at which all forwards stand, `BlockState` what is known of the block so far.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from gptq import solver
from gptq.compute.allocator import return_freed_memory
from gptq.errors import InputError
from gptq.models.blocks import Block, group_fused_siblings
from gptq.output.results import Coverage, LayerResult, weight_histogram
from gptq.pipeline.layer_inputs import LayerInputs
from gptq.pipeline.row_tiles import LayerFigures, Rows, find_corrections, round_rows, solve_rows
from gptq.pipeline.run import Run
from gptq.solver.solve import SMALLEST_POWER


@dataclass(frozen=True)
class Solution:
    """What is known of a layer once its codes are chosen."""

    solved: solver.SolvedLayer
    figures: LayerFigures
    histogram: dict[str, Any]  # of the weights


class Station:
    """Where forwards stand: the inputs that they bring to a layer, for as long as layers are solved on these.

    Holds immutable values and replaces them. A C that is larger than a layer is freed before that layer is solved.
    """

    def __init__(self, inputs: LayerInputs) -> None:
        self.inputs = inputs
        self.solved_ahead: dict[str, Solution] = {}  # siblings of a layer that was solved, by name
        self._has_drift = True  # whether `inputs` still holds all that was gathered

    def serves(self, name: str) -> bool:
        """Whether a layer that gets this input can be solved, or was."""
        return self._has_drift or name in self.solved_ahead

    def prepare_drift(self, rows: int) -> None:
        """Bring the drift into the form in which correcting this many rows costs least."""
        drift = self.inputs.drift
        if drift is not None:
            self.inputs = replace(self.inputs, drift=drift.for_rows(rows, self.inputs.factor))

    def release_drift(self) -> None:
        """Free the drift; for a further layer on this input it has to be gathered again."""
        self.inputs, self._has_drift = replace(self.inputs, drift=None), False


class BlockState:
    """A block while its layers are solved, in the order in which its forward reaches them."""

    def __init__(self, block: Block, run: Run) -> None:
        self.block = block
        self.run = run
        self.solutions: dict[str, Solution] = {}  # of layers that the forward has passed
        self.results: list[LayerResult] = []
        self.coverage: list[Coverage] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.run.observer.note(text)

    def weight(self, name: str) -> Tensor:
        """The stored weight of a layer, (outputs, inputs) float32."""
        return self.run.weights.weight(self.block.linears[name], name)


class LayerSolver(Protocol):
    """What is done with a layer when all forwards stand at it; a layer that none reaches has no station."""

    def __call__(self, name: str, station: Station | None, state: BlockState) -> None: ...


def quantize_layer(name: str, station: Station | None, state: BlockState) -> None:
    """Solve a layer and let the forward go on with the weight that its codes stand for."""
    began = time.monotonic()
    run, plan = state.run, state.run.layers[name]
    solution = _solution(name, station, state)
    state.solutions[name] = solution
    run.weights.set_weight(state.block.linears[name], solution.solved.weight())
    seconds = time.monotonic() - began
    figures = asdict(solution.figures)
    state.results.append(LayerResult(name=name, bits=plan.bits, group_size=plan.group_size, **figures, seconds=seconds))
    run.observer.layer_done(state.block.index, name, solution.solved.codes.numel())
    if run.returns_memory:
        return_freed_memory()


def _solution(name: str, station: Station | None, state: BlockState) -> Solution:
    if station is None:
        return _solve_together([name], None, state)[name]
    if name not in station.solved_ahead:
        station.solved_ahead |= _solve_together(_siblings(name, state), station, state)
    return station.solved_ahead.pop(name)


def _siblings(name: str, state: BlockState) -> list[str]:
    """A layer, and the unsolved layers that engines fuse with it and that have its scheme and number of inputs.

    They get the same input in every known architecture, unless their widths differ, as RWKV's key and value do. A
    sibling that gets another input is solved once more on that.
    """
    layers = state.run.layers
    together = next(names for names in group_fused_siblings(state.block.linears) if name in names)
    own = layers[name]
    alike = {n for n in together if (layers[n].scheme, layers[n].inputs) == (own.scheme, own.inputs)}
    return [name] + [n for n in together if n != name and n not in state.solutions and n in alike]


def _is_last_on_input(name: str, state: BlockState) -> bool:
    """Whether a layer has more inputs than outputs, and all layers that engines fuse with it are solved.

    Then C is larger than the layer. It is freed before the solve, and gathered again if another layer needs it.
    """
    together = next(names for names in group_fused_siblings(state.block.linears) if name in names)
    alone = all(sibling == name or sibling in state.solutions for sibling in together)
    plan = state.run.layers[name]
    return alone and plan.inputs > plan.outputs


def _solve_together(names: list[str], station: Station | None, state: BlockState) -> dict[str, Solution]:
    """Solve layers with one input and one scheme as one matrix.

    Raises:
        InputError: a layer's scales do not fit their stored dtype; names it.
    """
    run = state.run
    weights = [state.weight(name) for name in names]  # (outputs, inputs) float32 each
    try:
        if station is None:
            found = [round_rows(W, run.layers[name]) for name, W in zip(names, weights, strict=True)]
        else:
            found = _solve_at(station, weights, names, state)
    except ValueError as problem:
        if len(names) > 1 and run.ranks.size == 1:  # find out which
            return _solve_together(names[:1], station, state)
        raise InputError(
            f"{names[0]}: {problem}; its largest weight is {float(weights[0].abs().max()):.3g}"
        ) from problem
    return {
        name: Solution(solved, figures, weight_histogram(W))
        for name, W, (solved, figures) in zip(names, weights, found, strict=True)
    }


def _solve_at(
    station: Station, weights: list[Tensor], names: list[str], state: BlockState
) -> list[tuple[solver.SolvedLayer, LayerFigures]]:
    run, plan = state.run, state.run.layers[names[0]]
    rows = Rows.of(weights)
    station.prepare_drift(len(rows.W))
    corrections = find_corrections(rows, station.inputs, run.config, run.ranks)
    if len(names) == 1 and _is_last_on_input(names[0], state):
        station.release_drift()
    return solve_rows(rows, corrections, plan, station.inputs, run.config, run.ranks)


def original_weights(stop: nn.Module, state: BlockState) -> dict[nn.Module, nn.Parameter | None]:
    """What the original model computes with at the module where a forward stands, for its quantized layers."""
    weights, names = state.run.weights, {linear: name for name, linear in state.block.linears.items()}
    return {
        linear: nn.Parameter(weights.to_forward_layout(linear, state.weight(names[linear])), False)
        for linear in stop.modules()
        if linear in names
    }


def heldout_excess(results: Iterable[LayerResult]) -> float:
    """How much larger the sum of the layers' errors is on windows held out than on those learned from."""
    both = [(r.error, r.heldout_error) for r in results if r.heldout_error is not None]
    return sum(held for _, held in both) / max(sum(error for error, _ in both), SMALLEST_POWER) - 1 if both else 0.0
