"""Quantize one decoder block: solve its layers, tune them together if asked to, and pack them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from gptq import formats
from gptq.calibration.windows import held_out_windows
from gptq.checkpoint.tensors import sha256
from gptq.compute.allocator import return_freed_memory
from gptq.compute.background import Background
from gptq.models.blocks import Block
from gptq.models.forward import run_to_end
from gptq.models.weights import drop_parameters
from gptq.output.results import BlockError, code_histogram
from gptq.pipeline.block_result import BlockResult
from gptq.pipeline.block_walk import Calls, Outputs
from gptq.pipeline.layer import BlockState, quantize_layer
from gptq.pipeline.layer_walk import solve_block
from gptq.pipeline.run import Run
from gptq.pipeline.shared_calls import share_calls
from gptq.pipeline.tune import BlockToTune, hidden_states, tune

Pack = Callable[[Background], BlockResult]  # packs a block, on its threads


def quantize_block(block: Block, calls: Calls, in_flight: int, run: Run) -> tuple[Outputs, Pack]:
    """Solve a block's layers, tune them together if tune_steps is set; return outputs, and what packs the layers."""
    state = BlockState(block, run)
    outputs = solve_block(calls, in_flight, state, quantize_layer)
    if run.config.tune_steps and not block.is_head():
        tuned, error = _tune_block(calls[0], outputs, state)
        return outputs, partial(_pack_block, state, tuned, (error,))
    return outputs, partial(_pack_block, state, {}, ())


def round_block(block: Block, run: Run) -> Pack:
    """Round the layers of a block that has no calibration inputs to nearest."""
    state = BlockState(block, run)
    own, outcomes = state.alone(), {}
    for number, name in enumerate(block.linears):
        if run.ranks.owns(number):
            quantize_layer(name, None, own)
            outcomes[number] = own.take_outcome()
    state.join_outcomes(outcomes)
    drop_parameters(block.module)
    return_freed_memory()
    return partial(_pack_block, state, {}, ())


def _tune_block(calls: list[partial[Any]], outputs: Outputs, state: BlockState) -> tuple[dict[str, Tensor], BlockError]:
    """Tune a solved block towards the original block's outputs; recompute the quantized stream's `outputs`.

    Returns the tuned norms and biases by name in the model, and the block's error before and after.
    """
    block, run = state.block, state.run
    layers = {block.linears[name]: solution.solved for name, solution in state.solutions.items()}
    all_calls, targets = share_calls(calls, [hidden_states(out) for out in outputs[1]], run)
    held_out = held_out_windows(len(all_calls))
    full_names = {m: ".".join(filter(None, (block.name, path))) for path, m in block.module.named_modules()}
    named = {(m, key): f"{full_name}.{key}" for m, full_name in full_names.items() for key in m._parameters}
    kept = {key for key, name in named.items() if not run.weights.is_stored_whole(name)}
    grids = {linear: run.layers[name].grid for name, linear in block.linears.items()}
    names = {linear: name for name, linear in block.linears.items()}

    def to_layout(linear: nn.Module, W: Tensor) -> Tensor:
        return run.weights.to_forward_layout(names[linear], linear, W)

    to_tune = BlockToTune(block.module, all_calls, targets, held_out, layers, grids, to_layout, kept, run.ranks)
    tuned = tune(to_tune, run.config.tune_steps or 0, run.config.seed)
    error = BlockError(block.name, tuned.error_before, tuned.error_after)
    if tuned.layers is layers:
        state.note(f"{block.name}: tuning did not bring it closer to the original, so it stays as it was solved")
        return {}, error
    for name, linear in block.linears.items():
        state.solutions[name] = replace(state.solutions[name], solved=tuned.layers[linear])
        run.weights.set_weight(name, linear, state.solutions[name].solved.weight())
    parameters: dict[str, Tensor] = {}
    for (module, key), tensor in tuned.parameters.items():
        name = named[module, key]
        _, parameters[name] = run.weights.to_stored(name, tensor)
        module._parameters[key] = nn.Parameter(parameters[name].to(tensor), requires_grad=False)
    outputs[0][:] = [run_to_end(call) for call in calls]
    return parameters, error


@dataclass(frozen=True)
class _PackedLayer:
    tensors: dict[str, Tensor]  # by stored name
    histogram: dict[str, Any]
    checksum: str  # of the dequantized weight


def _pack_layer(state: BlockState, name: str) -> _PackedLayer:
    solution, plan = state.solutions.pop(name), state.run.layers[name]
    encoded = formats.encode(solution.solved, plan.scheme, plan.scale_dtype)
    return _PackedLayer(
        {f"{plan.stored}.{key}": tensor for key, tensor in encoded.items()},
        (solution.histogram or {}) | code_histogram(solution.solved.codes, plan.bits),
        sha256(solution.solved.weight()),
    )


def _pack_block(
    state: BlockState, tuned: Mapping[str, Tensor], errors: tuple[BlockError, ...], background: Background
) -> BlockResult:
    """Pack the layers that this process packs, and collect everything that quantizing the block yielded."""
    run, solutions = state.run, state.solutions
    names = [name for name in state.block.linears if name in solutions and solutions[name].histogram is not None]
    packed = dict(zip(names, background.map(partial(_pack_layer, state), names), strict=True))
    solutions.clear()
    tensors = {key: tensor for layer in packed.values() for key, tensor in layer.tensors.items()}
    stored = {name: run.weights.to_stored(name, tensor) for name, tensor in tuned.items()}
    return BlockResult(
        name=state.block.name,
        layers=tuple(state.results),
        weight_checksums={name: layer.checksum for name, layer in packed.items()},
        histograms={name: layer.histogram for name, layer in packed.items()},
        tuned={name: own for name, (own, _) in stored.items()},
        errors=errors,
        coverage=tuple(state.coverage),
        notes=tuple(state.notes),
        tensors=tensors | (dict(stored.values()) if run.ranks.rank == 0 else {}),  # of what all have, the first's
    )
