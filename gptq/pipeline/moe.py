"""Quantize a list of experts, each on the tokens that the router sends to it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptq.compute.distributed import Item
from gptq.models.experts import Expert, Experts
from gptq.models.forward import Pause, argument_at
from gptq.models.weights import swapped_weights
from gptq.output.results import Coverage
from gptq.pipeline.layer import (
    Arrival,
    BlockState,
    LayerSolver,
    SharedInput,
    drift_form,
    find_drifts,
    read_original_weights,
)
from gptq.pipeline.layer_inputs import (
    DriftForm,
    InputSums,
    LayerInputs,
    accumulate,
    inputs_from_sums,
    note_on_damping,
    pseudo_tokens,
)
from gptq.pipeline.run import Run

# For one window: x, the input of the experts, (tokens, hidden); the numbers of the experts that the router chose,
# (tokens, k); and x in the original model, None if it is not known. Where the router's weights multiply the inputs, x
# has a row for each choice of a token, and k is 1.
Routed = tuple[Tensor, Tensor, Tensor | None]


def routing_of(experts: Experts, pause: Pause | None, original: Pause | None) -> Item:
    """Return the `Routed` of a window from its pauses in both streams; three Nones if it does not reach the experts."""
    if pause is None:
        return None, None, None
    return routed(experts, arguments_at(pause), None if original is None else arguments_at(original))


def routed(experts: Experts, call: Sequence[Tensor], original: Sequence[Tensor] | None) -> Routed:
    """Return the `Routed` of a window from the arguments of the experts' call in both streams."""
    x, routes = experts.routing(*call)
    return x, routes, None if original is None else experts.original_inputs(call[0], *original)


def arguments_at(pause: Pause) -> list[Tensor]:
    """Return all arguments of the call at which a forward is paused."""
    return [argument_at(pause, number) for number in range(len(pause.args) + len(pause.kwargs))]


def gather_routings(own: Iterable[Item], windows: int, run: Run) -> list[Routed]:
    """Return the `Routed` of all windows that reach the experts, from all processes.

    `own` yields one item for each of the `windows` windows of this process.
    """
    items = run.ranks.gather_windows(own, run.ranks.total(windows), parts=3)
    return [(x, experts, original) for x, experts, original in items if x is not None and experts is not None]


def solve_experts(
    name: str, experts: Experts, windows: list[Routed], state: BlockState, solve_layer: LayerSolver
) -> None:
    """Quantize a list of experts, each on its own tokens.

    If an expert has too few tokens, its Hessian is blended with that of all tokens (see `blend_hessians`).
    """
    everyone = sum_all_inputs(name, windows, state)
    seen = [
        solve_expert(name, number, experts, windows, everyone, state, solve_layer) for number in range(len(experts))
    ]
    note_coverage(name, windows, seen, state)


def sum_all_inputs(name: str, windows: list[Routed], state: BlockState) -> InputSums:
    """Sum over the tokens of all experts of the list called `name`, with the drift of inputs."""
    arrivals = (Arrival(x, original) for x, _, original in windows)
    drifts = find_drifts(name, arrivals, DriftForm.INPUTS, state)
    return accumulate(windows[0][0].shape[-1], drifts, len(windows), state.run)


def solve_expert(
    name: str, number: int, experts: Experts, windows: list[Routed], everyone: InputSums, state: BlockState,
    solve_layer: LayerSolver,
) -> "Seen":  # fmt: skip
    """Quantize an expert of the list called `name`; `everyone` are the sums of all tokens."""
    expert = experts[number]
    if not isinstance(expert, Expert):
        raise TypeError(f"{name}.{number} is a {type(expert).__name__}")
    own = [(routes == number).any(-1) for _, routes, _ in windows]  # (tokens,) each
    few = _solve_expert(f"{name}.{number}", expert, list(zip(windows, own, strict=True)), everyone, state, solve_layer)
    return Seen(sum(int(rows.sum()) for rows in own), few)


