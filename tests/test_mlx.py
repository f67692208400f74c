"""MLX's affine format: against bit strings, back to the same bytes, and read by mlx-lm itself where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptq import InputError, QuantConfig, convert, formats, load, quantize
from gptq.formats import Codes, Scheme
from gptq.formats.compatibility import engines
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from gptq.planning.plan import plan_checkpoint
from tests import oracle
from tests.conftest import VOCAB, MakeModel

RTN = {"method": "rtn", "group_size": 32, "format": "mlx"}
IDS = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
MIXED = {"overrides": [["down_proj", {"bits": 8}], [r"s\.0\..*o_proj", {"skip": True}]]}


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_are_the_bit_string_and_biases_undo_the_middle(bits: int, rng: torch.Generator) -> None:
    scheme, middle = Scheme(bits, 32, True, "mlx"), 2 ** (bits - 1)
    layer = Codes(
        torch.randint(0, 2**bits, (5, 96), generator=rng).to(torch.uint8),
        torch.randn(5, 3, generator=rng).half(),
        torch.full((5, 3), middle, dtype=torch.uint8),
        torch.arange(96, dtype=torch.int32) // 32,
    )
    packed = formats.encode(layer, scheme)
    assert packed["weight"].dtype == torch.uint32
    words = packed["weight"].view(torch.int32).tolist()
    assert words == [oracle.bit_stream(row, bits) for row in layer.codes.tolist()]
    spread = [packed[key].double().repeat_interleave(32, dim=1) for key in ("scales", "biases")]
    assert torch.equal(spread[0] * layer.codes.double() + spread[1], layer.weight().double())
    read = formats.decode(packed, scheme)
    assert all(torch.equal(getattr(read, key), getattr(layer, key)) for key in ("codes", "scale", "zero", "g_idx"))
    assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.items()} == {
        k: (i.dtype, i.shape) for k, i in formats.layout(scheme, 5, 96).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_to_other_formats_and_back_are_the_same_bytes(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    first, there, back = tmp_path / "mlx", tmp_path / "gptq", tmp_path / "back"
    quantize(make_model(kind), first, QuantConfig.from_dict({**RTN, **MIXED}))
    assert verify.verify(first).problems == []
    convert(first, there, "gptq")
    assert "quantization" not in content(there)
    convert(there, back, "mlx")
    assert all_bytes(back) == all_bytes(first)
    with torch.no_grad():
        assert torch.equal(load(first)(IDS).logits, load(there)(IDS).logits)
    found = verify.inspect(first)
    assert (found.format, {layer.bits for layer in found.layers}) == ("mlx", {4, 8})
    direct = tmp_path / "direct"
    quantize(make_model(kind), direct, QuantConfig.from_dict({**RTN, **MIXED, "format": "gptq"}))
    assert load_file(direct / "model.safetensors").keys() == load_file(there / "model.safetensors").keys()
    assert content(direct) == content(there)


def test_from_pretrained_reads_mlx_files_with_this_package(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "a", QuantConfig.from_dict({**RTN, **MIXED, "sym": False}))
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(network(IDS).logits, load(tmp_path / "a")(IDS).logits)


def test_what_transformers_has_renamed_is_said_as_mlx_reads_it(make_model: MakeModel, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    source = make_model("llama", rope_parameters=rope)
    assert "rope_theta" not in content(source)
    quantize(source, tmp_path / "a", QuantConfig.from_dict(RTN))
    written = content(tmp_path / "a")
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    convert(tmp_path / "a", tmp_path / "b", "gptq")
    assert {k: v for k, v in content(tmp_path / "b").items() if k != "quantization_config"} == content(source)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"bits": 7}, "MLX has 2, 3, 4, 5, 6, 8 bits, not 7"),
        ("llama", {"group_size": 16}, "groups of 32, 64 or 128 that divide the inputs; here 16 of 64"),
        ("llama", {"group_size": 64}, "here 64 of 96 inputs"),
        ("gpt2", {}, "Conv1D"),
        ("qwen3_moe", {"overrides": [[r"experts\.1\.down", {"bits": 8}]]}, r"stacks .*experts\.0\.down.* and .*\.1\."),
    ],
)  # fmt: skip
def test_refusals(kind: str, options: dict[str, Any], message: str, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        quantize(make_model(kind), tmp_path / "out", QuantConfig.from_dict({**RTN, **options}))
    assert not (tmp_path / "out").exists()


def test_offsets_are_real_numbers_and_stay_what_was_chosen(make_model: MakeModel, tmp_path: Path) -> None:
    """Chosen in bfloat16 for a bfloat16 model; a grid that GPTQ files have no zero points for."""
    ids = torch.randint(1, VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))
    options = {"bits": 3, "group_size": 32, "sym": False, "format": "mlx"}
    out = tmp_path / "a"
    quantize(make_model("llama", dtype=torch.bfloat16), out, QuantConfig.from_dict(options), calibration=ids)
    assert verify.verify(out).problems == []
    tensors = load_file(out / "model.safetensors")
    found = {name: tensor for name, tensor in tensors.items() if name.endswith((".scales", ".biases"))}
    assert len(found) == 28
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    steps = (
        tensors["model.layers.0.mlp.up_proj.biases"].double() / tensors["model.layers.0.mlp.up_proj.scales"].double()
    )
    assert (steps - steps.round()).abs().max() > 0.2
    with pytest.raises(InputError, match=r"rounds to other values; quantize the original with --format gptq_v2"):
        convert(out, tmp_path / "b", "gptq_v2")
    quantize(make_model("llama"), tmp_path / "c", QuantConfig.from_dict({**RTN, "sym": False, "format": "gptq_v2"}))
    with pytest.raises(InputError, match=r"rounds to other values; quantize the original with --format mlx"):
        convert(tmp_path / "c", tmp_path / "d", "mlx")


def test_both_entries_of_the_config_have_to_agree(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "a", QuantConfig.from_dict(RTN))
    config = content(tmp_path / "a")
    config["quantization"]["bits"] = 8
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="say different things"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits 7; MLX has 2, 3, 4, 5, 6 or 8"),
        ({"bits": "9" * 5000}, "MLX has 2, 3, 4, 5, 6 or 8"),
        ({"bits": 8}, r"scales .* has the shape \(\d+, \d\), not"),
        ({"group_size": 10**30}, "MLX has 32, 64 and 128"),
        ({"group_size": 64}, r"has the shape \(64, 3\), not \(64, 2\)"),
        ({"mode": "mxfp4"}, "the mode 'affine' is read"),
        ({"x" * 5000: {"bits": 0}}, "MLX has 2, 3, 4, 5, 6 or 8"),
    ],
)  # fmt: skip
def test_a_config_of_strangers_is_answered_in_a_sentence(
    changes: dict[str, Any], message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    quantize(make_model("llama", num_hidden_layers=1), out, QuantConfig.from_dict(RTN))
    (out / "quantization_record.json").unlink()
    config = content(out)
    for entry in ("quantization", "quantization_config"):
        config[entry] |= changes
    (out / "config.json").write_text(json.dumps(config))
    for read in (verify.inspect, lambda folder: convert(folder, tmp_path / "b", "gptq_v2")):
        with pytest.raises(InputError, match=message) as caught:
            read(out)
        assert len(str(caught.value)) < 500
    with pytest.raises(InputError):
        load(out)


def test_biases_that_contradict_symmetry_are_found(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "a", QuantConfig.from_dict(RTN))
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.biases"][3, 1] *= 2
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.biases .* zero point 0, though .* says sym true"):
        load(tmp_path / "a")
    assert any("up_proj" in problem for problem in verify.verify(tmp_path / "a").problems)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"bits": bits}) for bits in (2, 3, 5, 6)]
    + [("llama", MIXED), ("qwen3", {"lm_head": True}), ("qwen3_moe", MIXED), ("mixtral", MIXED)]
    + [("llama", {"bits": 3, "sym": False}), ("llama", {"sym": False, "dtype": torch.bfloat16})],
)
def test_mlx_lm_computes_what_we_compute(
    kind: str, options: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    """Every weight bit for bit, and the logits of the whole model to the rounding of float32."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    out = tmp_path / "out"
    dtype = options.get("dtype", torch.float16)
    config = QuantConfig.from_dict({**RTN, **{k: v for k, v in options.items() if k != "dtype"}})
    quantize(make_model(kind, dtype=dtype), out, config)
    mx.set_default_device(mx.cpu)
    theirs, _ = utils.load_model(out)
    answer = theirs(mx.array(IDS.tolist()))
    assert str(answer.dtype).endswith(str(dtype).removeprefix("torch."))  # scales and activations are of one dtype
    ours = load(out, dtype="float32", device="cpu")
    compared = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear):
            path, expert = name, None
            if ".experts." in name:
                before, _, rest = name.partition(".experts.")
                expert, _, part = rest.partition(".")
                before = before.replace("mlp", "block_sparse_moe") if kind == "mixtral" else before
                path = f"{before}.switch_mlp.{part}"
            module = theirs
            for step in path.split("."):
                module = module[int(step)] if step.isdigit() else getattr(module, step)
            tensors = [
                module[key] if expert is None else module[key][int(expert)] for key in ("weight", "scales", "biases")
            ]
            scales, biases = (tensor.astype(mx.float32) for tensor in tensors[1:])
            weight = mx.dequantize(tensors[0], scales, biases, group_size=module.group_size, bits=module.bits)
            assert torch.equal(torch.tensor(weight.tolist()), layer.weight), name
            compared += 1
    assert compared == len(verify.inspect(out).layers)
    with torch.no_grad():
        expected = ours(IDS).logits
    theirs.set_dtype(mx.float32)  # exact for scales and biases, so that activations alone are rounded differently
    found = torch.tensor(theirs(mx.array(IDS.tolist())).tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("kind", "rope", "expected"),
    [
        ("phi3", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"partial_rotary_factor": 0.25}, {"rotary_pct": 0.25, "rotary_emb_base": 5e4}),
        ("llama", {}, {"rope_theta": 5e4}),
        ("llama", {"rope_type": "linear", "factor": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_entries_that_transformers_has_renamed_are_there_for_mlx_and_go_again(
    kind: str, rope: dict[str, Any], expected: dict[str, Any]
) -> None:
    """mlx-lm takes a default, and computes something else, where it does not find them."""
    mlx = formats.FORMATS["mlx"]
    own = {"model_type": kind, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, **rope}}
    said = {**own, "quantization_config": {"quant_method": "mlx", "bits": 4, "group_size": 32}}
    complete = mlx.complete_model_config(said)
    assert {key: complete[key] for key in expected} == expected
    plain = mlx.plain_model_config(complete)
    plain.pop("quantization_config")
    assert plain == own


def test_only_models_that_ran_are_said_to_run() -> None:
    layers = {"a": (Scheme(4, 32, True, "mlx"), 64)}
    for kind, takes in (("llama", True), ("opt", False), ("jamba", False), ("", True)):
        (found,) = (engine for engine in engines(layers, kind) if engine.name == "MLX")
        assert found.takes is takes


def test_a_weight_whose_zero_point_fits_no_float16_is_a_sentence(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 70_000
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"q_proj: a scale of .* does not fit float16 8 times"):
        quantize(source, tmp_path / "out", QuantConfig.from_dict(RTN))


@pytest.mark.parametrize("chosen", ["mlx", "gguf"])
def test_a_result_that_is_not_decoded_is_no_source(chosen: Any, make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "one", QuantConfig(method="rtn", group_size=32, format=chosen))
    with pytest.raises(InputError, match=f"quantized for {chosen}, which is not decoded; give its original"):
        quantize(tmp_path / "one", tmp_path / "two", QuantConfig(method="rtn", group_size=32))


@pytest.mark.parametrize("chosen", ["mlx", "gguf", "gptq"])
def test_windows_that_the_engine_does_not_know_are_told_of(chosen: Any, make_model: MakeModel) -> None:
    config = QuantConfig(method="rtn", group_size=32, format=chosen)
    for window in (8, None):
        notes = plan_checkpoint(str(make_model("mistral", sliding_window=window)), config, None, False).notes
        assert any("attend to everything, not to the last 8" in n for n in notes) is (bool(window) and chosen != "gptq")
