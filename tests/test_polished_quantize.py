"""`quantize` with polish_steps: what `quantize` and `polish` write one after the other, as one run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq import InputError, PolishConfig, QuantConfig, polish, quantize
from gptq.output import verify
from gptq.output.results import RECORD
from gptq.pipeline.run import Observer
from gptq.polishing import descent
from tests.conftest import VOCAB, MakeModel

CONFIG = QuantConfig(bits=2, group_size=32, effort="fast", format="gptq", seq_len=32, polish_steps=8)


class Stop(Observer):
    """Ends a run after a number of steps of polishing, as a kill would; notes what was done."""

    def __init__(self, after: int) -> None:
        self.after, self.steps, self.layers = after, list[int](), list[str]()

    def layer_done(self, block: int, name: str, weights: int) -> None:
        self.layers.append(name)

    def step_done(self, done: int, total: int) -> None:
        self.steps.append(done)
        if done == self.after:
            raise KeyboardInterrupt


@pytest.fixture
def tokens(rng: torch.Generator) -> Tensor:
    return torch.randint(1, VOCAB, (16, 32), generator=rng)


def test_max_is_best_with_longer_tuning_and_polish() -> None:
    best, most = (QuantConfig(effort=effort).to_dict() for effort in ("best", "max"))
    assert {key for key in best if best[key] != most[key]} == {"effort", "tune_steps", "polish_steps"}
    assert best["tune_steps"] < most["tune_steps"]
    assert most["polish_steps"] == PolishConfig().steps


@pytest.mark.slow
def test_one_run_writes_what_two_commands_write(make_model: MakeModel, tokens: Tensor, tmp_path: Path) -> None:
    source, one, two = make_model("llama"), tmp_path / "one", tmp_path / "two"
    made = quantize(source, one, CONFIG, calibration=tokens)
    quantize(source, tmp_path / "solved", replace(CONFIG, polish_steps=0), calibration=tokens)
    polish(tmp_path / "solved", source, two, PolishConfig(steps=8, num_samples=16, seq_len=32), calibration=tokens)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    record, expected = (json.loads((folder / RECORD).read_bytes()) for folder in (one, two))
    assert record["polish"] == expected["polish"]
    assert record["config"] == CONFIG.to_dict()
    assert verify.verify(one).problems == []
    assert any("KL(original || quantized)" in note for note in made.notes)
    assert not one.with_name("one.partial").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_while_polishing_goes_on_there(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "CHECK_EVERY", 2)
    source, whole, out = make_model("llama"), tmp_path / "whole", tmp_path / "out"
    quantize(source, whole, CONFIG, calibration=tokens)
    stop = Stop(5)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, CONFIG, calibration=tokens, observer=stop)
    assert not out.exists()
    again = Stop(100)
    quantize(source, out, CONFIG, calibration=tokens, observer=again)
    assert again.steps[0] == 5  # four steps were kept
    assert not again.layers
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ({}, {"memory_limit": 2**33}, "no limit accounts for"),
        ({"method": "rtn"}, {}, "needs calibration"),
        ({"format": "gguf", "group_size": 32, "bits": 4}, {}, "is not loaded here"),
        ({"format": "mxfp4-pack-quantized", "group_size": 32, "bits": 4}, {}, "no scales that may change"),
    ],
)
def test_what_cannot_be_polished_is_refused_before_a_block_is_quantized(
    options: dict[str, Any], arguments: dict[str, Any], said: str, make_model: MakeModel, tokens: Tensor, tmp_path: Path
) -> None:
    stop = Stop(100)
    with pytest.raises(InputError, match=said):
        quantize(
            make_model("llama"), tmp_path / "out", replace(CONFIG, **options), calibration=tokens, observer=stop,
            **arguments,
        )  # fmt: skip
    assert not stop.layers
    assert [*tmp_path.glob("out*")] == []


def test_windows_that_polishing_cannot_take_are_refused(make_model: MakeModel, tokens: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="7 windows leave none"):
        quantize(make_model("llama"), tmp_path / "out", CONFIG, calibration=tokens[:7])
    lengths = [20 + i % 2 for i in range(len(tokens))]
    masks = [(torch.arange(32) < length).long()[None] for length in lengths]
    padded = [{"input_ids": row[None], "attention_mask": mask} for row, mask in zip(tokens, masks, strict=True)]
    with pytest.raises(InputError, match="windows of text of one length"):
        quantize(make_model("llama"), tmp_path / "out", CONFIG, calibration=padded)
    assert [*tmp_path.glob("out*")] == []
