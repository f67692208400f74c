"""Run calibration windows through a block and solve it layer by layer, each on the outputs of quantized layers."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from gptq.models.blocks import Block
from gptq.models.experts import Experts
from gptq.models.forward import (
    PausableForward,
    Pause,
    argument_at,
    get_argument,
    identify,
    input_at,
    keep_arguments,
    pause_before,
    pause_instead,
    run_to_end,
    run_until,
)
from gptq.models.placeholders import UnsolvedWeight
from gptq.models.weights import WeightStream, swapped_weights
from gptq.pipeline.block_walk import Calls, Outputs
from gptq.pipeline.divided_experts import gather_calls, run_divided
from gptq.pipeline.layer import (
    Arrival,
    BlockState,
    LayerSolver,
    SharedInput,
    drift_form,
    find_drifts,
    read_original_weights,
)
from gptq.pipeline.layer_inputs import gather_inputs, inputs_from_sums, note_on_damping
from gptq.pipeline.moe import gather_routings, routing_of, solve_experts
from gptq.pipeline.run import Run
from gptq.planning.layer_plan import passes_at_once
from gptq.planning.memory import FOLLOWERS


def solve_block(calls: Calls, in_flight: int, state: BlockState, solve_layer: LayerSolver) -> Outputs:
    """Solve a block's layers, or the output head; return the block's outputs, or [] for the head."""
    if state.block.is_head():
        solve_head(calls, state, solve_layer)
        return []
    return walk_block(calls, in_flight, state, solve_layer)


def solve_head(calls: Calls, state: BlockState, solve_layer: LayerSolver) -> None:
    """Solve the output head without running it: nothing uses its output."""
    name = next(iter(state.block.linears))
    arguments = [[get_argument(call.args, call.keywords) for call in stream] for stream in calls]
    pairs = zip(arguments[0], arguments[1] if len(arguments) > 1 else [None] * len(arguments[0]), strict=True)
    arrivals = (Arrival(x, original) for x, original in pairs)
    solve_layer(name, _gather_shared_input(name, arrivals, len(arguments[0]), state), state)


def _gather_shared_input(name: str, arrivals: Iterable[Arrival], windows: int, state: BlockState) -> SharedInput:
    """Sum a layer's inputs over all windows, and factorize their Hessian; see `gather_inputs`."""
    form = drift_form(name, state)
    sums = gather_inputs(name, find_drifts(name, arrivals, form, state), windows, state.run)
    inputs = inputs_from_sums(name, sums, None, form, state.run)
    for note in note_on_damping(name, inputs, state.run):
        state.note(note)
    return SharedInput(inputs)


def walk_block(calls: Calls, in_flight: int, state: BlockState, solve_layer: LayerSolver) -> Outputs:
    """Solve a block's layers in the order in which its forward reaches them; return its output for every window.

    The first `in_flight` windows run once, and pause before each layer until it is solved. The other windows run again
    for each distinct layer input, and once more at the end.
    """
    block, run = state.block, state.run
    walk = _LayerWalk(calls, in_flight, state, solve_layer)
    free_weights(block.module, block, run.weights)
    try:
        points = block.pause_points()
        divided = [point for point in points if run.divides_experts and isinstance(point, Experts)]
        with (
            keep_arguments(walk.bases.values()),
            pause_before(point for point in points if point not in divided),
            pause_instead(divided),
        ):
            walk.solve_layers()
            for name, linear in block.linears.items():
                if linear not in walk.solved:
                    state.note(f"{name}: no calibration token reached it, so it is rounded to nearest")
                    solve_layer(name, None, state)
            return walk.outputs()
    finally:
        walk.stop()


def run_original(block: Block, calls: list[partial[Any]], run: Run) -> Outputs:
    """Return the outputs of a block with its original weights for one stream, or [] for the output head."""
    if block.is_head():
        return []
    set_original_weights(block, run.weights)
    return [[run.offload.put(run_to_end(call)) for call in calls]]


def set_original_weights(block: Block, weights: WeightStream) -> None:
    """Read the weights of a block's layers from the checkpoint."""
    for name, linear in block.linears.items():
        linear.weight = weights.original_parameter(name)


def free_weights(stop: nn.Module, block: Block, weights: WeightStream) -> None:
    """Replace the weights of a block's layers inside the module `stop` by placeholders (see `UnsolvedWeight`)."""
    inside = set(stop.modules())
    for name, linear in block.linears.items():
        if linear in inside:
            linear._parameters["weight"] = weights.unsolved(name, linear)


