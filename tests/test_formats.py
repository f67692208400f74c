"""A layer's integers on disk: against bit strings written out by hand, and between the formats."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq import InputError, QuantConfig, cli, formats, load, quantize, solver
from gptq.config import BITS, Format
from gptq.formats import Codes, Scheme
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from gptq.solver import IntegerGrid
from tests import oracle
from tests.conftest import VOCAB, MakeModel

PACKED: Format = "pack-quantized"


def some_codes(bits: int, outputs: int, inputs: int, columns: int, sym: bool, rng: torch.Generator) -> Codes:
    groups = -(-inputs // columns)
    middle = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
    zero = torch.randint(1, 2**bits, (outputs, groups), generator=rng).to(torch.uint8)
    return Codes(
        codes=torch.randint(0, 2**bits, (outputs, inputs), generator=rng).to(torch.uint8),
        scale=torch.rand(outputs, groups, generator=rng).half(),
        zero=middle if sym else zero,
        g_idx=torch.arange(inputs, dtype=torch.int32) // columns,
    )


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_quantized_is_the_bit_string_of_offset_codes(bits: int, sym: bool, rng: torch.Generator) -> None:
    """Signed codes and zero points plus 2^(bits - 1), dense, along the inputs and along the outputs."""
    layer = some_codes(bits, 5, 24, 8, sym, rng)
    packed = formats.encode(layer, Scheme(bits, 8, sym, PACKED))
    assert packed["weight_packed"].tolist() == [oracle.bit_stream(row, bits) for row in layer.codes.tolist()]
    assert packed["weight_shape"].tolist() == [5, 24]
    assert torch.equal(packed["weight_scale"], layer.scale)
    assert ("weight_zero_point" in packed) is not sym
    if not sym:
        columns = packed["weight_zero_point"].T.tolist()
        assert columns == [oracle.bit_stream(column, bits) for column in layer.zero.T.tolist()]


def test_int_quantized_is_signed_bytes(rng: torch.Generator) -> None:
    layer, scheme = some_codes(8, 5, 24, 24, True, rng), Scheme(8, -1, True, "int-quantized")
    packed = formats.encode(layer, scheme)
    assert packed["weight"].tolist() == [[code - 128 for code in row] for row in layer.codes.tolist()]
    assert packed["weight"].dtype == torch.int8
    assert torch.equal(packed["weight_scale"], layer.scale)
    read = formats.decode(packed, scheme)
    assert all(torch.equal(getattr(read, key), getattr(layer, key)) for key in ("codes", "scale", "zero", "g_idx"))
    assert torch.equal(packed["weight"].float() * packed["weight_scale"].float(), layer.weight())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", formats.GPTQ_BITS)
def test_the_formats_are_transposes_of_each_other(bits: int, sym: bool, rng: torch.Generator) -> None:
    layer = some_codes(bits, 32, 64, 16, sym, rng)
    v1, v2, packed = (formats.encode(layer, Scheme(bits, 16, sym, f)) for f in ("gptq", "gptq_v2", "pack-quantized"))
    assert torch.equal(v1["qweight"], packed["weight_packed"].T)
    assert torch.equal(v1["scales"], packed["weight_scale"].T)
    assert all(torch.equal(v1[name], v2[name]) for name in ("qweight", "scales", "g_idx"))
    for one, two, zeros in zip(v1["qzeros"].tolist(), v2["qzeros"].tolist(), layer.zero.T.tolist(), strict=True):
        assert one == oracle.bit_stream([zero - 1 for zero in zeros], bits)
        assert two == oracle.bit_stream(zeros, bits)
    if not sym:
        assert torch.equal(packed["weight_zero_point"], v2["qzeros"].T)


@pytest.mark.parametrize(
    ("format_", "bits"),
    [*((f, b) for f in ("gptq", "gptq_v2") for b in formats.GPTQ_BITS), *((PACKED, b) for b in BITS)],
)
@pytest.mark.parametrize("outputs", [3, 32])
def test_decoding_undoes_encoding_and_layout_foretells_it(
    bits: int, outputs: int, format_: Any, rng: torch.Generator
) -> None:
    for columns, sym in ((8, True), (20, False), (20, True), (7, False)):
        layer, scheme = some_codes(bits, outputs, 20, columns, sym, rng), Scheme(bits, columns, sym, format_)
        packed = formats.encode(layer, scheme)
        foretold = formats.layout(scheme, outputs, 20)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == {
            name: (info.dtype, info.shape) for name, info in foretold.items()
        }
        read = formats.decode(packed, scheme)
        for one, two in ((read.codes, layer.codes), (read.scale, layer.scale), (read.zero, layer.zero)):
            assert torch.equal(one, two)
        assert torch.equal(read.g_idx, layer.g_idx)


def test_a_zero_point_of_0_in_v1() -> None:
    """GPTQModel takes 1 off the whole word, so that 0 borrows from the next field; others cannot say it at all."""
    zero = torch.tensor([[8], [0], [8], [8], [8], [8], [8], [8]], dtype=torch.uint8)
    layer = Codes(
        torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1).half(), zero, torch.zeros(8, dtype=torch.int32)
    )
    with pytest.raises(ValueError, match="a zero point is 0"):
        formats.encode(layer, Scheme(4, -1, False, "gptq"))
    theirs = Scheme(4, -1, False, "gptq", by_gptqmodel=True)
    packed = formats.encode(layer, theirs)
    assert packed["qzeros"].tolist() == [[0x88888808 - 0x11111111]]
    assert torch.equal(formats.decode(packed, theirs).zero, zero)
    by_fields = formats.encode(layer, Scheme(4, -1, False, "gptq"), allow_zero=True)
    assert by_fields["qzeros"].tolist() == [[0x777777F7]]
    assert torch.equal(formats.decode(by_fields, Scheme(4, -1, False, "gptq")).zero, zero)


@pytest.fixture
def windows(rng: torch.Generator) -> Tensor:
    return torch.randint(1, VOCAB, (2, 16), generator=rng)


RTN = {"method": "rtn", "group_size": 32}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 4}, "gptq"), ({"bits": 8}, "gptq"), ({"bits": 4, "group_size": 48}, "gptq"),
        ({"bits": 3}, PACKED), ({"bits": 5}, PACKED), ({"bits": 4, "sym": False}, PACKED),
        ({"bits": 3, "group_size": 48}, "gptq"), ({"bits": 2, "group_size": 48, "sym": False}, "gptq_v2"),
        ({"bits": 4, "overrides": [["down_proj", {"bits": 8}]]}, PACKED),
    ],
)  # fmt: skip
def test_the_default_is_the_most_portable_file(
    options: dict[str, Any], expected: str, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    quantize(source, out, QuantConfig.from_dict({**RTN, **options}))
    content = verify.inspect(out)
    assert content.format == expected
    assert verify.verify(out).problems == []
    written = sum(i.nbytes for layer in content.layers for i in _layout(content.format, layer).values())
    assert content.quantized_bytes == written
    assert load(out)(windows).logits.isfinite().all()


def _layout(format_: Any, layer: verify.LayerContent) -> dict[str, Any]:
    return formats.layout(
        Scheme(layer.bits, layer.group_size, layer.sym, format_), layer.outputs, layer.inputs
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"bits": 5, "format": "gptq"}, "GPTQ files hold 2, 3, 4 or 8 bits, not 5"),
        ("llama", {"format": PACKED, "group_size": 48}, "whole groups, and 48 does not divide the 64 inputs"),
        (
            "llama",
            {"bits": 6, "group_size": 48},
            "48 does not .* as 'pack-quantized'; .* not 6, .* as 'gptq'; choose another w",
        ),
        ("gpt2", {"format": PACKED}, "transformer.h.0.attn.c_attn: .* Conv1D"),
        ("llama", {"format": PACKED, "method": "gptq", "desc_act": True, "static_groups": False}, "g_idx"),
        ("llama", {"overrides": [["up_proj", {"bits": 7}]], "format": "gptq_v2"}, "gate_proj: .* not 7"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_the_work(
    kind: str, options: dict[str, Any], message: str, windows: Tensor, make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        quantize(make_model(kind), tmp_path / "out", QuantConfig.from_dict({**RTN, **options}), calibration=windows)
    assert not (tmp_path / "out").exists()


# --- what other tools wrote -------------------------------------------------------------------------------------------


def test_early_autogptq_files(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    """quantize_config.json alone, without quant_method; a name of its own; a bias of zeros for every layer."""
    source, out = make_model("llama"), tmp_path / "out"
    quantize(source, out, QuantConfig.from_dict({**RTN, "format": "gptq"}))
    with torch.no_grad():
        expected = load(out)(windows).logits
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    early = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    (out / "quantize_config.json").write_text(json.dumps(early))
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name.replace("scales", "bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
    (out / "model.safetensors").unlink()
    (out / "quantization_record.json").unlink()
    (out / "README.md").unlink()
    save_file(tensors, out / "gptq_model-4bit-32g.safetensors")
    with torch.no_grad():
        assert torch.equal(load(out)(windows).logits, expected)
    assert verify.verify(out).problems == []


def test_autoround_in_gptq_format(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    """No checkpoint_format (v1 then), values of its own beside the known ones, widths of single layers in `dynamic`."""
    source, out = make_model("llama"), tmp_path / "out"
    mixed = {**RTN, "format": "gptq", "overrides": [[r"layers\.1\.mlp\.down_proj", {"bits": 8}]]}
    quantize(source, out, QuantConfig.from_dict(mixed))
    with torch.no_grad():
        expected = load(out)(windows).logits
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "bits": 4, "data_type": "int", "group_size": 32, "sym": True, "iters": 200, "autoround_version": "0.8.0",
        "block_name_to_quantize": "model.layers", "quant_method": "gptq", "desc_act": False, "true_sequential": False,
        "damp_percent": 0.01, "lm_head": False, "dynamic": {r"+:model\.layers\.1\.mlp\.down_proj": {"bits": 8}},
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    (out / "quantize_config.json").unlink()
    (out / "quantization_record.json").unlink()
    (out / "README.md").unlink()
    with torch.no_grad():
        assert torch.equal(load(out)(windows).logits, expected)
    assert verify.verify(out).problems == []


def spoil(out: Path, values: dict[str, Any], tensors: dict[str, Tensor | None]) -> None:
    """Change a checkpoint's configuration, and tensors by name (None takes one away)."""
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((out / name).read_text())
        (content["quantization_config"] if name == "config.json" else content).update(values)
        (out / name).write_text(json.dumps(content))
    held = {k: t for k, t in {**load_file(out / "model.safetensors"), **tensors}.items() if t is not None}
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({"quant_method": "bitsandbytes"}, {}, "quant_method 'bitsandbytes'"),
        ({"checkpoint_format": "marlin"}, {}, "format 'marlin'"),
        ({"bits": 5}, {}, "bits 5"),
        ({"bits": 8}, {}, r"\.qweight .* has the shape \(\d+, 64\), not \(\d+, 64\) as 8 bits"),
        ({"group_size": 16}, {}, r"qzeros .* has the shape \(3, 8\), not \(6, 8\) as 4 bits in groups of 16"),
        ({"group_size": "all"}, {}, "group_size 'all'"),
        ({"format": "gptq_v2"}, {}, "contradicts itself"),
        ({"dynamic": {"+:(": {}}}, {}, "not a regular expression"),
        ({"dynamic": {"-:.*down_proj": {}}}, {}, r"g_idx, but its quantization_config says .* not quantized"),
        ({}, {f"{LAYER}.qzeros": torch.full((3, 8), 0x66666666, dtype=torch.int32)}, "qzeros .* point 7, .* is 8"),
        ({}, {f"{LAYER}.g_idx": torch.arange(96, dtype=torch.int32) % 3}, "g_idx .* not made of runs of 32"),
        ({}, {f"{LAYER}.qweight": None}, f"{LAYER} .* has g_idx, qzeros, scales; .* needs g_idx, qweight"),
        ({}, {f"{LAYER}.weight": torch.ones(64, 96)}, rf"both {LAYER}\.weight and"),
        ({}, {f"{LAYER}.qweight": torch.zeros(12, 64)}, "holds torch.float32, not torch.int32"),
        ({}, {"model.norm.weight": torch.ones(7)}, r"model\.norm\.weight has the shape \(7,\)"),
        ({}, {f"{LAYER}.scales": torch.full((3, 64), float("nan")).half()}, r"scales .* holds NaN"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_what_was_expected(
    values: dict[str, Any], tensors: dict[str, Tensor | None], message: str, make_model: MakeModel, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, "format": "gptq"}))
    spoil(out, values, tensors)
    with pytest.raises(InputError, match=message):
        load(out)
    (out / "quantization_record.json").unlink()
    code = cli.main(["verify", str(out)])
    printed = capsys.readouterr()
    assert code in (1, 2)  # some are found on the way to the tensors, others among them
    assert re.search(message, printed.out + printed.err)


