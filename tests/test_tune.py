"""Tuning a block: closer to the original on windows it has not learned from, and what was tuned is what is stored."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gptq import InputError, QuantConfig, load, quantize, solver
from gptq.output import verify
from gptq.pipeline import soft_codes
from gptq.pipeline.shared_calls import _Packer, _unpack
from gptq.pipeline.tune import SMALLEST_TOKEN, BlockToTune, tune
from gptq.solver import Grid, IntegerGrid
from gptq.solver.grids.affine import AffineGrid
from gptq.solver.grids.table import IQ4_NL, TableGrid
from gptq.solver.grids.two_level import K_QUANTS
from tests.conftest import MakeModel

FOUR = IntegerGrid(4, sym=True)
OPTIONS: dict[str, Any] = {"bits": 3, "group_size": 32, "seq_len": 32}


def calls_of(block: nn.Module, inputs: Tensor) -> list[partial[Any]]:
    return [partial(block, x) for x in inputs]


def test_scales_that_are_wrong_by_a_factor_are_mended(rng: torch.Generator) -> None:
    """A block of one layer whose scales are all 8 % too small: its output can be had exactly, so tuning nears it."""
    W = torch.randn(16, 32, generator=rng)
    exact = solver.round_to_nearest(W, FOUR, 32)
    off = solver.SolvedLayer(
        exact.codes, (exact.scale * 0.92).half().float(), exact.zero, exact.g_idx, exact.row_errors
    )
    linear = nn.Linear(32, 16)
    block = nn.Sequential(linear)
    inputs = torch.randn(12, 6, 32, generator=rng)
    with torch.no_grad():
        wanted = [x @ exact.weight().T + linear.bias for x in inputs]
        linear.weight.copy_(off.weight())
        calls = calls_of(block, inputs)
        to_tune = BlockToTune(block, calls, wanted, [3, 7], {linear: off}, {linear: FOUR}, lambda _, w: w)
        tuned = tune(to_tune, 60, seed=0)
    assert tuned.error_before == pytest.approx(0.08**2, rel=0.1)
    assert tuned.error_after < 0.2 * tuned.error_before
    made = tuned.layers[linear]
    assert torch.equal(made.scale, made.scale.half().float())
    assert set(linear._parameters) == {"weight", "bias"}  # the block has its own parameters back


def test_what_is_perfect_is_left_alone(rng: torch.Generator) -> None:
    exact = solver.round_to_nearest(torch.randn(8, 32, generator=rng), FOUR, 32)
    linear = nn.Linear(32, 8)
    block = nn.Sequential(linear)
    with torch.no_grad():
        linear.weight.copy_(exact.weight())
        inputs = torch.randn(9, 4, 32, generator=rng)
        wanted = [block(x) for x in inputs]
        layers: dict[nn.Module, solver.SolvedLayer] = {linear: exact}
        to_tune = BlockToTune(block, calls_of(block, inputs), wanted, [], layers, {linear: FOUR}, lambda _, w: w)
        tuned = tune(to_tune, 3, seed=0)
    assert tuned.layers is layers
    assert tuned.parameters == {}


GRIDS: dict[str, Grid] = {
    "integer": IntegerGrid(2, sym=True), "affine": AffineGrid(3), "IQ4_NL": TableGrid(4, IQ4_NL), "Q2_K": K_QUANTS[2],
}  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_soft_weight_is_the_mean_of_three_values_and_ends_as_one_of_them(grid: Grid, rng: torch.Generator) -> None:
    """Against the grid's own values in float64, at random logits; at the ends of the grid there are but two."""
    solved = solver.round_to_nearest(torch.randn(8, 256, generator=rng), grid, getattr(grid, "columns", 32))
    ranks, top = grid.ranks(solved.codes).long(), grid.top
    assert int(ranks.min()) == 0
    assert int(ranks.max()) == top
    logits, scale = soft_codes.first_logits(solved, grid), 0.1 * torch.randn(solved.scale.shape, generator=rng)
    logits += 3 * torch.randn(2, 8, 256, generator=rng)
    found = soft_codes.soft_weight(solved, scale, logits, 0.7, grid)

    changed = replace(solved, scale=solved.scale * (1 + scale))
    expected, total = (torch.zeros(8, 256, dtype=torch.float64) for _ in range(2))
    best, chosen = torch.full((8, 256), -torch.inf), torch.zeros(8, 256)
    for move, logit in ((-1, logits[0]), (0, torch.zeros(8, 256)), (1, logits[1])):
        there = (ranks + move >= 0) & (ranks + move <= top)
        value = replace(changed, codes=grid.codes_of((ranks + move).clamp(0, top).float())).weight()
        probability = (logit.double() / 0.7).exp() * there
        expected, total = expected + probability * value, total + probability
        better = there & (logit > best)
        best, chosen = torch.where(better, logit, best), torch.where(better, value, chosen)
    assert torch.allclose(found.double(), expected / total, atol=1e-5)
    cold = soft_codes.soft_weight(solved, scale, logits, 1e-7, grid)
    assert torch.allclose(cold, chosen, atol=1e-5)
    rounded = soft_codes.round_layer(solved, scale, logits, grid)
    kept = rounded if grid.tunes_scales else replace(changed, codes=rounded.codes)
    assert torch.allclose(kept.weight(), chosen, atol=2e-3)


