"""Experts that a checkpoint holds in one tensor for all: every layout from file to file, and back into transformers."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from gptq import InputError, QuantConfig, load, quantize
from gptq.checkpoint.assembled import INDEX_FILE, open_source
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import sha256
from gptq.inference.quant_linear import QuantLinear
from gptq.models.experts import DenseExperts, ExpertForm, Experts, InputWeighingExperts, unfuse_experts
from gptq.output import verify
from gptq.output.convert import convert
from gptq.output.results import RECORD
from gptq.planning import memory
from gptq.planning.plan import plan_checkpoint

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
    t: Any = transformers
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
    network.eval()
    return network


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

    written = open_source(out)
    stored = {name: written.read_unchecked(name) for name in written.tensors}
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
    source, config = make_fused(kind, k=EXPERTS), QuantConfig.from_dict({**FAST, "bits": 8, "group_size": 8})
    quantize(source, tmp_path / "out", config, calibration=IDS, device="cpu")
    found, expected = logits(load(tmp_path / "out", dtype="float32")), logits(from_pretrained(source))
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()


# --- gpt-oss for vLLM -------------------------------------------------------------------------------------------------

# What vLLM 0.32.0 (model_executor/models/gpt_oss.py) copies to an expert, by the last part of the name. Other names
# that have one of LEADS in them it takes for tensors of all experts, and fails.
COPIED = {f"{part}_{key}" for part in ("w13", "w2") for key in ("weight_packed", "weight_scale", "bias")}
LEADS = (".w13_weight", ".w2_weight", ".w13_bias", ".w2_bias")


@pytest.fixture(scope="module")
def packed_oss(make_fused: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("oss") / "out"
    config = QuantConfig(method="rtn", group_size=16, format="pack-quantized")
    quantize(make_fused("gpt_oss"), out, config, device="cpu")
    return out


def test_gpt_oss_is_written_by_the_names_and_the_order_of_rows_that_vllm_reads(packed_oss: Path) -> None:
    experts, stored, network = LAYOUTS["gpt_oss"][0], load_file(packed_oss / "model.safetensors"), load(packed_oss)
    assert all(name.rpartition(".")[2] in COPIED for name in stored if any(lead in name for lead in LEADS))
    for number in range(EXPERTS):
        rows = {}
        for part in ("w13", "w2"):
            words, scale = (stored[f"{experts}.{number}.{part}_weight_{key}"] for key in ("packed", "scale"))
            nibbles = (words[..., None] >> torch.arange(0, 32, 4)) & 15  # (rows, words, 8)
            codes = nibbles.flatten(1).unflatten(1, (-1, 16)) - 8  # (rows, groups, 16)
            rows[part] = (codes * scale[..., None].float()).flatten(1), stored[f"{experts}.{number}.{part}_bias"]
        for part, found in (("gate", [r[0::2] for r in rows["w13"]]), ("up", [r[1::2] for r in rows["w13"]])):
            layer: Any = network.get_submodule(f"{experts}.{number}.{part}_proj")
            assert torch.equal(layer.weight, found[0])
            assert torch.equal(layer.bias, found[1])
        down: Any = network.get_submodule(f"{experts}.{number}.down_proj")
        assert torch.equal(down.weight, rows["w2"][0])
        assert torch.equal(down.bias, rows["w2"][1])
    assert {engine.name for engine in verify.inspect(packed_oss).engines if engine.takes} >= {"vLLM", "transformers"}


def test_converting_gpt_oss_away_and_back_gives_the_same_bytes(packed_oss: Path, tmp_path: Path) -> None:
    convert(packed_oss, tmp_path / "other", "gptq")
    assert not (tmp_path / "other" / INDEX_FILE).exists()
    convert(tmp_path / "other", tmp_path / "back", "pack-quantized")
    for name in ("model.safetensors", INDEX_FILE, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (packed_oss / name).read_bytes()
    assert verify.verify(tmp_path / "back").problems == []


@pytest.mark.parametrize("options", [{"sym": False}, {"overrides": [[r"experts\.1\.", {"skip": True}]]}], ids=str)
def test_experts_that_vllm_would_not_read_keep_their_names(
    options: dict[str, Any], make_fused: Callable[..., Path], tmp_path: Path
) -> None:
    config = QuantConfig.from_dict({"method": "rtn", "group_size": 16, "format": "pack-quantized", **options})
    quantize(make_fused("gpt_oss"), tmp_path / "out", config, device="cpu")
    assert not (tmp_path / "out" / INDEX_FILE).exists()
    assert "vLLM" not in {engine.name for engine in verify.inspect(tmp_path / "out").engines if engine.takes}


def test_transformers_is_not_given_an_index_that_it_cannot_undo(packed_oss: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(packed_oss, folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    name = f"{LAYOUTS['gpt_oss'][0]}.0.up_proj.bias"
    index["tensors"][name]["alternate"] = 0  # where gate_proj's is said to be
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"w13_bias', which holds two"):
        from_pretrained(folder)


# --- forms ------------------------------------------------------------------------------------------------------------


class OtherExperts(nn.Module):
    """Experts of no known model: up before gate, clamped, the router's weights on the inputs."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(5, 2 * intermediate, hidden, device="meta"))
        self.w_out = nn.Parameter(torch.empty(5, hidden, intermediate, device="meta"))
        self.limit = 3.0

    def _apply_gate(self, both: Tensor) -> Tensor:
        up, gate = both.chunk(2, dim=-1)
        return nn.functional.gelu(gate.clamp(max=self.limit)) * (up + 1)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(5):
            token, choice = torch.where(chosen == number)
            y = self._apply_gate((x[token] * weights[token, choice, None]) @ self.w_in[number].T)
            out.index_add_(0, token, y @ self.w_out[number].T)
        return out


