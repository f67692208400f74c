"""Solve the rows of one or more layers that share an input, tile by tile.

Rows are independent of each other once the Hessian is factorized. The rows of layers that share an input and a scheme
are therefore stacked into one matrix and solved in tiles, which processes share out.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gptq import solver
from gptq.compute.device_profile import profile_of
from gptq.compute.distributed import ALONE, Ranks
from gptq.config import QuantConfig
from gptq.pipeline.layer_inputs import DriftForm, HeldOutBlend, LayerInputs
from gptq.planning.layer_plan import LayerPlan
from gptq.solver.coordinate_descent import refine
from gptq.solver.error_propagation import best_correction_share
from gptq.solver.hessian import mean_output_power
from gptq.solver.solve import SMALLEST_POWER

SAMPLED_ROWS = 256  # rows per layer, approximately, that estimate the error of RTN and the held-out error
DEFAULT_SHARE = 0.5  # fraction of the correction applied when no held-out window can choose it (as in QEP)
LARGEST_ERROR = 1e30  # the largest relative error that a record may hold
ROUNDING = 1e-10  # smaller relative errors are due to floating-point rounding


@dataclass(frozen=True)
class StackedRows:
    """The stacked weights of layers that share an input, and their tiles."""

    W: Tensor  # (rows, inputs) float32
    layers: tuple[slice, ...]  # rows of each layer
    tiles: tuple[slice, ...]  # rows of each tile

    @classmethod
    def of(cls, weights: Iterable[Tensor], height: int, ranks: Ranks = ALONE) -> "StackedRows":
        """Stack weights (outputs, inputs) of `height` rows together, in tiles of the size that suits their device.

        Each is copied and freed before the next is read: together they can be most of the memory.
        """
        W: Tensor | None = None
        bounds = [0]
        for weight in weights:
            if len(weight) == height:
                W = weight
            else:
                W = weight.new_empty(height, weight.shape[1]) if W is None else W
                W[bounds[-1] : bounds[-1] + len(weight)] = weight
            bounds.append(bounds[-1] + len(weight))
            del weight
        if W is None:
            raise ValueError("there is no weight to stack")
        step = profile_of(W.device, ranks.size).tile_rows(len(W))
        tiles = tuple(slice(start, min(start + step, len(W))) for start in range(0, len(W), step))
        return cls(W, tuple(slice(start, stop) for start, stop in pairwise(bounds)), tiles)

    def own_tiles(self, ranks: Ranks) -> dict[int, slice]:
        """Return the tiles that this process solves, by number."""
        return {number: tile for number, tile in enumerate(self.tiles) if ranks.owns(number)}


@dataclass(frozen=True)
class Corrections:
    """Corrections for the drift (see `error_propagation`), and the fraction of its own that each layer applies."""

    by_tile: dict[int, Tensor]  # own tiles, (rows, inputs) each; removed when solved; empty without drift
    shares: tuple[float | None, ...]  # fraction by layer; None with one stream


@dataclass(frozen=True)
class ErrorSums:
    """Sums over some rows of a layer, which add up over tiles; `figures` turns them into relative errors.

    `power` is tr(W H W^T), errors are tr((T - Q) H (T - Q)^T), with the original weight W, the input Hessian H, the
    target T (W plus its correction) and the dequantized weight Q. Sums that need a matrix product of their own run over
    sampled rows only.
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
        """Return the layer's relative errors.

        Sampled rows give only the ratio between the solve's error and another error. The relative error of the sampled
        rows would not represent the layer, because a few rows can hold most of the layer's output power.
        """
        error = _ratio(self.error, self.power)
        sampled = _ratio(self.sampled_error, self.sampled_power)
        scale = error / sampled if min(error, sampled) > ROUNDING else 1.0
        held_out = None if inputs.held_out is None else _ratio(scale * self.held_out_error, self.held_out_power)
        rtn_error = _ratio(scale * self.sampled_rtn_error, self.sampled_power)
        return LayerFigures(error, rtn_error, held_out, share, inputs.factor.damp, inputs.tokens)


