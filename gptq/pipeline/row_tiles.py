"""Solve the rows of one or several layers with the same input, tile by tile."""

from dataclasses import fields
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gptq import solver
from gptq.compute.distributed import ALONE, Ranks
from gptq.compute.matmul import product
from gptq.config import QuantConfig
from gptq.pipeline.layer_inputs import LayerInputs, Unseen
from gptq.planning.plan import LayerPlan
from gptq.solver.coordinate_descent import refine
from gptq.solver.error_propagation import best_share, divide, full_correction
from gptq.solver.hessian import output_power
from gptq.solver.solve import ROWS, TINY

SAMPLE = 256  # about so many rows of a layer compare its error with other errors
FULL_SHARE = 0.5  # of the drift that is made up for, where too few windows leave none to find it by (QEP's choice)
EXACT = 1e-10  # a relative error that is mere rounding


def solve_rows(
    weights: list[Tensor], plan: LayerPlan, known: LayerInputs, config: QuantConfig, last: bool = False,
    ranks: Ranks = ALONE,
) -> list[tuple[solver.SolvedLayer, dict[str, Any]]]:  # fmt: skip
    """Codes of the weights (outputs, inputs) of layers with one input, and the figures of their LayerResults.

    What is known of the drift is forgotten once the `last` layer has its correction.

    Rows do not know of each other, so they are taken ROWS at a time, whichever layers they belong to, by `ranks` in
    turns.
    """
    W = torch.cat(weights) if len(weights) > 1 else weights[0]  # (rows, inputs)
    tiles = [slice(start, min(start + ROWS, len(W))) for start in range(0, len(W), ROWS)]
    bounds = [0, *accumulate(len(one) for one in weights)]
    of_layers = [slice(start, stop) for start, stop in pairwise(bounds)]
    own_tiles = {n: tile for n, tile in enumerate(tiles) if ranks.owns(n)}
    undrifted = 0.0 if config.two_streams else None
    corrections, shares = _corrections(W, own_tiles, of_layers, known, ranks, undrifted)
    if last:
        known.drift, known.spent = None, True
    shared = torch.cat([one.new_full((len(one), 1), share or 0.0) for one, share in zip(weights, shares, strict=True)])
    parts: dict[int, solver.SolvedLayer] = {}
    measured: dict[int, Tensor] = {}
    for number, rows in own_tiles.items():
        target = W[rows] + shared[rows] * corrections.pop(number) if corrections else W[rows]
        own_rows = [(_common(rows, layer), _sample(rows, layer)) for layer in of_layers]
        parts[number], measured[number] = _solve_tile(W[rows], target, own_rows, plan, known, config)
    solved = _stacked(parts, len(tiles), ranks)
    figures = torch.stack(ranks.exchange(measured, len(tiles))).sum(0)  # (layers, figures)
    found = []
    for rows, share, sums in zip(of_layers, shares, figures.tolist(), strict=True):
        own = {"share": share, "damp": known.factor.damp, "tokens": known.tokens}
        found.append((solved.take(rows), _errors(*sums) | own))
    return found


def _errors(
    error: float, power: float, some_error: float, some_power: float, some_nearest: float, *held_out: float
) -> dict[str, float | None]:
    """The errors of a LayerResult from what `_solve_tile` has found.

    A sample of rows tells how much larger or smaller than the error of the solve other errors are. Taken by themselves
    they would be those of other rows: few rows can have most of a layer's power.
    """
    relative, of_some = error / max(power, TINY), some_error / max(some_power, TINY)
    scaled = relative / of_some if min(relative, of_some) > EXACT else 1.0
    return {
        "error": relative,
        "rtn_error": scaled * some_nearest / max(some_power, TINY),
        "heldout_error": scaled * held_out[0] / max(held_out[1], TINY) if held_out else None,
    }


def _common(tile: slice, layer: slice) -> slice:
    """The rows of a tile that belong to a layer, counted from where the tile begins; perhaps none."""
    start, stop = max(tile.start, layer.start), min(tile.stop, layer.stop)
    return slice(start - tile.start, max(stop, start) - tile.start)


