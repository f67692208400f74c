"""Plain transformers reads what this package wrote: GPTQ through us, pack-quantized through compressed-tensors."""

import copy
import json
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from gptq import InputError, QuantConfig, load, quantize
from gptq.checkpoint.tensors import sha256
from gptq.formats.quantization_config import read_quantization
from gptq.inference import hf_registration
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from gptq.output.convert import convert
from gptq.output.results import RECORD
from tests.conftest import VOCAB, MakeModel

RTN = {"method": "rtn", "group_size": 32}
MIXED = {"overrides": [["down_proj", {"bits": 8, "group_size": -1}], [r"layers\.0\..*o_proj", {"skip": True}]]}
FP8_HEAD = {"lm_head": True, "format": "float-quantized", "bits": 8, "group_size": -1}
IDS = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"format": "gptq"}, {"format": "gptq_v2", "bits": 3, "sym": False}])
def test_transformers_loads_and_saves_gptq_files(
    kind: str, dtype: torch.dtype, options: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    mixed = MIXED if kind == "llama" else {}
    quantize(make_model(kind, dtype=dtype), out, QuantConfig.from_dict({**RTN, **options, **mixed}))
    network = AutoModelForCausalLM.from_pretrained(out)
    assert network.dtype == dtype
    with torch.no_grad():
        ours, theirs = load(out, dtype=str(dtype).removeprefix("torch.")), network
        assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
    assert sum(isinstance(module, QuantLinear) for module in network.modules()) >= 7

    network.save_pretrained(again)
    one, two = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    assert {n: (t.dtype, sha256(t)) for n, t in one.items()} == {n: (t.dtype, sha256(t)) for n, t in two.items()}
    assert _quantization(again) == _quantization(out)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(IDS).logits, network(IDS).logits)


def _quantization(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_pipeline_and_generate(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "out", QuantConfig.from_dict({**RTN, "format": "gptq"}))
    ours: Any = load(tmp_path / "out")
    made = ours.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False)
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out").decode(IDS[0, :5])
    write: Any = pipeline("text-generation", model=str(tmp_path / "out"))
    written = write(prompt, max_new_tokens=6, do_sample=False)
    assert written[0]["generated_text"].startswith(prompt)
    network: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(network.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False), made)


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 3}, {"bits": 5, "group_size": -1}, MIXED])
def test_transformers_loads_pack_quantized_files_with_compressed_tensors(
    options: dict[str, Any], make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: Any = sys.modules[hf_registration.TABLES]
    method, out = "compressed-tensors", tmp_path / "out"
    monkeypatch.setitem(tables.AUTO_QUANTIZATION_CONFIG_MAPPING, method, transformers.CompressedTensorsConfig)
    monkeypatch.setitem(tables.AUTO_QUANTIZER_MAPPING, method, tables.AUTO_QUANTIZER_MAPPING[method].theirs)
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, **options, "format": "pack-quantized"}))
    network = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        theirs = network(IDS).logits
        ours = load(out)
        torch.testing.assert_close(theirs, ours(IDS).logits, rtol=0, atol=1e-5)
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(network.get_submodule(name).state_dict()["weight"], layer.weight)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_unpacks_our_weights(bits: int, sym: bool, make_model: MakeModel, tmp_path: Path) -> None:
    """transformers 5.23 stumbles over asymmetric files of every tool, so that its own decompression is asked here."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    out = tmp_path / "out"
    options = {**RTN, "bits": bits, "sym": sym, "format": "pack-quantized"}
    quantize(make_model("llama", num_hidden_layers=1), out, QuantConfig.from_dict(options))
    scheme = QuantizationConfig.model_validate(_quantization(out)).config_groups["group_0"]
    file, network = load_file(out / "model.safetensors"), load(out)
    for name, layer in network.named_modules():
        if isinstance(layer, QuantLinear):
            own = {key.removeprefix(f"{name}."): t for key, t in file.items() if key.startswith(f"{name}.")}
            own["weight_scale"] = own["weight_scale"].float()
            assert torch.equal(PackedQuantizationCompressor.decompress(own, scheme)["weight"], layer.weight)


@pytest.mark.slow
def test_the_package_is_light_and_registers_before_transformers_is_there(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "out", QuantConfig.from_dict({**RTN, "format": "gptq"}))
    program = """
import sys
import gptq
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoModelForCausalLM
network = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(network.model.layers[0].mlp.up_proj).__module__)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "gptq.inference.quant_linear\n"


def test_where_optimum_and_gptqmodel_are_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs: ...

    tables: Any = types.ModuleType("tables")
    for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        setattr(tables, name, {"gptq": Theirs, "compressed-tensors": Theirs})
    monkeypatch.setattr(hf_registration, "gptqmodel_is_installed", lambda: True)
    hf_registration._replace_entries(tables)
    assert tables.AUTO_QUANTIZER_MAPPING["gptq"] is tables.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is Theirs
    monkeypatch.setattr(hf_registration, "gptqmodel_is_installed", lambda: False)
    hf_registration._replace_entries(tables)
    entered = tables.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]
    quantizer: Any = tables.AUTO_QUANTIZER_MAPPING["gptq"]
    assert quantizer.theirs is Theirs
    assert issubclass(entered, transformers.GPTQConfig)
    hf_registration._replace_entries(tables)  # a second time changes nothing
    assert tables.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is entered
    assert tables.AUTO_QUANTIZER_MAPPING["gptq"] is quantizer


