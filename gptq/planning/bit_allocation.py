"""Mixed precision under a byte budget: choose the bit width and group size of each layer.

Every unit (a layer, or sibling layers that engines fuse) can be stored in several ways. Each way has a size in bytes
and an error in the output of the unit's block. Choosing one way per unit, with the least sum of errors within the
budget, is a knapsack problem.

Few of the ways are measured. The ratio of the errors of two group sizes hardly depends on the width (within 7 % on two
models), so each width is measured with one group size, and the other group sizes with one width. From some width on, a
further bit halves the distance to the grid and quarters the error (3.9 to 4.0 times from 3 bits on, in float32; in
bfloat16 the forward's own rounding hides it), so large widths are not measured at all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gptq import formats
from gptq.config import Format, Override, QuantConfig
from gptq.errors import InputError
from gptq.formats.scheme import Scheme
from gptq.models.blocks import group_fused_siblings
from gptq.planning.layer_plan import LayerPlan
from gptq.planning.plan import Plan
from gptq.planning.result_tensors import list_result_tensors

GROUP_SIZES = (-1, 32, 64, 128)  # inputs per scale that are tried beside the configured number
MEASURED_WIDTH = 3  # bits: the width, or the nearest one, that is measured with every group size
LARGEST_MEASURED = 4  # bits: the errors of wider codes follow from this width's
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
    choices: tuple[StorageChoice, ...]  # of each width, the one with the configured group size first

    @cached_property
    def _group_sizes(self) -> dict[int, list[int]]:
        """The group sizes of each width."""
        found: dict[int, list[int]] = {}
        for choice in self.choices:
            found.setdefault(choice.bits, []).append(choice.group_size)
        return found

    @cached_property
    def _width(self) -> int:
        """The width that is measured with every group size."""
        return min(self._group_sizes, key=lambda bits: abs(bits - MEASURED_WIDTH))

    @cached_property
    def measured(self) -> tuple[StorageChoice, ...]:
        """The choices whose errors are measured; `with_errors` estimates the others."""
        return tuple(
            choice
            for choice in self.choices
            if not self._is_wide(choice.bits, choice.group_size) and not self._is_other(choice.bits, choice.group_size)
        )

    def _is_wide(self, bits: int, group: int) -> bool:
        """Whether an error follows from that of fewer bits in the same groups."""
        return bits > LARGEST_MEASURED and group in self._group_sizes.get(LARGEST_MEASURED, ())

    def _is_other(self, bits: int, group: int) -> bool:
        """Whether an error follows from that of the same bits in other groups."""
        first = self._group_sizes[bits][0]
        return bits != self._width and group != first and {first, group} <= set(self._group_sizes[self._width])

    def with_errors(self, errors: Sequence[float]) -> "Unit":
        """Return the unit with an error for each choice.

        Args:
            errors: of the `measured` choices.
        """
        known = {(c.bits, c.group_size): error for c, error in zip(self.measured, errors, strict=True)}

        def error(bits: int, group: int) -> float:
            if self._is_wide(bits, group):
                return error(LARGEST_MEASURED, group) / 4.0 ** (bits - LARGEST_MEASURED)
            if self._is_other(bits, group):
                first = self._group_sizes[bits][0]
                of_first, of_other = known[self._width, first], known[self._width, group]
                return known[bits, first] * (of_other / of_first if of_first else 1.0)
            return known[bits, group]

        return replace(self, choices=tuple(replace(c, error=error(c.bits, c.group_size)) for c in self.choices))


def find_units(plan: Plan, config: QuantConfig) -> tuple[list[Unit], Format]:
    """Return the units of a planned checkpoint, and the format; an overridden unit has a single choice."""
    chosen = _choose_format(plan, config)
    own = formats.FORMATS[chosen]
    groups = dict.fromkeys((config.group_size, *GROUP_SIZES))
    asked = [own.adapt(Scheme(bits, group, config.sym, chosen)) for bits in own.widths for group in groups]
    all_ways = list(dict.fromkeys((scheme.bits, scheme.group_size) for scheme in asked))
    usual = own.adapt(Scheme(config.bits, config.group_size, config.sym, chosen)).group_size
    units = []
    for names in group_fused_siblings(plan.layers):
        layers = [plan.layers[name] for name in names]
        first = layers[0]
        is_default = first.bits == config.bits and first.group_size in (min(usual, first.inputs), first.inputs)
        ways = _list_ways(layers, all_ways, config, chosen) if is_default else []
        ways = ways or [(first.bits, first.group_size)]
        choices = [StorageChoice(b, g, sum(_nbytes(layer, b, g, chosen) for layer in layers)) for b, g in ways]
        units.append(Unit(tuple(names), tuple(choices)))
    return units, chosen


def _list_ways(
    layers: Sequence[LayerPlan], all_ways: Sequence[tuple[int, int]], config: QuantConfig, chosen: Format
) -> list[tuple[int, int]]:
    """Return the pairs of width and group size in which the format can hold layers, each way to store them once.

    A group size that was not configured has to divide the inputs, because few engines read a short last group.
    """
    found: dict[tuple[int, int], tuple[int, int]] = {}  # by width and columns of a group
    for bits, group in all_ways:
        columns = [_scheme(layer, bits, group, chosen).columns(layer.inputs) for layer in layers]
        divides = all(layer.inputs % one == 0 for layer, one in zip(layers, columns, strict=True))
        if _holds(layers, (bits, group), chosen) and (divides or group == config.group_size):
            found.setdefault((bits, max(columns)), (bits, group))
    return list(found.values())


def _holds(layers: Sequence[LayerPlan], way: tuple[int, int], chosen: Format) -> bool:
    """Whether a format can hold layers with these bits and this group size."""
    schemes = ((layer, _scheme(layer, *way, chosen)) for layer in layers)
    return not any(formats.refusal(scheme, one.outputs, one.inputs, one.transposed) for one, scheme in schemes)


def _choose_format(plan: Plan, config: QuantConfig) -> Format:
    """Return the configured format; for "auto" pack-quantized if it holds all layers in all widths, otherwise GPTQ."""
    if config.format != "auto":
        return config.format
    packed: Format = "pack-quantized"
    layers = [*plan.layers.values()]
    if all(_holds(layers, (bits, config.group_size), packed) for bits in formats.FORMATS[packed].widths):
        return packed
    return "gptq" if config.sym else "gptq_v2"


def _scheme(layer: LayerPlan, bits: int, group_size: int, chosen: Format) -> Scheme:
    columns = layer.inputs if group_size == -1 else min(group_size, layer.inputs)
    return replace(layer, bits=bits, group_size=columns, format=chosen).scheme


def _nbytes(layer: LayerPlan, bits: int, group_size: int, chosen: Format) -> int:
    scheme = _scheme(layer, bits, group_size, chosen)
    return sum(info.nbytes for info in formats.layout(scheme, layer.outputs, layer.inputs, layer.scale_dtype).values())


def _uniform_bytes(layer: LayerPlan, chosen: Format) -> int:
    """Return the bytes of a layer as planned: with a zero point for each group, or what the format needs, if more."""
    groups = layer.scheme.groups(layer.inputs)
    bits = layer.outputs * (layer.inputs * layer.bits + groups * (8 * layer.scale_dtype.itemsize + layer.bits))
    return max(bits // 8, _nbytes(layer, layer.bits, layer.group_size, chosen))


def choose_storage(plan: Plan, config: QuantConfig, units: Sequence[Unit], chosen: Format) -> list[StorageChoice]:
    """Choose how each unit is stored, within what `mixed`, target_bits or target_size of the config allow.

    Raises:
        InputError: the target is too small.
    """
    if config.mixed:
        return allocate(units, sum(_uniform_bytes(layer, chosen) for layer in plan.layers.values()))
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