def _ratio(error: float, power: float) -> float:
    """Return a relative error, at most LARGEST_ERROR: the output power of a layer can be almost 0."""
    return min(error / max(power, SMALLEST_POWER), LARGEST_ERROR)


@dataclass(frozen=True)
class LayerFigures:
    """Error figures of a solved layer, documented in `output.results.LayerResult`."""

    error: float
    rtn_error: float
    heldout_error: float | None
    share: float | None
    damp: float | None
    tokens: int


def round_rows(W: Tensor, plan: LayerPlan, grid: solver.Grid) -> tuple[solver.SolvedLayer, LayerFigures]:
    """Round W (outputs, inputs) to nearest, for a layer without calibration inputs."""
    nearest = solver.round_to_nearest(W, grid, plan.group_size)
    error = nearest.error / max(float(W.double().square().sum()), SMALLEST_POWER)
    return nearest, LayerFigures(error, error, heldout_error=None, share=None, damp=None, tokens=0)


def find_corrections(rows: StackedRows, inputs: LayerInputs, config: QuantConfig, ranks: Ranks = ALONE) -> Corrections:
    """Return the corrections for the drift; held-out windows choose the fraction that each layer applies."""
    drift, held_out = inputs.drift, inputs.held_out
    if drift is None:
        return Corrections({}, (0.0 if config.two_streams else None,) * len(rows.layers))
    by_tile: dict[int, Tensor] = {}
    gains: dict[int, Tensor] = {}
    for number, tile in rows.own_tiles(ranks).items():
        by_tile[number] = drift.correction(rows.W[tile], tile, inputs.factor)
        if held_out is not None:
            W = None if drift.form is DriftForm.OUTPUTS else rows.W[tile]
            parts = [rows_inside(tile, layer) for layer in rows.layers]
            found = [_measure_gain(W, by_tile[number], part, tile, held_out) for part in parts]
            if None not in found:
                gains[number] = torch.tensor(found, dtype=torch.float64, device=rows.W.device)  # (layers, 2)
    exchanged = ranks.gather_pieces(gains, len(rows.tiles))
    if not exchanged:
        return Corrections(by_tile, (DEFAULT_SHARE,) * len(rows.layers))
    return Corrections(by_tile, tuple(best_correction_share(*gain) for gain in torch.stack(exchanged).sum(0).tolist()))


def _measure_gain(
    W: Tensor | None, correction: Tensor, rows: slice, tile: slice, held_out: HeldOutBlend
) -> tuple[float, float] | None:
    """Return the arguments of `best_correction_share` for some rows of a tile; None if no drift is known.

    Args:
        W: the tile's weight, or None where the drift is one of outputs, which are then those of one layer.
    """
    A = correction[rows]
    if not len(A):
        return 0.0, 0.0
    outputs = slice(tile.start + rows.start, tile.start + rows.stop)
    agreement = held_out.agreement(None if W is None else W[rows], A, outputs)
    return None if agreement is None else (held_out.power(A), agreement)


def solve_rows(
    rows: StackedRows, corrections: Corrections, plan: LayerPlan, grid: solver.Grid, inputs: LayerInputs,
    config: QuantConfig, ranks: Ranks = ALONE,
) -> list[tuple[solver.SolvedLayer, LayerFigures]]:  # fmt: skip
    """Solve all tiles; return each layer's codes and figures. `plan` is that of any layer: all have the same scheme."""
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
        correction = None  # free it before the solve
        solved[number] = _solve_tile(target, plan, grid, inputs, config)
        found = [_sum_errors(W[tile], target, solved[number], tile, layer, plan, grid, inputs) for layer in rows.layers]
        sums[number] = torch.tensor([astuple(one) for one in found], dtype=torch.float64, device=W.device)
    whole = _gather_tiles(solved, len(rows.tiles), grid, ranks)
    totals = [ErrorSums()] * len(rows.layers)
    for of_layers in ranks.gather_pieces(sums, len(rows.tiles)):  # (layers, sums) of each tile
        totals = [total + ErrorSums(*values) for total, values in zip(totals, of_layers.tolist(), strict=True)]
    return [
        (whole.take(layer), total.figures(inputs, share))
        for layer, total, share in zip(rows.layers, totals, corrections.shares, strict=True)
    ]


