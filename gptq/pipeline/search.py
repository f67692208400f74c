"""What is tried out before the first layer is quantized for good: how many windows, and which widths."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gptq import solver
from gptq.calibration.arrays import Inputs
from gptq.calibration.windows import MOST_WINDOWS, Given, is_held_out, windows_of
from gptq.compute.matmul import exact_float32
from gptq.config import QuantConfig
from gptq.errors import InputError
from gptq.models.blocks import Block
from gptq.models.forward import run_through
from gptq.models.weights import WeightStream, swapped
from gptq.output.results import LayerResult
from gptq.pipeline.block import Fresh, run_as_original, solve_head, walk_block, walk_blocks
from gptq.pipeline.job import Job, Observer
from gptq.pipeline.journal import Journal
from gptq.pipeline.layer import finish_layer, heldout_excess
from gptq.pipeline.layer_inputs import LayerInputs
from gptq.pipeline.tune import first_tensor
from gptq.planning.bit_allocation import Unit, choose, overrides_for, units_of
from gptq.planning.plan import Plan
from gptq.solver.solve import TINY

FEWEST_WINDOWS = 16  # that a search for enough windows tries
ENOUGH = 0.1  # held-out error above the calibration's by so little that more windows would change it by half of that


def enough_windows(
    given: Given,
    plan: Plan,
    config: QuantConfig,
    stream: WeightStream,
    trust_remote_code: bool,
    observer: Observer,
    journal: Journal,
) -> tuple[list[Inputs], list[str]]:
    """As many windows as the config says, or the journal; for "auto" twice as many, until more would change little.

    That is when the first block's layers err on those held out nearly as little as on the others. Their ratio is about
    1 + 2 n / tokens for n inputs, so that it tells what more tokens could bring. Windows that were given are all used.
    """
    drawn = journal.find("windows")
    if drawn:
        windows, notes = (
            windows_of(given, drawn[0]["count"], plan.folder, plan.network, config, trust_remote_code)[0],
            drawn[0]["notes"],
        )
    elif config.num_samples == "auto":
        windows, notes = _search_windows(given, plan, config, stream, trust_remote_code, observer)
    else:
        windows, notes = windows_of(given, config.num_samples, plan.folder, plan.network, config, trust_remote_code)
    journal.require_windows(windows, notes)
    return windows, notes


def _search_windows(
    given: Given, plan: Plan, config: QuantConfig, stream: WeightStream, trust_remote_code: bool, observer: Observer
) -> tuple[list[Inputs], list[str]]:
    windows, notes = windows_of(given, FEWEST_WINDOWS, plan.folder, plan.network, config, trust_remote_code)
    if not isinstance(given, str):
        return windows, notes
    alone = replace(config, effort="fast", two_streams=False, tune_steps=0, target_bits=None, target_size=None)
    while True:
        excess = heldout_excess(_results_of_first_block(windows, plan, alone, stream))
        observer.stage(
            f"{len(windows)} windows: held-out error of the first block {excess:+.0%} beside the calibration's"
        )
        if excess <= ENOUGH or 2 * len(windows) > MOST_WINDOWS:
            return windows, notes
        try:
            windows, notes = windows_of(given, 2 * len(windows), plan.folder, plan.network, config, trust_remote_code)
        except InputError:  # the text has no more
            return windows, [*notes, f"the calibration text ends at {len(windows)} windows; more would help"]


def notes_on_samples(results: list[LayerResult]) -> list[str]:
    """Whether more calibration windows would have helped, where some were held out."""
    if all(result.heldout_error is None for result in results):
        return []
    excess = heldout_excess(results)
    return [
        f"on windows held out, layer errors are {excess:+.0%} beside those on the calibration windows; "
        + ("more samples would help" if excess > ENOUGH else "more samples would change little")
    ]


def _results_of_first_block(
    windows: list[Inputs], plan: Plan, config: QuantConfig, stream: WeightStream
) -> list[LayerResult]:
    job = Job(config, plan.layers, stream, None, Observer(), finish_layer)

    def visit(index: int, block: Block, fresh: Fresh) -> list[list[Any]]:
        walk_block(index, block, fresh, len(windows), job)
        return []

    with torch.no_grad(), exact_float32(stream.device):
        walk_blocks(plan.network, plan.blocks, windows, 1, stream, visit)
    return job.results


def choose_widths(
    plan: Plan,
    config: QuantConfig,
    windows: list[Inputs],
    in_flight: int,
    stream: WeightStream,
    observer: Observer,
    journal: Journal,
) -> QuantConfig:
    """The config with an override for every layer, so that the target is met; takes one pass over the original model.

    What the journal says was measured already is not measured again. A choice is judged by what it does to the output
    of its block when it alone is quantized: the squared change of a token's output relative to the token's own, as the
    norms of the blocks that follow will see it.
    """
    units, chosen_format = units_of(plan, config)
    choose(plan, config, units, chosen_format)  # an impossible target is refused before the work
    observer.stage("measuring what each width does to each layer")
    observer.started(len(plan.blocks), sum(p.outputs * p.inputs for p in plan.layers.values()))
    known: dict[str, list[list[float]]] = {entry["name"]: entry["errors"] for entry in journal.find("measured")}
    if known:
        before = (plan.layers[name] for block in plan.blocks if block.name in known for name in block.linears)
        observer.going_on(len(known), sum(layer.outputs * layer.inputs for layer in before))
    trials: dict[str, dict[tuple[int, int], solver.SolvedLayer]] = {}
    finish = partial(_try_choices, units={name: unit for unit in units for name in unit.layers}, trials=trials)
    job = Job(config, plan.layers, stream, None, observer, finish)
    measured: list[Unit] = []

    def visit(index: int, block: Block, fresh: Fresh) -> list[list[Any]]:
        inside = [unit for unit in units if unit.layers[0] in block.linears]
        if block.name in known:
            measured.extend(map(_with_errors, inside, known[block.name]))
            return run_as_original(block, fresh[0], job)
        outputs: list[list[Any]] = []
        if block.is_head():
            solve_head(index, block, fresh, job)
        else:
            outputs = walk_block(index, block, fresh, in_flight, job)
        found = [_measure(unit, block, fresh[0], outputs[0] if outputs else None, trials, job) for unit in inside]
        trials.clear()
        measured.extend(found)
        errors = [[choice.error for choice in unit.choices] for unit in found]
        journal.append("measured", {"name": block.name, "errors": errors})
        return outputs

    with torch.no_grad(), exact_float32(stream.device):
        left = walk_blocks(plan.network, plan.blocks, windows, 1, stream, visit)
    measured += [unit for block in left for unit in units if unit.layers[0] in block.linears]  # none sees a difference
    observer.finished()
    overrides = overrides_for(measured, choose(plan, config, measured, chosen_format))
    return replace(config, overrides=(*config.overrides, *overrides), format=chosen_format)


def _try_choices(
    index: int, block: Block, name: str, known: LayerInputs | None, job: Job,
    units: dict[str, Unit], trials: dict[str, dict[tuple[int, int], solver.SolvedLayer]],
) -> None:  # fmt: skip
    """Solve a layer in every way it could be stored, and let the forward go on with the original weight."""
    plan, linear = job.plans[name], block.linears[name]
    W = job.stream.weight(linear, name)  # (outputs, inputs) float32
    trials[name] = {}
    for choice in units[name].choices:
        group_size = plan.inputs if choice.group_size == -1 else min(choice.group_size, plan.inputs)
        if known is None:
            solved = solver.round_to_nearest(W, choice.bits, group_size, plan.sym)
        else:
            solved = solver.solve(W, known.factor, choice.bits, group_size, plan.sym, search=bool(job.config.search))
        trials[name][choice.bits, choice.group_size] = solved
    job.stream.set_weight(linear, W)
    job.observer.layer_done(index, name, W.numel())


def _measure(
    unit: Unit, block: Block, fresh: list[partial[Any]], outputs: list[Any] | None,
    trials: dict[str, dict[tuple[int, int], solver.SolvedLayer]], job: Job,
) -> Unit:  # fmt: skip
    """The unit with the error that each choice brings into the block's output, on held-out windows.

    Where the original `outputs` are not given, each is computed when it is compared.
    """
    windows = [i for i in range(len(fresh)) if is_held_out(i, len(fresh))] or list(range(len(fresh)))
    found = []
    for choice in unit.choices:
        weights: dict[nn.Module, nn.Parameter | None] = {}
        for name in unit.layers:
            linear = block.linears[name]
            Q = trials[name][choice.bits, choice.group_size].weight()
            weights[linear] = nn.Parameter(job.stream.computed_with(linear, Q), requires_grad=False)
        errors = []
        for i in windows:
            original = outputs[i] if outputs else run_through(fresh[i])
            with swapped(weights):
                errors.append(_relative_change(run_through(fresh[i]), original))
        found.append(sum(errors) / len(errors))
    return _with_errors(unit, found)


def _with_errors(unit: Unit, errors: list[float]) -> Unit:
    return replace(unit, choices=tuple(replace(c, error=e) for c, e in zip(unit.choices, errors, strict=True)))


def _relative_change(output: Any, original: Any) -> float:
    """Mean over tokens of ||y - y'||^2 / ||y'||^2."""
    y, wanted = first_tensor(output).double(), first_tensor(original).double()  # (..., tokens, width)
    return float(((y - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=TINY)).mean())
