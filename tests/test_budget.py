"""Mixed widths: the knapsack against all combinations, and targets that are met by what lies on disk."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq import InputError, Override, QuantConfig, quantize
from gptq.formats import FORMATS
from gptq.output import verify
from gptq.pipeline.run import Observer
from gptq.pipeline.search import trial_windows
from gptq.planning.bit_allocation import StorageChoice, Unit, allocate, find_units
from gptq.planning.plan import plan_checkpoint
from tests.conftest import MakeModel


def random_units(rng: torch.Generator, units: int = 5) -> list[Unit]:
    sizes = torch.randint(50, 100, (units,), generator=rng).tolist()
    noise = torch.rand(units, 4, generator=rng).tolist()
    return [
        Unit((f"layer{i}",), tuple(StorageChoice(bits, 32, size * bits, (1 + noise[i][bits - 2]) / 4**bits * (i + 1))
                                   for bits in (2, 3, 4, 5)))
        for i, size in enumerate(sizes)
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_choice_is_the_best_of_all_combinations(share: float, rng: torch.Generator) -> None:
    units = random_units(rng)
    least, most = (sum(pick(c.nbytes for c in unit.choices) for unit in units) for pick in (min, max))
    budget = int(least + share * (most - least))
    chosen = allocate(units, budget)
    assert sum(choice.nbytes for choice in chosen) <= budget
    possible = (c for c in product(*(unit.choices for unit in units)) if sum(x.nbytes for x in c) <= budget)
    best = min(sum(x.error for x in combination) for combination in possible)
    assert sum(choice.error for choice in chosen) == pytest.approx(best, rel=1e-12)


def test_less_than_the_smallest_is_refused(rng: torch.Generator) -> None:
    units = random_units(rng)
    with pytest.raises(InputError, match="which take"):
        allocate(units, sum(min(c.nbytes for c in unit.choices) for unit in units) - 1)


def unit_of(errors: dict[tuple[int, int], float]) -> Unit:
    return Unit(("layer",), tuple(StorageChoice(bits, group, 1, error) for (bits, group), error in errors.items()))


def test_errors_that_are_not_measured_follow_from_the_ratio_of_two_group_sizes() -> None:
    """Where an error is a factor of the width times one of the group size, and bits quarter it, estimates are exact."""
    of_width = {2: 0.31, 3: 0.07, 4: 0.02, 5: 0.02 / 4, 6: 0.02 / 16, 8: 0.02 / 256}
    of_group = {64: 1.0, 32: 0.8, 128: 1.1, -1: 1.7}
    true = {(bits, group): x * y for bits, x in of_width.items() for group, y in of_group.items()}
    unit = unit_of(true)
    measured = {(choice.bits, choice.group_size) for choice in unit.measured}
    assert measured == {(2, 64), (3, 64), (4, 64), (3, 32), (3, 128), (3, -1)}
    blank = unit_of(dict.fromkeys(true, 0.0))
    found = blank.with_errors([true[choice.bits, choice.group_size] for choice in blank.measured])
    assert [choice.error for choice in found.choices] == pytest.approx([*true.values()], rel=1e-12)
    # An error of 0 gives no ratio; then both group sizes have it.
    zero = blank.with_errors([0.5 * (choice.bits != 3) for choice in blank.measured])
    assert {c.error for c in zero.choices if c.bits in (2, 4)} == {0.5}


def test_widths_that_have_group_sizes_of_their_own_are_all_measured() -> None:
    """As those of K-quants: no other width has the group sizes whose ratio would be needed."""
    unit = unit_of({(2, 16): 0.3, (4, 32): 0.1, (6, 16): 0.01})
    assert unit.measured == unit.choices
    assert unit.with_errors([0.3, 0.1, 0.01]) == unit


def test_a_layer_is_stored_in_each_way_once(make_model: MakeModel) -> None:
    """Group sizes beside the configured one divide the inputs, and a group is no longer than a row."""
    config = QuantConfig(bits=3, group_size=32)
    plan = plan_checkpoint(str(make_model("llama")), config, None, trust_remote_code=False)
    units, chosen = find_units(plan, config)
    assert chosen == "pack-quantized"
    for unit in units:
        inputs = plan.layers[unit.layers[0]].inputs
        columns = [c.group_size if c.group_size > 0 else inputs for c in unit.choices if c.bits == 3]
        assert columns[0] == 32
        assert len(set(columns)) == len(columns)
        assert all(inputs % one == 0 for one in columns[1:])
        assert inputs in columns  # a row with one scale is always a way
        assert len(unit.choices) == len(columns) * len(FORMATS[chosen].widths)


@pytest.mark.slow
def test_targets_are_met_on_disk(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source = make_model("llama")
    options: dict[str, Any] = {"group_size": 32, "seq_len": 32, "effort": "fast"}
    uniform = quantize(source, tmp_path / "uniform", QuantConfig(bits=3, **options), calibration=windows)
    for name, target in (("same", uniform.bytes_after), ("larger", uniform.bytes_after + 3000)):
        out = tmp_path / name
        made = quantize(source, out, QuantConfig(bits=3, target_size=target, **options), calibration=windows)
        assert sum(file.stat().st_size for file in out.glob("*.safetensors")) == made.bytes_after <= target
        assert verify.verify(out).problems == []
        widths = {layer.name: (layer.bits, layer.group_size) for layer in made.layers}
        for block in ("model.layers.0", "model.layers.1"):  # what engines fuse stays together
            assert len({widths[f"{block}.self_attn.{kind}_proj"] for kind in "qkv"}) == 1
            assert len({widths[f"{block}.mlp.{kind}_proj"] for kind in ("gate", "up")}) == 1
    assert len({width for width, _ in widths.values()}) > 1
    by_bits = quantize(source, tmp_path / "bits", QuantConfig(target_bits=5, **options), calibration=windows)
    assert 4 < by_bits.bits_per_weight <= 5


@pytest.mark.slow
def test_mixed_widths_take_no_more_than_one_width_with_zero_points(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, eight = make_model("llama"), Override("o_proj", bits=8)
    config = QuantConfig(bits=3, group_size=32, mixed=True, seq_len=32, effort="fast", overrides=(eight,))
    made = quantize(source, tmp_path / "out", config, calibration=windows)
    plan = plan_checkpoint(str(source), replace(config, mixed=False), None, trust_remote_code=False)
    most = 0
    for layer in plan.layers.values():
        groups = -(-layer.inputs // 32)
        most += layer.outputs * (layer.bits * layer.inputs + groups * (16 + layer.bits))
    weights = sum(layer.outputs * layer.inputs for layer in plan.layers.values())
    assert 0.9 * most / weights < made.bits_per_weight <= most / weights
    assert {layer.bits for layer in made.layers if layer.name.endswith("o_proj")} == {8}
    assert len({(layer.bits, layer.group_size) for layer in made.layers}) > 2


def test_a_format_with_one_width_leaves_nothing_to_choose_and_nothing_is_measured(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source = make_model("llama")
    options: dict[str, Any] = {"format": "nvfp4-pack-quantized", "seq_len": 32, "effort": "fast"}
    for name, mixed in (("one", False), ("mixed", True)):
        stages = Stages()
        config = QuantConfig(mixed=mixed, **options)
        quantize(source, tmp_path / name, config, calibration=windows, observer=stages)
        assert not any("each width" in text for text in stages.seen)
    one, mixed_too = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "mixed"))
    assert one.keys() == mixed_too.keys()
    assert all(torch.equal(one[name].view(torch.uint8), mixed_too[name].view(torch.uint8)) for name in one)


@pytest.mark.parametrize(
    ("tokens", "inputs", "expected"),
    [(512, 64, 32), (128, 64, 128), (64, 64, 200), (512, 4096, 64)],
    ids=["held_out", "tokens", "too_few", "inputs"],
)
def test_widths_are_measured_on_as_many_windows_as_that_takes(
    tokens: int, inputs: int, expected: int, make_model: MakeModel
) -> None:
    """4 windows of those held out, which are one in 8; 16,384 tokens; 8 tokens for each input of the widest layer."""
    plan = plan_checkpoint(str(make_model("llama")), QuantConfig(bits=3), None, trust_remote_code=False)
    widest = next(iter(plan.layers))
    plan = replace(plan, layers=plan.layers | {widest: replace(plan.layers[widest], inputs=inputs)})
    windows = [{"input_ids": torch.full((1, tokens), i)} for i in range(200)]
    assert trial_windows(windows, plan) == windows[:expected]


def test_experts_are_measured_on_all_windows(make_model: MakeModel) -> None:
    plan = plan_checkpoint(str(make_model("mixtral")), QuantConfig(bits=3), None, trust_remote_code=False)
    windows = [{"input_ids": torch.full((1, 512), i)} for i in range(200)]
    assert len(trial_windows(windows, plan)) == 200


class Stages(Observer):
    """Keeps what a run says that it does."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def stage(self, text: str) -> None:
        self.seen.append(text)


def test_overrides_stay_and_impossible_targets_cost_nothing(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source = make_model("llama")
    eight = Override("o_proj", bits=8)
    kept = QuantConfig(group_size=32, seq_len=32, effort="fast", target_bits=5.5, overrides=(eight,))
    made = quantize(source, tmp_path / "out", kept, calibration=windows)
    assert {layer.bits for layer in made.layers if layer.name.endswith("o_proj")} == {8}
    assert made.bits_per_weight <= 5.5
    with pytest.raises(InputError, match="give a larger target"):
        quantize(source, tmp_path / "small", QuantConfig(target_size=1000, seq_len=32), calibration=windows)
    assert not (tmp_path / "small").exists()
    refused: list[dict[str, Any]] = [
        {"target_bits": 3, "target_size": 5},
        {"target_bits": -1},
        {"target_size": 3.5},
        {"target_bits": 4, "method": "rtn"},
        {"mixed": True, "method": "rtn"},
        {"mixed": True, "target_bits": 4},
        {"mixed": True, "static_groups": False},
    ]
    for wrong in refused:
        with pytest.raises(InputError):
            QuantConfig(**wrong)
