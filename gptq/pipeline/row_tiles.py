"""Solve the rows of one or several layers with the same input, tile by tile.

Rows do not depend on each other once the Hessian is factorized. So the rows of layers that share an input and a scheme
are one matrix, taken TILE_ROWS at a time, whichever layer they belong to; processes take the tiles in turns.
"""

from dataclasses import astuple, dataclass, fields
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gptq import solver
from gptq.compute.distributed import ALONE, Ranks
from gptq.config import QuantConfig
from gptq.pipeline.layer_inputs import HeldOutBlend, LayerInputs
from gptq.planning.plan import LayerPlan
from gptq.solver.coordinate_descent import refine
from gptq.solver.error_propagation import best_share
from gptq.solver.hessian import output_power
from gptq.solver.solve import SMALLEST_POWER, TILE_ROWS

SAMPLED_ROWS = 256  # rows per layer, about, that estimate the errors of RTN and on held-out windows
DEFAULT_SHARE = 0.5  # of the correction, where no held-out window tells a better one (QEP's choice)
LARGEST_ERROR = 1e30  # that the record's readers accept
ROUNDING = 1e-10  # relative errors up to here are floating-point rounding


@dataclass(frozen=True)
class Rows:
    """The weights of layers with one input as one matrix, and how it is tiled."""

    W: Tensor  # (rows, inputs) float32
    layers: tuple[slice, ...]  # the rows of each layer
    tiles: tuple[slice, ...]

    @classmethod
    def of(cls, weights: list[Tensor]) -> "Rows":
        """From each layer's weight (outputs, inputs)."""
        W = torch.cat(weights) if len(weights) > 1 else weights[0]
        tiles = tuple(slice(start, min(start + TILE_ROWS, len(W))) for start in range(0, len(W), TILE_ROWS))
        bounds = [0, *accumulate(map(len, weights))]
        return cls(W, tuple(slice(start, stop) for start, stop in pairwise(bounds)), tiles)

    def own_tiles(self, ranks: Ranks) -> dict[int, slice]:
        """Those that this process solves, by number."""
        return {number: tile for number, tile in enumerate(self.tiles) if ranks.owns(number)}


@dataclass(frozen=True)
class Corrections:
    """What makes up for the drift: W C H^-1 of this process's tiles, and the share of it that each layer takes."""

    by_tile: dict[int, Tensor]  # (rows of the tile, inputs); empty where nothing drifted; each is used once
    shares: tuple[float | None, ...]  # by layer; None where the original's activations are not carried


@dataclass(frozen=True)
class ErrorSums:
    """Sums over some rows of a layer, which add up over tiles; see `figures` for what they make.

    `power` is tr(W H W^T), errors are tr((T - Q) H (T - Q)^T) with the target T. What costs a product of its own is
    summed over sampled rows only.
    """

    error: float = 0.0
    power: float = 0.0
    sampled_error: float = 0.0
    sampled_power: float = 0.0
    sampled_rtn_error: float = 0.0
    held_out_error: float = 0.0
    held_out_power: float = 0.0

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        return ErrorSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def figures(self, inputs: LayerInputs, share: float | None) -> "LayerFigures":
        """Relative errors of the layer.

        Sampled rows say how much larger or smaller than the solve's error another error is. Taken by themselves they
        would be the errors of other rows: a few rows can hold most of a layer's power.
        """
        error = _ratio(self.error, self.power)
        sampled = _ratio(self.sampled_error, self.sampled_power)
        scale = error / sampled if min(error, sampled) > ROUNDING else 1.0
        held_out = None if inputs.held_out is None else _ratio(scale * self.held_out_error, self.held_out_power)
        rtn_error = _ratio(scale * self.sampled_rtn_error, self.sampled_power)
        return LayerFigures(error, rtn_error, held_out, share, inputs.factor.damp, inputs.tokens)


def _ratio(error: float, power: float) -> float:
    """A relative error, at most what the record can hold: a layer may have no output to speak of."""
    return min(error / max(power, SMALLEST_POWER), LARGEST_ERROR)


@dataclass(frozen=True)
class LayerFigures:
    """The figures of a solved layer; `output.results.LayerResult` says what each means."""

    error: float
    rtn_error: float
    heldout_error: float | None
    share: float | None
    damp: float | None
    tokens: int


def round_rows(W: Tensor, plan: LayerPlan) -> tuple[solver.SolvedLayer, LayerFigures]:
    """The nearest codes of W (outputs, inputs), for a layer whose inputs are not known."""
    nearest = solver.round_to_nearest(W, plan.bits, plan.group_size, plan.sym)
    error = nearest.error / max(float(W.double().square().sum()), SMALLEST_POWER)
    return nearest, LayerFigures(error, error, heldout_error=None, share=None, damp=None, tokens=0)


def find_corrections(rows: Rows, inputs: LayerInputs, config: QuantConfig, ranks: Ranks = ALONE) -> Corrections:
    """What makes up for the drift, and how much of it each layer takes: as much as helps on held-out windows."""
    drift, held_out = inputs.drift, inputs.held_out
    if drift is None:
        return Corrections({}, (0.0 if config.two_streams else None,) * len(rows.layers))
    by_tile: dict[int, Tensor] = {}
    gains: dict[int, Tensor] = {}
    for number, tile in rows.own_tiles(ranks).items():
        by_tile[number] = drift.correction(rows.W[tile], inputs.factor)
        if held_out is not None:
            inside = [rows_inside(tile, layer) for layer in rows.layers]
            found = [_gain(rows.W[tile], by_tile[number], own, held_out) for own in inside]
            if None not in found:
                gains[number] = torch.tensor(found, dtype=torch.float64, device=rows.W.device)  # (layers, 2)
    exchanged = ranks.gather_pieces(gains, len(rows.tiles))
    if not exchanged:
        return Corrections(by_tile, (DEFAULT_SHARE,) * len(rows.layers))
    return Corrections(by_tile, tuple(best_share(*gain) for gain in torch.stack(exchanged).sum(0).tolist()))


