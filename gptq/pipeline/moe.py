"""Quantizing a list of experts, each for the tokens that the router sends it."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gptq.compute.distributed import Item
from gptq.models.blocks import Block
from gptq.models.experts import Expert, Experts
from gptq.models.forward import Pause, argument, input_at
from gptq.models.weights import swapped
from gptq.output.results import Coverage
from gptq.pipeline.job import Job
from gptq.pipeline.layer import original_weights
from gptq.pipeline.layer_inputs import accumulated, known_from, pseudo_tokens

Routed = tuple[Tensor, Tensor, Tensor | None]  # x (tokens, hidden), experts (tokens, k), x of the original model


def routed(pause: Pause | None, original: Pause | None) -> Item:
    """As Routed; nothing for a window that passed by the experts."""
    return (None, None, None) if pause is None else (argument(pause), argument(pause, 1), input_at(original))


def everywhere(arriving: Iterable[Item], windows: int, job: Job) -> list[Routed]:
    """What the windows of all processes bring, `arriving` being those of this one, of which there are so many."""
    items = job.ranks.in_order(arriving, job.ranks.total(windows), parts=3)
    return [(x, experts, original) for x, experts, original in items if x is not None and experts is not None]


def solve_experts(index: int, block: Block, name: str, experts: Experts, windows: list[Routed], job: Job) -> None:
    """Quantize a layer's experts, each for its own tokens, blended with all of the layer's where these are too few."""
    everyone = accumulated(windows[0][0].shape[-1], ((x, original) for x, _, original in windows), len(windows), job)
    tokens, blended = [], []
    for number, expert in enumerate(experts):
        if not isinstance(expert, Expert):
            raise TypeError(f"{name}.{number} is a {type(expert).__name__}")
        own = [(routes == number).any(-1) for _, routes, _ in windows]  # (tokens,) each
        tokens.append(sum(int(rows.sum()) for rows in own))
        layers = {f"{name}.{number}.{part}": linear for part, linear in expert.named_children()}
        planned = {linear: layer for layer, linear in layers.items() if layer in job.plans}
        gate_up = [planned[linear] for linear in (expert.gate_proj, expert.up_proj) if linear in planned]
        few = False
        if gate_up:
            pairs = [
                (x[rows], None if original is None else original[rows])
                for (x, _, original), rows in zip(windows, own, strict=True)
            ]
            sums = accumulated(job.plans[gate_up[0]].inputs, pairs, len(windows), job)
            known = known_from(gate_up[0], sums, everyone, job)
            few = pseudo_tokens(sums[0].num_tokens, job.plans[gate_up[0]].inputs) > 0
            for layer in gate_up:
                job.finish(index, block, layer, known, job)
        if expert.down_proj in planned:
            few |= _solve_down(
                index, block, planned[expert.down_proj], expert, list(zip(windows, own, strict=True)), job
            )
        if few:
            blended.append(number)
    _report_coverage(Coverage(name, sum(len(x) for x, _, _ in windows), tokens, blended), job)


def _solve_down(
    index: int, block: Block, name: str, expert: Expert, windows: list[tuple[Routed, Tensor]], job: Job
) -> bool:
    """Quantize an expert's down_proj behind its quantized gate and up; whether its own tokens were too few."""
    originals = original_weights(expert, block, job)
    inputs = job.plans[name].inputs

    def inner(everyone: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        for (x, _, original), own in windows:
            rows = torch.ones_like(own) if everyone else own
            h = expert.intermediate(x[rows])
            if original is None:
                yield h, None
            else:
                with swapped(originals):
                    yield h, expert.intermediate(original[rows])

    sums = accumulated(inputs, inner(False), len(windows), job)
    few = pseudo_tokens(sums[0].num_tokens, inputs) > 0
    all_sums = accumulated(inputs, inner(True), len(windows), job) if few else None
    job.finish(index, block, name, known_from(name, sums, all_sums, job), job)
    return few


def _report_coverage(found: Coverage, job: Job) -> None:
    job.coverage.append(found)
    if job.writer is None:  # only measured
        return
    if found.blended:
        least = min(range(len(found.tokens)), key=found.tokens.__getitem__)
        job.note(
            f"{found.name}: {len(found.blended)} of {len(found.tokens)} experts saw too few of {found.all_tokens} "
            f"tokens (the least, expert {least}, {found.tokens[least]}); their Hessians are blended with that of all"
        )