def offset_of(solved: solver.SolvedLayer) -> Tensor:
    """The offset of each weight, (outputs, inputs) or a number."""
    return torch.zeros(()) if solved.offset is None else solved.offset[:, solved.g_idx.long()]


@pytest.mark.parametrize("noise", [None, 5])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_gradient_of_a_soft_weight_is_that_of_its_definition(
    grid: Grid, noise: int | None, rng: torch.Generator
) -> None:
    """Against torch's own derivative of a sum over the values of three codes, with a Gumbel variable for each."""
    solved = solver.round_to_nearest(torch.randn(8, 256, generator=rng), grid, getattr(grid, "columns", 32))
    ranks, logits = grid.ranks(solved.codes), soft_codes.first_logits(solved, grid)
    logits = (logits + torch.randn(2, 8, 256, generator=rng)).requires_grad_()
    scale = (0.1 * torch.randn(solved.scale.shape, generator=rng)).requires_grad_()
    G = torch.randn(8, 256, generator=rng)

    unit = replace(solved, scale=torch.ones_like(solved.scale), offset=None)
    low, value, high = (
        replace(unit, codes=grid.codes_of((ranks + move).clamp(0, grid.top))).weight() for move in (-1, 0, 1)
    )
    z = torch.stack([logits[0], torch.zeros_like(logits[0]), logits[1]]) / 0.7
    if noise is not None:
        draws, levels = torch.Generator().manual_seed(noise), soft_codes.gumbel_levels(G.device)
        own, lower, higher = (soft_codes.draw_gumbel(G, levels, draws) for _ in range(3))
        z = z + soft_codes.NOISE * torch.stack([lower, own, higher])
    p = z.softmax(0)
    mean = p[0] * low + p[1] * value + p[2] * high
    weight = soft_codes.soft_weight(solved, scale, logits, 0.7, grid, noise)
    dense = (solved.scale * (1 + scale))[:, solved.g_idx.long()] * mean
    assert torch.allclose(weight, dense + offset_of(solved), atol=1e-5)
    expected = torch.autograd.grad((dense * G).sum(), [scale, logits])
    found = torch.autograd.grad((weight * G).sum(), [scale, logits])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_noise_is_of_gumbel_variables_that_do_not_depend_on_each_other() -> None:
    """Their distribution function is exp(-exp(-x)), their mean Euler's constant, their variance pi^2 / 6."""
    n = 30_001  # no multiple of the bytes in a word
    draws, levels = torch.Generator().manual_seed(0), soft_codes.gumbel_levels(torch.device("cpu"))
    drawn = torch.stack([soft_codes.draw_gumbel(torch.empty(n), levels, draws) for _ in range(3)]).double()  # (3, n)
    below = torch.arange(1, n + 1) / n
    for one in drawn:
        assert float((torch.exp(-torch.exp(-one.sort().values)) - below).abs().max()) < 1 / soft_codes.LEVELS + 0.01
    assert float(drawn.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(drawn.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert float((torch.corrcoef(drawn) - torch.eye(3)).abs().max()) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([drawn[0, 1:], drawn[0, :-1]]))[0, 1])) < 0.02