def test_files_that_disagree_and_tensors_that_nothing_uses(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, "format": "gptq"}))
    spoil(out, {}, {"model.layers.0.mlp.gate_proj.surplus": torch.ones(3)})
    load(out)
    assert "holds model.layers.0.mlp.gate_proj.surplus, which the model does not use" in caplog.text
    (out / "quantization_record.json").unlink()
    assert verify.verify(out).problems == [
        "the tensor model.layers.0.mlp.gate_proj.surplus belongs to nothing in the model that config.json describes",
    ]
    beside = json.loads((out / "quantize_config.json").read_text())
    (out / "quantize_config.json").write_text(json.dumps({**beside, "group_size": 64}))
    with pytest.raises(
        InputError, match=r"quantize_config\.json says group_size 64, but config\.json beside it says 32"
    ):
        load(out)


def test_pack_quantized_files_of_before_dense_packing_are_told(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, "bits": 3}))
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    tensors[name] = torch.zeros(64, 7, dtype=torch.int32)  # ten codes of 3 bits to a word
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"shape \(64, 7\), not \(64, 6\) .* compressed-tensors before 0\.18"):
        load(out)


def test_act_order_by_groups_of_older_compressed_tensors_is_read(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, rng: torch.Generator
) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, "format": PACKED}))
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    for layer in [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]:
        inputs = int(tensors[f"{layer}.weight_shape"][1])
        tensors[f"{layer}.weight_g_idx"] = torch.randperm(inputs, generator=rng).to(torch.int32) // 32
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (out / "config.json").write_text(json.dumps(config))
    (out / "quantization_record.json").unlink()
    network = load(out)
    codes = oracle.unpacked_rows(tensors[f"{name}.weight_packed"], 4, 96)
    groups = tensors[f"{name}.weight_g_idx"].long()
    expected = (codes - 8) * tensors[f"{name}.weight_scale"].double()[:, groups]
    linear = network.get_submodule(name)
    assert isinstance(linear, QuantLinear)
    assert torch.equal(linear.weight.double(), expected)
    assert network(windows).logits.isfinite().all()
    assert not all(layer.ordered_groups for layer in verify.inspect(out).layers)


def test_a_layer_that_the_solver_made_is_one_of_integers() -> None:
    solved = solver.round_to_nearest(torch.linspace(-1, 1, 64).view(2, 32), IntegerGrid(4, sym=False), 16)
    kinds: tuple[Format, ...] = ("gptq", "gptq_v2", "pack-quantized", "pack-quantized-a8")
    for format_ in kinds:
        scheme = Scheme(4, 16, False, format_)
        assert torch.equal(formats.decode(formats.encode(solved, scheme), scheme).weight(), solved.weight())