class UngatedInFunctions(nn.Module):
    """Experts without a gate, stored as (inputs, outputs), whose activation is a function, not a module."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(5, intermediate, hidden, device="meta"))
        self.up = nn.Parameter(torch.empty(5, hidden, intermediate, device="meta"))
        self.down_b, self.up_b = (nn.Parameter(torch.empty(5, n, device="meta")) for n in (hidden, intermediate))
        self.activate = nn.functional.silu

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(5):
            token, choice = torch.where(chosen == number)
            y = self.activate(x[token] @ self.up[number] + self.up_b[number]) @ self.down[number] + self.down_b[number]
            out.index_add_(0, token, y * weights[token, choice, None])
        return out


@pytest.mark.parametrize("hidden", [24, 32, 64])  # twice the intermediate size leaves the shapes of a transposed form
def test_forms_are_found_by_trying(hidden: int) -> None:
    experts, form = unfuse_experts(OtherExperts(hidden, 32))
    assert form == ExpertForm("w_in", "w_out", None, None, True, False, False, up_first=True)
    assert isinstance(experts, InputWeighingExperts)
    experts, form = unfuse_experts(UngatedInFunctions(hidden, 32))
    assert form == ExpertForm("up", "down", "up_b", "down_b", False, True, False, False)
    assert type(experts) is Experts
    config = transformers.GptOssConfig(hidden_size=hidden, intermediate_size=32, num_local_experts=5)
    with torch.device("meta"):
        fused = GptOssExperts(config)
    _, form = unfuse_experts(fused)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    assert form == ExpertForm(*names, gated=True, transposed=True, interleaved=True, up_first=False)


@pytest.mark.parametrize("make", [GptOssExperts, MixtralExperts])
def test_separate_experts_compute_what_the_fused_ones_do_beyond_every_clamp(
    make: type[nn.Module], rng: torch.Generator
) -> None:
    config = transformers.GptOssConfig(hidden_size=24, intermediate_size=40, num_local_experts=5, hidden_act="silu")
    fused = make(config)
    for parameter in fused.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    experts, form = unfuse_experts(fused)
    for (part, key), name in form.places().items():
        for number, expert in enumerate(experts):
            taken = form.take(part, key, fused.get_parameter(name)[number])
            setattr(getattr(expert, part), key, nn.Parameter(taken.contiguous()))
    x, weights = 10 * torch.randn(7, 24, generator=rng), torch.rand(7, 2, generator=rng)
    chosen = torch.rand(7, 5, generator=rng).topk(2).indices
    with torch.no_grad():
        torch.testing.assert_close(experts(x, chosen, weights), fused(x, chosen, weights), rtol=1e-4, atol=1e-2)
        pickled = pickle.loads(pickle.dumps(copy.deepcopy(experts)))  # noqa: S301
        assert torch.equal(pickled(x, chosen, weights), experts(x, chosen, weights))


def test_rows_of_dense_experts_are_those_that_the_router_chose(rng: torch.Generator) -> None:
    experts = DenseExperts(nn.Identity() for _ in range(3))
    x = torch.randn(3, 4, 6, generator=rng)  # experts, tokens, hidden
    x[0, 1] = x[2] = 0
    rows, routes = experts.routing(x.flatten(0, 1))
    assert torch.equal(rows, torch.cat([x[0, [0, 2, 3]], x[1]]))
    assert routes.flatten().tolist() == [0, 0, 0, 1, 1, 1, 1]
    original = x + 1.0
    original[1, 2] = 0  # there the original model has chosen another expert
    expected = torch.cat([original[0, [0, 2, 3]], original[1, :2], x[1, 2:3], original[1, 3:]])
    assert torch.equal(experts.original_inputs(x.flatten(0, 1), original.flatten(0, 1)), expected)
    assert torch.equal(experts(x.flatten(0, 1)), x.flatten(0, 1))


# --- what is kept, and what is refused --------------------------------------------------------------------------------


def test_an_expert_that_is_skipped_is_stored_by_itself_and_convert_reads_it(
    make_fused: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = make_fused("gpt_oss"), tmp_path / "out"
    options = {**FAST, "format": "gptq", "overrides": [[r"experts\.1\.", {"skip": True}]]}
    quantize(source, out, QuantConfig.from_dict(options), calibration=IDS, device="cpu")
    stored, original = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    experts = LAYOUTS["gpt_oss"][0]
    fused = original[f"{experts}.gate_up_proj"][1].T
    assert torch.equal(stored[f"{experts}.1.up_proj.weight"], fused[1::2])
    assert torch.equal(stored[f"{experts}.2.gate_proj.bias"], original[f"{experts}.gate_up_proj_bias"][2, ::2])
    convert(out, tmp_path / "other", "pack-quantized")
    assert verify.verify(tmp_path / "other").problems == []
    found = logits(load(out, dtype="float32"))
    for folder in (out, tmp_path / "other"):
        assert torch.equal(logits(from_pretrained(folder)), found)


def test_experts_that_stay_fused_are_named_with_the_reason_and_their_share(
    make_fused: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(make_fused("granitemoe"))
    plan = plan_checkpoint(source, QuantConfig(group_size=16), None, False)
    shapes = [info.shape for info in plan.source.tensors.values()]
    total = sum(torch.Size(shape).numel() for shape in shapes)
    quantized = sum(layer.outputs * layer.inputs for layer in plan.layers.values())
    assert plan.kept_share == pytest.approx(1 - quantized / total)
    monkeypatch.setattr("gptq.models.experts._computes_the_same", lambda *_: False)
    less = plan_checkpoint(source, QuantConfig(group_size=16), None, False)
    assert less.kept_share - plan.kept_share == pytest.approx(EXPERTS * 3 * 32 * 48 / total)
    note = "fused tensors of 1 modules (model.layers.0.block_sparse_moe.experts ...) stay as they are: it computes some"
    assert [one for one in less.notes if one.startswith(note)]


def test_a_fused_tensor_of_another_shape_is_refused_by_name(make_fused: Callable[..., Path], tmp_path: Path) -> None:
    source = make_fused("llama4_text")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.feed_forward.experts.down_proj"
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(InputError, match=rf"{name} has the shape \(3, 48, 32\), but .* \(4, 48, 32\)"):
        plan_checkpoint(str(tmp_path), QuantConfig(group_size=16), None, False)


@pytest.mark.slow
def test_fused_experts_come_out_the_same_for_every_batch_size(make_fused: Callable[..., Path], tmp_path: Path) -> None:
    config = QuantConfig(group_size=16, num_samples=8, seq_len=16)
    for name, batch_size in (("all", None), ("three", 3)):
        quantize(
            make_fused("llama4_text"), tmp_path / name, config, calibration=IDS, device="cpu", batch_size=batch_size
        )
    for name in ("model.safetensors", RECORD):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_gates_and_routers_stay_unless_an_override_names_them(tmp_path: Path) -> None:
    options = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = transformers.Qwen2MoeConfig(
        **options, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=48, intermediate_size=48,
        shared_expert_intermediate_size=48,
    )  # fmt: skip
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)

    def planned(*overrides: Any) -> tuple[set[str], list[str]]:
        plan = plan_checkpoint(str(tmp_path), QuantConfig(group_size=16, overrides=overrides), None, False)
        return {name for name in plan.layers if name.endswith("gate")}, plan.notes

    kept, notes = planned()
    assert kept == set()
    assert [note for note in notes if note.startswith("model.layers.0.mlp.shared_expert_gate: gates and routers stay")]
    assert planned(["mlp", {"bits": 8}])[0] == set()  # which is about more than gates
    assert planned(["shared_expert_gate", {"bits": 8}])[0] == {"model.layers.0.mlp.shared_expert_gate"}


@pytest.mark.parametrize("kind", ["gemma4_text", "jetmoe", "afmoe"])
def test_routers_in_modules_of_their_own_stay(kind: str, make_fused: Callable[..., Path], tmp_path: Path) -> None:
    options = {key: value for key, value in TEXT.items() if key != "head_dim"}
    if kind == "gemma4_text":
        folder = make_fused(kind)
    else:
        folder, local = tmp_path, {"num_local_experts": EXPERTS, "num_experts": EXPERTS, "num_experts_per_tok": 2}
        own = {"num_dense_layers": 0, "moe_intermediate_size": 48, "kv_channels": 16, **local}
        config = transformers.AutoConfig.for_model(kind, **options, **own)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    plan = plan_checkpoint(str(folder), QuantConfig(group_size=16), None, False)
    assert not [name for name in plan.layers if "router" in name]
    assert any("router" in note and "gates and routers stay" in note for note in plan.notes)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_of_a_fused_tensor_one_expert_is_read_at_a_time(
    make_fused: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sizes = Source.read, []

    def observed(source: Source, name: str, *arguments: Any, **keywords: Any) -> Tensor:
        tensor = read(source, name, *arguments, **keywords)
        if "_linear" in name:
            sizes.append(len(tensor))
        return tensor

    monkeypatch.setattr(Source, "read", observed)
    config = QuantConfig(method="rtn", group_size=16)
    quantize(make_fused("granitemoe"), tmp_path / "out", config, device="cpu")
    assert sizes == [1] * EXPERTS * 3


RUN = """
import sys
import torch
from gptq import QuantConfig, quantize
from gptq.planning import memory

