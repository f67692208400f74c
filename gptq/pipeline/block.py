"""Taking calibration windows through a block, layer by layer: each layer sees inputs of quantized layers before it."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
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
    pause_before,
    run_to_end,
    run_until,
)
from gptq.models.uncalled_layers import UnsolvedWeight
from gptq.models.weights import WeightStream, swapped_weights
from gptq.pipeline.block_walk import Calls, Outputs
from gptq.pipeline.layer import BlockState, LayerSolver, Station, original_weights
from gptq.pipeline.layer_inputs import gather_inputs, inputs_from_sums, note_on_damping
from gptq.pipeline.moe import gather_routings, routing_of, solve_experts
from gptq.pipeline.run import Run


def solve_block(calls: Calls, in_flight: int, state: BlockState, solve_layer: LayerSolver) -> Outputs:
    """Solve a block's layers, or the output head; returns the block's outputs, none of the head."""
    if state.block.is_head():
        solve_head(calls, state, solve_layer)
        return []
    return walk_block(calls, in_flight, state, solve_layer)


def solve_head(calls: Calls, state: BlockState, solve_layer: LayerSolver) -> None:
    """Solve the output head; its own output is not needed."""
    name = next(iter(state.block.linears))
    arguments = [[get_argument(call.args, call.keywords) for call in stream] for stream in calls]
    pairs = zip(arguments[0], arguments[1] if len(arguments) > 1 else [None] * len(arguments[0]), strict=True)
    solve_layer(name, _station(name, pairs, len(arguments[0]), state), state)


def _station(name: str, arriving: Any, windows: int, state: BlockState) -> Station:
    inputs = inputs_from_sums(name, gather_inputs(name, arriving, windows, state.run), None, state.run)
    for note in note_on_damping(name, inputs, state.run):
        state.note(note)
    return Station(inputs)


def walk_block(calls: Calls, in_flight: int, state: BlockState, solve_layer: LayerSolver) -> Outputs:
    """Solve a block's layers in the order in which its forward reaches them; returns its output for every window.

    The first `in_flight` windows run once, standing still before each layer until it is solved. The others run anew
    for each distinct input of layers, and once more at the end.
    """
    block, run = state.block, state.run
    walk = _LayerWalk(calls, in_flight, state, solve_layer)
    forget_weights(block.module, block, run.weights.device)
    try:
        with pause_before(block.pause_points()):
            walk.to_the_end()
            for name, linear in block.linears.items():
                if linear not in walk.solved:
                    state.note(f"{name}: no calibration token reached it, so it is rounded to nearest")
                    solve_layer(name, None, state)
            return walk.outputs()
    finally:
        walk.stop()


def run_as_original(block: Block, calls: list[partial[Any]], run: Run) -> Outputs:
    """A stream's outputs of a block with its original weights, as `walk_block` would give them; none of the head."""
    if block.is_head():
        return []
    set_original_weights(block, run.weights)
    return [[run.offload.put(run_to_end(call)) for call in calls]]


def set_original_weights(block: Block, weights: WeightStream) -> None:
    """Give a block's layers the weights of the checkpoint."""
    for name, linear in block.linears.items():
        weights.set_weight(linear, weights.weight(linear, name))


def forget_weights(stop: nn.Module, block: Block, device: torch.device) -> None:
    """Free the weights of those of a block's layers that are inside `stop`; computing with them is an error."""
    inside = set(stop.modules())
    for name, linear in block.linears.items():
        if linear in inside:
            linear._parameters["weight"] = UnsolvedWeight.of(linear, name, device)


