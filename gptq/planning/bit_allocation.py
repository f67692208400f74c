"""Mixed precision under a byte budget: choose the bit width and group size of each layer.

Every unit (a layer, or sibling layers that engines fuse) can be stored in several ways. Each way has a size in bytes
and an error in the output of the unit's block. Choosing one way per unit, with the least sum of errors within the
budget, is a knapsack problem.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptq import formats
from gptq.config import Format, Override, QuantConfig
from gptq.errors import InputError
from gptq.formats.scheme import Scheme
from gptq.models.blocks import group_fused_siblings
from gptq.planning.plan import LayerPlan, Plan, list_result_tensors

WIDTHS = (2, 3, 4, 8)  # bits per weight that are tried
FINE_GROUP = 32  # group size tried in addition to the configured one
BINS = 20_000  # resolution of the knapsack: the bytes above the smallest choice are rounded up to spare bytes / BINS


@dataclass(frozen=True)
class StorageChoice:
    """One way to store a unit."""

    bits: int
    group_size: int
    nbytes: int
    error: float = 0.0  # in the output of the block; 0 until it is measured


@dataclass(frozen=True)
class Unit:
    """Layers that must be stored in the same way, by their names in the model, and their choices."""

    layers: tuple[str, ...]
    choices: tuple[StorageChoice, ...]


def find_units(plan: Plan, config: QuantConfig) -> tuple[list[Unit], Format]:
    """Return the units of a planned checkpoint, and the format; an overridden unit has a single choice."""
    groups = dict.fromkeys((config.group_size, *((FINE_GROUP,) if not 0 < config.group_size <= FINE_GROUP else ())))
    chosen = _choose_format(plan, config, [(bits, group) for bits in WIDTHS for group in groups])
    own = formats.FORMATS[chosen]
    asked = [own.adapt(Scheme(bits, group, config.sym, chosen)) for bits in own.widths for group in groups]
    all_ways = list(dict.fromkeys((scheme.bits, scheme.group_size) for scheme in asked))
    usual = own.adapt(Scheme(config.bits, config.group_size, config.sym, chosen)).group_size
    units = []
    for names in group_fused_siblings(plan.layers):
        layers = [plan.layers[name] for name in names]
        first = layers[0]
        is_default = first.bits == config.bits and first.group_size in (
            min(usual, first.inputs),
            first.inputs,
        )
        ways = [way for way in all_ways if _holds(layers, way, chosen)] if is_default else []
        ways = ways or [(first.bits, first.group_size)]
        choices = [StorageChoice(b, g, sum(_nbytes(layer, b, g, chosen) for layer in layers)) for b, g in ways]
        units.append(Unit(tuple(names), tuple(choices)))
    return units, chosen


def _holds(layers: Sequence[LayerPlan], way: tuple[int, int], chosen: Format) -> bool:
    """Whether a format can hold layers with these bits and this group size."""
    schemes = ((layer, _scheme(layer, *way, chosen)) for layer in layers)
    return not any(formats.refusal(scheme, one.outputs, one.inputs, one.transposed) for one, scheme in schemes)


def _choose_format(plan: Plan, config: QuantConfig, ways: Sequence[tuple[int, int]]) -> Format:
    """Return the configured format; for "auto" pack-quantized if it holds every layer in every way, otherwise GPTQ."""
    if config.format != "auto":
        return config.format
    holds = all(_holds([*plan.layers.values()], way, "pack-quantized") for way in ways)
    if holds:
        return "pack-quantized"
    return "gptq" if config.sym else "gptq_v2"


def _scheme(layer: LayerPlan, bits: int, group_size: int, chosen: Format) -> Scheme:
    columns = layer.inputs if group_size == -1 else min(group_size, layer.inputs)
    return replace(layer, bits=bits, group_size=columns, format=chosen).scheme


def _nbytes(layer: LayerPlan, bits: int, group_size: int, chosen: Format) -> int:
    scheme = _scheme(layer, bits, group_size, chosen)
    return sum(info.nbytes for info in formats.layout(scheme, layer.outputs, layer.inputs, layer.scale_dtype).values())


def choose_storage(plan: Plan, config: QuantConfig, units: Sequence[Unit], chosen: Format) -> list[StorageChoice]:
    """Choose how each unit is stored, within the config's target_bits or target_size.

    Raises:
        InputError: the target is too small.
    """
    weights = sum(layer.outputs * layer.inputs for layer in plan.layers.values())
    if config.target_bits is not None:
        return allocate(units, int(config.target_bits * weights / 8))
    target = config.target_size or 0
    smallest = [min(unit.choices, key=lambda choice: choice.nbytes) for unit in units]
    packed = sum(choice.nbytes for choice in smallest)
    budget = packed + target - _file_bytes(plan, units, smallest, chosen)
    while True:  # the length of the files' headers depends on the choices by a few bytes
        choices = allocate(units, budget)
        excess = _file_bytes(plan, units, choices, chosen) - target
        if excess <= 0:
            return choices
        budget -= excess


def _file_bytes(plan: Plan, units: Sequence[Unit], choices: Sequence[StorageChoice], chosen: Format) -> int:
    """Return the total size of the files with tensors with these choices."""
    layers = {}
    for unit, choice in zip(units, choices, strict=True):
        for name in unit.layers:
            scheme = _scheme(plan.layers[name], choice.bits, choice.group_size, chosen)
            layers[name] = replace(
                plan.layers[name], bits=choice.bits, group_size=scheme.group_size, format=scheme.format
            )
    tensors, _ = list_result_tensors(plan.source, layers, plan.names)
    return formats.FORMATS[chosen].file_bytes(tensors, plan.folder)


def allocate(units: Sequence[Unit], budget: int) -> list[StorageChoice]:
    """Return the choices with the least sum of errors whose bytes add up to at most `budget`.

    Bytes are rounded up (see BINS), so the budget is never exceeded; otherwise the optimum is exact.

    Raises:
        InputError: even the smallest choices exceed the budget.
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
    least = np.zeros(bins + 1)  # [b]: least sum of errors of the units so far with at most b spare bins
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


def make_overrides(units: Sequence[Unit], chosen: Sequence[StorageChoice]) -> tuple[Override, ...]:
    """Return one override for each pair of bits and group size, whose pattern names the layers that get it."""
    layers_by_choice: dict[tuple[int, int], list[str]] = {}
    for unit, choice in zip(units, chosen, strict=True):
        layers_by_choice.setdefault((choice.bits, choice.group_size), []).extend(unit.layers)
    return tuple(
        Override(f"^(?:{'|'.join(map(re.escape, names))})$", bits=bits, group_size=group)
        for (bits, group), names in layers_by_choice.items()
    )
