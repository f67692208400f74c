"""The model that ships with the package, and what the demonstration says of it."""

import json
from pathlib import Path

import pytest

from gptq import QuantConfig, calibration, demo, quantize
from gptq.checkpoint.reader import Source
from gptq.cli.arguments import main
from gptq.evaluation import evaluate
from gptq.inference.load import load
from gptq.models.hf_config import read_tokenizer
from gptq.output import verify


def test_the_shipped_model_is_small_bf16_and_says_how_it_was_trained() -> None:
    files = [file for file in demo.MODEL.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    assert {str(info.dtype) for info in Source(demo.MODEL).tensors.values()} == {"torch.bfloat16"}
    config = json.loads((demo.MODEL / "config.json").read_text())
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    training = json.loads((demo.MODEL / "training.json").read_text())
    assert training["parameters"] == sum(info.nbytes // 2 for info in Source(demo.MODEL).tensors.values())
    assert training["validation_loss"] < 4


def test_the_two_halves_of_the_text_share_no_topic() -> None:
    calibration_text, measured_text = demo.read_texts()
    assert 0.5 < len(calibration_text) / len(measured_text) < 2
    assert calibration_text[:200] not in measured_text


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_beats_round_to_nearest_on_the_shipped_model(bits: int, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(demo.MODEL, trust_remote_code=False)
    calibration_text, measured_text = demo.read_texts()
    windows = calibration.draw_windows([calibration_text], tokenizer, 32, 256, seed=0)
    measured = calibration.evaluation_windows([measured_text], tokenizer, 256, 24)
    found = {}
    for method in ("rtn", "gptq"):
        config = QuantConfig(bits=bits, method=method)
        result = quantize(demo.MODEL, tmp_path / method, config, calibration=windows)
        found[method] = evaluate.measure_perplexity(load(tmp_path / method), measured).perplexity
    assert all(layer.error < layer.rtn_error for layer in result.layers)
    assert found["gptq"] < found["rtn"]
    assert verify.verify(tmp_path / "gptq").problems == []


@pytest.mark.slow
def test_the_demonstration_end_to_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CALIBRATION_WINDOWS", 6)
    monkeypatch.setattr(demo, "MEASURED_WINDOWS", 6)
    assert main(["demo", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(row["bits"], row["method"]) for row in shown["rows"]] == [
        (16, "original"), (4, "rtn"), (4, "gptq"), (3, "rtn"), (3, "gptq"),
    ]  # fmt: skip
    sizes = [row["bytes"] for row in shown["rows"]]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3] == sizes[4]
    assert shown["generated"].strip()