def _sample(tile: slice, layer: slice) -> slice:
    """Of these some, as far apart in all tiles; by an odd number, as rows of attention repeat by powers of two."""
    rows, step = _common(tile, layer), (layer.stop - layer.start) // SAMPLE | 1
    skipped = (layer.start - tile.start - rows.start) % step  # from the layer's first row on, every step-th
    return slice(min(rows.start + skipped, rows.stop), rows.stop, step)


def _solve_tile(
    W: Tensor,
    target: Tensor,
    layers: list[tuple[slice, slice]],
    plan: LayerPlan,
    known: LayerInputs,
    config: QuantConfig,
) -> tuple[solver.SolvedLayer, Tensor]:
    """Codes for some rows of W (rows, inputs), and (layers, figures) float64 what `_errors` wants summed over tiles.

    Args:
        layers: which of the rows belong to each, and which of these are in its sample.
    """
    factor, unseen = known.factor, known.unseen
    solved = solver.solve(
        target, factor, plan.bits, plan.group_size, plan.sym, config.static_groups, bool(config.search)
    )
    if config.sweeps:
        solved = refine(target, solved, factor, plan.bits, config.sweeps)
    off = target - solved.weight()
    undamped = (solved.row_errors - factor.ridge * off.square().sum(1, dtype=torch.float64)).clamp(min=0)
    figures = torch.zeros(len(layers), 5 if unseen is None else 7, dtype=torch.float64, device=W.device)
    for own, (rows, sample) in zip(figures, layers, strict=True):
        if len(W[rows]):
            own[0], own[1] = undamped[rows].sum(), output_power(W[rows], factor.H)
        some = W[sample].contiguous()  # (sampled rows, inputs)
        if not len(some):
            continue
        own[2] = undamped[sample].sum()
        own[3] = own[1] if len(some) == len(W[rows]) else output_power(some, factor.H)
        nearest = solver.round_to_nearest(some, plan.bits, plan.group_size, plan.sym).weight()
        own[4] = output_power(target[sample] - nearest, factor.H)
        if unseen is not None:
            own[5], own[6] = unseen.power(off[sample].contiguous()), unseen.power(some)
    return solved, figures


def _stacked(parts: dict[int, solver.SolvedLayer], count: int, ranks: Ranks) -> solver.SolvedLayer:
    """All rows, one tile below the other, wherever they were solved."""
    names = [one.name for one in fields(solver.SolvedLayer)]
    columns = [ranks.exchange({n: getattr(part, name) for n, part in parts.items()}, count) for name in names]
    return solver.SolvedLayer.stack([solver.SolvedLayer(*tile) for tile in zip(*columns, strict=True)])


def _corrections(
    W: Tensor, own: dict[int, slice], layers: list[slice], known: LayerInputs, ranks: Ranks, none: float | None
) -> tuple[dict[int, Tensor], list[float | None]]:
    """What would make up for the drift in this process's `own` tiles of W (rows, inputs), by number.

    And how much of it each of the `layers` is to take, which is `none` where nothing has drifted.
    """
    if known.drift is None:
        return {}, [none] * len(layers)
    if len(W) > len(known.drift) and not known.divided:
        known.drift, known.divided = divide(known.drift, known.factor), True
    corrections: dict[int, Tensor] = {}
    gains: dict[int, Tensor] = {}
    for number, rows in own.items():
        if known.divided:
            corrections[number] = product(W[rows], known.drift)
        else:
            corrections[number] = full_correction(W[rows], known.drift, known.factor)
        if known.unseen is not None:
            found = [_gain(W[rows], corrections[number], _common(rows, layer), known.unseen) for layer in layers]
            if None not in found:
                gains[number] = torch.tensor(found, dtype=torch.float64, device=W.device)  # (layers, 2)
    everywhere = ranks.exchange(gains, -(-len(W) // ROWS))
    if not everywhere:
        return corrections, [FULL_SHARE] * len(layers)
    return corrections, [best_share(*gain) for gain in torch.stack(everywhere).sum(0).tolist()]


def _gain(W: Tensor, correction: Tensor, rows: slice, unseen: Unseen) -> tuple[float, float] | None:
    """What `best_share` wants to know of some rows; None where the original inputs are not known."""
    if not len(W[rows]):
        return 0.0, 0.0
    agreement = unseen.agreement(W[rows], correction[rows])
    return None if agreement is None else (unseen.power(correction[rows]), agreement)
