"""One linear layer: what its inputs tell, and its codes; and what a run carries along from layer to layer."""

import time
from typing import Any

from torch import Tensor, nn

from gptq import solver
from gptq.compute.allocator import return_freed_memory
from gptq.errors import InputError
from gptq.models.blocks import Block, fused_siblings
from gptq.output.results import LayerResult, weight_histogram
from gptq.pipeline.job import Job
from gptq.pipeline.layer_inputs import LayerInputs, Solution
from gptq.pipeline.row_tiles import solve_rows
from gptq.planning.plan import LayerPlan
from gptq.solver.solve import TINY


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
