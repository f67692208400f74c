"""Images, sound and chats as calibration: what they reach is quantized, what they do not reach stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gptq import InputError, QuantConfig, quantize
from gptq.output import verify
from tests.conftest import LLAMA_LIKE, VOCAB

CONFIG = QuantConfig(bits=4, group_size=32, num_samples=8, seq_len=32, effort="fast", format="gptq")
IMAGE, START, END = VOCAB - 4, VOCAB - 3, VOCAB - 2  # tokens of the tiny Qwen2-VL
QWEN: dict[str, Any] = {
    "text_config": {
        **LLAMA_LIKE, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    },
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    "image_token_id": IMAGE, "video_token_id": VOCAB - 1, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
TOWER = [f"model.visual.blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def save(network: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a model with weights as large as trained ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
    network.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def qwen(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Qwen2-VL: 8 layers in the tower, 14 in the language model."""
    network = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(**QWEN))
    return save(network, tmp_path / "qwen", tokenizer)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_text_does_not_reach_stays_bit_for_bit(qwen: Path, windows: Tensor, tmp_path: Path) -> None:
    ids = windows.clamp(max=IMAGE - 1)
    result = quantize(qwen, tmp_path / "out", CONFIG, calibration=ids)
    before, after = weights_of(qwen), weights_of(tmp_path / "out")
    assert len(result.layers) == 14
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("visual."))
    assert [n for n in result.notes if "visual" in n] == [
        "model.visual.blocks stays as it is: the calibration has no inputs for it"
    ]
    assert verify.verify(tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("override", "layers", "bits", "note"),
    [
        ("visual:bits=8", 22, 8, "as an override asks"),
        ("visual:skip", 14, None, "model.visual.blocks stays as it is"),
        ("mlp:bits=8", 14, None, "model.visual.blocks stays as it is"),  # names reached layers too: it is about those
    ],
)
def test_an_override_can_ask_for_what_is_not_reached(
    override: str, layers: int, bits: int | None, note: str, qwen: Path, windows: Tensor, tmp_path: Path
) -> None:
    config = QuantConfig.from_dict({**CONFIG.to_dict(), "overrides": [override]})
    result = quantize(qwen, tmp_path / "out", config, calibration=windows.clamp(max=IMAGE - 1))
    tower = [layer for layer in result.layers if "visual" in layer.name]
    assert (len(result.layers), {layer.bits for layer in tower}) == (layers, {bits} - {None})
    assert [note in n for n in result.notes if "visual" in n and "group" not in n] == [True]
    assert verify.verify(tmp_path / "out").problems == []


def test_an_override_that_names_nothing_is_still_refused(qwen: Path, windows: Tensor, tmp_path: Path) -> None:
    config = QuantConfig.from_dict({**CONFIG.to_dict(), "overrides": ["vision:skip"]})
    with pytest.raises(InputError, match="'vision:skip=true' names no layer"):
        quantize(qwen, tmp_path / "out", config, calibration=windows)
