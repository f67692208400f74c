"""Options of single layers: resolved with their fused siblings, written as readers' rules, read back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq import InputError, QuantConfig, load, quantize
from gptq.config import Override
from gptq.formats import Scheme
from gptq.formats.gptq import dynamic_rules
from gptq.formats.name_rules import name_patterns
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from gptq.planning.layer_plan import LayerPlan
from gptq.planning.overrides import resolve_layer_options
from gptq.planning.plan_notes import notes_on_shapes
from tests import oracle
from tests.conftest import VOCAB, MakeModel

LAYERS = [
    f"model.layers.{i}.{name}"
    for i in range(12)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip


def resolved(*overrides: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    return resolve_layer_options(LAYERS, QuantConfig(overrides=tuple(Override.parse(text) for text in overrides)))


def test_overrides_are_text_pairs_and_json() -> None:
    parsed = Override.parse("down_proj:bits=8,group_size=-1,sym=false")
    assert parsed == Override("down_proj", bits=8, group_size=-1, sym=False)
    assert Override.parse(str(parsed)) == parsed
    assert Override.parse("a:b:skip") == Override("a:b", skip=True)
    config = QuantConfig(overrides=(("down_proj", {"bits": 8, "group_size": -1, "sym": False}),))  # type: ignore[arg-type]
    assert config.overrides == (parsed,)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [("down_proj", "not PATTERN:OPTIONS"), ("(:bits=8", "not a regular expression"), ("x:wbits=8", "'wbits'"),
     ("x:bits=9", "bits is 9"), ("x:bits=four", "bits is 'four'"), ("x:group_size=0", "group_size is 0"),
     ("x:bits", "bits is True"), ("x:sym=1", "sym is 1")],
)  # fmt: skip
def test_a_bad_override_is_a_sentence(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Override.parse(text)


def test_a_remark_on_shapes_is_made_once() -> None:
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qk"]
    plans = [LayerPlan(n, n, f"{n}.weight", 64, 64, bits=4, group_size=64, sym=True) for n in names]
    assert [*notes_on_shapes(plans, QuantConfig())] == [
        "q_proj, k_proj in 6 layers (model.layers.0.self_attn.q_proj ...): "
        "64 inputs are one group, smaller than the group size of 128"
    ]


def test_later_overrides_win_and_siblings_stay_together() -> None:
    options, notes = resolved("mlp:bits=3,group_size=64", r"layers\.0\.mlp\.down:bits=8", r"layers\.1\..*q_proj:skip")
    assert options["model.layers.0.mlp.down_proj"] == {"bits": 8, "group_size": 64, "sym": True, "skip": False}
    assert options["model.layers.11.mlp.up_proj"]["bits"] == 3
    assert [n for n, o in options.items() if o["skip"]] == LAYERS[7:10]  # q, k and v of block 1
    assert len(notes) == 1
    assert "k_proj, v_proj in 2 layers (model.layers.1.self_attn.k_proj ...)" in notes[0]
    options, notes = resolved("proj:bits=3", "q_proj:bits=8")  # the general and the special
    assert {options[f"model.layers.2.self_attn.{x}_proj"]["bits"] for x in "qkv"} == {8}
    assert options["model.layers.2.self_attn.o_proj"]["bits"] == 3
    _, notes = resolved(r"layers\.0\.:skip", "q_proj:bits=3")
    assert "k_proj, v_proj in 22 layers (model.layers.1.self_attn.k_proj ...)" in notes[0]  # not in block 0


def test_contradictions_and_typos_are_refused() -> None:
    with pytest.raises(InputError, match=r"differ in bits of .*q_proj and .*k_proj"):
        resolved("q_proj:bits=8", "k_proj:bits=4")
    with pytest.raises(InputError, match=r"'dwon_proj:bits=8' names no layer"):
        resolved("dwon_proj:bits=8")


@pytest.mark.parametrize(
    "chosen", [LAYERS[6::7], LAYERS[4:6], LAYERS[0:3] + LAYERS[70:73], LAYERS[3:4], LAYERS, LAYERS[7 * 11 :]]
)
def test_patterns_match_the_chosen_layers_and_no_others(chosen: list[str]) -> None:
    found = name_patterns(chosen, LAYERS)
    for name in LAYERS:
        assert any(re.match(pattern, name) for pattern in found) == (name in chosen), name
        assert any(re.match(pattern, name.removeprefix("model.")) for pattern in found) == (name in chosen), name


def test_rules_hold_for_the_names_of_fused_layers_too() -> None:
    """vLLM takes the first rule that re.match finds at the start of the fused name (utils/gptq_utils.py)."""
    layers = {name: (Scheme(8 if re.search("[qkv]_proj|gate|up", name) else 4, 128, True), 4096) for name in LAYERS}
    rules = dynamic_rules(Scheme(4, 128, True), layers, ())
    for fused in ("self_attn.qkv_proj", "mlp.gate_up_proj", "self_attn.q_proj"):
        matching = [own for rule, own in rules.items() if re.match(rule.removeprefix("+:"), f"model.layers.7.{fused}")]
        assert matching == [{"bits": 8, "group_size": 128, "sym": True}]
    assert not any(re.match(rule.removeprefix("+:"), "model.layers.7.mlp.down_proj") for rule in rules)


@pytest.fixture
def windows(rng: torch.Generator) -> Tensor:
    return torch.randint(1, VOCAB, (4, 32), generator=rng)


def test_a_mixed_checkpoint_from_file_to_file(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    config = QuantConfig(
        bits=4,
        group_size=32,
        format="gptq",
        overrides=(
            Override("down_proj", bits=8, group_size=-1),
            Override(r"layers\.1\..*gate_proj", bits=2, sym=False),
            Override(r"layers\.0\..*o_proj", skip=True),
        ),
    )
    result = quantize(source, out, config, calibration=windows)
    assert any("up_proj" in note for note in result.notes)
    widths = {layer.name: (layer.bits, layer.group_size) for layer in verify.inspect(out).layers}
    assert widths["model.layers.0.mlp.down_proj"] == (8, 96)
    assert widths["model.layers.1.mlp.up_proj"] == widths["model.layers.1.mlp.gate_proj"] == (2, 32)
    assert widths["model.layers.0.mlp.up_proj"] == (4, 32)
    assert "model.layers.0.self_attn.o_proj" not in widths
    assert verify.verify(out).problems == []
    file, original = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    kept = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(file[kept], original[kept])
    network = load(out)
    for name, (bits, _) in widths.items():
        linear = network.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        assert torch.equal(linear.weight.double(), oracle.dequantized(file, name, bits))
    assert len({layer.error < layer.rtn_error for layer in result.layers}) == 1


def test_skipping_everything_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to quantize"):
        quantize(
            make_model("llama"), tmp_path / "out", QuantConfig(method="rtn", overrides=(Override(".", skip=True),))
        )
