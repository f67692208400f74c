"""Checkpoints that are stored quantized: read as transformers and compressed-tensors decode them, bit for bit."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gptq import InputError, QuantConfig, compare, convert, load, quantize
from gptq.checkpoint.reader import Source
from gptq.checkpoint.sources import decoded
from gptq.compute.number_formats import powers_of_two
from gptq.config import Format
from gptq.formats.original import open_original
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from gptq.output.results import RECORD
from gptq.planning.plan import plan_checkpoint
from tests.conftest import LLAMA_LIKE, MakeModel

CONFIG = QuantConfig(bits=4, group_size=32, num_samples=6, seq_len=32, effort="fast")
RTN = QuantConfig(bits=4, group_size=32, method="rtn")
SOLVED = {"fp8-block", "nvfp4"}  # of the other layouts, weights are rounded to nearest
FLOAT8 = torch.float8_e4m3fn
Tensors = dict[str, Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


# --- layouts, written as their publishers describe them --------------------------------------------------------------


def amax_of_blocks(W: Tensor, rows: int, columns: int) -> Tensor:
    """The largest magnitude of each block, (ceil(outputs / rows), ceil(inputs / columns)); at least a little."""
    grid = [[part.abs().amax() for part in line.split(columns, 1)] for line in W.split(rows)]
    return torch.tensor(grid).clamp(min=1e-6)


def fp8_blocks(W: Tensor, size: int = 32, e8m0: bool = False) -> Tensors:
    scale = amax_of_blocks(W.float(), size, size) / 448
    if e8m0:
        scale = scale.log2().ceil().exp2()
    spread = scale.repeat_interleave(size, 0)[: len(W)].repeat_interleave(size, 1)[:, : W.shape[1]]
    stored = scale.to(torch.float8_e8m0fnu) if e8m0 else scale
    return {"weight": (W.float() / spread).to(FLOAT8), "weight_scale_inv": stored}


def fp8_tensor(W: Tensor) -> Tensors:
    scale = (W.abs().amax() / 448).to(torch.bfloat16)
    return {
        "weight": (W.float() / scale.float()).to(FLOAT8),
        "weight_scale": scale.reshape(1),
        "input_scale": torch.tensor([0.5], dtype=torch.bfloat16),
    }


def fp8_channel(W: Tensor) -> Tensors:
    scale = (W.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    return {"weight": (W.float() / scale.float()).to(FLOAT8), "weight_scale": scale}


def e2m1_codes(values: Tensor) -> Tensor:
    """The nearest of the 16 E2M1 numbers, two codes per byte, the first in the low half."""
    codes = (values[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def mxfp4(W: Tensor) -> Tensors:
    exponent = (amax_of_blocks(W.float(), 1, 32) / 6).log2().ceil().int()  # (outputs, inputs / 32)
    values = W.float() / exponent.float().exp2().repeat_interleave(32, 1)
    return {"weight_packed": e2m1_codes(values), "weight_scale": (exponent + 127).to(torch.uint8)}


def nvfp4(W: Tensor) -> Tensors:
    whole = 448 * 6 / W.abs().amax().float()
    scale = (amax_of_blocks(W.float(), 1, 16) / 6 * whole).to(FLOAT8)  # (outputs, inputs / 16)
    values = W.float() / (scale.float() / whole).repeat_interleave(16, 1)
    return {"weight_packed": e2m1_codes(values), "weight_scale": scale, "weight_global_scale": whole.reshape(1)}


def modelopt(W: Tensor) -> Tensors:
    made = nvfp4(W)
    return {
        "weight": made["weight_packed"],
        "weight_scale": made["weight_scale"],
        "weight_scale_2": 1 / made["weight_global_scale"].reshape(()),
        "input_scale": torch.tensor(0.25),
    }


def awq(W: Tensor, group: int = 32) -> Tensors:
    """AutoAWQ's layout, from a loop over words and nibbles."""
    groups = W.float().T.unflatten(0, (-1, group))  # (groups, group, outputs)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().int()
    codes = (groups / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15).int().flatten(0, 1)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(values: Tensor) -> Tensor:
        packed = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
        for word in range(packed.shape[1]):
            for nibble, output in enumerate(order):
                packed[:, word] |= values[:, word * 8 + output].long() << 4 * nibble
        return torch.where(packed >= 2**31, packed - 2**32, packed).int()

    return {"qweight": words(codes), "qzeros": words(zero), "scales": scale}


