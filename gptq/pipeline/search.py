"""Trial runs before quantization: find the number of calibration windows, and the bit widths for a target size."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from gptq import solver
from gptq.calibration.arrays import Inputs
from gptq.calibration.windows import (
    HELD_OUT_EVERY,
    MAX_WINDOWS,
    Calibration,
    count_tokens,
    held_out_windows,
    make_windows,
)
from gptq.compute.distributed import Ranks
from gptq.compute.matmul import exact_float32
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.models.blocks import Block
from gptq.models.forward import run_to_end
from gptq.models.weights import WeightStream, swapped_weights
from gptq.output.results import LayerResult
from gptq.pipeline.block_walk import BlockWalk
from gptq.pipeline.journal import Journal
from gptq.pipeline.layer import BlockState, SharedInput, held_out_excess, quantize_layer
from gptq.pipeline.layer_walk import run_original, solve_block, walk_block
from gptq.pipeline.run import LayerProgress, Observer, Run
from gptq.pipeline.tune import hidden_states
from gptq.planning.bit_allocation import StorageChoice, Unit, choose_storage, find_units, make_overrides
from gptq.planning.plan import Plan
from gptq.solver.solve import SMALLEST_POWER

MIN_WINDOWS = 16  # where the search for enough windows starts
# Stop when the held-out error exceeds the calibration error by at most this fraction. Doubling the windows halves the
# excess, so more windows would gain little.
MAX_EXCESS = 0.1
# The error of a choice is a mean over tokens; more of them change it by little, and each costs a forward per choice.
MEASURED_WINDOWS, MEASURED_TOKENS = 4, 4096  # at least; fewer if fewer are held out
# The trials compare layers that are all solved on the same Hessians, which takes fewer tokens than solving them well.
TRIAL_TOKENS, TRIAL_TOKENS_PER_INPUT = 16_384, 8  # at least; the second times the inputs of the widest layer


def find_enough_windows(
    given: Calibration,
    plan: Plan,
    config: QuantConfig,
    weights: WeightStream,
    trust_remote_code: bool,
    observer: Observer,
    journal: Journal,
) -> tuple[list[Inputs], list[str]]:
    """Return the calibration windows, and notes for the user.

    The journal of an earlier run decides how many windows are drawn; without one, num_samples does. For "auto" the
    number of windows is doubled until the first block's error on held-out windows is nearly its error on the other
    windows: the ratio of these two errors is about 1 + 2 n / tokens for layers with n inputs, so it tells what more
    tokens could gain. Windows given as arrays are all used.
    """
    drawn = journal.find("windows")
    if drawn:
        count, notes = drawn[0]["count"], drawn[0]["notes"]
        windows, _ = make_windows(given, count, plan.folder, plan.network, config, trust_remote_code)
    elif config.num_samples == "auto":
        windows, notes = _search_windows(given, plan, config, weights, trust_remote_code, observer)
    else:
        windows, notes = make_windows(given, config.num_samples, plan.folder, plan.network, config, trust_remote_code)
    journal.require_windows(windows, notes)
    return windows, notes


def _search_windows(
    given: Calibration,
    plan: Plan,
    config: QuantConfig,
    weights: WeightStream,
    trust_remote_code: bool,
    observer: Observer,
) -> tuple[list[Inputs], list[str]]:
    windows, notes = make_windows(given, MIN_WINDOWS, plan.folder, plan.network, config, trust_remote_code)
    if not given.is_drawn:
        return windows, notes
    one_width = replace(config, mixed=False, target_bits=None, target_size=None)
    alone = replace(one_width, effort="fast", two_streams=False, tune_steps=0)
    while True:
        excess = held_out_excess(_results_of_first_block(windows, plan, alone, weights))
        observer.stage(
            f"{len(windows)} windows: held-out error of the first block {excess:+.0%} beside the calibration's"
        )
        if excess <= MAX_EXCESS or 2 * len(windows) > MAX_WINDOWS:
            return windows, notes
        try:
            windows, notes = make_windows(given, 2 * len(windows), plan.folder, plan.network, config, trust_remote_code)
        except InputError:  # the text has no more
            return windows, [*notes, f"the calibration text ends at {len(windows)} windows; more would help"]


def note_on_samples(results: list[LayerResult]) -> list[str]:
    """Return a note for the user on whether more calibration windows would have helped, if any were held out."""
    if all(result.heldout_error is None for result in results):
        return []
    excess = held_out_excess(results)
    return [
        f"on windows held out, layer errors are {excess:+.0%} beside those on the calibration windows; "
        + ("more samples would help" if excess > MAX_EXCESS else "more samples would change little")
    ]


def _results_of_first_block(
    windows: list[Inputs], plan: Plan, config: QuantConfig, weights: WeightStream
) -> list[LayerResult]:
    """Quantize the first block and return its layers' results; nothing is written."""
    run = Run(config, plan.layers, weights, Observer(), reruns_blocks=True)
    walk = BlockWalk(plan.network, plan.blocks, windows, num_streams=1, weights=weights)
    with torch.no_grad(), exact_float32(weights.device), walk:
        block, calls = next(iter(walk))
        state = BlockState(block, run)
        walk_block(calls, len(windows), state, quantize_layer)
    return state.results