class _LayerWalk:
    """The forwards of a block's windows, advanced from layer to layer.

    Forwards in flight stay paused; the other windows are run up to a layer each time its inputs are gathered. Layers
    that get the very same tensors (queries, keys and values, say) share one Hessian and its factor. In the original
    stream FOLLOWERS windows follow together when their inputs are gathered, and go on at once where
    `passes_at_once` holds of the layer: so few windows at a time have wide inputs there.
    """

    def __init__(self, calls: Calls, in_flight: int, state: BlockState, solve_layer: LayerSolver) -> None:
        self.solved: set[nn.Module] = set()
        self._state = state
        self._solve_layer = solve_layer
        self._in_flight = [[PausableForward(call) for call in stream[:in_flight]] for stream in calls]
        self._waiting = [stream[in_flight:] for stream in calls]
        self._names = state.block.pause_points()
        self._order = {stop: i for i, stop in enumerate(self._names)}
        self._passed: set[nn.Module] = set()  # by the quantized stream
        self.bases = _find_bases(state) if len(calls) > 1 else {}
        # Outputs of experts that are divided over processes, by stream and window, for waiting windows that run again.
        self._answers: list[list[dict[nn.Module, Any]]] = [[{} for _ in stream] for stream in self._waiting]
        # Original weights, by what a forward pauses at; kept for waiting windows, which run again.
        self._originals: dict[nn.Module, dict[nn.Module, nn.Parameter | None]] = {}
        self._shared: SharedInput | None = None
        self._shared_keys: dict[int, object] = {}  # keys (see `identify`) of the inputs of `_shared`

    def solve_layers(self) -> None:
        """Advance all forwards to the end of the block, solving each layer; all processes solve a layer together."""
        modules = [*self._names]
        for forward in chain(*self._in_flight):
            forward.advance()
        while True:
            standing = (self._order[f.standing.module] for f in self._in_flight[0] if f.standing)
            at = self._state.run.ranks.minimum(min(standing, default=len(modules)))
            if at == len(modules):
                return
            self._solve_and_resume(modules[at])

    def _solve_and_resume(self, stop: nn.Module) -> None:
        """Solve a layer, or list of experts, if a window has reached it; then resume the quantized stream."""
        state, run = self._state, self._state.run
        standing = self._input_keys(stop)
        if isinstance(stop, Experts) and run.divides_experts:
            self._run_divided(stop)
        else:
            if stop not in self.solved and run.ranks.any(bool(standing)):
                if isinstance(stop, Experts):
                    self._solve_experts(stop)
                else:
                    self._solve(stop, standing)
                self.solved.update(stop.modules())
            self._restore_weights(stop)
            for i in standing:
                self._pass(self._in_flight[0][i])
            if not any(self._waiting) and not run.reruns_blocks:
                free_weights(stop, state.block, run.weights)
            self._keep_originals(stop)
        self._passed.add(stop)

    def _solve_experts(self, experts: Experts) -> None:
        state = self._state
        routings = (routing_of(experts, *pauses) for pauses in self._pauses_of_windows(experts))
        gathered = gather_routings(routings, self._num_windows(), state.run)
        solve_experts(self._names[experts], experts, gathered, state, self._solve_layer)

    def _run_divided(self, experts: Experts) -> None:
        """Solve and run experts that are divided over processes; then resume the forwards with their outputs."""
        state, offload = self._state, self._state.run.offload
        calls = gather_calls(experts, self._pauses_of_windows(experts), self._num_windows(), state)
        standing = [_pauses_at(experts, forwards) for forwards in self._in_flight]
        solves = experts not in self.solved and any(call is not None for call in calls[0])
        solver = self._solve_layer if solves else None
        outputs = run_divided(self._names[experts], experts, calls, state, solver)
        if solves:
            self.solved.update(experts.modules())
        in_flight = len(self._in_flight[0])
        for i, both in enumerate(outputs):
            for stream, output in enumerate(both[: len(self._in_flight)]):
                if i >= in_flight:
                    self._answers[stream][i - in_flight][experts] = offload.put(output)
                elif i in standing[stream]:
                    self._in_flight[stream][i].advance(output)

    def _solve(self, linear: nn.Module, standing: dict[int, object]) -> None:
        state, run, name = self._state, self._state.run, self._names[linear]
        incomplete = self._shared is not None and not self._shared.can_solve(name)
        if incomplete or run.ranks.any(standing != self._shared_keys):
            self._shared = None  # free the old inputs first
            base = self.bases.get(linear)
            arrivals = (_arrival_at(*pauses, base) for pauses in self._pauses_of_windows(linear))
            self._shared = _gather_shared_input(name, arrivals, self._num_windows(), state)
            for forwards in self._in_flight:  # these inputs are not needed while the layer is solved
                run.offload.put([argument_at(pause) for pause in _pauses_at(linear, forwards).values()])
            self._shared_keys = self._input_keys(linear)
        run.offload.release()
        self._solve_layer(name, self._shared, state)

    def _num_windows(self) -> int:
        return len(self._in_flight[0]) + len(self._waiting[0])

    def _restore_weights(self, stop: nn.Module) -> None:
        """Restore weights freed by `free_weights`, for a forward that reaches a solved layer a second time."""
        inside = set(stop.modules())
        for name, linear in self._state.block.linears.items():
            if name in self._state.solutions and linear in inside and isinstance(linear.weight, UnsolvedWeight):
                self._state.run.weights.set_weight(name, linear, self._state.solutions[name].solved.weight())

    def _pass(self, forward: PausableForward) -> None:
        """Resume a forward that is paused; what its layer's outputs are added to is not needed any more."""
        if forward.standing and forward.standing.module in self.bases:
            forward.standing.kept.pop(self.bases[forward.standing.module], None)
        forward.advance()

    def _pass_original(self, forward: PausableForward) -> None:
        """Resume a forward of the original stream, with the original weights of what it is paused at."""
        if forward.standing:
            stop = forward.standing.module
            if stop not in self._originals:
                self._originals[stop] = read_original_weights(stop, self._state)
            with swapped_weights(self._originals[stop]):
                self._pass(forward)

    def _follow(self, forwards: list[PausableForward], stop: nn.Module | None) -> None:
        """Resume forwards of the original stream, layer by layer, until none is before `stop`; or to their end."""
        while behind := [
            f.standing.module for f in forwards if f.standing and self._is_before(f.standing.module, stop)
        ]:
            first = min(behind, key=self._order.__getitem__)
            for forward in forwards:
                if forward.standing and forward.standing.module is first:
                    self._pass_original(forward)

    def _is_before(self, at: nn.Module, stop: nn.Module | None) -> bool:
        return stop is None or (at is not stop and (at in self._passed or self._order[at] < self._order[stop]))

    def _keep_originals(self, stop: nn.Module) -> None:
        """Keep original weights for waiting windows, which run again; otherwise free those that followers needed."""
        if not any(self._waiting):
            self._originals.clear()
        elif len(self._in_flight) > 1 and stop not in self._originals:
            self._originals[stop] = read_original_weights(stop, self._state)

    def _input_keys(self, linear: nn.Module) -> dict[int, object]:
        """Return, by window, the key of the input (see `identify`) of each forward paused at `linear`."""
        return {i: identify(argument_at(pause)) for i, pause in _pauses_at(linear, self._in_flight[0]).items()}

    def _pauses_of_windows(self, linear: nn.Module) -> Iterator[tuple[Pause | None, Pause | None]]:
        """Yield for each window its pause at `linear` in the quantized stream, and the one in the original stream.

        A pause is None if the window does not reach `linear` in that stream. Windows in flight come first; then the
        waiting windows, which are run up to `linear` now.
        """
        name = self._names[linear]
        at_once = passes_at_once([self._state.run.layers[own] for own in self._state.siblings.get(name, ())])
        originals = self._in_flight[1] if len(self._in_flight) > 1 else []
        for i, forward in enumerate(self._in_flight[0]):
            if i % FOLLOWERS == 0:
                self._follow(originals[i : i + FOLLOWERS], linear)
            yield _pause_at(linear, forward), _pause_at(linear, originals[i]) if originals else None
            if at_once and originals and _pause_at(linear, originals[i]):
                self._pass_original(originals[i])
        for i, call in enumerate(self._waiting[0]):
            pause, original = run_until(call, linear, self._answers[0][i]), None
            if originals:
                with swapped_weights(self._all_originals()):
                    original = run_until(self._waiting[1][i], linear, self._answers[1][i])
            yield pause, original

    def _all_originals(self) -> dict[nn.Module, nn.Parameter | None]:
        return {linear: weight for own in self._originals.values() for linear, weight in own.items()}

    def outputs(self) -> Outputs:
        """Return the block's outputs once all layers are solved."""
        offload = self._state.run.offload
        self._follow([*chain(*self._in_flight[1:])], None)
        outputs = [[offload.put(forward.result) for forward in forwards] for forwards in self._in_flight]
        with ExitStack() as stack:
            for out, calls, answers in zip(outputs, self._waiting, self._answers, strict=True):
                out += [offload.put(run_to_end(*one)) for one in zip(calls, answers, strict=True)]
                stack.enter_context(swapped_weights(self._all_originals()))  # for the second stream
        return outputs

    def stop(self) -> None:
        for forward in chain(*self._in_flight):
            forward.stop()


def _find_bases(state: BlockState) -> dict[nn.Module, nn.Module]:
    """Return, by layer, the module whose first argument the layer's outputs are added to, where it is known."""
    block, layers = state.block, state.run.layers
    return {
        linear: block.module.get_submodule(base) for n, linear in block.linears.items() if (base := layers[n].added_to)
    }


def _arrival_at(pause: Pause | None, original: Pause | None, base: nn.Module | None) -> Arrival:
    """Return what reaches a layer at its pauses in both streams; `base` is the layer's of `_find_bases`."""
    bases = (None if one is None or base is None else one.kept.get(base) for one in (pause, original))
    return Arrival(input_at(pause), input_at(original), *bases)


def _pause_at(linear: nn.Module, forward: PausableForward) -> Pause | None:
    """Return the pause of a forward, if it is paused at `linear`."""
    return forward.standing if forward.standing and forward.standing.module is linear else None


def _pauses_at(linear: nn.Module, forwards: list[PausableForward]) -> dict[int, Pause]:
    """Return the pauses of the forwards that are paused at `linear`, by window."""
    return {i: pause for i, forward in enumerate(forwards) if (pause := _pause_at(linear, forward))}
