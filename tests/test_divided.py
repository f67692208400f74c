"""Checkpoints with fused tensors that transformers divides when it loads them: q/k/v in one, gate and up in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from gptq import QuantConfig, load, quantize
from gptq.formats.original import open_original
from gptq.models.build import open_model
from gptq.models.weights import WeightStream
from gptq.output import verify
from tests.conftest import SMALL

DIVIDED: dict[str, tuple[str, dict[str, Any], str]] = {  # class, what its configuration says, a fused tensor
    "nomic_bert": ("NomicBertForMaskedLM", {"intermediate_size": 96}, "nomic_bert.encoder.layers.1.attn.Wqkv.weight"),
    "jina_embeddings_v3": (  # with biases
        "JinaEmbeddingsV3ForMaskedLM", {"intermediate_size": 96}, "roberta.encoder.layers.1.mixer.Wqkv.bias",
    ),
    "molmo2_text": (  # pieces of different sizes
        "Molmo2TextModel", {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
        "layers.1.self_attn.att_proj.weight",
    ),
}  # fmt: skip


def make(kind: str, folder: Path) -> PreTrainedModel:
    name, own, _ = DIVIDED[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SMALL, **own, "pad_token_id": 0})
        model: PreTrainedModel = getattr(transformers, name)(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.08) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", DIVIDED)
def test_pieces_are_read_as_transformers_reads_them(kind: str, tmp_path: Path) -> None:
    model, fused = make(kind, tmp_path), DIVIDED[kind][2]
    assert fused in load_file(tmp_path / "model.safetensors")
    opened = open_model(open_original(tmp_path), trust_remote_code=False)
    assert fused not in opened.source.tensors
    weights = WeightStream(opened.source, opened.names, torch.device("cpu"), torch.float32)
    for name, expected in model.named_parameters():
        assert torch.equal(weights.read(name), expected), name
    held = sum(opened.source.stored_bytes(name) for name in opened.source.tensors)
    assert held == sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.parametrize(("kind", "options"), [("nomic_bert", {"tune_steps": 1}), ("molmo2_text", {"method": "rtn"})])
def test_each_piece_is_a_layer_that_every_reader_finds(
    kind: str, options: dict[str, Any], windows: Tensor, tmp_path: Path
) -> None:
    model, source, out = make(kind, tmp_path / "source"), tmp_path / "source", tmp_path / "out"
    config = QuantConfig(bits=8, group_size=32, num_samples=6, seq_len=32, format="gptq", **options)
    result = quantize(source, out, config, calibration=windows)
    assert {"q_proj", "k_proj", "v_proj"} <= {layer.name.rpartition(".")[2] for layer in result.layers}
    assert verify.verify(out).problems == []
    with torch.no_grad():
        expected, found = model(windows)[0], load(out)(windows)[0]
        by_transformers = type(model).from_pretrained(out)(windows)[0]
    assert float((found - expected).norm() / expected.norm()) < 0.03
    assert torch.equal(found, by_transformers)


def test_a_fused_layer_that_is_not_quantized_stays_fused(windows: Tensor, tmp_path: Path) -> None:
    model = make("jina_embeddings_v3", tmp_path / "source")
    config = QuantConfig(group_size=32, method="rtn", format="gptq", overrides=("layers.1.*q_proj:skip",))  # type: ignore[arg-type]
    quantize(tmp_path / "source", tmp_path / "out", config)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    for key in ("weight", "bias"):
        fused = f"roberta.encoder.layers.1.mixer.Wqkv.{key}"
        assert torch.equal(after[fused], before[fused])
        assert fused.replace("1", "0") not in after
    assert "roberta.layers.0.self_attn.k_proj.qweight" in after or "layers.0.self_attn.k_proj.qweight" in after
    with torch.no_grad():
        by_transformers = type(model).from_pretrained(tmp_path / "out")(windows)[0]
        assert torch.equal(load(tmp_path / "out")(windows)[0], by_transformers)