def test_quantizing_through_transformers_is_still_their_business(make_model: MakeModel) -> None:
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(
            make_model("llama"), quantization_config=transformers.GPTQConfig(bits=4, dataset=["a text"])
        )


# --- what from_pretrained and load have in common ---------------------------------------------------------------------


def test_from_pretrained_makes_the_checks_of_load(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = make_model("llama", num_hidden_layers=1, attention_bias=True)
    quantize(source, out, QuantConfig.from_dict({**RTN, "format": "gptq"}))
    original = {name: (out / name).read_text() for name in ("config.json", "quantize_config.json")}
    for name, text in original.items():
        (out / name).write_text(text.replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"'))
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=r"q_proj\.qzeros .* holds the zero point 7, .* sym true, which is 8"):
            read(out)
    for name, text in original.items():
        (out / name).write_text(text)
    tensors = load_file(out / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.scales", "model.layers.0.self_attn.q_proj.bias"):
        damaged = {**tensors, name: torch.full_like(tensors[name], torch.nan)}
        save_file(damaged, out / "model.safetensors", {"format": "pt"})
        for read in (load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(InputError, match="holds NaN"):
                read(out)
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, out / "model.safetensors")
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=r"lacks model\.norm\.weight"):
            read(out)


@pytest.mark.parametrize("chosen", ["gptq", "pack-quantized"])
def test_scales_stay_as_stored_and_models_are_pickled(chosen: str, make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama", num_hidden_layers=1), out, QuantConfig.from_dict({**RTN, "format": chosen}))
    stored = load_file(out / "model.safetensors")
    scales = {name: tensor for name, tensor in stored.items() if name.endswith(("scales", "weight_scale"))}
    for number, network in enumerate((load(out, dtype="float32"), AutoModelForCausalLM.from_pretrained(out))):
        with torch.no_grad():
            expected = network(IDS).logits
            for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301
                assert torch.equal(again(IDS).logits, expected)
        torch.nn.Module.to(network, torch.bfloat16).save_pretrained(tmp_path / str(number))  # transformers' own refuses
        saved = load_file(tmp_path / str(number) / "model.safetensors")
        assert saved["model.norm.weight"].dtype == torch.bfloat16
        for name, tensor in scales.items():
            assert tensor.dtype == torch.float16
            assert torch.equal(saved[name], tensor)
            assert saved[name].dtype == tensor.dtype


READERS: tuple[Callable[[Path], object], ...] = (
    load, AutoModelForCausalLM.from_pretrained, verify.inspect,
    lambda folder: convert(folder, folder.with_name("other"), "gptq_v2"),
)  # fmt: skip


def test_rotations_and_sparse_weights_of_other_tools_are_refused_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama", num_hidden_layers=1), out, QuantConfig.from_dict({**RTN, "format": "pack-quantized"}))
    (out / RECORD).unlink()
    original = json.loads((out / "config.json").read_text())
    for key, value in (
        ("transform_config", {"config_groups": {"R4": {"type": "hadamard", "apply": []}}}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
        ("rotation_of_tomorrow", True),
    ):
        quantization = {**original["quantization_config"], key: value}
        (out / "config.json").write_text(json.dumps({**original, "quantization_config": quantization}))
        for use in READERS:
            with pytest.raises(InputError, match=key):
                use(out)


def test_what_a_gptq_file_asks_for_and_is_not_known_is_refused_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama", num_hidden_layers=1), out, QuantConfig.from_dict({**RTN, "format": "gptq"}))
    for file in (RECORD, "quantize_config.json"):
        (out / file).unlink()
    original = json.loads((out / "config.json").read_text())
    for key, value in (
        ("rotation", "hadamard"), ("activation", "w4afp8"), ("adapter", {"path": "x"}), ("pack_dtype", "int16"),
        ("is_marlin_format", True), ("act_bits", 8), ("of_tomorrow", False), ("dynamic", {"+:.*": {"rotation": "x"}}),
    ):  # fmt: skip
        quantization = {**original["quantization_config"], key: value}
        (out / "config.json").write_text(json.dumps({**original, "quantization_config": quantization}))
        for use in READERS:
            with pytest.raises(InputError, match=key):
                use(out)


WRITTEN: dict[str, dict[str, Any]] = {  # by each tool, beside bits, group_size, desc_act and quant_method
    "AutoGPTQ 0.7": {
        "damp_percent": 0.01, "static_groups": False, "sym": True, "true_sequential": True, "model_name_or_path": None,
        "model_file_base_name": "model", "is_marlin_format": False,
    },
    "optimum": {
        "batch_size": 1, "block_name_to_quantize": "model.layers", "cache_block_outputs": True, "damp_percent": 0.1,
        "dataset": "c4", "exllama_config": {"version": 1}, "max_input_length": None, "model_seqlen": 2048,
        "module_name_preceding_first_block": ["model.embed_tokens"], "modules_in_block_to_quantize": [["q_proj"]],
        "pad_token_id": None, "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": True,
        "use_exllama": True,
    },
    "GPTQModel 5.6": {
        "sym": True, "lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32", "pack_impl": "cpu",
        "meta": {"quantizer": ["gptqmodel:5.6.12"], "gptaq": False}, "format": "gptq",
    },
    "GPTQModel 7.7": {
        "sym": True, "lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32", "method": "gptq",
        "format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"], "moe": None}, "dynamic": {"-:.*mlp.*": {}},
    },
    "AutoRound 0.16": {
        "sym": True, "data_type": "int", "provider": "auto-round", "autoround_version": "0.16.1", "lm_head": False,
        "true_sequential": False, "damp_percent": 0.01, "iters": 50, "enable_quanted_input": False,
        "block_name_to_quantize": "model.layers", "act_bits": 16, "super_bits": None,
    },
    "transformers": {**transformers.GPTQConfig(bits=4, group_size=32).to_dict(), "quant_method": "gptq"},
}  # fmt: skip


@pytest.mark.parametrize("tool", WRITTEN)
def test_what_other_tools_write_about_gptq_files_is_known(tool: str) -> None:
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, **WRITTEN[tool]}
    assert read_quantization("config.json", said).schemes(["model.layers.0.self_attn.q_proj"])