def _gain(W: Tensor, correction: Tensor, rows: slice, held_out: HeldOutBlend) -> tuple[float, float] | None:
    """The arguments of `best_share` for some rows; None where the original's inputs are not known."""
    if not len(W[rows]):
        return 0.0, 0.0
    agreement = held_out.agreement(W[rows], correction[rows])
    return None if agreement is None else (held_out.power(correction[rows]), agreement)


def solve_rows(
    rows: Rows, corrections: Corrections, plan: LayerPlan, inputs: LayerInputs, config: QuantConfig,
    ranks: Ranks = ALONE,
) -> list[tuple[solver.SolvedLayer, LayerFigures]]:  # fmt: skip
    """Codes and figures of each layer; `plan` is that of any of them, as all are stored alike."""
    W = rows.W
    heights = [layer.stop - layer.start for layer in rows.layers]
    shares = torch.cat(
        [W.new_full((height, 1), share or 0.0) for height, share in zip(heights, corrections.shares, strict=True)]
    )  # (rows, 1)
    solved: dict[int, solver.SolvedLayer] = {}
    sums: dict[int, Tensor] = {}
    for number, tile in rows.own_tiles(ranks).items():
        correction = corrections.by_tile.pop(number, None)
        target = W[tile] if correction is None else W[tile] + shares[tile] * correction
        correction = None  # its memory is needed
        solved[number] = _solve_tile(target, plan, inputs, config)
        found = [_sum_errors(W[tile], target, solved[number], tile, layer, plan, inputs) for layer in rows.layers]
        sums[number] = torch.tensor([astuple(one) for one in found], dtype=torch.float64, device=W.device)
    whole = _stacked(solved, len(rows.tiles), ranks)
    totals = [ErrorSums()] * len(rows.layers)
    for of_layers in ranks.gather_pieces(sums, len(rows.tiles)):  # (layers, sums) of each tile
        totals = [total + ErrorSums(*values) for total, values in zip(totals, of_layers.tolist(), strict=True)]
    return [
        (whole.take(layer), total.figures(inputs, share))
        for layer, total, share in zip(rows.layers, totals, corrections.shares, strict=True)
    ]


def _solve_tile(target: Tensor, plan: LayerPlan, inputs: LayerInputs, config: QuantConfig) -> solver.SolvedLayer:
    """Codes for rows of a target (rows, inputs)."""
    solved = solver.solve(
        target, inputs.factor, plan.bits, plan.group_size, plan.sym, config.static_groups, bool(config.search)
    )
    return refine(target, solved, inputs.factor, plan.bits, config.sweeps) if config.sweeps else solved


def _sum_errors(
    W: Tensor, target: Tensor, solved: solver.SolvedLayer, tile: slice, layer: slice, plan: LayerPlan,
    inputs: LayerInputs,
) -> ErrorSums:  # fmt: skip
    """The sums over those rows of a tile, W and its target (rows, inputs), that belong to a layer."""
    own, sample = rows_inside(tile, layer), sampled_rows(tile, layer)
    if not len(W[own]):
        return ErrorSums()
    factor, held_out = inputs.factor, inputs.held_out
    off = target[own] - solved.take(own).weight()
    undamped = (solved.row_errors[own] - factor.ridge * off.square().sum(1, dtype=torch.float64)).clamp(min=0)
    sums = ErrorSums(error=float(undamped.sum()), power=output_power(W[own], factor.H))
    some = W[sample].contiguous()  # (sampled rows, inputs)
    if not len(some):
        return sums
    inside = slice(sample.start - own.start, sample.stop - own.start, sample.step)
    nearest = solver.round_to_nearest(some, plan.bits, plan.group_size, plan.sym).weight()
    return sums + ErrorSums(
        sampled_error=float(undamped[inside].sum()),
        sampled_power=sums.power if len(some) == len(W[own]) else output_power(some, factor.H),
        sampled_rtn_error=output_power(target[sample] - nearest, factor.H),
        held_out_error=0.0 if held_out is None else held_out.power(off[inside].contiguous()),
        held_out_power=0.0 if held_out is None else held_out.power(some),
    )


def rows_inside(tile: slice, layer: slice) -> slice:
    """The rows of a tile that belong to a layer, counted from the tile's start; possibly none."""
    start, stop = max(tile.start, layer.start), min(tile.stop, layer.stop)
    return slice(start - tile.start, max(stop, start) - tile.start)


def sampled_rows(tile: slice, layer: slice) -> slice:
    """Every step-th row of a layer that lies in a tile, the same rows whatever the tiling.

    The step is odd because attention's rows repeat with a period that is a power of two.
    """
    rows, step = rows_inside(tile, layer), (layer.stop - layer.start) // SAMPLED_ROWS | 1
    skipped = (layer.start - tile.start - rows.start) % step  # from the layer's first row on, every step-th
    return slice(min(rows.start + skipped, rows.stop), rows.stop, step)


def _stacked(parts: dict[int, solver.SolvedLayer], count: int, ranks: Ranks) -> solver.SolvedLayer:
    """All rows, one tile below the other, wherever they were solved."""
    names = [one.name for one in fields(solver.SolvedLayer)]
    columns = [ranks.gather_pieces({n: getattr(part, name) for n, part in parts.items()}, count) for name in names]
    return solver.SolvedLayer.stack([solver.SolvedLayer(*tile) for tile in zip(*columns, strict=True)])
