"""The figures of a solved layer, against their definitions in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptq import solver
from gptq.compute import device_profile
from gptq.compute.cpu_features import has_amx, has_avx512_bf16
from gptq.config import QuantConfig
from gptq.pipeline.layer_inputs import HeldOutBlend, LayerInputs
from gptq.pipeline.row_tiles import SAMPLED_ROWS, LayerFigures, StackedRows, find_corrections, sampled_rows, solve_rows
from gptq.planning.layer_plan import LayerPlan
from gptq.solver import IntegerGrid
from gptq.solver.hessian import HeldOut

INPUTS, TOKENS = 64, 400
# Where the CPU multiplies bfloat16, powers are measured on rounded weights. Here a few rows have nearly all of the
# power, so their roundings cancel less than in a real layer.
EXACT = 1e-2 if has_avx512_bf16() or has_amx() else 2e-3


def relative(off: Tensor, W: Tensor, x: Tensor) -> float:
    """||off x||^2 / ||W x||^2 over tokens x (tokens, inputs)."""
    return float((x.double() @ off.double().T).square().sum() / (x.double() @ W.double().T).square().sum())


def solved(
    weights: list[Tensor], plan: LayerPlan, inputs: LayerInputs
) -> list[tuple[solver.SolvedLayer, LayerFigures]]:
    config, rows = QuantConfig(bits=4, group_size=32), StackedRows.of(weights, sum(map(len, weights)))
    return solve_rows(rows, find_corrections(rows, inputs, config), plan, plan.grid, inputs, config)


@pytest.mark.parametrize(
    ("rows", "tolerance"),
    [((200,), EXACT), ((1200,), 0.1), ((700, 90), 0.35)],
    ids=["all rows", "a sample", "two layers over tiles"],
)
def test_errors_are_those_of_the_definition(
    rows: tuple[int, ...], tolerance: float, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = replace(device_profile.CPU, solve_rows=512)
    monkeypatch.setitem(device_profile.PROFILES, "cpu", (low, low))
    strength = torch.exp(torch.randn(INPUTS, generator=rng))
    seen, unseen = (torch.randn(TOKENS, INPUTS, generator=rng) * strength for _ in range(2))
    weights = [torch.randn(n, INPUTS, generator=rng) for n in rows]
    for W in weights:  # a few rows, in no sample, have nearly all of the power, and larger errors for it
        W[1::100] = 20 * W[1::100] ** 3
    H = seen.T @ seen / TOKENS
    held_out = HeldOut(INPUTS, H.device)
    held_out.add(unseen)
    known = LayerInputs(solver.factorize(H, solver.act_order(H)), None, HeldOutBlend(((1.0, held_out),)), 2 * TOKENS)
    plan = LayerPlan("a", "a", "a.weight", rows[0], INPUTS, bits=4, group_size=32, sym=True)
    found = solved(weights, plan, known)

    for W, (layer, figures) in zip(weights, found, strict=True):
        off, nearest = W - layer.weight(), solver.round_to_nearest(W, IntegerGrid(4, sym=True), 32).weight()
        assert figures.error == pytest.approx(relative(off, W, seen), rel=EXACT)
        assert figures.rtn_error == pytest.approx(relative(W - nearest, W, seen), rel=tolerance)
        assert figures.heldout_error == pytest.approx(relative(off, W, unseen), rel=tolerance)


@pytest.mark.parametrize(("layer", "tile"), [(slice(0, 5000), 2048), (slice(700, 1500), 256), (slice(30, 90), 64)])
def test_a_sample_is_the_same_rows_whatever_the_tiles(layer: slice, tile: int) -> None:
    total, step = 6000, (layer.stop - layer.start) // SAMPLED_ROWS | 1
    found: list[int] = []
    for start in range(0, total, tile):
        stop = min(start + tile, total)
        found += range(start, stop)[sampled_rows(slice(start, stop), layer)]
    assert found == [*range(layer.start, layer.stop, step)]
    assert 128 < len(found) < 2 * SAMPLED_ROWS or step == 1


def test_a_layer_of_zeros_has_figures(rng: torch.Generator) -> None:
    H = torch.eye(INPUTS)
    known = LayerInputs(solver.factorize(H, solver.natural_order(H)), None, None, 1)
    plan = LayerPlan("a", "a", "a.weight", 40, INPUTS, bits=4, group_size=32, sym=True)
    ((_, figures),) = solved([torch.zeros(40, INPUTS)], plan, known)
    assert (figures.error, figures.rtn_error, figures.heldout_error) == (0.0, 0.0, None)
