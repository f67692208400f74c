"""FP8, NVFP4 and MXFP4 files: bytes by hand, their readers, and what they share with other formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptq import InputError, Override, QuantConfig, convert, formats, load, quantize, solver
from gptq.checkpoint.tensors import sha256
from gptq.compute import number_formats
from gptq.config import Format
from gptq.formats import Scheme
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from tests.conftest import MakeModel

OPTIONS: dict[Format, dict[str, Any]] = {
    "nvfp4-pack-quantized": {"bits": 4, "group_size": 16},
    "mxfp4-pack-quantized": {"bits": 4, "group_size": 32},
    "float-quantized": {"bits": 8, "group_size": -1},
    "fp8": {"bits": 8, "group_size": 128},
}
EVERY = pytest.mark.parametrize("kind", OPTIONS)
READ_BY_COMPRESSED_TENSORS: list[Format] = ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized"]
HALVES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def some_layer(kind: Format, rng: torch.Generator, outputs: int = 200, inputs: int = 160) -> solver.SolvedLayer:
    file_format, options = formats.FORMATS[kind], OPTIONS[kind]
    scheme = Scheme(options["bits"], options["group_size"], True, kind)
    W = torch.randn(outputs, inputs, generator=rng)
    grid = file_format.grid(scheme, file_format.choose_scale_dtype(torch.bfloat16)).for_layers([W])
    return solver.round_to_nearest(W, grid, scheme.columns(inputs))


def read_by_hand(kind: Format, packed: dict[str, Tensor]) -> Tensor:
    """The weight that stored tensors stand for, float64, from the definitions of the formats."""
    if kind in ("float-quantized", "fp8"):
        codes = packed["weight"].double()
        if kind == "float-quantized":
            return codes * packed["weight_scale"].double()
        scale = packed["weight_scale_inv"].double()
        return codes * scale.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)[:, : codes.shape[1]]
    nibbles = [[half for byte in row for half in (byte & 15, byte >> 4)] for row in packed["weight_packed"].tolist()]
    codes = torch.tensor([[HALVES[half] for half in row] for row in nibbles], dtype=torch.float64)
    if kind == "mxfp4-pack-quantized":
        exponents = packed["weight_scale"].double() - 127
        return codes * (2.0**exponents).repeat_interleave(32, 1)
    scale = packed["weight_scale"].float() / packed["weight_global_scale"]  # in float32, as readers do
    return codes * scale.double().repeat_interleave(16, 1)


@EVERY
def test_stored_tensors_are_the_layer_that_was_chosen(kind: Format, rng: torch.Generator) -> None:
    layer, options = some_layer(kind, rng), OPTIONS[kind]
    scheme, file_format = Scheme(options["bits"], options["group_size"], True, kind), formats.FORMATS[kind]
    packed = formats.encode(layer, scheme, file_format.choose_scale_dtype(torch.bfloat16))
    layout = formats.layout(scheme, 200, 160, file_format.choose_scale_dtype(torch.bfloat16))
    assert {key: (t.dtype, tuple(t.shape)) for key, t in packed.items()} == {
        key: (info.dtype, info.shape) for key, info in layout.items()
    }
    read = formats.decode(packed, scheme)
    assert torch.equal(read.weight(), layer.weight())
    assert torch.equal(read_by_hand(kind, packed).float(), layer.weight())
    again = formats.encode(read, scheme, file_format.choose_scale_dtype(torch.bfloat16))
    assert all(sha256(again[key]) == sha256(packed[key]) for key in packed)


def test_bytes_of_powers_of_two_are_read_and_written() -> None:
    every = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    powers = number_formats.powers_of_two(every)
    assert powers.double().log2().tolist() == [e - 127 for e in range(255)]
    assert torch.equal(number_formats.exponents_of(powers), every)
    assert torch.isinf(number_formats.powers_of_two(torch.tensor([255], dtype=torch.uint8)))


@pytest.mark.slow
@EVERY
def test_quantized_loaded_verified_and_inspected(
    kind: Format, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, out = make_model("llama", dtype=torch.bfloat16), tmp_path / "out"
    options = OPTIONS[kind] | ({"bits": 8} if "fp8" in kind else {})
    config = QuantConfig(format=kind, seq_len=32, effort="best", tune_steps=2, **options)
    result = quantize(source, out, config, calibration=windows)
    assert verify.verify(out).problems == []
    content = verify.inspect(out)
    assert content.format == kind
    assert content.bits_per_weight == result.bits_per_weight
    assert all(layer.error is not None and layer.error < (layer.rtn_error or 0) for layer in content.layers)
    file = load_file(out / "model.safetensors")
    network = load(out, dtype="float32")
    for layer in content.layers:
        packed = {key.rpartition(".")[2]: t for key, t in file.items() if key.rpartition(".")[0] == layer.name}
        held: Any = network.get_submodule(layer.name)
        assert torch.equal(held.weight, read_by_hand(kind, packed).float())
    others: tuple[Format, ...] = ("nvfp4-pack-quantized", "pack-quantized", "gptq")
    for targets in others:
        if targets != kind:
            with pytest.raises(InputError, match=r"quantize the original with --format|, which --bits"):
                convert(out, tmp_path / "no", targets)
    with pytest.raises(InputError, match=r"in the format .* already"):
        convert(out, tmp_path / "no", kind)


@pytest.mark.slow
def test_fused_layers_share_their_global_scale(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    """vLLM takes one of the scales for all; experts too have one for gate and up."""
    for kind in ("llama", "qwen3_moe"):
        source = make_model(kind)
        config = QuantConfig(format="nvfp4-pack-quantized", seq_len=32, **OPTIONS["nvfp4-pack-quantized"])
        quantize(source, tmp_path / kind, config, calibration=windows)
        file = load_file(tmp_path / kind / "model.safetensors")
        largest: dict[str, list[float]] = {}
        original = load_file(source / "model.safetensors")
        for name, scale in file.items():
            if name.endswith(".weight_global_scale"):
                layer = name.removesuffix(".weight_global_scale")
                parent, _, own = layer.rpartition(".")
                fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}
                weight = original.get(f"{layer}.weight")
                found = largest.setdefault(f"{parent}.{fused.get(own, own)}", [float(scale), 0.0])
                assert found[0] == float(scale)
                found[1] = max(found[1], 0.0 if weight is None else float(weight.abs().max()))
        for scale_, most in largest.values():
            assert most == 0 or scale_ == pytest.approx(448 * 6 / most, rel=1e-6)
        assert any(most for _, most in largest.values())


@pytest.mark.parametrize("kind", READ_BY_COMPRESSED_TENSORS)
def test_compressed_tensors_reads_the_weights_bit_for_bit(
    kind: Format, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    """FP4 it rounds to bfloat16, FP8 it computes in the dtype of the scales, which is bfloat16 too."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig

    source, out = make_model("llama", dtype=torch.bfloat16, num_hidden_layers=1), tmp_path / "out"
    kept = (Override("o_proj", skip=True),)  # in `ignore`
    config = QuantConfig(format=kind, seq_len=32, overrides=kept, **OPTIONS[kind])
    quantize(source, out, config, calibration=windows)
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(stored).config_groups["group_0"]
    compressor = compressors.BaseCompressor.get_value_from_registry(stored["format"])
    file, network = load_file(out / "model.safetensors"), load(out, dtype="float32")
    layers = [name for name, module in network.named_modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 6
    for name in layers:
        own = {key.removeprefix(f"{name}."): t for key, t in file.items() if key.startswith(f"{name}.")}
        weight: Any = network.get_submodule(name).weight
        assert torch.equal(compressor.decompress(own, scheme)["weight"].bfloat16(), weight.bfloat16())


@EVERY
def test_from_pretrained_computes_what_load_does(
    kind: Format, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = make_model("llama", dtype=torch.bfloat16)
    quantize(source, out, QuantConfig(format=kind, method="rtn", **OPTIONS[kind]))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = load(out, dtype="bfloat16")(input_ids=windows[:1]).logits
        assert torch.equal(theirs(input_ids=windows[:1]).logits, expected)
    theirs.save_pretrained(tmp_path / "again")
    file, again = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert {key: sha256(t) for key, t in file.items()} == {key: sha256(t) for key, t in again.items()}


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("nvfp4-pack-quantized", {"bits": 3, "group_size": 16}, "--bits 4 --group-size 16 gives"),
        ("nvfp4-pack-quantized", {"bits": 4, "group_size": 16, "sym": False}, "--bits 4 --group-size 16 gives"),
        ("mxfp4-pack-quantized", {"bits": 4, "group_size": 64}, "--bits 4 --group-size 32 gives"),
        ("float-quantized", {"bits": 8, "group_size": 32}, "--bits 8 --group-size -1 gives"),
        ("fp8", {"bits": 4, "group_size": 128}, "--bits 8 --group-size 128 gives"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_what_to_ask_for(
    kind: Format, options: dict[str, Any], why: str, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=why):
        quantize(make_model("llama"), tmp_path / "out", QuantConfig(format=kind, **options), calibration=windows)


@EVERY
def test_the_format_alone_gives_its_width_and_group_size(kind: Format) -> None:
    config = QuantConfig(format=kind)
    assert {"bits": config.bits, "group_size": config.group_size} == OPTIONS[kind]


def test_damaged_files_are_explained(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama")
    for kind, suffix, broken, why in (
        ("mxfp4-pack-quantized", "q_proj.weight_scale", 255, "255, which stands for NaN"),
        ("nvfp4-pack-quantized", "q_proj.weight_global_scale", 0, "0.0, and scales are divided by it"),
    ):
        out = tmp_path / kind
        quantize(source, out, QuantConfig(format=kind, method="rtn", **OPTIONS[kind]))  # type: ignore[arg-type, index]
        (out / "quantization_record.json").unlink()
        (out / "README.md").unlink()
        file = load_file(out / "model.safetensors")
        name = next(name for name in file if name.endswith(suffix))
        file[name].fill_(broken)
        save_file(file, out / "model.safetensors", {"format": "pt"})
        assert any(why in problem for problem in verify.verify(out).problems)
        with pytest.raises(InputError, match=why):
            load(out)


def test_fp8_of_other_tools_is_read_decoded(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama"), out, QuantConfig(format="fp8", method="rtn", **OPTIONS["fp8"]))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = load(out, dtype="float32")(input_ids=ids).logits
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["meta"]
    (out / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.allclose(load(out, dtype="float32")(input_ids=ids).logits, expected, atol=1e-5)
    with pytest.raises(InputError, match="another tool wrote it"):
        verify.inspect(out)