class Attention(nn.Module):
    """A block whose windows do not reach each other, unless `mixes`."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.linear, self.mixes, self.rows = nn.Linear(16, 16), mixes, 0

    def forward(self, x: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        self.rows = len(x)
        h = self.linear(x) * angles[0] + angles[1] + mask  # (windows, tokens, 16)
        return (h + x.mean(0) if self.mixes else h), None


@pytest.mark.parametrize("mixes", [False, True])
def test_short_windows_are_run_together_where_that_gives_the_same(mixes: bool, rng: torch.Generator) -> None:
    block = Attention(mixes)
    angles = torch.randn(1, 6, 16, generator=rng), torch.randn(1, 6, 16, generator=rng)
    calls = [
        partial(block, torch.randn(1, 6, 16, generator=rng), torch.randn(1, 6, 1, generator=rng), angles=angles)
        for _ in range(12)
    ]
    with torch.no_grad():
        wanted = [call()[0] + 1 for call in calls]
        to_tune = BlockToTune(block, calls, wanted, [], {}, {}, lambda _, w: w)
        found = [(to_tune.distance(*piece), block.rows) for piece in to_tune.pieces(range(3, 10))]
    assert to_tune.together == (1 if mixes else 2)
    assert [rows for _, rows in found] == ([1] * 7 if mixes else [2, 2, 2, 1])
    power = sum(target.double().square().mean() for target in wanted) / len(wanted)
    sizes = [(target.double().square().mean(-1) / power).sqrt() for target in wanted[3:10]]  # of each token
    assert float(sum(distance for distance, _ in found)) == pytest.approx(float(sum((1 / s).mean() for s in sizes)))


def test_a_token_counts_half_way_between_its_error_and_its_relative_error(rng: torch.Generator) -> None:
    """Outputs and errors of a token that are a times as large add a times as much: not a^2 times, and not the same."""
    y, error = torch.randn(2, 8, generator=rng), torch.randn(8, generator=rng)
    y *= (y[0].norm() / y.norm(dim=1))[:, None]  # tokens of the same size
    for factor in (0.25, 4.0):
        found = []
        for token in (0, 1):
            sizes = torch.tensor([factor, 1.0])[:, None]
            target, off = (y * sizes)[None], torch.zeros(1, 2, 8)  # (windows, tokens, features)
            off[0, token] = error * sizes[token]
            block = BlockToTune(
                nn.Identity(), [partial(nn.Identity(), target + off)], [target], [], {}, {}, lambda _, w: w
            )
            found.append(float(block.distance(block.forwards[0], [0])))
        assert found[0] / found[1] == pytest.approx(factor, rel=1e-5)


def test_a_token_whose_output_is_zero_does_not_outweigh_all_others(rng: torch.Generator) -> None:
    target = torch.randn(1, 4, 8, generator=rng)
    target[0, 0] = 0
    block = BlockToTune(nn.Identity(), [partial(nn.Identity(), target + 1)], [target], [], {}, {}, lambda _, w: w)
    sizes = (target[0].square().mean(-1) / target.square().mean()).clamp(min=SMALLEST_TOKEN).sqrt()
    assert float(block.distance(block.forwards[0], [0])) == pytest.approx(float((1 / sizes).mean()), rel=1e-5)
    assert float(1 / sizes[0]) < 32


def test_codes_that_are_wrong_by_one_are_mended(rng: torch.Generator) -> None:
    """A block of one layer, a twentieth of whose codes are one off: moving them back gives its output exactly."""
    exact = solver.round_to_nearest(torch.randn(16, 32, generator=rng), FOUR, 32)
    moved = torch.rand(16, 32, generator=rng) < 0.05
    codes = torch.where(moved, torch.where(exact.codes > 7, exact.codes - 1, exact.codes + 1), exact.codes)
    off, linear = replace(exact, codes=codes), nn.Linear(32, 16, bias=False)
    block = nn.Sequential(linear)
    inputs = torch.randn(32, 16, 32, generator=rng)
    with torch.no_grad():
        wanted = [x @ exact.weight().T for x in inputs]
        linear.weight.copy_(off.weight())
        to_tune = BlockToTune(
            block, calls_of(block, inputs), wanted, [3, 7], {linear: off}, {linear: FOUR}, lambda _, w: w
        )
        tuned = tune(to_tune, 100, seed=0)
    assert int(moved.sum()) > 15
    assert int((tuned.layers[linear].codes != exact.codes).sum()) < 3


@pytest.mark.slow
def test_a_tuned_checkpoint_holds_what_was_tuned(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source = make_model("qwen2")  # norms and biases
    ten = torch.cat([windows, windows.flip(0)[:4]])
    config = QuantConfig(effort="best", tune_steps=40, **OPTIONS)
    for name in ("one", "two"):
        quantize(source, tmp_path / name, config, calibration=ten)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert verify.verify(tmp_path / "one").problems == []
    blocks = json.loads((tmp_path / "one" / "quantization_record.json").read_text())["blocks"]
    assert [block["name"] for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert all(block["tuned"] <= block["solved"] for block in blocks)
    assert any(block["tuned"] < block["solved"] for block in blocks)
    original = load_file(source / "model.safetensors")
    changed = {key for key in original if key in one and not torch.equal(one[key], original[key])}
    assert {key.rpartition(".")[2] for key in changed} == {"weight", "bias"}  # of norms, of queries, keys and values
    assert all(original[key].ndim == 1 and original[key].dtype == one[key].dtype for key in changed)
    network = load(tmp_path / "one", dtype="float32")
    state = network.state_dict()
    for key in changed:
        assert torch.equal(state[key], one[key].float())


def test_tuning_needs_the_original_stream() -> None:
    with pytest.raises(InputError, match="tune_steps needs two_streams"):
        QuantConfig(effort="best", two_streams=False)


def test_a_call_that_is_sent_comes_back_and_what_windows_have_in_common_is_known() -> None:
    everywhere, twice, alone = torch.zeros(3), torch.ones(2), torch.full((2,), 2.0)
    windows = [((twice, [twice, None]), {"mask": everywhere, "flag": True}), ((alone,), {"mask": everywhere, "x": 0.1})]
    packer = _Packer()
    sent = json.loads(json.dumps([packer.pack(window) for window in windows]))
    assert [len(own) for own in packer.windows_of] == [1, 2, 1]
    first, second = (_unpack(window, packer.tensors) for window in sent)
    assert first[0][0] is first[0][1][0] is twice
    assert first[0][1][1] is None
    assert first[1]["mask"] is second[1]["mask"] is everywhere
    assert (first[1]["flag"], second[1]["x"], type(first[0]), type(first[0][1])) == (True, 0.1, tuple, list)
    with pytest.raises(InputError, match="gets a dtype, which cannot be sent"):
        packer.pack((torch.float32,))
