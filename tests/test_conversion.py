"""From format to format: the same integers and scales, and back again the same bytes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq import InputError, QuantConfig, cli, convert, load, quantize
from gptq.checkpoint.atomic_folder import MARKER, partial_folder_of
from gptq.checkpoint.tensors import sha256
from gptq.checkpoint.writer import ShardWriter
from gptq.config import Format
from gptq.output import verify
from gptq.pipeline import quantize as quantize_module
from tests.conftest import DATA, VOCAB, MakeModel

RTN = {"method": "rtn", "group_size": 32}
SAME_GRID: tuple[Format, ...] = ("gptq", "gptq_v2", "pack-quantized")  # hold the same integers, of every width
FIXTURES = ["gptqmodel-w4g32-sym", "gptqmodel-w4g32-asym-v2", "llmcompressor-w4-channel-sym"]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4}, {"bits": 2, "sym": False}, {"bits": 3, "group_size": -1}, {"bits": 8, "sym": False},
        {"bits": 4, "overrides": [["down_proj", {"bits": 8, "group_size": -1}], [r"s\.0\..*o_proj", {"skip": True}]]},
    ],
)  # fmt: skip
def test_between_all_formats_and_back(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama", dtype=torch.bfloat16)
    ids = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    for first in SAME_GRID:
        quantize(source, tmp_path / first, QuantConfig.from_dict({**RTN, **options, "format": first}))
        checksums = [layer["weight_sha256"] for layer in _record(tmp_path / first)["layers"]]
        with torch.no_grad():
            expected = load(tmp_path / first)(ids).logits
        for second in (f for f in SAME_GRID if f != first):
            there, back = tmp_path / f"{first}-{second}", tmp_path / f"{first}-{second}-{first}"
            convert(tmp_path / first, there, second)
            assert verify.inspect(there).format == second
            assert verify.verify(there).problems == []
            assert [layer["weight_sha256"] for layer in _record(there)["layers"]] == checksums
            with torch.no_grad():
                assert torch.equal(load(there)(ids).logits, expected)
            convert(there, back, first)
            assert all_bytes(back) == all_bytes(tmp_path / first)
    direct = load_file(tmp_path / "gptq" / "model.safetensors")  # what quantize writes is what convert writes
    converted = load_file(tmp_path / "pack-quantized-gptq" / "model.safetensors")
    assert direct.keys() == converted.keys()
    assert all(torch.equal(direct[name], converted[name]) for name in direct)


def _record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "quantization_record.json").read_text())
    return content


def test_one_solve_gives_several_formats(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    options = ["--method", "rtn", "--group-size", "32"]
    named = [word for chosen in ("gptq", "mlx", "pack-quantized") for word in ("--format", chosen)]
    assert cli.main(["quantize", str(source), str(out), *options, *named, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["out"], result["also"]) == (str(out / "gptq"), [str(out / f) for f in ("mlx", "pack-quantized")])
    sums = []
    for folder in sorted(out.iterdir()):
        assert verify.verify(folder).problems == []
        sums.append([layer["weight_sha256"] for layer in _record(folder)["layers"]])
    assert len(sums) == 3
    assert sums[0] == sums[1] == sums[2]
    quantize(source, tmp_path / "alone", QuantConfig.from_dict({**RTN, "format": "gptq"}))
    assert all_bytes(tmp_path / "alone") == all_bytes(out / "gptq")
    convert(tmp_path / "alone", tmp_path / "mlx", "mlx")
    assert all_bytes(tmp_path / "mlx") == all_bytes(out / "mlx")
    assert cli.main(["quantize", str(source), str(out), *options, *named]) == 2  # it is there already


def test_a_run_that_stops_between_two_formats_goes_on(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = make_model("llama"), QuantConfig.from_dict({**RTN, "format": "gptq"})
    quantize(source, tmp_path / "whole", config, also=["mlx", "pack-quantized"])

    def stop_at_the_second(model: Path, out: Path, chosen: Format, **options: Any) -> Any:
        if chosen == "pack-quantized":
            raise KeyboardInterrupt
        return convert(model, out, chosen, **options)

    monkeypatch.setattr(quantize_module, "convert", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", config, also=["mlx", "pack-quantized"])
    assert not (tmp_path / "out" / "gptq").exists()
    monkeypatch.undo()
    left = partial_folder_of(tmp_path / "out" / "mlx").root
    left.mkdir()
    (left / MARKER).touch()  # as by a signal while the folder of a finished conversion is removed
    quantize(source, tmp_path / "out", config, also=["mlx", "pack-quantized"])
    assert not left.exists()
    for chosen in ("gptq", "mlx", "pack-quantized"):
        assert all_bytes(tmp_path / "out" / chosen) == all_bytes(tmp_path / "whole" / chosen)
    (tmp_path / "out" / "gptq").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="mlx exists and is not empty"):
        quantize(source, tmp_path / "out", config, also=["mlx"])


def test_several_formats_are_refused_before_the_work_where_grids_differ(make_model: MakeModel, tmp_path: Path) -> None:
    config = QuantConfig.from_dict({**RTN, "sym": False, "format": "gptq_v2"})
    cases: list[tuple[Format, str]] = [
        ("mlx", "'gptq_v2' rounds to other"),
        ("int-quantized", "holds symmetric 8 bits"),
    ]
    for also, reason in cases:
        with pytest.raises(InputError, match=rf"{reason}.* cannot write 'gptq_v2' and '{also}'"):
            quantize(make_model("llama"), tmp_path / "out", config, also=[also])
    assert not (tmp_path / "out").exists()


def test_shards_stay_where_they_are(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "ShardWriter", partial(ShardWriter, max_shard_bytes=40_000))
    quantize(make_model("llama"), tmp_path / "a", QuantConfig.from_dict(RTN))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    convert(tmp_path / "a", tmp_path / "b", "pack-quantized")
    convert(tmp_path / "b", tmp_path / "c", "gptq")
    assert all_bytes(tmp_path / "c") == all_bytes(tmp_path / "a")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    held = {k: f.name for f in (tmp_path / "b").glob("*.safetensors") for k in load_file(f)}
    assert index["weight_map"] == held
    loaded = [load_file(tmp_path / "b" / file) for file in set(held.values())]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensors in loaded for tensor in tensors.values())


@pytest.mark.parametrize("fixture", FIXTURES)
def test_files_of_other_tools(fixture: str, tmp_path: Path) -> None:
    folder = DATA / "fixtures" / fixture
    if not folder.is_dir():
        pytest.skip(f"no fixture at {folder}")
    content, ids = verify.inspect(folder), load_file(folder / "reference.safetensors")["input_ids"]
    with torch.no_grad():
        expected = load(folder, dtype="float32")(ids).logits
    for other in SAME_GRID:
        if other == content.format:
            continue
        if other == "pack-quantized":  # 172 inputs in groups of 32
            with pytest.raises(InputError, match="whole groups, and 32 does not divide the 172 inputs"):
                convert(folder, tmp_path / "refused", other)
            continue
        there, back = tmp_path / other, tmp_path / f"{other}-back"
        convert(folder, there, other)
        assert verify.verify(there).problems == []
        for engine_ in verify.inspect(there).engines:  # the card says what inspect says
            assert (
                f"- {engine_.name}: {'yes' if engine_.takes else 'no'}, {engine_.why}"
                in (there / "README.md").read_text()
            )
        with torch.no_grad():
            assert torch.equal(load(there, dtype="float32")(ids).logits, expected)
        convert(there, back, content.format)
        one, two = (
            load_file(f / "model.safetensors") for f in (folder, back)
        )  # the order in the file is each tool's own
        assert {n: (t.dtype, sha256(t)) for n, t in one.items()} == {n: (t.dtype, sha256(t)) for n, t in two.items()}
        assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
        assert verify.verify(back).problems == []
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("kind", "options", "target", "message"),
    [
        ("llama", {"bits": 5}, "gptq", "not 5"),
        ("llama", {"bits": 4}, "gptq", "in the format 'gptq' already"),
        ("llama", {"bits": 4, "group_size": 48}, "pack-quantized", "whole groups"),
        ("gpt2", {"bits": 4}, "pack-quantized", "Conv1D"),
    ],
)  # fmt: skip
def test_refusals_name_the_layer_and_leave_nothing(
    kind: str, options: dict[str, Any], target: Format, message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    quantize(make_model(kind), tmp_path / "a", QuantConfig.from_dict({**RTN, **options}))
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "a", tmp_path / "b", target)
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        convert(make_model(kind), tmp_path / "b", target)
    assert not (tmp_path / "b").exists()


def test_scattered_groups_cannot_go_where_nothing_would_use_them(make_model: MakeModel, tmp_path: Path) -> None:
    ids = torch.randint(1, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    config = QuantConfig(bits=4, group_size=32, desc_act=True, static_groups=False)
    quantize(make_model("llama"), tmp_path / "a", config, calibration=ids)
    with pytest.raises(InputError, match="no g_idx any more"):
        convert(tmp_path / "a", tmp_path / "b", "pack-quantized")
    convert(tmp_path / "a", tmp_path / "b", "gptq_v2")
    convert(tmp_path / "b", tmp_path / "c", "gptq")
    assert all_bytes(tmp_path / "c") == all_bytes(tmp_path / "a")


def test_a_zero_point_of_0_is_not_written_as_v1(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "a"
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, "sym": False, "format": "gptq_v2"}))
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.qzeros"][1, 2] = 0x77777077
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "quantization_record.json").unlink()
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj has a zero point of 0, which GPTQ v1 stores as -1"):
        convert(out, tmp_path / "b", "gptq")
    convert(out, tmp_path / "b", "pack-quantized")
    convert(tmp_path / "b", tmp_path / "c", "gptq_v2")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
