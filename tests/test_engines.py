"""What is written, held against the rules of readers that cannot run here; each rule with where it stands.

vLLM: vllm/model_executor/layers/quantization/{auto_gptq.py, utils/gptq_utils.py, compressed_tensors/} (September 2026);
SGLang: sglang/srt/layers/quantization/gptq.py. The rules are written out again below and nothing is taken from them.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq import InputError, QuantConfig, cli, formats, quantize
from gptq.config import FORMATS, Format
from gptq.formats import Scheme
from gptq.formats.compatibility import engines
from gptq.inference.hf_quantization_config import BY_METHOD
from gptq.models.blocks import FUSED
from gptq.output import verify
from gptq.planning.plan import plan_checkpoint
from tests.conftest import MakeModel

RTN = {"method": "rtn", "group_size": 32}
SPECIAL = {"overrides": [["down_proj|[qv]_proj", {"bits": 8, "group_size": -1}], [r"s\.0\..*o_proj", {"skip": True}]]}
PARTS = dict(FUSED[:1] + FUSED[2:3])  # Llama's packed_modules_mapping in vLLM


def fused_names(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every linear layer of the blocks as vLLM has it, and the layers of the checkpoint that it is made of."""
    for block in range(2):
        for parent, names in (("self_attn", ["qkv_proj", "o_proj"]), ("mlp", ["gate_up_proj", "down_proj"])):
            for name in names:
                prefix = f"model.layers.{block}.{parent}."
                yield prefix + name, [prefix + part for part in PARTS.get(name, (name,))]


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return content


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8, "group_size": -1}, {"format": "gptq", **SPECIAL}])
def test_vllms_rules_for_gptq(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, **options}))
    config, tensors = config_of(out), load_file(out / "model.safetensors")
    # AutoGPTQConfig.get_config_filenames: quantize_config.json; from_config: these keys have to be there.
    assert json.loads((out / "quantize_config.json").read_text()) == config
    assert {"bits", "group_size", "desc_act", "sym", "quant_method"} <= config.keys()
    assert config["quant_method"] == "gptq"
    for fused, parts in fused_names(out):
        # gptq_utils.get_dynamic_override: rules in their order, re.match on the fused name, "-:" is not quantized.
        bits, group_size, quantized = config["bits"], config["group_size"], True
        for rule, own in config.get("dynamic", {}).items():
            if re.match(rule[2:], fused):
                bits, group_size = own.get("bits", bits), own.get("group_size", group_size)
                quantized = not rule.startswith("-:")
                break
        # utils/gptq_utils.py: all parts of a fused layer are quantized, or none.
        assert {f"{part}.qweight" in tensors for part in parts} == {quantized}
        if not quantized:
            continue
        assert (bits, config["sym"]) in ((4, True), (8, True))  # auto_gptq.py, TYPE_MAP
        for part in parts:  # GPTQLinearMethod.create_weights: shapes that it makes for the checkpoint to fill
            inputs, outputs = len(tensors[f"{part}.g_idx"]), tensors[f"{part}.scales"].shape[1]
            groups = 1 if group_size == -1 else inputs // group_size
            assert group_size == -1 or inputs % group_size == 0
            assert tensors[f"{part}.qweight"].shape == (inputs * bits // 32, outputs)
            assert tensors[f"{part}.qzeros"].shape == (groups, outputs * bits // 32)
            assert tensors[f"{part}.scales"].shape == (groups, outputs)
            assert tensors[f"{part}.scales"].dtype == torch.float16
            assert {tensors[f"{part}.{s}"].dtype for s in ("qweight", "qzeros", "g_idx")} == {torch.int32}
            # has_g_idx = desc_act: without it g_idx is not looked at, so groups have to be runs of columns.
            runs = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
            assert config["desc_act"] or torch.equal(tensors[f"{part}.g_idx"].long(), runs)


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 4, "sym": False}, {"bits": 5, "group_size": -1}, SPECIAL, {"bits": 6, **SPECIAL}]
)
def test_vllms_rules_for_compressed_tensors(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, **options}))
    config, tensors = config_of(out), load_file(out / "model.safetensors")
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert not (out / "quantize_config.json").exists()
    assert "lm_head" in config["ignore"]

    def matches(target: str, name: str) -> bool:  # compressed_tensors/utils/match.py: re.match, or the very name
        return bool(re.match(target[3:], name)) if target.startswith("re:") else target in (name, "Linear")

    for fused, parts in fused_names(out):
        # compressed_tensors/utils.py should_ignore_layer and find_matched_target: by fused name or all parts alike.
        for names in ([fused], parts):
            ignored = {any(matches(target, name) for target in config["ignore"]) for name in names}
            assert ignored == {f"{parts[0]}.weight" in tensors}
        if f"{parts[0]}.weight" in tensors:
            continue
        found = [
            {g for g, group in config["config_groups"].items() if any(matches(t, name) for t in group["targets"])}
            for name in (fused, *parts)
        ]
        assert len(found[0]) == 1
        assert all(groups == found[0] for groups in found)
        weights = config["config_groups"][found[0].pop()]["weights"]
        bits, size = weights["num_bits"], weights["group_size"]
        assert (weights["strategy"], weights["type"], weights["dynamic"]) == (
            "group" if size else "channel",
            "int",
            False,
        )
        for part in parts:  # schemes/compressed_tensors_wNa16.py, create_weights
            outputs, inputs = tensors[f"{part}.weight_shape"].tolist()
            assert not size or inputs % size == 0
            assert tensors[f"{part}.weight_packed"].shape == (outputs, -(-inputs * bits // 32))
            assert tensors[f"{part}.weight_scale"].shape == (outputs, inputs // size if size else 1)
            assert (f"{part}.weight_zero_point" in tensors) is not weights["symmetric"]


def answers(scheme: Scheme, inputs: int = 4096) -> dict[str, bool]:
    return {e.name: e.takes for e in engines({"model.layers.0.mlp.down_proj": (scheme, inputs)})}


def test_who_takes_what() -> None:
    everyone = {"gptq", "transformers", "vLLM", "SGLang", "GPTQModel"}
    packed: Format = "pack-quantized"
    for scheme, inputs, takes in (
        (Scheme(4, 128, True, "gptq"), 4096, everyone),
        (Scheme(8, -1, True, "gptq"), 4096, everyone),
        (Scheme(3, 128, True, "gptq"), 4096, everyone - {"vLLM"}),  # TYPE_MAP
        (Scheme(4, 128, False, "gptq"), 4096, everyone - {"vLLM", "GPTQModel"}),  # loader.py: from itself only
        (Scheme(4, 128, False, "gptq", by_gptqmodel=True), 4096, everyone - {"vLLM"}),
        (Scheme(4, 128, False, "gptq_v2"), 4096, everyone - {"vLLM"}),
        (Scheme(4, 128, True, "gptq"), 172, {"gptq", "transformers", "GPTQModel"}),  # short last group
        (Scheme(3, -1, True, "gptq"), 172, {"gptq", "transformers"}),  # GPTQModel: words in threes
        (Scheme(4, 128, True, packed), 4096, everyone - {"GPTQModel"}),
        (Scheme(5, 128, True, packed), 4096, {"gptq", "transformers", "vLLM"}),
        (Scheme(4, 128, False, packed), 4096, {"gptq", "transformers", "vLLM"}),
        (Scheme(3, 128, False, packed), 4096, {"gptq", "transformers"}),
        (Scheme(4, 128, True, packed, scattered=True), 4096, {"gptq", "transformers", "vLLM", "SGLang"}),
    ):
        found = answers(scheme, inputs)
        assert {name for name, taken in found.items() if taken} == takes, (scheme, inputs)


@pytest.mark.parametrize(("inputs", "offered"), [(4096, True), (172, False)])
def test_what_gptqmodel_does_not_compute_is_not_offered_for_transformers_either(inputs: int, offered: bool) -> None:
    _, transformers, *_ = engines({"model.layers.0.mlp.down_proj": (Scheme(3, -1, True, "gptq"), inputs)})
    assert transformers.takes
    assert ("gptqmodel" in transformers.why) == offered


def test_experts_are_promised_where_a_source_shows_it() -> None:
    scheme = Scheme(4, 128, True, "gptq")
    packed = replace(scheme, format="pack-quantized")

    def takers(
        model_type: str, parts: tuple[str, ...], where: str = "mlp", scheme: Scheme = scheme, **others: Scheme
    ) -> set[str]:
        experts = {f"model.layers.0.{where}.experts.{i}.{part}": part for i in (0, 1) for part in parts}
        layers = {name: (others.get(part, scheme), 4096) for name, part in experts.items()}
        return {engine.name for engine in engines(layers, model_type) if engine.takes}

    gated, mixtral = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
    assert takers("qwen2_moe", gated) == {"gptq", "transformers", "vLLM", "SGLang"}
    assert takers("mixtral", mixtral, "block_sparse_moe") == {"gptq", "transformers", "vLLM", "SGLang"}
    assert takers("granitemoe", gated, "block_sparse_moe") == {"gptq", "transformers", "vLLM"}  # SGLang: w1, w3, w2
    assert takers("gpt_oss", gated) == {"gptq", "transformers"}
    assert takers("gpt_oss", gated, scheme=packed) == {"gptq", "transformers", "vLLM"}
    assert takers("gpt_oss", gated, scheme=replace(packed, sym=False)) == {"gptq", "transformers"}
    assert takers("gpt_oss", gated, scheme=replace(packed, format="pack-quantized-a8")) == {"gptq", "transformers"}
    assert takers("gpt_oss", gated, scheme=packed, down_proj=replace(packed, bits=8)) == {"gptq", "transformers"}
    assert takers("gpt_oss", gated[1:], scheme=packed) == {"gptq", "transformers"}
    assert takers("a model of tomorrow", gated) == {"gptq", "transformers"}
    optimum = next(e for e in engines({"layers.0.mlp.experts.0.up_proj": (scheme, 4096)}) if e.name == "transformers")
    assert "optimum" not in optimum.why  # which has no layers for fused experts


@pytest.mark.parametrize("kind", FORMATS)
def test_transformers_is_promised_every_format_that_the_registered_quantizer_reads(kind: Format) -> None:
    def of_layer(layer: str) -> tuple[Any, Any]:
        own, *others = engines({layer: (Scheme(8, 32, True, kind), 4096)})
        return own, next(engine for engine in others if engine.name == "transformers")

    registered = not formats.FORMATS[kind].is_assembled  # GGUF files are read by transformers itself
    assert formats.FORMATS[kind].quant_method in BY_METHOD or not registered
    own, dense = of_layer("layers.0.mlp.down_proj")
    assert dense.takes
    assert ("import gptq" in dense.why) == ("import gptq" in own.why) == registered
    own, experts = of_layer("layers.0.mlp.experts.0.up_proj")
    assert experts.takes == (kind != "mlx")  # which stacks experts: see the sweep and `models.assembled_names`
    assert ("import gptq" in experts.why) == ("import gptq" in own.why) == (registered and experts.takes)
    assert "compressed-tensors," not in experts.why  # which does not take them apart


def test_siblings_stored_apart_are_told() -> None:
    layers = {f"model.layers.0.mlp.{x}_proj": (Scheme(b, 128, True), 4096) for x, b in (("gate", 4), ("up", 8))}
    vllm = next(engine for engine in engines(layers) if engine.name == "vLLM")
    assert not vllm.takes
    assert "model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj are stored differently" in vllm.why


def test_a_plan_reads_no_weights(make_model: MakeModel) -> None:
    """Numbers that any reading refuses change nothing of it."""
    source, config = make_model(), QuantConfig(bits=4, group_size=32)
    before = plan_checkpoint(str(source), config, None, False)
    damaged = {name: torch.full_like(t, torch.nan) for name, t in load_file(source / "model.safetensors").items()}
    save_file(damaged, source / "model.safetensors", {"format": "pt"})
    after = plan_checkpoint(str(source), config, None, False)
    assert (after.layers, after.tensors, after.notes) == (before.layers, before.tensors, before.notes)
    with pytest.raises(InputError, match="NaN"):
        quantize(source, source.with_name("out"), QuantConfig(method="rtn", group_size=32))


def test_a_plan_with_widths_to_choose_says_that_it_is_of_one_width(
    make_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_model("llama"))
    for options, said in (([], 0), (["--mixed"], 1), (["--target-bits", "4"], 1)):
        assert cli.main(["plan", source, *options]) == 0
        assert capsys.readouterr().out.count("what width and group size each layer needs") == said


@pytest.mark.slow
def test_plan_and_inspect_say_it(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    options = ["--bits", "3", "--group-size", "32", "--override", "down_proj:bits=5", "--method", "rtn"]
    assert cli.main(["plan", str(source), *options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert cli.main(["plan", str(source), *options]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^about [\d,]+ MiB of memory", printed, re.MULTILINE)
    assert re.search(r"^about [\d,]+ s: ", printed, re.MULTILINE)
    assert re.search(r"^model\.layers\.1\.mlp\.down_proj +5 +32 +yes +64 x 96$", printed, re.MULTILINE)
    assert re.search(r"^vLLM +yes +as compressed-tensors, in releases with Humming", printed, re.MULTILINE)
    assert cli.main(["quantize", str(source), str(out), *options]) == 0
    assert not (tmp_path / "plan").exists()
    assert planned["file_bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert planned["peak_bytes"] > 0
    content = verify.inspect(out)
    assert planned["format"] == content.format == "pack-quantized"
    assert planned["bits_per_weight"] == pytest.approx(content.bits_per_weight)
    assert planned["tensor_bytes"] == content.quantized_bytes + content.other_bytes
    assert planned["engines"] == [vars(engine) for engine in content.engines]
    assert cli.main(["inspect", str(out)]) == 0
    assert re.search(r"^GPTQModel +no +it reads GPTQ files", capsys.readouterr().out, re.MULTILINE)


def test_the_model_card_says_how_it_was_made_and_what_was_measured(
    make_model: MakeModel, tmp_path: Path, text_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    (source / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\ntags:\n- old\n---\n# The original\n")
    windows = torch.randint(1, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    result = quantize(source, out, QuantConfig(group_size=32, overrides=(("down", {"bits": 8}),)), calibration=windows)  # type: ignore[arg-type]
    assert cli.main(["eval", str(out), "--data", text_file, "--seq-len", "32", "--windows", "2", "--card"]) == 0
    printed = capsys.readouterr().out
    card = (out / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: mit\n" in front
    assert "language:\n- en\n" in front
    assert "- old" not in front
    assert "- 8-bit" in front
    for line in ("| group_size | 32 |", "| calibration | (2, 16) given tokens |", "`down`: bits 8", "by `gptq` 0."):
        assert line in card
    measured = printed.split()[1]
    assert f"- perplexity {measured} on `{Path(text_file).name}` (62 tokens in windows of 32)" in card
    worst = max(result.layers, key=lambda layer: layer.error)
    assert f"{worst.error:.2%} at `{worst.name}`" in card
    assert str(tmp_path) not in card + (out / "quantization_record.json").read_text()
    assert verify.verify(out).problems == []
