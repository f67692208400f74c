"""GPTQ files without g_idx, and those of AutoRound's own export, which describes the same layouts in other words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptq import InputError, QuantConfig, convert, formats, load, quantize
from gptq.config import Format
from gptq.formats import Scheme, auto_round, awq
from gptq.formats.original import open_original
from gptq.formats.quantization_config import read_quantization
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from tests.conftest import MakeModel

KEPT, EIGHT = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MIXED = [[r"layers\.0\.self_attn\.q_proj", {"skip": True}], [r"layers\.1\.mlp\.down_proj", {"bits": 8}]]


@pytest.fixture
def ours(make_model: MakeModel, tmp_path: Path) -> Path:
    """An asymmetric v2 file; a layer of 8 bits, and one that is not quantized."""
    options = {"method": "rtn", "bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"}
    quantize(make_model("llama"), tmp_path / "ours", QuantConfig.from_dict({**options, "overrides": MIXED}))
    return tmp_path / "ours"


def as_by_another_tool(ours: Path, folder: Path, config: dict[str, Any] | None, with_g_idx: bool) -> Path:
    """Copy a result with another `quantization_config` (None: as it is), without what only this package writes."""
    folder.mkdir()
    values = json.loads((ours / "config.json").read_text())
    values["quantization_config"] = config or {**values["quantization_config"], "meta": {}}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(ours / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if with_g_idx or not name.endswith(".g_idx")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_read_everywhere(folder: Path, ours: Path, windows: Tensor) -> None:
    """Everything that reads a file finds what it finds in the file of this package."""
    with torch.no_grad():
        expected = load(ours)(windows).logits
        assert torch.equal(load(folder)(windows).logits, expected)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(network(windows).logits, expected)
        assert isinstance(network.get_submodule(EIGHT), QuantLinear)
        network.save_pretrained(folder.with_name("saved"))
        assert tensors_of(folder.with_name("saved")) == tensors_of(folder)
        assert torch.equal(load(folder.with_name("saved"))(windows).logits, expected)
    assert verify.verify(folder).problems == []
    found, wanted = verify.inspect(folder), verify.inspect(ours)
    assert [(x.name, x.bits, x.group_size, x.ordered_groups) for x in found.layers] == [
        (x.name, x.bits, x.group_size, True) for x in wanted.layers
    ]
    assert [engine.name for engine in found.engines if engine.takes] == ["gptq", "transformers"]
    source, own = open_original(folder), open_original(ours)
    assert torch.equal(source.read(f"{EIGHT}.weight"), own.read(f"{EIGHT}.weight"))


def test_gptq_files_without_g_idx(ours: Path, windows: Tensor, tmp_path: Path) -> None:
    folder = as_by_another_tool(ours, tmp_path / "early", None, with_g_idx=False)
    assert_read_everywhere(folder, ours, windows)
    convert(folder, tmp_path / "packed", "pack-quantized")
    ways: tuple[tuple[Path, str], ...] = ((folder, "at once"), (tmp_path / "packed", "back"))
    for source, name in ways:  # both write g_idx
        convert(source, tmp_path / name, "gptq_v2")
        assert tensors_of(tmp_path / name) == tensors_of(ours)
    with pytest.raises(InputError, match="is in the format 'gptq_v2' already"):
        convert(tmp_path / "back", tmp_path / "again", "gptq_v2")
    config = json.loads((ours / "config.json").read_text())["quantization_config"]
    scattered = as_by_another_tool(ours, tmp_path / "act", {**config, "desc_act": True}, with_g_idx=False)
    for read in (load, verify.inspect, open_original, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            InputError, match=r"proj in .* has no g_idx, .* desc_act is true and the group size 32; set"
        ):
            read(scattered)


def tensors_of(folder: Path) -> dict[str, tuple[torch.dtype, Any]]:
    return {name: (t.dtype, t.tolist()) for name, t in load_file(folder / "model.safetensors").items()}


OF_AUTO_ROUND: dict[str, Any] = {
    "autoround_version": "0.16.1", "bits": 4, "block_name_to_quantize": "model.layers", "data_type": "int",
    "enable_quanted_input": False, "group_size": 32, "quant_method": "auto-round", "sym": False,
    "extra_config": {
        r".*layers\.1\.mlp\..*": {"bits": 2},  # a name comes before it
        EIGHT: {"bits": 8, "super_bits": None}, KEPT: {"bits": 16, "data_type": "float"},
        r"^model\.layers\.1\.mlp\.(gate|up)_proj$": {"bits": 3}, "lm_head": {"bits": 16},
    },
}  # fmt: skip


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel", "auto_round:auto_gptq", None])
def test_auto_rounds_own_export(packing: str | None, ours: Path, windows: Tensor, tmp_path: Path) -> None:
    config: dict[str, Any] = {**OF_AUTO_ROUND, "packing_format": packing}
    config["extra_config"] = {EIGHT: {"bits": 8}, r".*\.0\.self_attn\.q_.*": {"bits": 16}}
    kind: Format = "gptq_v2"
    if packing in ("auto_round:auto_gptq", None):  # v1
        convert(ours, tmp_path / "v1", "gptq")
        ours, kind = tmp_path / "v1", "gptq"
    if packing is None:
        del config["packing_format"]
    folder = as_by_another_tool(ours, tmp_path / "theirs", config, with_g_idx=packing == "auto_round:gptqmodel")
    (folder / auto_round.COPY).write_text(json.dumps(config))
    assert_read_everywhere(folder, ours, windows)
    convert(folder, tmp_path / "usual", kind)
    assert tensors_of(tmp_path / "usual") == tensors_of(ours)
    assert not (tmp_path / "usual" / auto_round.COPY).exists()
    assert json.loads((tmp_path / "usual" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert [engine.takes for engine in verify.inspect(tmp_path / "usual").engines].count(True) >= 2


def test_options_of_single_layers() -> None:
    read = read_quantization("config.json", {**OF_AUTO_ROUND, "packing_format": "auto_round"})
    widths = {EIGHT: 8, KEPT: None, "lm_head": None, "model.layers.1.mlp.up_proj": 2, "model.layers.11.mlp.up_proj": 4}
    assert {name: s and s.bits for name, s in read.schemes(widths).items()} == widths


def test_zero_points_as_auto_round_wrote_them() -> None:
    """Words that auto-round 0.16.1 wrote of one layer (4 bits, asymmetric), and the zero points that it reads there."""
    zero = [8, 6, 8, 8, 6, 6, 8, 8]
    for packing, word in (("auto_round:auto_gptq", 0x77557757), ("auto_round:gptqmodel", 0x88668868)):
        read = read_quantization("config.json", {**OF_AUTO_ROUND, "packing_format": packing})
        words = torch.tensor([[word]]).to(torch.int32)
        assert read.everywhere == Scheme(4, 32, False, read.format)
        assert formats.decode_zeros({"qzeros": words}, read.everywhere, 8).flatten().tolist() == zero
    assert awq._unpack(torch.tensor([[0x86868688]]).to(torch.int32)).flatten().tolist() == zero


def test_auto_rounds_awq_files_are_sources(make_model: MakeModel, tmp_path: Path, rng: torch.Generator) -> None:
    source, folder = make_model("llama"), tmp_path / "theirs"
    tensors = load_file(source / "model.safetensors")
    outputs, inputs = tensors.pop(f"{EIGHT}.weight").shape
    words = torch.randint(-(2**31), 2**31, (inputs, outputs // 8), generator=rng).to(torch.int32)
    parts = {"qweight": words, "qzeros": words[::32].clone(), "scales": torch.ones(inputs // 32, outputs).half()}
    folder.mkdir()
    save_file({**tensors, **{f"{EIGHT}.{key}": part for key, part in parts.items()}}, folder / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    ours = {**OF_AUTO_ROUND, "packing_format": "auto_round:auto_awq", "extra_config": {}}
    values["quantization_config"] = ours
    (folder / "config.json").write_text(json.dumps(values))
    twin = {**ours, "quant_method": "awq", "version": "gemm"}
    read = open_original(folder).read(f"{EIGHT}.weight")
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": twin}))
    assert torch.equal(read, open_original(folder).read(f"{EIGHT}.weight"))
    assert not read[:, ::32].any()  # codes that equal the zero points
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="'auto-round', with the layout of 'awq'"):
        verify.inspect(folder)
    own = {**ours, "group_size": 64, "extra_config": {EIGHT: {"group_size": 32}}}
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": own}))
    assert torch.equal(read, open_original(folder).read(f"{EIGHT}.weight"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing_format": "auto_round:fp8"}, "packing_format 'auto_round:fp8'; of AutoRound's files those of"),
        ({"packing_format": 3}, "packing_format 3; it is the name of a layout"),
        ({"data_type": "mx_fp"}, "data_type 'mx_fp'; of AutoRound's files those are read whose weights"),
        ({"act_bits": 8}, "act_bits '8'"),
        ({"rotation_config": {"kind": "hadamard"}}, "rotation_config"),
        ({"bits": 5}, "bits 5; GPTQ files hold 2, 3, 4 or 8"),
        ({"bits": None}, "bits None"),
        ({"extra_config": {"lm_head": {"data_type": "fp"}}}, "extra_config 'lm_head', says data_type 'fp'"),
        ({"extra_config": {"lm_head": 4}}, "extra_config"),
        ({"extra_config": {"(": {"bits": 8}}}, "is not a regular expression"),
    ],
)
def test_what_is_not_read_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_quantization("config.json", {**OF_AUTO_ROUND, **changes})


def test_transformers_keeps_its_own_class_for_the_rest() -> None:
    kind: Any = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["auto-round"]
    other = kind.from_dict({**OF_AUTO_ROUND, "packing_format": "auto_round:auto_awq"})
    assert isinstance(kind.from_dict(OF_AUTO_ROUND), kind)
    assert type(other) is transformers.AutoRoundConfig
