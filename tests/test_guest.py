"""The package in a process that others have set up: torch's modes are ignored, and are as they were afterwards."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gptq import QuantConfig, load, quantize
from gptq.compute.torch_state import fresh_torch_state
from gptq.output import verify
from tests.conftest import MakeModel

CONFIG = QuantConfig(bits=4, group_size=32, effort="best", tune_steps=1, format="gptq")


class DefaultDtype(AbstractContextManager[None]):
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.bfloat16)

    def __exit__(self, *_: object) -> None:
        assert torch.get_default_dtype() == torch.bfloat16
        torch.set_default_dtype(torch.float32)


def deterministic() -> AbstractContextManager[None]:
    torch.use_deterministic_algorithms(True)
    return nullcontext()


STATES: dict[str, Any] = {
    "inference mode": torch.inference_mode,
    "another default dtype": DefaultDtype,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
}


def test_modes_of_the_caller_change_no_byte(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source, plain = make_model(num_hidden_layers=1), tmp_path / "plain"
    quantize(source, plain, CONFIG, calibration=windows)
    expected = load(plain)(input_ids=windows).logits
    for name, state in STATES.items():
        out = tmp_path / name
        with state():
            before = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_device())
            own = windows.clone()  # in inference mode, a tensor that counts no changes
            quantize(source, out, CONFIG, calibration=windows if own.is_meta else own)
            model = load(out)
            after = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_device())
            assert before == after
        torch.use_deterministic_algorithms(False)
        for file in plain.iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes(), (name, file.name)
        assert torch.equal(model(input_ids=windows).logits, expected)
        assert verify.verify(out).problems == []


def test_threads_share_one_default_dtype_and_the_last_restores_it() -> None:
    entered, may_leave, found = threading.Event(), threading.Event(), []

    def work() -> None:
        with fresh_torch_state():
            entered.set()
            may_leave.wait(20)
            found.append(torch.get_default_dtype())

    with DefaultDtype():
        thread = threading.Thread(target=work)
        with fresh_torch_state():
            thread.start()
            assert entered.wait(20)
        may_leave.set()
        thread.join()
    assert found == [torch.float32]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_packed_model_can_be_traced(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    quantize(make_model(), tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    model = load(tmp_path / "out")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return found

    with torch.no_grad():
        whole = Logits().eval()
        traced: Any = torch.jit.trace(whole, (windows,))
        torch.testing.assert_close(traced(windows.flip(0)), whole(windows.flip(0)), rtol=1e-4, atol=1e-4)


def test_a_mask_of_infinity_is_copied(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    stored = load_file(source / "model.safetensors")
    stored["model.mask"] = torch.full((4, 4), -torch.inf).triu(1)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, out, QuantConfig(method="rtn", group_size=32))
    assert torch.equal(load_file(out / "model.safetensors")["model.mask"], stored["model.mask"])
    assert verify.verify(out).problems == []


def test_a_packed_model_becomes_dense_when_asked(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    quantize(make_model("opt"), tmp_path / "out", QuantConfig(method="rtn", group_size=32, format="gptq"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        packed = model(input_ids=windows).logits
        name, stored = "model.decoder.layers.0.fc1", load_file(tmp_path / "out" / "model.safetensors")
        layer: Any = model.get_submodule(name)
        assert torch.equal(layer.qweight, stored[f"{name}.qweight"])
        dense = model.dequantize()
        assert type(dense.get_submodule(name)) is nn.Linear
        torch.testing.assert_close(dense(input_ids=windows).logits, packed, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("read", [AutoModelForCausalLM.from_pretrained, load])
def test_adapters_are_trained_on_a_packed_model(
    read: Callable[[Path], Any], make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    quantize(make_model(), tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    model = read(tmp_path / "out")
    before = model(input_ids=windows).logits.detach()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=windows).logits.detach(), before)
    kept = adapted.get_base_model().state_dict()
    for name, tensor in stored.items():
        parent, _, own = name.rpartition(".")
        assert torch.equal(kept[name] if name in kept else kept[f"{parent}.base_layer.{own}"], tensor)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(read(tmp_path / "out"), tmp_path / "adapter")
    assert torch.equal(again(input_ids=windows).logits, adapted(input_ids=windows).logits)