def choose_widths(
    plan: Plan,
    config: QuantConfig,
    windows: list[Inputs],
    in_flight: int,
    weights: WeightStream,
    observer: Observer,
    journal: Journal,
    ranks: Ranks,
) -> QuantConfig:
    """Choose the bit widths that meet the target; return the config with an override for every layer.

    Takes one pass over the original model, with the windows of `trial_windows`. The error of a choice is measured in
    the block's output when only that unit is quantized: ||change||^2 / ||output||^2 of each token, because the norm
    layers of later blocks rescale each token. Blocks whose errors the journal holds are not measured again.

    Every process takes all these windows through the model. Each solves and measures its own choices, which is most of
    the work, and tells the others their errors.

    Raises:
        InputError: the target cannot be met.
    """
    units, chosen_format = find_units(plan, config)
    only = choose_storage(plan, config, units, chosen_format)  # refuses an impossible target before measuring
    if all(len(unit.choices) == 1 for unit in units):
        return _with_widths(config, units, only, chosen_format)
    observer.stage("measuring what each width does to each layer")
    windows = trial_windows(windows, plan)
    observer.started(len(plan.blocks), sum(p.outputs * p.inputs for p in plan.layers.values()))
    known: dict[str, list[list[float]]] = {entry["name"]: entry["errors"] for entry in journal.find("measured")}
    if known:
        before = (plan.layers[name] for block in plan.blocks if block.name in known for name in block.linears)
        observer.resumed(len(known), sum(layer.outputs * layer.inputs for layer in before))
    run = Run(config, plan.layers, weights, LayerProgress(observer), reruns_blocks=True)
    trials = _TrialSolver(units, ranks)
    measured: list[Unit] = []
    walk = BlockWalk(plan.network, plan.blocks, windows, num_streams=1, weights=weights)
    with torch.no_grad(), exact_float32(weights.device), walk:
        for block, calls in walk:
            inside = [unit for unit in units if unit.layers[0] in block.linears]
            if [len(errors) for errors in known.get(block.name, [])] == [len(unit.measured) for unit in inside]:
                measured += map(Unit.with_errors, inside, known[block.name])
                walk.resume_with(run_original(block, calls[0], run))
                continue
            outputs = solve_block(calls, min(in_flight, len(windows)), BlockState(block, run), trials.solve)
            originals = outputs[0] if outputs else None
            errors = _measure_choices(inside, block, calls[0], originals, trials, weights)
            trials.solved.clear()
            measured += map(Unit.with_errors, inside, errors)
            journal.append("measured", {"name": block.name, "errors": errors})
            walk.resume_with(outputs)
    # Blocks that no input reaches keep an error of 0 for every choice.
    measured += [unit for block in walk.unreached for unit in units if unit.layers[0] in block.linears]
    observer.finished()
    return _with_widths(config, measured, choose_storage(plan, config, measured, chosen_format), chosen_format)