torch.set_num_threads(1)
base = memory.warm_up()
windows = torch.randint(1, 90, (8, 32), generator=torch.Generator().manual_seed(0))
config = QuantConfig(group_size=32, num_samples=8, seq_len=32, effort="fast")
quantize(sys.argv[1], sys.argv[2], config, calibration=windows, device="cpu", dtype="float32",
         memory_limit=base + int(sys.argv[3]))
print(memory.peak_resident_bytes() - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are counted in Linux's /proc")
def test_a_block_of_64_fused_experts_stays_within_the_memory_limit(tmp_path: Path) -> None:
    config = transformers.GraniteMoeConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=VOCAB,
        intermediate_size=128, num_local_experts=64, num_experts_per_tok=8, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GraniteMoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    chosen = QuantConfig(group_size=32, effort="fast")
    plan, tokens = plan_checkpoint(str(tmp_path / "source"), chosen, None, False), memory.Tokens(8, 32, 1)
    limit = int(memory.estimate_peak(plan, chosen, tokens, torch.float32, 8, False, 0) / (1 - memory.MARGIN))
    limit += 50_000_000  # what the process grows by before it looks at its memory
    command = [sys.executable, "-c", RUN, str(tmp_path / "source"), str(tmp_path / "out"), str(limit)]
    added = int(subprocess.check_output(command, text=True).splitlines()[-1])
    assert added <= limit
    assert verify.verify(tmp_path / "out").problems == []
