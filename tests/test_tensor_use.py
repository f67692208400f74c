"""Every tensor of a checkpoint is computed with, packed, or named; transformers' own reader is the judge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptq import QuantConfig
from gptq.models.blocks import Block
from gptq.models.reached_layers import find_uncalled_layers
from gptq.models.tensor_use import describe_kinds
from gptq.models.trial_forward import run_trial
from gptq.planning.plan import plan_checkpoint
from tests.conftest import MakeModel, load_script

sweep = load_script("sweep_architectures")
REPRESENTATIVE = {  # of each way in which tensors are held and used, and the class that builds it
    "gemma3_text": "AutoModelForCausalLM",  # tied, norms with an offset
    "bloom": "AutoModelForCausalLM",
    "mamba": "AutoModelForCausalLM",  # parameters of blocks, a weight without a call
    "rwkv": "AutoModelForCausalLM",  # changes weights in place
    "deepseek_v3": "AutoModelForCausalLM",  # experts, a buffer of the router
    "bart": "AutoModelForSeq2SeqLM",  # a buffer of the outermost module
    "marian": "AutoModelForSeq2SeqLM",  # computed positions
    "deberta-v2": "AutoModelForMaskedLM",  # a weight of the encoder that is read without a call
    "clip": "AutoModel",  # parameters of the outermost module
    "hubert": "AutoModelForCTC",  # parametrized weights, batch norms
    "llava": "AutoModelForImageTextToText",
}
CONFIG = QuantConfig(bits=8, group_size=16)


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_what_the_plan_says_of_each_tensor_is_what_the_readers_do(kind: str, tmp_path: Path) -> None:
    built = sweep.build_and_save(kind, REPRESENTATIVE[kind], tmp_path / "model")
    assert not isinstance(built, str), built
    assert sweep.use_problems(built, tmp_path / "model")[0] == []


@pytest.mark.parametrize("kind", ["bart", "marian"])  # one shifts input_ids for its decoder, the other wants them
def test_text_runs_through_encoder_and_decoder_before_the_work(kind: str, tmp_path: Path) -> None:
    built = sweep.build_and_save(kind, "AutoModelForSeq2SeqLM", tmp_path / "model")
    assert not isinstance(built, str), built
    plan = plan_checkpoint(str(tmp_path / "model"), CONFIG, None, False)
    assert not [note for note in plan.notes if "is not known" in note]


def test_tensors_that_nothing_reads_are_named_one_note_a_kind(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama")
    tensors = load_file(source / "model.safetensors")
    for name in ("mtp.a.weight", "mtp.b.bias", "scale", "model.layers.0.odd", "model.layers.1.odd", "model.norm.odd"):
        tensors[name] = torch.full((3,), -torch.inf)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = plan_checkpoint(str(source), CONFIG, None, False)
    reason = "not in the model that config.json describes; copied"
    kinds = ["model.layers.*.odd (2 tensors)", "model.norm.odd", "mtp (2 tensors)", "scale"]
    assert [note for note in plan.notes if note.endswith("copied")] == [f"{kind}: {reason}" for kind in kinds]
    assert plan.unused == {name for name, tensor in tensors.items() if tensor.shape == (3,)}


def test_names_of_many_tensors_are_short() -> None:
    stored = ["a.x.1.w", "a.x.2.w", "a.x.3.w", "a.y.w", "a.y.v", "b.w", "b.v", "c.10.w"]
    chosen = [name for name in stored if name not in ("a.x.3.w", "b.v")]
    assert describe_kinds(chosen, stored) == ["a.x.*.w (2 tensors)", "a.y (2 tensors)", "b.w", "c.10.w"]
    assert describe_kinds([], stored) == []


def test_a_weight_that_is_computed_with_outside_its_call_is_found_whatever_comes_first() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.both, self.plain = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            called: Tensor = self.plain(self.both(x)) + self.first.forward(x)
            return called @ self.both.weight

    network: Any = nn.Sequential(Attention())
    block = Block("0", network[0], {f"0.{name}": module for name, module in network[0].named_children()})
    trial = run_trial(network, {"input": torch.ones(2, 4)})
    assert find_uncalled_layers(network, [block], trial) == ["0.first", "0.both"]
    assert trial.used == {f"0.{name}" for name, _ in network[0].named_parameters()}
