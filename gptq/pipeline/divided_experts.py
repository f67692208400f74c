"""Divide the experts of a mixture over processes: each reads, solves and runs its own, on the tokens of all windows.

The inputs of the experts go to every process, which need them for the Hessian of all tokens. What an expert adds to the
output of a window goes back to the process that runs the window, which adds up all of them in the order of the experts,
as one process does. So neither the weights nor the Hessians of experts go round.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gptq.compute.distributed import Item
from gptq.models.experts import Experts
from gptq.models.forward import Pause
from gptq.models.placeholders import UnsolvedWeight
from gptq.models.weights import swapped_weights
from gptq.pipeline.layer import BlockState, LayerSolver, Outcome, read_original_weights
from gptq.pipeline.moe import Seen, arguments_at, note_coverage, routed, solve_expert, sum_all_inputs

PACKED = 3  # tensors of a packed call of the experts, see `Experts.pack_call`

Call = tuple[Tensor, ...]  # packed arguments of a call of the experts
Added = list[dict[int, Tensor]]  # by window, what each of this process's experts adds, (rows, hidden)


def gather_calls(
    experts: Experts, pauses: Iterable[tuple[Pause | None, Pause | None]], windows: int, state: BlockState
) -> list[list[Call | None]]:
    """Return, for each stream, the packed calls of the experts in all windows of all processes.

    Args:
        pauses: of this process's `windows` windows: in the quantized and in the original stream.
    """
    ranks = state.run.ranks
    own = (_pack(experts, pause) + _pack(experts, original) for pause, original in pauses)
    calls: list[list[Call | None]] = [[], []]
    for item in ranks.gather_windows(own, ranks.total(windows), parts=2 * PACKED):
        for stream, parts in enumerate((item[:PACKED], item[PACKED:])):
            known = tuple(x for x in parts if x is not None)
            calls[stream].append(known or None)
    return calls


def _pack(experts: Experts, pause: Pause | None) -> Item:
    return (None,) * PACKED if pause is None else experts.pack_call(*arguments_at(pause))


def run_divided(
    name: str, experts: Experts, calls: list[list[Call | None]], state: BlockState, solve_layer: LayerSolver | None
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Yield the experts' output in this process's windows in order, in the quantized and in the original stream.

    Args:
        calls: by stream and window, of all processes; None where a window does not reach the experts.
        solve_layer: quantizes a layer; None if the experts are solved already.
    """
    ranks = state.run.ranks
    solve = None if solve_layer is None else _Solving(name, experts, calls, state, solve_layer)
    added: list[Added] = [[{} for _ in own] for own in calls]  # by stream
    for number, expert in enumerate(experts):
        if ranks.owns(number):
            if solve is not None:
                solve.expert(number)
            _restore_weights(expert, state)
            _run_expert(experts, number, calls[0], added[0])
            if any(calls[1]):
                with swapped_weights(read_original_weights(expert, state)):
                    _run_expert(experts, number, calls[1], added[1])
            _free_weights(expert, state)
    if solve is not None:
        solve.join()
    windows = len(calls[0])
    for receiver in range(ranks.size):
        for i in type(ranks)(receiver, ranks.size).own_windows(windows):
            outputs = [
                _collect(experts, own[i], got[i], receiver, state) for own, got in zip(calls, added, strict=True)
            ]
            if receiver == ranks.rank:
                yield outputs[0], outputs[1]


class _Solving:
    """Solves this process's experts, and tells the others what came out."""

    def __init__(
        self, name: str, experts: Experts, calls: list[list[Call | None]], state: BlockState, solve_layer: LayerSolver
    ) -> None:
        self._name, self._experts, self._state, self._solve_layer = name, experts, state, solve_layer
        self._windows = [
            routed(experts, experts.unpack_call(*call), original and experts.unpack_call(*original))
            for call, original in zip(*calls, strict=True)
            if call is not None
        ]
        self._everyone = sum_all_inputs(name, self._windows, state)
        self._everyone.seen.complete()
        self._own = state.alone()
        self._seen: dict[int, Seen] = {}
        self._outcomes: dict[int, Outcome] = {}

    def expert(self, number: int) -> None:
        self._seen[number] = solve_expert(
            self._name, number, self._experts, self._windows, self._everyone, self._own, self._solve_layer
        )
        self._outcomes[number] = self._own.take_outcome()

    def join(self) -> None:
        state = self._state
        state.join_outcomes(self._outcomes)
        found = dict(
            one for text in state.run.ranks.gather_texts(json.dumps([*self._seen.items()])) for one in json.loads(text)
        )
        note_coverage(self._name, self._windows, [Seen(*found[n]) for n in range(len(self._experts))], state)


def _run_expert(experts: Experts, number: int, calls: list[Call | None], added: Added) -> None:
    for call, own in zip(calls, added, strict=True):
        if call is not None:
            own[number] = experts.run_one(number, *experts.unpack_call(*call))[1]


def _collect(experts: Experts, packed: Call | None, own: dict[int, Tensor], receiver: int, state: BlockState) -> Any:
    """Return the output of one window's call on the process `receiver`; the others send what their experts add."""
    ranks = state.run.ranks
    if packed is None:
        return None
    if ranks.rank != receiver:
        if own:  # there may be more processes than experts
            part = torch.cat([*own.values()])
            ranks.send(part, ranks.rank, receiver, tuple(part.shape), part.dtype)
        return None
    call = experts.unpack_call(*packed)
    rows = [experts.rows_of(number, *call) for number in range(len(experts))]
    for sender in range(ranks.size):
        numbers = [number for number in range(len(experts)) if ranks.owner_of(number) == sender]
        heights = [len(rows[number]) for number in numbers]
        if sender != receiver and numbers:
            part = ranks.send(None, sender, receiver, (sum(heights), call[0].shape[-1]), call[0].dtype)
            own |= zip(numbers, part.split(heights), strict=True)
    return experts.combine(((rows[number], own[number]) for number in range(len(experts))), *call)


def _restore_weights(expert: torch.nn.Module, state: BlockState) -> None:
    """Give the layers of a solved expert their quantized weights again."""
    for name, linear in _layers_of(expert, state):
        if name in state.solutions and isinstance(linear.weight, UnsolvedWeight):
            state.run.weights.set_weight(name, linear, state.solutions[name].solved.weight())


def _free_weights(expert: torch.nn.Module, state: BlockState) -> None:
    for name, linear in _layers_of(expert, state):
        linear._parameters["weight"] = state.run.weights.unsolved(name, linear)


def _layers_of(expert: torch.nn.Module, state: BlockState) -> list[tuple[str, torch.nn.Module]]:
    inside = set(expert.modules())
    return [(name, linear) for name, linear in state.block.linears.items() if linear in inside]
