"""Experts that a checkpoint holds in one tensor for all: every layout from file to file, and back into transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq import QuantConfig, load, quantize
from gptq.checkpoint.tensors import sha256
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify

VOCAB, EXPERTS = 96, 4
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "spatial_merge_size": 1, "temporal_patch_size": 1, "num_position_embeddings": 16,
}  # fmt: skip
IMAGE = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def _config(kind: str, k: int) -> tuple[str, Any]:
    """The class of a tiny model, and its configuration with k of 4 experts for each token."""
    without_head_dim = {key: value for key, value in TEXT.items() if key != "head_dim"}
    local = {"num_local_experts": EXPERTS, "num_experts_per_tok": k, "intermediate_size": 48}
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": k, "moe_intermediate_size": 48}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    linear = {
        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 48, "layer_types": ["full_attention"],
    }  # fmt: skip
    t = transformers
    made: dict[str, tuple[str, Callable[[], Any]]] = {
        "gpt_oss": ("GptOssForCausalLM", lambda: t.GptOssConfig(**TEXT, **local)),
        "llama4_text": ("Llama4ForCausalLM", lambda: t.Llama4TextConfig(**TEXT, **local, intermediate_size_mlp=48)),
        "granitemoe": ("GraniteMoeForCausalLM", lambda: t.GraniteMoeConfig(**without_head_dim, **local)),
        "qwen3_vl_moe": (
            "Qwen3VLMoeForConditionalGeneration",
            lambda: t.Qwen3VLMoeConfig(
                text_config={**TEXT, **moe, "intermediate_size": 48, "rope_parameters": rope},
                vision_config={**VISION, "deepstack_visual_indexes": [0]}, **IMAGE,
            ),
        ),
        "qwen3_5_moe": (
            "Qwen3_5MoeForConditionalGeneration",
            lambda: t.Qwen3_5MoeConfig(text_config={**TEXT, **moe, **linear}, vision_config=VISION, **IMAGE),
        ),
        "gemma4_text": (
            "Gemma4ForCausalLM",
            lambda: t.Gemma4TextConfig(
                **TEXT, num_experts=EXPERTS, top_k_experts=k, moe_intermediate_size=48, intermediate_size=48,
                enable_moe_block=True, global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
                layer_types=["full_attention"], sliding_window=32,
            ),
        ),
    }  # fmt: skip
    name, config = made[kind]
    return name, config()


LAYOUTS = {  # where the experts lie in the result, the fused tensors of the source, and how they are held there
    "gpt_oss": ("model.layers.0.mlp.experts", ("gate_up_proj", "down_proj"), "interleaved"),
    "llama4_text": ("model.layers.0.feed_forward.experts", ("gate_up_proj", "down_proj"), "transposed"),
    "granitemoe": ("model.layers.0.block_sparse_moe.experts", ("input_linear.weight", "output_linear.weight"), ""),
    "qwen3_vl_moe": ("model.language_model.layers.0.mlp.experts", ("gate_up_proj", "down_proj"), "transposed"),
    "qwen3_5_moe": ("model.language_model.layers.0.mlp.experts", ("gate_up_proj", "down_proj"), ""),
    "gemma4_text": ("model.layers.0.experts", ("gate_up_proj", "down_proj"), ""),
}
IDS = torch.randint(1, 85, (8, 16), generator=torch.Generator().manual_seed(1))
FAST = {"group_size": 16, "num_samples": 8, "seq_len": 16, "effort": "fast"}


@pytest.fixture(scope="module")
def make_fused(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny model whose file holds experts fused, once for each kind and k, and returns its folder."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, k: int = 2) -> Path:
        if (kind, k) not in made:
            name, config = _config(kind, k)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = getattr(transformers, name)(config)
                for key, parameter in network.named_parameters():
                    if parameter.ndim > 1 or "bias" in key:
                        nn.init.normal_(parameter, std=0.1)
            made[kind, k] = tmp_path_factory.mktemp(kind)
            network.save_pretrained(made[kind, k], save_original_format=kind != "qwen3_5_moe")  # whose is one by one
            stored = load_file(made[kind, k] / "model.safetensors")
            assert [name for name in stored if name.endswith(LAYOUTS[kind][1])]
        return made[kind, k]

    return make


def from_pretrained(folder: Path) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    network: PreTrainedModel = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype=torch.float32
    )
    return network.eval()


def logits(network: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(input_ids=IDS).logits
    return found


def with_weights_of(out: Path, source: Path, folder: Path, kind: str) -> PreTrainedModel:
    """Plain transformers on the source's own fused tensors, with the weights that the packed layers stand for."""
    experts, fused, held = LAYOUTS[kind]
    tensors = load_file(source / "model.safetensors")
    weights = {name: m.weight for name, m in load(out, dtype="float32").named_modules() if isinstance(m, QuantLinear)}
    gate, up, down = (
        torch.stack([weights.pop(f"{experts}.{i}.{part}") for i in range(EXPERTS)])
        for part in ("gate_proj", "up_proj", "down_proj")
    )
    first = torch.stack((gate, up), 2).flatten(1, 2) if held == "interleaved" else torch.cat((gate, up), 1)
    for name, stacked in zip(fused, (first, down), strict=True):
        parent = experts.removesuffix(".experts") if "." in name else experts
        tensors[f"{parent}.{name}"] = (stacked.transpose(1, 2) if held else stacked).contiguous()
    folder.mkdir()
    save_file(
        {**tensors, **{f"{n}.weight": W for n, W in weights.items()}}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return from_pretrained(folder)


@pytest.mark.parametrize(("bits", "chosen"), [(4, "gptq"), (3, "pack-quantized")])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_fused_experts_from_file_to_file(
    kind: str, bits: int, chosen: str, make_fused: Callable[..., Path], tmp_path: Path
) -> None:
    source, out, again = make_fused(kind), tmp_path / "out", tmp_path / "again"
    experts = LAYOUTS[kind][0]
    config = QuantConfig.from_dict({**FAST, "bits": bits, "format": chosen})
    result = quantize(source, out, config, calibration=IDS, device="cpu")
    own = [layer for layer in result.layers if ".experts." in layer.name]
    parts = {f"{experts}.{i}.{part}_proj" for i in range(EXPERTS) for part in ("gate", "up", "down")}
    assert {layer.name for layer in own} == parts
    assert all(layer.error < layer.rtn_error for layer in own)
    assert not [note for note in result.notes if "fused" in note]
    assert verify.verify(out).problems == []

    stored = load_file(out / "model.safetensors")
    marker = "qweight" if chosen == "gptq" else "weight_packed"
    assert {name.removesuffix(f".{marker}") for name in stored if name.endswith(marker) and "experts" in name} == parts
    assert not [name for name in stored if "gate_up_proj" in name or "_linear" in name]
    found = logits(load(out, dtype="float32"))
    expected = logits(with_weights_of(out, source, tmp_path / "dense", kind))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)

    network = from_pretrained(out)
    assert torch.equal(logits(network), found)
    network.save_pretrained(again)
    saved = load_file(again / "model.safetensors")
    assert {n: (t.dtype, sha256(t)) for n, t in saved.items()} == {n: (t.dtype, sha256(t)) for n, t in stored.items()}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_at_8_bits_the_logits_stay(kind: str, make_fused: Callable[..., Path], tmp_path: Path) -> None:
    """All experts for each token, so that no rounding of the router's inputs changes the choice."""
    source, config = make_fused(kind, k=EXPERTS), QuantConfig(bits=8, group_size=16, num_samples=8, seq_len=16)
    quantize(source, tmp_path / "out", config, calibration=IDS, device="cpu")
    found, expected = logits(load(tmp_path / "out", dtype="float32")), logits(from_pretrained(source))
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()
