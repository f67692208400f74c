"""Weight-only quantization against its laws; the comparison, its statistics, its files and its command line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq.errors import InputError
from lenet_baseline import compare, data, train, weight_only
from lenet_baseline.__main__ import main
from lenet_baseline.activations import record_activations
from lenet_baseline.model import LAYERS, LeNet
from lenet_baseline.weight_only import BITS, METHODS

pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model() -> LeNet:
    made = LeNet("all")
    made.initialize(torch.Generator().manual_seed(5))
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return data.load().train.draw(64, 0)


# --- weights alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_gptq_is_below_nearest_and_nearest_below_max_abs_in_every_layer(
    bits: int, model: LeNet, images: Tensor
) -> None:
    errors = weight_only.quantize_model(model, bits, images).errors
    for name in LAYERS:
        assert 0 < errors["gptq"][name] < errors["rtn"][name]
        assert errors["gptq"][name] < errors["max-abs"][name]


@pytest.mark.parametrize("bits", BITS)
def test_recorded_errors_are_those_of_the_outputs(bits: int, model: LeNet, images: Tensor) -> None:
    """tr(E H E^T) / tr(W H W^T) against the layer's outputs themselves, in float64, on the GPTQ model's inputs."""
    quantized = weight_only.quantize_model(model, bits, images)
    inputs = record_activations(quantized.models["gptq"], images).inputs
    for method in METHODS:
        for name in LAYERS:
            layer = torch.nn.functional.conv2d if name.startswith("conv") else torch.nn.functional.linear
            x, W = inputs[name].double(), model.weight(name).double()
            wrong = layer(x, W - quantized.models[method].weight(name).double())
            relative = float(wrong.square().sum() / layer(x, W).square().sum())
            assert quantized.errors[method][name] == pytest.approx(relative, rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", METHODS)
def test_each_row_has_as_many_values_as_bits_allow(bits: int, method: weight_only.Method, model: LeNet) -> None:
    W = model.weight("fc3")
    Q = weight_only.quantize_weight(W, torch.eye(84), method, bits)
    assert all(len(row.unique()) <= 2**bits for row in Q)
    assert Q.shape == W.shape


def test_gptq_with_independent_inputs_rounds_to_nearest(model: LeNet) -> None:
    W = model.weight("fc2")
    gptq, nearest = (weight_only.quantize_weight(W, torch.eye(120), method, 3) for method in ("gptq", "rtn"))
    assert torch.equal(gptq, nearest)


def test_biases_and_the_float_model_stay_as_they_are(model: LeNet, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = weight_only.quantize_model(model, 2, images)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        if name.endswith("bias"):
            assert all(torch.equal(q.state_dict()[name], tensor) for q in quantized.models.values())


def test_the_hessian_of_a_convolution_is_that_of_its_patches(model: LeNet, images: Tensor) -> None:
    """Against torch's own unfold, in float64."""
    patches = torch.nn.functional.unfold(images.double(), 5).transpose(1, 2).reshape(-1, 75)
    expected = patches.T @ patches / len(patches)
    H = weight_only._hessian(images, model.weight("conv1"))
    torch.testing.assert_close(H.double(), expected, rtol=1e-4, atol=1e-5)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_interval_is_students() -> None:
    """t(0.975, 2) = 4.302653 from a table; the deviation of 1, 2, 3 is 1."""
    found = compare.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(4.302653 / 3**0.5)
    assert 2 - found["low"] == pytest.approx(4.302653 / 3**0.5)
    assert compare.interval([0.5]) == {"mean": 0.5, "low": None, "high": None}


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.9, 0.91, 0.92], "better"),
        ([0.1, 0.11, 0.12], "worse"),
        ([0.4, 0.5, 0.61], "not shown"),
        ([0.5, 0.5, 0.5], "equal"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(values: list[float], verdict: str) -> None:
    assert compare.difference(values, [0.5, 0.5, 0.5])["verdict"] == verdict
    assert compare.difference(values[:1], [0.2])["verdict"] == "not shown"  # one seed shows nothing


# --- the whole, by its command line -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "CALIBRATION_IMAGES", 128)  # enough for these laws, and quick
        assert main(["compare", "--out", str(out), "--epochs", "4", "--seeds", "2"]) == 0
        yield out


def results_of(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def test_results_hold_every_way_and_the_integer_path_agrees(compared: Path) -> None:
    results = results_of(compared)
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    for run in results["runs"]:
        assert run["float"] > 0.9
        assert len(run["int8"]) == 6
        assert all(row["integer_logits_equal"] for row in run["int8"])
        assert all(row["integer_accuracy"] == row["accuracy"] for row in run["int8"])
        assert abs(run["int8"][0]["accuracy"] - run["float"]) <= 0.02
        assert {(row["bits"], row["method"]) for row in run["weight_only"]} == {(b, m) for b in BITS for m in METHODS}
    assert results["distributions"]["inputs"]["conv1"]["full_range"] == [-1, 1]
    for layers in results["distributions"].values():
        for found in layers.values():
            assert sum(found["counts"]) > 0
            assert len(found["edges"]) == len(found["counts"]) + 1
    weights = results["distributions"]["weights"]
    assert [sum(weights[name]["counts"]) for name in LAYERS] == [450, 2400, 48000, 10080, 840]


def test_summary_follows_from_the_runs(compared: Path) -> None:
    results = results_of(compared)
    assert results["summary"] == json.loads(json.dumps(compare.summarize(results["runs"])))
    found = next(row for row in results["summary"]["gptq_minus_rtn"] if row["bits"] == 2)
    by_seed = [
        {row["method"]: row["accuracy"] for row in run["weight_only"] if row["bits"] == 2} for run in results["runs"]
    ]
    assert found["mean"] == pytest.approx(sum(seed["gptq"] - seed["rtn"] for seed in by_seed) / 2)


def test_a_second_run_reuses_the_models_and_writes_the_same_bytes(
    compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["results.json", "weights.png", "activations.png", "accuracy.png", "layer_error.png"]
    before = {name: (compared / name).read_bytes() for name in names}
    trained = {path: path.stat().st_mtime_ns for path in (compared / "models").iterdir()}
    capsys.readouterr()
    assert main(["compare", "--out", str(compared), "--epochs", "4", "--seeds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == results_of(compared)["summary"]
    assert {path: path.stat().st_mtime_ns for path in (compared / "models").iterdir()} == trained
    for name in names:
        assert (compared / name).read_bytes() == before[name]


def test_plot_draws_what_was_recorded_and_nothing_else(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_bytes((compared / "results.json").read_bytes())
    assert main(["plot", "--out", str(tmp_path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [Path(path).stem for path in figures] == ["weights", "activations", "accuracy", "layer_error"]
    for path in figures:
        assert Path(path).read_bytes().startswith(PNG)
        assert Path(path).read_bytes() == (compared / Path(path).name).read_bytes()


def test_the_table_says_each_number_once(compared: Path) -> None:
    results = results_of(compared)
    text = compare.table(results)
    assert "logits equal bit for bit" in text
    assert f"{100 * results['summary']['float']['mean']:.2f}" in text
    assert text.count("GPTQ per channel") == len(BITS)


def test_train_and_quantize_use_the_same_model(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--out", str(compared), "--epochs", "4", "--seed", "1", "--json"]
    assert main(["train", *recipe]) == 0
    trained = json.loads(capsys.readouterr().out)
    runs = results_of(compared)["runs"]
    assert trained["accuracy"] == runs[1]["float"]
    assert main(["quantize", *recipe, "--range", "percentile", "--per-channel"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = next(r for r in runs[1]["int8"] if (r["rule"], r["scales"]) == ("percentile", "channel"))
    assert found["int8_accuracy"] == row["accuracy"]
    assert found["simulated_equals_integer"] is True
    assert found["int8_bytes"] < 0.3 * found["float_bytes"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "no results of this version"),
        ("[]", "no results"),
        ('{"version": 1}', "cannot be drawn"),
    ],
)
def test_plot_without_results_ends_with_a_sentence(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(["plot", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_user_s_mistake_costs_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained before looking at --out"))
    assert main(["train", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    assert "neither as a folder nor on the Hub" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path / "file"), "--epochs", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lenet_baseline: ")
    for wrong in (["compare", "--seeds", "0"], ["train", "--seed", "-1"], ["train", "--bias", "some"], []):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    with pytest.raises(InputError):
        compare.read_results(tmp_path)
