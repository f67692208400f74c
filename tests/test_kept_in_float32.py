"""What a model keeps in float32 stays float32 in a model that computes in fewer bits, as from_pretrained has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gptq import QuantConfig, load, quantize
from gptq.evaluation.original_logits import compute_logits_by_block
from gptq.output.record import read_record
from tests.conftest import VOCAB, MakeModel

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
IDS = torch.randint(1, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))


def floats(network: Any) -> dict[str, torch.dtype]:
    tensors = (*network.named_parameters(), *network.named_buffers())
    return {name: t.dtype for name, t in tensors if t.is_floating_point()}


@pytest.fixture
def corrected(make_model: MakeModel) -> Path:
    """A DeepSeek-V3 with a router corrected by biases that bfloat16 does not tell apart, as DeepSeek's own."""
    source = make_model("deepseek_v3", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    count = len(tensors[BIAS])
    tensors[BIAS] = 14 + 0.03 * torch.randn(count, generator=torch.Generator().manual_seed(0))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_tokens_go_to_the_experts_that_the_original_sends_them_to(corrected: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", QuantConfig(bits=8, group_size=32, effort="fast")
    quantize(corrected, out, config, calibration=IDS, dtype="bfloat16")
    original: Any = AutoModelForCausalLM.from_pretrained(corrected, dtype=torch.bfloat16)
    chosen: list[Tensor] = []
    experts = original.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
    with torch.no_grad():
        for window in IDS:
            original(window[None])
    expected = torch.bincount(torch.cat(chosen).flatten(), minlength=len(original.state_dict()[BIAS]))
    found = torch.tensor([expert.tokens for expert in read_record(out).experts or []])
    assert (found.flatten() - expected).abs().sum() <= 0.02 * expected.sum()  # layers before have been quantized
    ours, theirs = load(out, dtype="bfloat16"), AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert torch.equal(ours.state_dict()[BIAS], load_file(corrected / "model.safetensors")[BIAS])
    assert floats(ours) == floats(theirs)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[BIAS], ours.state_dict()[BIAS])


@pytest.mark.parametrize(("kind", "kept"), [("olmo_hybrid", "model.layers.0.linear_attn.A_log"), ("deepseek_v3", BIAS)])
def test_what_a_module_makes_in_float32(kind: str, kept: str, make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model(kind, dtype=torch.bfloat16), tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    ours = load(tmp_path / "out", dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert floats(ours) == floats(theirs)
    assert floats(ours)[kept] == torch.float32


def test_a_layer_that_is_kept_is_solved_in_float32(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    """T5's `wo`, where the rest computes in float16."""
    source, out = make_model("t5"), tmp_path / "out"
    pairs = {"input_ids": windows, "decoder_input_ids": windows}
    config = QuantConfig(group_size=32, effort="best", tune_steps=2)
    quantize(source, out, config, calibration=[pairs], dtype="float16")
    ours = load(out, dtype="float16")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.float16)
    assert floats(ours) == floats(theirs)
    assert floats(theirs)["encoder.block.0.layer.1.DenseReluDense.wo.scales"] == torch.float16  # as it is stored
    inputs = {name: ids[:1] for name, ids in pairs.items()}
    with torch.no_grad():
        found, expected = ours(**inputs).logits.float(), theirs(**inputs).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_what_no_file_holds_is_made_in_the_dtype_that_is_asked_for(make_model: MakeModel, tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by a root, which bfloat16 rounds."""
    source = make_model("gemma2", dtype=torch.bfloat16, hidden_size=96)
    quantize(source, tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    for folder in (source, tmp_path / "out"):
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ours: Any = load(folder, dtype="float32")
        for network in (theirs, ours):
            assert float(network.model.embed_tokens.embed_scale) == pytest.approx(96**0.5, rel=1e-7)
        with torch.no_grad():
            assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    by_block = compute_logits_by_block(source, IDS, torch.device("cpu"), "float32")
    with torch.no_grad():
        original = load(source, dtype="float32")(IDS).logits[:, :-1]
    assert torch.allclose(torch.stack([*by_block]), original, rtol=0, atol=1e-5)
