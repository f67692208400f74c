"""Whole runs on tensors that say that they are on a GPU (`pretend_cuda`), beside the same runs on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq import QuantConfig, quantize
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import tensor_bytes
from gptq.solver import Grid, inner_loops
from tests.conftest import MakeModel
from tests.pretend_cuda import OnCuda, pretend_cuda


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(1, 300, (6, 16), generator=torch.Generator().manual_seed(0))


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put whole-tensor operations in the place of the Triton kernels, which are tried elsewhere; return the calls."""
    calls: list[str] = []

    def choose_columns(*args: Any) -> Any:
        calls.append("choose_columns")
        return inner_loops.choose_columns_reference(*args)

    def best_grids(w: Tensor, importance: Tensor, scales: Tensor, shifts: Tensor, grid: Grid) -> Tensor:
        calls.append("best_grids")
        groups = zip(w, importance, scales.unbind(1), shifts.unbind(1), strict=True)
        return torch.stack([inner_loops.best_grid_reference(*group, grid) for group in groups])

    class Kernels:
        pass

    Kernels.choose_columns, Kernels.best_grids = staticmethod(choose_columns), staticmethod(best_grids)  # type: ignore[attr-defined]
    monkeypatch.setattr(inner_loops, "_triton_kernels", lambda: Kernels)
    monkeypatch.setattr(inner_loops, "_has_triton", lambda: True)
    return calls


def test_tensors_from_two_devices_are_refused_and_views_change_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_cuda(monkeypatch):
        x = torch.zeros(3, 4, device="cuda")
        assert isinstance(x, OnCuda)
        assert (x.device.type, x.is_cuda, x[0].is_cuda, x.cpu().is_cuda) == ("cuda", True, True, False)
        x[1:, 0] += 2
        assert x.sum().item() == 4
        assert x.cpu().numpy().sum() == 4
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3, 4)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


@pytest.mark.slow
def test_a_run_on_a_gpu_goes_through_and_agrees_with_the_cpu(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = make_model("llama"), QuantConfig(group_size=32, effort="balanced", format="gptq")
    quantize(source, tmp_path / "cpu", config, calibration=windows, dtype="float32")
    calls = without_kernels(monkeypatch)
    with pretend_cuda(monkeypatch):
        quantize(source, tmp_path / "gpu", config, calibration=windows, device="cuda", dtype="float32")
    assert {"choose_columns", "best_grids"} <= set(calls)
    cpu, gpu = Source(tmp_path / "cpu"), Source(tmp_path / "gpu")
    assert gpu.tensors == cpu.tensors
    different = [name for name in cpu.tensors if tensor_bytes(cpu.read(name)) != tensor_bytes(gpu.read(name))]
    words = [name for name in cpu.tensors if name.endswith("qweight")]
    same = sum(float((cpu.read(name) == gpu.read(name)).float().mean()) for name in words) / len(words)
    assert same > 0.9  # words of eight codes
    assert all(name.endswith(("qweight", "scales")) for name in different)
