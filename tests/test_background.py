"""Blocks that are packed, hashed and written behind the walk, as on a GPU; here on CPU tensors, without streams."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq import InputError, QuantConfig, quantize
from gptq.checkpoint.writer import ShardWriter
from gptq.compute import device_profile
from gptq.compute.background import Background
from tests.conftest import MakeModel

CONFIG = QuantConfig(group_size=32, effort="balanced")


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    profile = replace(device_profile.CPU, packing_threads=3)
    monkeypatch.setitem(device_profile.PROFILES, "cpu", (profile, profile))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gptq-background")]


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(1, 300, (6, 16), generator=torch.Generator().manual_seed(0))


def test_a_job_runs_behind_the_caller_and_after_the_one_before() -> None:
    background, gate = Background(torch.device("cpu"), 2), threading.Event()
    done: list[Any] = []
    background.start(lambda: done.append(gate.wait(60)))
    assert background.is_behind
    assert not done
    gate.set()
    background.start(lambda: done.extend(background.map(lambda x: x * x, range(5))))
    background.wait()
    assert done == [True, 0, 1, 4, 9, 16]

    def fail() -> None:
        raise OSError("no space left on device")

    background.start(fail)
    with pytest.raises(OSError, match="no space left"):
        background.start(lambda: done.append(None))
    background.wait()  # an error is raised once
    background.close()
    assert None not in done


def test_blocks_that_are_stored_behind_the_walk_are_the_same(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = make_model("llama")
    quantize(source, tmp_path / "plain", CONFIG, calibration=windows)
    request.getfixturevalue("behind")
    quantize(source, tmp_path / "behind", CONFIG, calibration=windows)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "behind" / name).read_bytes()


@pytest.mark.usefixtures("behind")
def test_an_error_behind_the_walk_ends_the_run_which_goes_on_after_the_last_stored_block(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    write = ShardWriter.write

    def full(self: ShardWriter, name: str, tensor: Tensor, *more: Any) -> None:
        if "layers.1." in name:
            raise OSError(28, "No space left on device")
        write(self, name, tensor, *more)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises((OSError, InputError), match="No space left"):
            quantize(source, out, CONFIG, calibration=windows)
    assert not out.exists()
    journal = next((tmp_path / "out.partial").glob("*.jsonl")).read_text()
    assert '"block"' in journal
    assert "layers.0" in journal
    quantize(source, out, CONFIG, calibration=windows)
    quantize(source, tmp_path / "plain", CONFIG, calibration=windows)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
