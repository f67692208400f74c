"""Mixed widths under a budget: which width and group size each layer gets when the sum of bytes is given.

Every unit (a layer, or siblings that engines fuse) can be stored in several ways, each with its bytes and the error it
brings into its block's output. The choice is a knapsack: the least sum of errors whose bytes stay within the budget.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptq import formats
from gptq.checkpoint.writer import file_bytes
from gptq.config import Format, Override, QuantConfig
from gptq.errors import InputError
from gptq.formats.scheme import Scheme
from gptq.models.blocks import group_fused_siblings
from gptq.planning.plan import LayerPlan, Plan, announce

WIDTHS = (2, 3, 4, 8)
FINE_GROUP = 32  # tried beside the group size that was asked for
BINS = 20_000  # of the knapsack: a unit's bytes are rounded up to budget / BINS


@dataclass(frozen=True)
class Choice:
    """One way to store a unit."""

    bits: int
    group_size: int
    nbytes: int
    error: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Layers that are stored alike, by their names in the model, and the ways to do it."""

    layers: tuple[str, ...]
    choices: tuple[Choice, ...]


def units_of(plan: Plan, config: QuantConfig) -> tuple[list[Unit], Format]:
    """The units of a planned checkpoint, with all choices for those that no override has spoken of; and the format."""
    groups = dict.fromkeys((config.group_size, *((FINE_GROUP,) if not 0 < config.group_size <= FINE_GROUP else ())))
    everywhere = [(bits, group) for bits in WIDTHS for group in groups]
    chosen = _format(plan, config, everywhere)
    units = []
    for names in group_fused_siblings(plan.layers):
        layers = [plan.layers[name] for name in names]
        first = layers[0]
        usual = first.bits == config.bits and first.group_size in (min(config.group_size, first.inputs), first.inputs)
        ways = everywhere if usual else [(first.bits, first.group_size)]
        choices = [Choice(b, g, sum(_nbytes(layer, b, g, chosen) for layer in layers)) for b, g in ways]
        units.append(Unit(tuple(names), tuple(choices)))
    return units, chosen


def _format(plan: Plan, config: QuantConfig, ways: Sequence[tuple[int, int]]) -> Format:
    """The format asked for, or of pack-quantized and GPTQ the first that can hold every layer in every way."""
    if config.format != "auto":
        return config.format
    holds = all(
        not formats.refusal(_scheme(layer, b, g, "pack-quantized"), layer.outputs, layer.inputs, layer.transposed)
        for layer in plan.layers.values()
        for b, g in ways
    )
    if holds:
        return "pack-quantized"
    return "gptq" if config.sym else "gptq_v2"


def _scheme(layer: LayerPlan, bits: int, group_size: int, chosen: Format) -> Scheme:
    inside = layer.inputs if group_size == -1 else min(group_size, layer.inputs)
    return replace(layer, bits=bits, group_size=inside, format=chosen).scheme


def _nbytes(layer: LayerPlan, bits: int, group_size: int, chosen: Format) -> int:
    scheme = _scheme(layer, bits, group_size, chosen)
    return sum(info.nbytes for info in formats.layout(scheme, layer.outputs, layer.inputs).values())


def choose(plan: Plan, config: QuantConfig, units: Sequence[Unit], chosen: Format) -> list[Choice]:
    """The way each unit is stored so that the config's target is met.

    Raises:
        InputError: it cannot be met.
    """
    weights = sum(layer.outputs * layer.inputs for layer in plan.layers.values())
    if config.target_bits is not None:
        return allocate(units, int(config.target_bits * weights / 8))
    target = config.target_size or 0
    smallest = [min(unit.choices, key=lambda choice: choice.nbytes) for unit in units]
    packed = sum(choice.nbytes for choice in smallest)
    budget = packed + target - _file_bytes(plan, units, smallest, chosen)
    while True:  # headers hold numbers, so they grow by a few bytes with the choices
        choices = allocate(units, budget)
        excess = _file_bytes(plan, units, choices, chosen) - target
        if excess <= 0:
            return choices
        budget -= excess


def _file_bytes(plan: Plan, units: Sequence[Unit], choices: Sequence[Choice], chosen: Format) -> int:
    layers = {}
    for unit, choice in zip(units, choices, strict=True):
        for name in unit.layers:
            scheme = _scheme(plan.layers[name], choice.bits, choice.group_size, chosen)
            layers[name] = replace(
                plan.layers[name], bits=choice.bits, group_size=scheme.group_size, format=scheme.format
            )
    return file_bytes(announce(plan.source, layers))


def allocate(units: Sequence[Unit], budget: int) -> list[Choice]:
    """The choices with the least sum of errors whose bytes are at most `budget`.

    Exact but for bytes being rounded up to budget / BINS, so the budget is never exceeded.

    Raises:
        InputError: even the smallest choices take more.
    """
    smallest = [min(choice.nbytes for choice in unit.choices) for unit in units]
    spare = budget - sum(smallest)
    if spare < 0:
        raise InputError(
            f"the target leaves {max(budget, 0):,} bytes for the quantized layers, which take {sum(smallest):,} "
            "at their smallest; give a larger target, or quantize more layers"
        )
    step = max(spare / BINS, 1.0)
    bins = int(spare / step)
    least = np.zeros(bins + 1)  # least sum of errors of the units so far, by spare bins used at most
    taken = np.zeros((len(units), bins + 1), dtype=np.uint8)
    for row, (unit, base) in enumerate(zip(units, smallest, strict=True)):
        costs = np.full((len(unit.choices), bins + 1), np.inf)
        for i, choice in enumerate(unit.choices):
            extra = int(np.ceil((choice.nbytes - base) / step))
            if extra <= bins:
                costs[i, extra:] = least[: bins + 1 - extra] + choice.error
        taken[row] = costs.argmin(0)
        least = costs.min(0)
    chosen, left = [], bins
    for row in range(len(units) - 1, -1, -1):
        choice = units[row].choices[taken[row, left]]
        left -= int(np.ceil((choice.nbytes - smallest[row]) / step))
        chosen.append(choice)
    return chosen[::-1]


def overrides_for(units: Sequence[Unit], chosen: Sequence[Choice]) -> tuple[Override, ...]:
    """One override for each way of storing, naming the layers that get it."""
    alike: dict[tuple[int, int], list[str]] = {}
    for unit, choice in zip(units, chosen, strict=True):
        alike.setdefault((choice.bits, choice.group_size), []).extend(unit.layers)
    return tuple(
        Override(f"^(?:{'|'.join(map(re.escape, names))})$", bits=bits, group_size=group)
        for (bits, group), names in alike.items()
    )
