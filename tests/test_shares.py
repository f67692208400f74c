"""What each of several processes does, by arithmetic, against formulas written out; a token takes 2 of 4 experts."""

import json

import pytest
import torch

from gptq import QuantConfig
from gptq.cli.arguments import main
from gptq.planning import cost, memory
from gptq.planning.device_models import DEVICE_MODELS
from gptq.planning.plan import plan_checkpoint
from gptq.planning.shares import count_shares
from tests.conftest import MakeModel

CONFIG = QuantConfig(group_size=32, effort="fast", sweeps=1)
TOKENS = memory.Tokens(8, 10, 1)
HIDDEN, BLOCKS = 64, 2


def test_two_processes_share_the_work_and_exchange_these_bytes(make_model: MakeModel) -> None:
    plan = plan_checkpoint(str(make_model("mixtral")), CONFIG, None, trust_remote_code=False)
    one, two = (count_shares(plan, CONFIG, TOKENS, ranks, torch.float32) for ranks in (1, 2))
    layers = plan.layers.values()
    experts, others = ([p for p in layers if (".experts." in p.name) == inside] for inside in (True, False))
    everyone = 70.0 * HIDDEN**2 * BLOCKS  # the Hessian of all tokens
    work = cost.count_work(plan, CONFIG, TOKENS)
    reached = sum(p.outputs * p.inputs for p in others) + sum(p.outputs * p.inputs for p in experts) / 2
    assert one.operations["forward"] == pytest.approx(work.forward) == pytest.approx(2 * 80 * reached)
    assert sum(one.operations.values()) == pytest.approx(work.total + everyone)
    every_process = 2 * BLOCKS * HIDDEN**3 / 3  # factors of the inputs of q/k/v and of o
    assert one.alone == two.alone == pytest.approx({"factorize": every_process})
    for stage, operations in one.operations.items():
        dense = sum(3.0 * p.outputs * p.inputs**2 for p in others) if stage == "solve" else 0.0  # one tile each
        alone = every_process if stage == "factorize" else 0.0
        assert two.operations[stage] == pytest.approx((operations - alone - dense) / 2 + alone + dense), stage
    assert two.received == {
        "inputs": 4 * 80 * 3 * HIDDEN * BLOCKS / 2,  # q/k/v, o, experts
        "sums": 4 * 3 * HIDDEN**2 * BLOCKS / 2,
        "codes": sum(p.outputs * p.inputs for p in others) / 2,
        "outputs": 4 * 80 * 2 * HIDDEN * BLOCKS / 4,
        "result": plan.packed_bytes / 2,
    }
    assert not any(one.received.values())
    assert two.read == sum(map(plan.source_bytes, others)) + sum(map(plan.source_bytes, experts)) / 2
    device = DEVICE_MODELS["h200"]
    assert two.standing_still(device) == pytest.approx(every_process / device.solver + plan.file_bytes / device.disk)


def test_plan_prints_what_each_process_does(
    make_model: MakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "measure_rates", lambda *_, **__: cost.Rates(1e9, 1e9, 0.0))
    source = str(make_model("llama"))
    options = ["--group-size", "32", "--samples", "8", "--device", "cpu", "--calibration", "none", "--ranks"]
    assert main(["plan", source, *options, "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ranks"]
    assert (found["count"], found["device_model"], found["device_bytes"]) == (4, "h200", 141e9)
    assert main(["plan", source, *options, "9"]) == 2
    assert "8 calibration windows cannot be shared by 9 processes" in capsys.readouterr().err