class _LayerWalk:
    """The forwards of a block's windows on their way from layer to layer.

    The forwards in flight stand; the waiting windows are run up to a layer when its inputs are gathered. Layers that
    get the very same tensors (queries, keys and values, say) share a station: one Hessian and its factor.
    """

    def __init__(self, calls: Calls, in_flight: int, state: BlockState, solve_layer: LayerSolver) -> None:
        self.solved: set[nn.Module] = set()
        self._state = state
        self._solve_layer = solve_layer
        self._flights = [[PausableForward(call) for call in stream[:in_flight]] for stream in calls]
        self._waiting = [stream[in_flight:] for stream in calls]
        self._names = state.block.pause_points()
        self._originals: dict[nn.Module, nn.Parameter | None] = {}  # weights that waiting windows will need
        self._station: Station | None = None
        self._station_inputs: list[dict[int, object]] = []  # identities of the tensors that the station was made of

    def to_the_end(self) -> None:
        """Solve the layers at which forwards stand until none stands; processes go to each layer together."""
        order = {linear: i for i, linear in enumerate(self._names)}
        modules = [*self._names]
        for forward in chain(*self._flights):
            forward.advance()
        while True:
            standing = (order[f.standing.module] for f in chain(*self._flights) if f.standing)
            at = self._state.run.ranks.minimum(min(standing, default=len(order)))
            if at == len(order):
                return
            self._pass(modules[at])

    def _pass(self, stop: nn.Module) -> None:
        """Solve the layer, or list of experts, if a forward of the quantized stream stands there, and go on."""
        state, run = self._state, self._state.run
        standing = self._standing_at(stop)
        if stop not in self.solved and run.ranks.any(bool(standing[0])):
            if isinstance(stop, Experts):
                self._solve_experts(stop)
            else:
                self._solve(stop, standing)
            self.solved.update(stop.modules())
        self._restore_weights(stop)
        self._go_on(stop, standing)
        if not any(self._waiting) and not run.reruns_blocks:
            forget_weights(stop, state.block, run.weights.device)

    def _solve_experts(self, experts: Experts) -> None:
        state = self._state
        routings = (routing_of(*pauses) for pauses in self._arriving(experts))
        gathered = gather_routings(routings, self._num_windows(), state.run)
        solve_experts(self._names[experts], experts, gathered, state, self._solve_layer)

    def _solve(self, linear: nn.Module, standing: list[dict[int, object]]) -> None:
        state, run, name = self._state, self._state.run, self._names[linear]
        spent = self._station is not None and not self._station.serves(name)
        if spent or run.ranks.any(standing != self._station_inputs):
            self._station = None  # free the old one first
            pairs = ((input_at(pause), input_at(original)) for pause, original in self._arriving(linear))
            self._station = _station(name, pairs, self._num_windows(), state)
            for flight in self._flights:  # these inputs are not needed while the layer is solved
                run.offload.put([argument_at(pause) for pause in _pauses_at(linear, flight).values()])
            self._station_inputs = self._standing_at(linear)
        run.offload.release()
        self._solve_layer(name, self._station, state)

    def _num_windows(self) -> int:
        return len(self._flights[0]) + len(self._waiting[0])

    def _restore_weights(self, stop: nn.Module) -> None:
        """Bring back what `forget_weights` has freed, where a forward passes a layer a second time."""
        inside = set(stop.modules())
        for name, linear in self._state.block.linears.items():
            if name in self._state.solutions and linear in inside and linear.weight.is_meta:
                self._state.run.weights.set_weight(linear, self._state.solutions[name].solved.weight())

    def _go_on(self, stop: nn.Module, standing: list[dict[int, object]]) -> None:
        """Let the forwards that stand at `stop` run it, each with its own stream's weights."""
        if len(standing) > 1 and standing[1]:
            own = original_weights(stop, self._state)
            if any(self._waiting):
                self._originals |= own
            with swapped_weights(own):
                for i in standing[1]:
                    self._flights[1][i].advance()
        for i in standing[0]:
            self._flights[0][i].advance()

    def _standing_at(self, linear: nn.Module) -> list[dict[int, object]]:
        """By stream: the identity of the input that each window has at `linear` if it stands there."""
        return [
            {i: identify(argument_at(pause)) for i, pause in _pauses_at(linear, flight).items()}
            for flight in self._flights
        ]

    def _arriving(self, linear: nn.Module) -> Iterator[tuple[Pause | None, Pause | None]]:
        """Every window's pause at `linear` and the original model's, in the windows' order; None where it passes by.

        First come those in flight, then those that run again.
        """
        flights, waiting = self._flights, self._waiting
        here = [_pauses_at(linear, flight) for flight in flights]
        for i in range(len(flights[0])):
            yield here[0].get(i), here[1].get(i) if len(here) > 1 else None
        for i, call in enumerate(waiting[0]):
            pause, original = run_until(call, linear), None
            if len(waiting) > 1:
                with swapped_weights(self._originals):
                    original = run_until(waiting[1][i], linear)
            yield pause, original

    def outputs(self) -> Outputs:
        """The block's outputs once all layers are solved."""
        offload = self._state.run.offload
        outputs = [[offload.put(forward.result) for forward in flight] for flight in self._flights]
        outputs[0] += [offload.put(run_to_end(call)) for call in self._waiting[0]]
        with swapped_weights(self._originals):
            for out, calls in zip(outputs[1:], self._waiting[1:], strict=True):
                out += [offload.put(run_to_end(call)) for call in calls]
        return outputs

    def stop(self) -> None:
        for forward in chain(*self._flights):
            forward.stop()


def _pauses_at(linear: nn.Module, flight: list[PausableForward]) -> dict[int, Pause]:
    return {i: f.standing for i, f in enumerate(flight) if f.standing and f.standing.module is linear}