class Seen(NamedTuple):
    """The number of an expert's tokens, and whether they were too few."""

    tokens: int
    few: bool


def note_coverage(name: str, windows: list[Routed], seen: list[Seen], state: BlockState) -> None:
    """Record what each expert of the list called `name` has seen."""
    blended = [number for number, expert in enumerate(seen) if expert.few]
    coverage = Coverage(name, sum(len(x) for x, _, _ in windows), [expert.tokens for expert in seen], blended)
    state.coverage.append(coverage)
    if coverage.blended:
        state.note(_note_on_coverage(coverage))


def _solve_expert(
    name: str, expert: Expert, windows: list[tuple[Routed, Tensor]], everyone: InputSums, state: BlockState,
    solve_layer: LayerSolver,
) -> bool:  # fmt: skip
    """Quantize one expert; return whether its own tokens were too few."""
    planned = {
        linear: f"{name}.{part}" for part, linear in expert.named_children() if f"{name}.{part}" in state.run.layers
    }
    few = False
    gate_up = [planned[linear] for linear in (expert.gate_proj, expert.up_proj) if linear in planned]
    if gate_up:
        name = gate_up[0]
        arrivals = (Arrival(x[own], None if original is None else original[own]) for (x, _, original), own in windows)
        num_inputs = state.run.layers[name].inputs
        sums = accumulate(num_inputs, find_drifts(name, arrivals, DriftForm.INPUTS, state), len(windows), state.run)
        few = pseudo_tokens(sums.seen.num_tokens, num_inputs) > 0
        shared = SharedInput(_expert_inputs(name, sums, everyone, DriftForm.INPUTS, state))
        for layer in gate_up:
            solve_layer(layer, shared, state)
    if expert.down_proj in planned:
        few |= _solve_down(planned[expert.down_proj], expert, windows, state, solve_layer)
    return few


def _solve_down(
    name: str, expert: Expert, windows: list[tuple[Routed, Tensor]], state: BlockState, solve_layer: LayerSolver
) -> bool:
    """Quantize an expert's down_proj on the outputs of its quantized gate and up.

    Returns whether the expert saw too few tokens.
    """
    originals = read_original_weights(expert, state)
    num_inputs, form = state.run.layers[name].inputs, drift_form(name, state)

    def arrivals(everyone: bool) -> Iterator[Arrival]:
        for (x, _, original), own in windows:
            rows = torch.ones_like(own) if everyone else own
            h = expert.intermediate(x[rows])
            if original is None:
                yield Arrival(h, None)
            else:
                with swapped_weights(originals):
                    yield Arrival(h, expert.intermediate(original[rows]))

    def sums_over(everyone: bool) -> InputSums:
        return accumulate(num_inputs, find_drifts(name, arrivals(everyone), form, state), len(windows), state.run)

    sums = sums_over(everyone=False)
    few = pseudo_tokens(sums.seen.num_tokens, num_inputs) > 0
    all_sums = sums_over(everyone=True) if few else None
    solve_layer(name, SharedInput(_expert_inputs(name, sums, all_sums, form, state)), state)
    return few


def _expert_inputs(
    name: str, own: InputSums, everyone: InputSums | None, form: DriftForm, state: BlockState
) -> LayerInputs:
    inputs = inputs_from_sums(name, own, everyone, form, state.run)
    for note in note_on_damping(name, inputs, state.run):
        state.note(note)
    return inputs


def _note_on_coverage(coverage: Coverage) -> str:
    least = min(range(len(coverage.tokens)), key=coverage.tokens.__getitem__)
    return (
        f"{coverage.name}: {len(coverage.blended)} of {len(coverage.tokens)} experts saw too few of "
        f"{coverage.all_tokens} tokens (the least, expert {least}, {coverage.tokens[least]}); their Hessians are "
        "blended with that of all"
    )