def compressed_tensors(format_name: str, **weights: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights},
        "format": format_name,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensors], dict[str, Any]]] = {  # how weights are stored, what is said of it
    "fp8-block": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}),
    "fp8-block-e8m0": (
        lambda W: fp8_blocks(W, e8m0=True),
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "scale_fmt": "ue8m0"},
    ),
    "fp8-tensor": (fp8_tensor, compressed_tensors("naive-quantized", strategy="tensor")),
    "fp8-channel": (fp8_channel, compressed_tensors("float-quantized", strategy="channel")),
    "mxfp4": (
        mxfp4,
        compressed_tensors("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32),
    ),
    "nvfp4": (nvfp4, compressed_tensors("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)),
    "modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
}  # fmt: skip


def decode(layout: str, stored: Tensors) -> Tensor:
    """The weight as the reader of its layout decodes it: transformers, compressed-tensors, or the published formula."""
    if layout.startswith("fp8-block"):
        made: Tensor = Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["weight_scale_inv"], torch.bfloat16)
        return made
    _, config = LAYOUTS[layout]
    if "config_groups" in config:
        scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        weight: Tensor = compressor.decompress(stored, scheme)["weight"]
        return weight.bfloat16()
    if layout == "modelopt":  # modelopt/torch/quantization/qtensor/nvfp4_tensor.py
        scale = stored["weight_scale"].float() * stored["weight_scale_2"]
        codes = torch.stack([stored["weight"] & 15, stored["weight"] >> 4], -1).flatten(1).int()
        return (E2M1[codes] * scale.repeat_interleave(16, 1)).bfloat16()
    words, zeros, scales = (stored[key].tolist() for key in ("qweight", "qzeros", "scales"))  # read number by number
    return torch.tensor(
        [
            [(_nibble(line, o) - _nibble(zeros[i // 32], o)) * scales[i // 32][o] for i, line in enumerate(words)]
            for o in range(len(scales[0]))
        ]
    ).bfloat16()


def _nibble(words: list[int], output: int) -> int:
    """awq/utils/packing_utils.py: AWQ_ORDER."""
    return words[output // 8] >> 4 * [0, 2, 4, 6, 1, 3, 5, 7].index(output % 8) & 15


def store(source: Path, folder: Path, layout: str, config: dict[str, Any] | None = None) -> Path:
    """Write a model's folder with the linear layers of its blocks in a layout."""
    encode, said = LAYOUTS[layout]
    tensors: Tensors = {}
    for name, W in load_file(source / "model.safetensors").items():
        layer = name.removesuffix("weight")
        parts = encode(W) if name.endswith("proj.weight") else {"weight": W}
        tensors |= {layer + key: tensor.contiguous() for key, tensor in parts.items()}
    return write(source, folder, tensors, said if config is None else config)


def write(source: Path, folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values |= {"quantization_config": config} if config else {}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def plain(make_model: MakeModel) -> Path:
    return make_model("llama", dtype=torch.bfloat16)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_decoded_bit_for_bit_and_quantized_as_the_decoded_model_is(
    layout: str, plain: Path, windows: Tensor, tmp_path: Path
) -> None:
    folder = store(plain, tmp_path / "stored", layout)
    original, stored, source = load_file(plain / "model.safetensors"), load_file(folder / "model.safetensors"), None
    source = open_original(folder)
    assert source.tensors.keys() == original.keys()
    expected: Tensors = {}
    for name, W in original.items():
        own = {k.rpartition(".")[2]: t for k, t in stored.items() if k.startswith(name.removesuffix("weight"))}
        expected[name] = decode(layout, own) if name.endswith("proj.weight") else W
        assert torch.equal(source.read(name), expected[name]), name
        assert torch.equal(source.read(name, torch.float32), expected[name].float()), name
        assert source.read(name).dtype == torch.bfloat16
    assert torch.equal(source.read("model.layers.1.mlp.up_proj.weight", rows=slice(37, 70)),
                       expected["model.layers.1.mlp.up_proj.weight"][37:70])  # fmt: skip

    twin = write(plain, tmp_path / "plain", expected, {})
    for made in (folder, twin):
        quantize(made, tmp_path / f"{made.name}-out", CONFIG if layout in SOLVED else RTN, calibration=windows)
    out, same = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("stored", "plain"))
    assert out.keys() == same.keys()
    assert all(torch.equal(out[name], same[name]) for name in out)
    assert verify.verify(tmp_path / "stored-out").problems == []
    said = json.loads((tmp_path / "stored-out" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "gptq"
    assert said.get("weight_block_size") is None

    with torch.no_grad():
        assert torch.equal(load(folder)(windows).logits, load(twin)(windows).logits)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("layout", ["fp8-block", "fp8-channel", "nvfp4"])
def test_transformers_loads_the_same_model(layout: str, plain: Path, windows: Tensor, tmp_path: Path) -> None:
    folder = store(plain, tmp_path / "stored", layout)
    options = {}
    if layout != "fp8-block":  # without a GPU transformers decodes FP8 by itself
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    with torch.no_grad():
        assert torch.equal(load(folder, dtype="bfloat16")(windows).logits, theirs(windows).logits)


@pytest.mark.parametrize("first", ["gptq", "gptq_v2", "pack-quantized"])
def test_integer_files_are_sources_too(first: Format, plain: Path, windows: Tensor, tmp_path: Path) -> None:
    config = QuantConfig(bits=4, group_size=32, format=first, sym=first != "gptq_v2", method="rtn")
    quantize(plain, tmp_path / "first", config)
    source, packed = open_original(tmp_path / "first"), load(tmp_path / "first", dtype="float32")
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        linear = packed.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        W = torch.cat([linear(row[None]).detach() for row in torch.eye(linear.in_features)]).T  # a product by W
        assert torch.equal(source.read(f"{name}.weight"), W.bfloat16())
    plan = plan_checkpoint(str(tmp_path / "first"), CONFIG, None, False)
    assert any("the errors of that rounding stay" in note for note in plan.notes)
    quantize(tmp_path / "first", tmp_path / "out", QuantConfig(bits=8, group_size=32, method="rtn"))
    assert verify.verify(tmp_path / "out").problems == []
    with torch.no_grad():
        ours, theirs = load(tmp_path / "out", dtype="float32")(windows).logits, packed(windows).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_groups_of_several_kinds_in_one_checkpoint(plain: Path, tmp_path: Path) -> None:
    """As Kimi's: attention in FP8 with quantized activations, the rest packed integers."""
    packed, float8 = tmp_path / "packed", store(plain, tmp_path / "float8", "fp8-channel")
    quantize(plain, packed, QuantConfig(bits=4, group_size=32, format="pack-quantized", method="rtn"))
    integers, floats = (load_file(folder / "model.safetensors") for folder in (packed, float8))
    tensors = {name: tensor for name, tensor in integers.items() if "self_attn" not in name}
    tensors |= {name: tensor for name, tensor in floats.items() if "self_attn" in name}
    said = json.loads((packed / "config.json").read_text())["quantization_config"]
    activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token", "symmetric": True}
    attention = {**LAYOUTS["fp8-channel"][1]["config_groups"]["group_0"], "targets": ["re:.*self_attn.*"]}
    groups = {
        "group_0": {**said["config_groups"]["group_0"], "targets": ["re:.*mlp.*"]},
        "group_1": {**attention, "input_activations": activations},
    }
    mixed = {**said, "format": "mixed-precision", "config_groups": groups}
    source = open_original(write(plain, tmp_path / "mixed", tensors, mixed))
    for folder, names in ((packed, "mlp.up_proj"), (float8, "self_attn.q_proj")):
        name = f"model.layers.1.{names}.weight"
        assert torch.equal(source.read(name), open_original(folder).read(name))
    assert len(source.notes) == 2


@pytest.mark.parametrize("packed_first", [True, False])
@pytest.mark.parametrize("kind", ["float-quantized", "int-quantized"])
def test_packed_words_beside_codes_of_8_bits(
    kind: Format, packed_first: bool, plain: Path, windows: Tensor, tmp_path: Path
) -> None:
    """As llm-compressor writes a file with two schemes: it is loaded packed, and read as a source, in either order."""
    words, codes = tmp_path / "words", tmp_path / "codes"
    quantize(plain, words, QuantConfig(bits=4, group_size=32, format="pack-quantized", method="rtn"))
    quantize(plain, codes, QuantConfig(bits=8, group_size=-1, format=kind, method="rtn"))
    tensors = {n: t for n, t in load_file(words / "model.safetensors").items() if ".mlp." not in n}
    tensors |= {n: t for n, t in load_file(codes / "model.safetensors").items() if ".mlp." in n}
    said = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (words, codes)]
    groups = [
        {"format": one["format"], **one["config_groups"]["group_0"], "targets": [f"re:.*{part}.*"]}
        for one, part in zip(said, ("self_attn", "mlp"), strict=True)
    ]
    ordered = groups if packed_first else groups[::-1]
    config = {**said[0], "format": "mixed-precision", "config_groups": dict(zip("ab", ordered, strict=True))}
    mixed = write(plain, tmp_path / "mixed", tensors, config)
    network, parts = load(mixed, dtype="float32"), {"self_attn.q_proj": words, "mlp.down_proj": codes}
    inputs = {"self_attn.q_proj": 64, "mlp.down_proj": 96}
    for part, folder in parts.items():
        expected = load(folder, dtype="float32").get_submodule(f"model.layers.1.{part}")
        x = torch.randn(3, inputs[part], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(network.get_submodule(f"model.layers.1.{part}")(x), expected(x))
        name = f"model.layers.1.{part}.weight"
        assert torch.equal(open_original(mixed).read(name), open_original(folder).read(name))


def test_fp8_codes_beside_words_of_another_method_are_not_taken_for_weights(plain: Path, tmp_path: Path) -> None:
    words, float8 = tmp_path / "words", store(plain, tmp_path / "float8", "fp8-channel")
    quantize(plain, words, QuantConfig(bits=4, group_size=32, format="gptq", method="rtn"))
    tensors = {n: t for n, t in load_file(words / "model.safetensors").items() if ".mlp." not in n}
    theirs = {n: t for n, t in load_file(float8 / "model.safetensors").items() if ".mlp." in n}
    tensors |= {f"{n}_inv" if n.endswith("_scale") else n: t for n, t in theirs.items()}
    said = json.loads((words / "config.json").read_text())["quantization_config"]
    mixed = write(plain, tmp_path / "mixed", tensors, said)
    with pytest.raises(InputError, match=r"mlp\.down_proj\.weight in .* holds FP8 codes beside packed layers"):
        load(mixed)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(open_original(mixed).read(name), open_original(float8).read(name))


def test_scales_that_are_float8_are_not_taken_for_weights(plain: Path, tmp_path: Path) -> None:
    """A file of NVFP4 and FP8 layers, as ModelOpt's MIXED_PRECISION."""
    four, eight = store(plain, tmp_path / "four", "nvfp4"), store(plain, tmp_path / "eight", "fp8-channel")
    tensors = {n: t for n, t in load_file(four / "model.safetensors").items() if ".mlp." not in n}
    tensors |= {n: t for n, t in load_file(eight / "model.safetensors").items() if ".mlp." in n}
    modelopt = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    mixed = open_original(write(plain, tmp_path / "mixed", tensors, modelopt))
    for part, folder in {"self_attn.q_proj": four, "mlp.down_proj": eight}.items():
        name = f"model.layers.1.{part}.weight"
        assert torch.equal(mixed.read(name), open_original(folder).read(name))


def test_experts_of_gpt_oss_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    own: dict[str, Any] = {
        **LLAMA_LIKE,
        "num_local_experts": 4,
        "intermediate_size": 64,
        "head_dim": 16,
        "num_experts_per_tok": 2,
    }
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_config(transformers.GptOssConfig(**own)).bfloat16().save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(110, 124, blocks.shape[:3], generator=draw, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    folder = write(
        plain, tmp_path / "stored", tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    )
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    source = open_original(folder)
    for name, info in source.tensors.items():
        assert torch.equal(source.read(name), theirs[name]), name
        if "blocks" in "".join(source.stored_names(name)):
            assert info.shape[0] == 4
            assert torch.equal(source.read(name, rows=slice(1, 3)), theirs[name][1:3])
            blocks, scales = (tensors[part] for part in source.stored_names(name))
            assert torch.equal(source.read(name), convert_moe_packed_tensors(blocks, scales))
    twin = write(plain, tmp_path / "twin", {name: tensor.contiguous() for name, tensor in theirs.items()}, {})
    assert_same_results(folder, twin, RTN)


def test_a_mixture_of_experts_in_float8_is_quantized_as_the_decoded_one(make_model: MakeModel, tmp_path: Path) -> None:
    """DeepSeek-V3: experts one by one, and layers with fewer rows or columns than a block."""
    plain = make_model("deepseek_v3", dtype=torch.bfloat16)
    folder = store(plain, tmp_path / "stored", "fp8-block-e8m0")
    source = open_original(folder)
    twin = write(plain, tmp_path / "twin", {name: source.read(name) for name in source.tensors}, {})
    layers = assert_same_results(folder, twin, RTN)
    assert any("experts.3.up_proj" in name for name in layers)


def assert_same_results(folder: Path, twin: Path, config: QuantConfig) -> list[str]:
    """Quantize two checkpoints and compare the tensors; return the names of the layers."""
    results = [quantize(made, made.with_name(f"{made.name}-result"), config) for made in (folder, twin)]
    first, second = (load_file(Path(result.out) / "model.safetensors") for result in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert verify.verify(Path(results[0].out)).problems == []
    return [layer.name for layer in results[0].layers]


@pytest.mark.parametrize("shape", [(200, 300), (128, 129), (1, 260), (576, 64)])
def test_blocks_at_ragged_edges_have_128_rows_and_columns_but_for_the_last(
    shape: tuple[int, int], tmp_path: Path, rng: torch.Generator
) -> None:
    """DeepSeek-V3's kv_a_proj has 576 rows: four whole blocks and a half."""
    W = torch.randn(shape, generator=rng)
    parts = fp8_blocks(W, 128)
    save_file({f"layer.{key}": tensor for key, tensor in parts.items()}, tmp_path / "model.safetensors")
    found = open_original(tmp_path).read("layer.weight")  # without a config.json: bfloat16
    expected = torch.empty(shape, dtype=torch.float64)
    for r in range(math.ceil(shape[0] / 128)):
        for c in range(math.ceil(shape[1] / 128)):
            block = (slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
            expected[block] = parts["weight"][block].double() * float(parts["weight_scale_inv"][r, c])
    assert torch.equal(found, expected.bfloat16())


def test_every_way_to_share_a_scale(tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per tensor, row, column, expert, block of 32 and block of an expert; read whole and a few rows at a time."""
    monkeypatch.setattr(decoded, "CHUNK_WEIGHTS", 96)
    matrix = torch.randn(64, 96, generator=rng).to(FLOAT8)
    stack = torch.randn(3, 64, 96, generator=rng).to(FLOAT8)

    def scales(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng) + 0.5

    def read(weight: Tensor, scale: Tensor, **config: Any) -> Tensor:
        save_file({"e": weight, "e_scale": scale}, tmp_path / "model.safetensors")
        values = {"dtype": "float32"} | ({"quantization_config": {"quant_method": "fp8", **config}} if config else {})
        (tmp_path / "config.json").write_text(json.dumps(values))
        source = open_original(tmp_path)
        whole = source.read("e")
        assert torch.equal(whole[1:3], source.read("e", rows=slice(1, 3)))
        return whole

    for weight, shapes in (
        (matrix, [(), (1,), (1, 1), (64, 1), (1, 96)]),
        (stack, [(1, 1, 1), (3, 1, 1), (3, 64, 1), (3, 1, 96)]),
    ):
        for shape in shapes:
            scale = scales(*shape)
            assert torch.equal(read(weight, scale), weight.float() * scale), shape
    rows = scales(64)
    assert torch.equal(read(matrix, rows), matrix.float() * rows[:, None])
    experts = scales(3)
    assert torch.equal(read(stack, experts), stack.float() * experts[:, None, None])
    blocks = scales(3, 2, 3)
    expected = stack.float() * blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert torch.equal(read(stack, blocks, weight_block_size=[32, 32]), expected)
    bytes_ = torch.randint(100, 140, (64, 3), generator=rng, dtype=torch.uint8)
    powers = torch.exp2(bytes_.double() - 127).float().repeat_interleave(32, 1)
    assert torch.equal(read(matrix, bytes_), matrix.float() * powers)


def test_powers_of_two_are_exact_and_their_nan_is_not_finite() -> None:
    found = powers_of_two(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert found[:255].tolist() == [2.0**exponent for exponent in range(-127, 128)]
    assert not math.isfinite(found[255])


def test_a_weight_is_decoded_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """Reading needs the weight once, and not a second time in float32."""
    rows = [len(chunk) for chunk in decoded.row_chunks(range(5, 100_000), (100_000, 4096), 128)]
    assert max(rows) * 4096 <= decoded.CHUNK_WEIGHTS
    assert sum(rows) == 100_000 - 5
    assert all(n % 128 == 0 for n in rows[1:-1])


# --- without a configuration, and the rest of the folder --------------------------------------------------------------


def test_scales_are_not_ignored_where_the_configuration_does_not_speak_of_them(
    plain: Path, windows: Tensor, tmp_path: Path, text_file: str
) -> None:
    silent = store(plain, tmp_path / "silent", "fp8-channel", {})
    said = store(plain, tmp_path / "said", "fp8-channel")
    config = QuantConfig(bits=8, group_size=32, method="rtn")
    for folder in (silent, said):
        quantize(folder, tmp_path / f"{folder.name}-out", config)
    ours, same = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("silent", "said"))
    assert all(torch.equal(ours[name], same[name]) for name in same)
    with torch.no_grad():
        expected, found = (load(tmp_path / name, dtype="float32")(windows).logits for name in ("silent", "silent-out"))
    assert float((found - expected).norm() / expected.norm()) < 0.05
    measured = compare(tmp_path / "silent-out", said, text_file, seq_len=16, windows=3)
    assert measured.kl < 0.01
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        convert(silent, tmp_path / "converted", "gptq")


def test_nothing_of_the_old_quantization_is_left(plain: Path, tmp_path: Path) -> None:
    folder = store(plain, tmp_path / "stored", "modelopt", {})
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    result = quantize(folder, tmp_path / "out", QuantConfig(bits=4, group_size=32, method="rtn"))
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "input_scale" in name]
    assert any("14 scales of activations (model.layers.0." in note for note in result.notes)
    assert any("14 weights of the checkpoint are NVFP4" in note for note in result.notes)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    linears = sum(W.numel() for n, W in load_file(plain / "model.safetensors").items() if n.endswith("proj.weight"))
    assert record["sizes"]["quantized_bytes_before"] == linears // 2 + linears // 16 + 14 * 4


# --- what is refused --------------------------------------------------------------------------------------------------


Change = Callable[[Tensors], Any]


def without(key: str) -> Change:
    return lambda tensors: tensors.pop(f"{LAYER}.{key}")


def replaced(key: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({f"{LAYER}.{key}": tensor})


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("fp8-block", without("weight_scale_inv"), r"up_proj\.weight in .* its scales \(.*missing"),
        ("fp8-block", replaced("weight_scale_inv", torch.ones(2, 1)), r"weight_scale_inv .*\(2, 1\); .*needs \(3, 2\)"),
        ("fp8-block", replaced("weight_scale_inv", torch.ones(7, 7)), r"weight_scale_inv .*\(7, 7\)"),
        ("fp8-block", replaced("weight_scale_inv", torch.ones(3, 2).int()), "weight_scale_inv in .*holds torch.int32"),
        ("fp8-block", without("weight"), r"weight_scale_inv in .*, but .*up_proj\.weight is missing"),
        ("fp8-block", replaced("weight", torch.ones(96, 64).bfloat16()), r"up_proj\.weight holds torch.bfloat16"),
        ("fp8-channel", replaced("weight_scale", torch.ones(95, 1)), r"up_proj\.weight_scale .*\(95, 1\)"),
        ("fp8-channel", replaced("qweight", torch.ones(8, 96).int()), r"up_proj\.qweight in .* belongs to a weight"),
        ("mxfp4", without("weight_scale"), r"up_proj\.weight_packed in .* other tensors"),
        ("mxfp4", replaced("weight_scale", torch.ones(96, 1).byte()), r"up_proj\.weight_scale .*\(96, 1\)"),
        (
            "mxfp4",
            replaced("weight_packed", torch.ones(96, 33).byte()),
            r"weight_packed .*66 inputs, which groups of 32",
        ),
        ("nvfp4", without("weight_global_scale"), r"up_proj\.weight_global_scale is missing"),
        ("nvfp4", without("weight_scale"), r"up_proj\.weight_scale is missing"),
        ("nvfp4", replaced("weight_global_scale", torch.ones(2)), r"up_proj\.weight_global_scale .*\(2,\)"),
        ("modelopt", replaced("pre_quant_scale", torch.ones(64)), r"up_proj\.pre_quant_scale in"),
        ("awq", without("qzeros"), r"up_proj\.qzeros is missing"),
        ("awq", replaced("scales", torch.ones(1, 96).half()), r"up_proj\.scales .*\(1, 96\), not \(2, 96\)"),
        ("awq", replaced("act.scales", torch.ones(64).half()), r"act\.scales in"),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(
    layout: str, change: Change, message: str, plain: Path, tmp_path: Path
) -> None:
    folder = store(plain, tmp_path / "stored", layout)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        quantize(folder, tmp_path / "out", RTN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "hqq"},
            "says quant_method 'hqq', which is not read; what is read is auto-round, awq, compressed",
        ),
        ({"quant_method": "fp8", "rotation": "hadamard"}, "key 'rotation', which is not known of 'fp8'"),
        ({**LAYOUTS["fp8-channel"][1], "transform_config": {"config_groups": {"R1": {}}}}, "says transform_config"),
        ({"quant_method": "awq", "bits": 3, "group_size": 32}, "bits 3; of AWQ files"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "krot": 8}, "key 'krot', which is not known of"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version 'gemv'; of AWQ files"),
    ],
)
def test_unknown_methods_and_options_are_named(
    config: dict[str, Any], message: str, plain: Path, tmp_path: Path
) -> None:
    folder = store(plain, tmp_path / "stored", "fp8-channel", config)
    with pytest.raises(InputError, match=message):
        plan_checkpoint(str(folder), CONFIG, None, False)


def test_packed_integers_need_a_configuration(plain: Path, tmp_path: Path) -> None:
    folder = store(plain, tmp_path / "stored", "awq", {})
    with pytest.raises(InputError, match=r"qweight in .* holds packed integers, but no quantization_config"):
        open_original(folder)


@pytest.mark.parametrize(
    ("part", "bad"), [("weight_scale_inv", math.inf), ("weight_scale_inv", math.nan), ("weight", math.nan)]
)
def test_numbers_that_are_not_finite_are_named(part: str, bad: float, plain: Path, tmp_path: Path) -> None:
    folder = store(plain, tmp_path / "stored", "fp8-block")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{part}"
    tensors[name] = tensors[name].clone()
    tensors[name][1, 1] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} in .* holds NaN or infinity"):
        open_original(folder).read("model.layers.0.mlp.up_proj.weight")


def test_plain_float8_without_any_scale_is_what_it_says(tmp_path: Path, rng: torch.Generator) -> None:
    W = torch.randn(8, 8, generator=rng).to(FLOAT8)
    save_file({"layer.weight": W}, tmp_path / "model.safetensors")
    source = open_original(tmp_path)
    assert type(source) is Source
    assert torch.equal(source.read("layer.weight", torch.float32), W.float())