def _solve_tile(
    target: Tensor, plan: LayerPlan, grid: solver.Grid, inputs: LayerInputs, config: QuantConfig
) -> solver.SolvedLayer:
    """Solve one tile's target (rows, inputs)."""
    solved = solver.solve(target, inputs.factor, grid, plan.group_size, config.static_groups, bool(config.search))
    return refine(target, solved, inputs.factor, grid, config.sweeps) if config.sweeps else solved


def _sum_errors(
    W: Tensor, target: Tensor, solved: solver.SolvedLayer, tile: slice, layer: slice, plan: LayerPlan,
    grid: solver.Grid, inputs: LayerInputs,
) -> ErrorSums:  # fmt: skip
    """Return the sums over a tile's rows that belong to one layer; W and target are the tile's rows, (rows, inputs)."""
    own = rows_inside(tile, layer)
    sample = own if grid.joins_rows else sampled_rows(tile, layer)
    if not len(W[own]):
        return ErrorSums()
    factor, held_out = inputs.factor, inputs.held_out
    off = target[own] - solved.take(own).weight()
    undamped = (solved.row_errors[own] - factor.ridge * off.square().sum(1, dtype=torch.float64)).clamp(min=0)
    sums = ErrorSums(error=float(undamped.sum()), power=mean_output_power(W[own], factor.H))
    some = W[sample].contiguous()  # (sampled rows, inputs)
    if not len(some):
        return sums
    inside = slice(sample.start - own.start, sample.stop - own.start, sample.step)
    nearest = solver.round_to_nearest(some, grid, plan.group_size).weight()
    return sums + ErrorSums(
        sampled_error=float(undamped[inside].sum()),
        sampled_power=sums.power if len(some) == len(W[own]) else mean_output_power(some, factor.H),
        sampled_rtn_error=mean_output_power(target[sample] - nearest, factor.H),
        held_out_error=0.0 if held_out is None else held_out.power(off[inside].contiguous()),
        held_out_power=0.0 if held_out is None else held_out.power(some),
    )


def rows_inside(tile: slice, layer: slice) -> slice:
    """Return the rows of a tile that belong to a layer, relative to the tile's start; the slice may be empty."""
    start, stop = max(tile.start, layer.start), min(tile.stop, layer.stop)
    return slice(start - tile.start, max(stop, start) - tile.start)


def sampled_rows(tile: slice, layer: slice) -> slice:
    """Return every step-th row of a layer inside a tile, relative to its start; the rows do not depend on the tiling.

    The step is odd, because the rows of attention weights repeat with a power-of-two period (the head size).
    """
    rows, step = rows_inside(tile, layer), (layer.stop - layer.start) // SAMPLED_ROWS | 1
    skipped = (layer.start - tile.start - rows.start) % step  # so that counting starts at the layer's first row
    return slice(min(rows.start + skipped, rows.stop), rows.stop, step)


def _gather_tiles(
    parts: dict[int, solver.SolvedLayer], count: int, grid: solver.Grid, ranks: Ranks
) -> solver.SolvedLayer:
    """Gather the tiles of all processes and stack them."""
    names = ["codes", "scale", "zero", "g_idx", *grid.stored, "row_errors"]
    columns = [ranks.gather_pieces({n: getattr(part, name) for n, part in parts.items()}, count) for name in names]
    tiles = [dict(zip(names, tile, strict=True)) for tile in zip(*columns, strict=True)]
    return solver.SolvedLayer.stack([solver.SolvedLayer(**tile) for tile in tiles])