def trial_windows(windows: list[Inputs], plan: Plan) -> list[Inputs]:
    """Return the first windows, as many as measuring widths takes; all where experts see a part of the tokens each."""
    tokens = count_tokens(windows)
    if not tokens or any(block.expert_layers() for block in plan.blocks):
        return windows
    enough = max(TRIAL_TOKENS, TRIAL_TOKENS_PER_INPUT * max(layer.inputs for layer in plan.layers.values()))
    return windows[: max(HELD_OUT_EVERY * MEASURED_WINDOWS, -(-len(windows) * enough // tokens))]


def _with_widths(
    config: QuantConfig, units: Sequence[Unit], choices: Sequence[StorageChoice], chosen_format: Format
) -> QuantConfig:
    """Return the config with the format and an override for every layer."""
    return replace(config, overrides=(*config.overrides, *make_overrides(units, choices)), format=chosen_format)


class _TrialSolver:
    """Solves each layer of a block once for every choice of its unit that belongs to this process."""

    def __init__(self, units: Sequence[Unit], ranks: Ranks) -> None:
        self.ranks = ranks
        self._units = {name: unit for unit in units for name in unit.layers}
        numbers = count()
        self._numbers = {(unit.layers, choice): next(numbers) for unit in units for choice in unit.measured}
        self.solved: dict[str, dict[StorageChoice, solver.SolvedLayer]] = {}  # by name and choice

    def number(self, unit: Unit, choice: StorageChoice) -> int:
        """The number of a choice among all that are measured."""
        return self._numbers[unit.layers, choice]

    def own_choices(self, unit: Unit) -> list[StorageChoice]:
        """The choices that this process solves and measures."""
        return [choice for choice in unit.measured if self.ranks.owns(self.number(unit, choice))]

    def solve(self, name: str, shared: SharedInput | None, state: BlockState) -> None:
        """Solve a layer for each of this process's choices, and give it its original weight; a LayerSolver."""
        run, plan = state.run, state.run.layers[name]
        W = state.weight(name)  # (outputs, inputs) float32
        own = self.solved[name] = {}
        for choice in self.own_choices(self._units[name]):
            group_size = plan.inputs if choice.group_size == -1 else min(choice.group_size, plan.inputs)
            grid = replace(plan, bits=choice.bits, group_size=group_size).grid.for_layers([W])
            if shared is None:
                solved = solver.round_to_nearest(W, grid, group_size)
            else:
                factor, search = shared.inputs.factor, bool(run.config.search)
                solved = solver.solve(W, factor, grid, group_size, search=search)
            own[choice] = solved
        run.weights.set_weight(name, state.block.linears[name], W)
        run.observer.layer_done(state.block.index, name, W.numel())


def _measure_choices(
    units: Sequence[Unit], block: Block, calls: list[partial[Any]], originals: list[Any] | None, trials: _TrialSolver,
    weights: WeightStream,
) -> list[list[float]]:  # fmt: skip
    """Return the error of each measured choice of each unit, from all processes; arguments as in `_measure`."""
    own = [
        (trials.number(unit, choice), _measure(unit, choice, block, calls, originals, trials, weights))
        for unit in units
        for choice in trials.own_choices(unit)
    ]
    texts = trials.ranks.gather_texts(json.dumps(own))  # a float is the same again when its text is read
    errors: dict[int, float] = dict(one for text in texts for one in json.loads(text))
    return [[errors[trials.number(unit, choice)] for choice in unit.measured] for unit in units]


def _measure(
    unit: Unit, choice: StorageChoice, block: Block, calls: list[partial[Any]], originals: list[Any] | None,
    trials: _TrialSolver, weights: WeightStream,
) -> float:  # fmt: skip
    """Return the error that a choice causes in the block's output, averaged over the first held-out windows.

    If no window is held out, others are used. `originals` are the outputs of the original block; without them,
    each output is computed when it is needed.
    """
    windows = held_out_windows(len(calls)) or list(range(len(calls)))
    swapped: dict[nn.Module, nn.Parameter | None] = {}
    for name in unit.layers:
        linear = block.linears[name]
        Q = trials.solved[name][choice].weight()
        swapped[linear] = nn.Parameter(weights.to_forward_layout(name, linear, Q), requires_grad=False)
    errors: list[float] = []
    tokens = 0
    for i in windows:
        if len(errors) >= MEASURED_WINDOWS and tokens >= MEASURED_TOKENS:
            break
        original = originals[i] if originals else run_to_end(calls[i])
        tokens += hidden_states(original).shape[:-1].numel()
        with swapped_weights(swapped):
            errors.append(_relative_change(run_to_end(calls[i]), original))
    return sum(errors) / len(errors)


def _relative_change(output: Any, original: Any) -> float:
    """Return the mean over tokens of ||y - y'||^2 / ||y'||^2 for the original output y'."""
    y, target = hidden_states(output).double(), hidden_states(original).double()  # (..., tokens, hidden)
    return float(((y - target).square().sum(-1) / target.square().sum(-1).clamp(min=SMALLEST_POWER)).mean())