def test_a_layout_of_mlx_that_is_not_read_is_a_sentence_in_transformers_too(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {"group_size": 64, "bits": 4, "mode": "unheard-of", "quant_method": "mlx"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="unheard-of"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("options", [{}, {"lm_head": True}, FP8_HEAD])
def test_another_head_on_a_packed_model(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    """What the checkpoint lacks is new, as of a plain one; a packed head that the class lacks is left out."""
    out = tmp_path / "out"
    quantize(make_model("llama", num_labels=3), out, QuantConfig.from_dict({**RTN, **options}))
    expected = load(out, dtype="float32").model(IDS).last_hidden_state
    for kind in (AutoModel, AutoModelForTokenClassification):
        network: Any = kind.from_pretrained(out)
        base = network if kind is AutoModel else network.model
        assert sum(isinstance(module, QuantLinear) for module in network.modules()) == 14
        assert torch.equal(base(IDS).last_hidden_state, expected)
    assert network.score.weight.shape == (3, 64)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForTokenClassification])
def test_another_head_is_no_excuse_for_what_the_base_model_lacks(
    kind: Any, make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("llama")
    for name, dropped in (("norm", "model.norm.weight"), ("layer", "model.layers.0.mlp.down_proj.")):
        quantize(source, tmp_path / name, QuantConfig.from_dict(RTN))
        tensors = load_file(tmp_path / name / "model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(dropped)}
        save_file(kept, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"lacks .*(norm|down_proj)\.weight"):
            kind.from_pretrained(tmp_path / name)
    quantize(source, tmp_path / "shallow", QuantConfig.from_dict(RTN))
    config = json.loads((tmp_path / "shallow" / "config.json").read_text())
    (tmp_path / "shallow" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"holds model\.layers\.1\..*, for which its config.json has no layer"):
        kind.from_pretrained(tmp_path / "shallow")


def test_what_accelerate_cannot_offload_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    options: dict[str, Any] = {"device_map": {**places, "lm_head": "cpu"}, "offload_folder": tmp_path / "offloaded"}
    source = make_model("llama")
    for chosen, own in (("gptq", {}), ("int-quantized", {"bits": 8, "group_size": -1})):
        quantize(source, tmp_path / chosen, QuantConfig.from_dict({**RTN, "format": chosen, **own}))
    with torch.no_grad():
        offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", **options)(IDS).logits
        assert torch.equal(offloaded, load(tmp_path / "gptq", dtype="float32")(IDS).logits)
    chosen_later = {**options, "device_map": "auto", "max_memory": {"cpu": "20KB"}}
    for own in (options, chosen_later):
        with pytest.raises(InputError, match=r"_proj is stored as int-quantized, which accelerate cannot offload"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "int-quantized", **own)


@pytest.mark.parametrize("lm_head", [False, True])
def test_a_dtype_that_no_configuration_names_is_that_of_the_weights(
    lm_head: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("llama", dtype=torch.bfloat16)
    values = json.loads((source / "config.json").read_text())
    del values["dtype"]
    (source / "config.json").write_text(json.dumps(values))
    quantize(source, tmp_path / "out", QuantConfig.from_dict({**RTN, "lm_head": lm_head}))
    for folder in (source, tmp_path / "out"):
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
