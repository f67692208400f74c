"""Checkpoints from a stranger: one sentence, never a traceback, a hang, a huge allocation, or a file elsewhere."""

import gzip
import json
import os
import random
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq import InputError, QuantConfig, cli, convert, load, quantize
from gptq.calibration.arrays import read_arrays
from gptq.calibration.chats import tokenized_chats
from gptq.calibration.processed import process_rows, read_image
from gptq.calibration.sources import Table, open_table
from gptq.calibration.text import documents
from gptq.checkpoint import unpickle
from gptq.checkpoint.reader import Source, read_index
from gptq.checkpoint.untrusted import MAX_DEPTH, check_folder, read_json
from gptq.evaluation.quality import read_measurements
from gptq.evaluation.report import write_report
from gptq.formats import Scheme, name_rules
from gptq.formats.name_rules import Quantization
from gptq.formats.quantization_config import read_quantization
from gptq.models.build import build_empty_model
from gptq.models.hf_config import read_config
from gptq.output import verify
from gptq.output.record import read_record
from gptq.output.results import RECORD
from gptq.output.verify import inspect
from gptq.pipeline.block_result import BlockResult
from gptq.pipeline.journal import JOURNAL, Journal
from tests.conftest import MakeModel, load_script

changes, seeds, _, laws, _, fuzz = (
    load_script(f"fuzz_{name}") for name in ("changes", "seeds", "targets", "laws", "coverage", "readers")
)


class Checkpoints(dict[str, Path]):
    """Small checkpoints, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = seeds.make_checkpoint(name, self._folder)
        return self[name]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A quantized checkpoint in GPTQ's format, to be spoiled."""
    return shutil.copytree(checkpoints["gptq"], tmp_path / "model")


def change(file: Path, do: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    do(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_whatever_is_changed_the_answer_is_a_sentence(checkpoints: dict[str, Path]) -> None:
    """A short form of scripts/fuzz_readers.py, the same each time."""
    inputs = {f"model/{name}": checkpoints[name] for name in ("plain", "gptq", "pack", "awq", "autogptq", "nvfp4")}
    campaign = fuzz.Campaign(inputs, random.Random(0), ["read", "original", "records", "inspect", "verify", "load"])
    for _ in range(60):
        change = campaign.next()
        assert laws.broken_law(change, inputs) is None, str(change)


@pytest.mark.parametrize("found", ["polish model/wide", "inspect model/gguf-iq4 config.json:531060793"])
def test_what_a_change_has_found_stays_mended(found: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Also changes of nothing: a valid file that a command does not end well on."""
    if "gguf" in found:
        pytest.importorskip("gguf")
    change = laws.Change.parse(found)
    inputs = {name: checkpoints[name.partition("/")[2]] for name in ("model/plain", change.seed)}
    data = seeds.make_data(tmp_path / "data")["a.txt"]
    assert laws.broken_law(change, {**inputs, "data/a.txt": data}) is None


# --- what lies in the folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "notes.txt"])
@pytest.mark.parametrize("kind", ["pipe", "link outside", "link to a device", "link to itself", "link to nothing"])
def test_only_plain_files_inside_the_folder_are_opened(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / name).touch()
    changes.change_kind(folder / name, kind, tmp_path / "secret")
    for read in (load, inspect, verify.verify, write_report, lambda f: quantize(f, tmp_path / "out")):
        with pytest.raises(InputError, match=name):
            read(folder)
    assert not (tmp_path / "out").exists()


def test_links_inside_the_folder_and_in_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    check_folder(folder)
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "a").touch()
    (snapshot / "config.json").symlink_to("../../blobs/a")
    check_folder(snapshot)
    (blobs / "a").unlink()
    (blobs / "a").symlink_to(tmp_path / "model" / "config.json")
    with pytest.raises(InputError, match="outside its folder"):
        check_folder(snapshot)


def test_the_templates_folder_and_names_are_looked_at_too(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"a\.jinja is a link"):
        check_folder(folder)
    (folder / "additional_chat_templates" / RECORD).touch()  # not even where the folder looks like a run's result
    with pytest.raises(InputError, match=r"a\.jinja is a link"):
        check_folder(folder)
    shutil.rmtree(folder / "additional_chat_templates")
    (folder / "a\x1b[31m\nb.json").touch()
    with pytest.raises(InputError, match="control characters") as caught:
        check_folder(folder)
    assert str(caught.value).isprintable()


def test_a_report_replaces_a_link_and_does_not_write_through_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("precious")
    (folder / "report").mkdir()
    (folder / "report" / "index.html").symlink_to(tmp_path / "mine.html")
    write_report(folder)
    assert (tmp_path / "mine.html").read_text() == "precious"
    shutil.rmtree(folder / "report")
    (folder / "report").symlink_to(tmp_path)
    with pytest.raises(InputError, match="report is a link"):
        write_report(folder)


def test_a_huge_json_file_is_not_read(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    with pytest.raises(InputError, match=r"tokenizer\.json has 1,099,512 MB"):
        load(folder)


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw", [*changes.RAW, b'{"a": "\\ud800"}', b'{"a": ' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1)]
)
@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", RECORD, "quality.json"])
def test_what_is_no_json_object_is_refused(name: str, raw: bytes, folder: Path) -> None:
    (folder / name).write_bytes(raw)
    if raw in (b"{}", b'{"a": NaN, "a": 2}'):
        assert isinstance(read_json(folder / name), dict)
    else:
        with pytest.raises(InputError, match=name):
            read_json(folder / name)
    assert cli.main(["report" if name in (RECORD, "quality.json") else "inspect", str(folder)]) in (0, 2)


@pytest.mark.parametrize("content", ["[]", "5", "null", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{"])
def test_an_index_is_an_index(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json"):
        Source(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "", ".", "a\0.safetensors"]
)
def test_an_index_names_shards_beside_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"index\.json names the shard"):
        Source(tmp_path)


# --- quantization_config ----------------------------------------------------------------------------------------------


def each(key: str, *values: Any) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


def grouped(**changes: Any) -> dict[str, Any]:
    """The one group of a compressed-tensors configuration, changed."""
    return {"config_groups": {"g": {**GROUP, **changes}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
GROUP: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "group_size": 16, "strategy": "group"},
}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": GROUP}, "ignore": []}


@pytest.mark.parametrize(
    "values",
    [
        *each("bits", 0, -1, 1, 1000, "4", 4.0, True, None, [4]),
        *each("group_size", 0, -2, "16", True, None, 1.5, {}),
        *each("sym", "no", 1, None),
        *each("desc_act", "false", 0, []),
        *each("dynamic", 5, "x", ["a"], {"a": 5}, {"a": None}, {"(": {}}, {"+:a": {"bits": "8"}}),
        *each("dynamic", {"(a{900}){900}": {}}, {"a{1,99999999999}": {}}),
        *each("dynamic", {"(" * 3000 + ")" * 3000: {}}, {"a" * 200_000: {}}),
        {"quant_method": []}, {"quant_method": {}}, {"format": ["gptq"]}, {"checkpoint_format": 5},
    ],
    ids=lambda values: str(values)[:40],
)  # fmt: skip
def test_a_gptq_configuration_says_what_it_may(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="here"):
        read_quantization("here", {**GPTQ, **values})


@pytest.mark.parametrize(
    "values",
    [
        *each("config_groups", None, [], {}, {"g": 5}, {"g": []}, {"g": {}}),
        *(grouped(**values) for values in each("targets", "Linear", 5, [5], {"a": 1}, ["re:("])),
        grouped(weights=5),
        *each("ignore", "lm_head", 5, [None], {"a": 1}, ["re:(a{900}){900}"]),
        *(grouped(weights={**GROUP["weights"], **values}) for values in [
            *each("num_bits", 0, True, 9), *each("group_size", 0, -2, True), *each("strategy", ["group"]),
            *each("symmetric", "no"), *each("type", "float", [])]),
    ],
    ids=lambda values: str(values)[:60],
)  # fmt: skip
def test_a_compressed_tensors_configuration_says_what_it_may(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="here"):
        read_quantization("here", {**PACKED, **values})


@pytest.mark.parametrize("value", [5, "x", [], True])
def test_a_quantization_config_is_an_object(value: Any, folder: Path) -> None:
    change(folder / "config.json", lambda config: config.update(quantization_config=value))
    for read in (load, inspect, lambda f: convert(f, folder / "out", "pack-quantized")):
        with pytest.raises(InputError, match=r"config\.json"):
            read(folder)


def test_a_rule_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time exponential in the length of the name, and the name comes from the same file."""
    monkeypatch.setattr(name_rules, "PATIENCE", 0.2)
    read = read_quantization("here", {**GPTQ, "dynamic": {"+:layers": {"bits": 8}, "+:(?:a|a)*$": {}}})
    began = time.process_time()
    with pytest.raises(InputError, match="does not end"):
        read.schemes(["layers.0", "a" * 60 + "b"])
    assert time.process_time() - began < 10


def test_rules_match_as_before() -> None:
    eight = Scheme(8, 16, True)
    read = Quantization("gptq", None, ((r"(?:.*\.)?up_proj$", eight), (r"up", None)))
    assert read.schemes(["m.up_proj", "up_proj", "upper", "m.down_proj"]) == {
        "m.up_proj": eight, "up_proj": eight, "upper": None, "m.down_proj": None,
    }  # fmt: skip


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        *({key: value} for key in ("num_hidden_layers", "num_attention_heads", "num_labels")
          for value in (10**9, 10**40, 1e300)),
        *({key: 10**9} for key in ("hidden_size", "vocab_size", "intermediate_size")),
        {"num_hidden_layers": 100_000}, {"num_hidden_layers": -1}, {"num_hidden_layers": "2"}, {"hidden_act": "none"},
        {"hidden_size": 0}, {"vocab_size": -5}, {"pad_token_id": 10**6}, {"num_attention_heads": 0},
        {"architectures": 5}, {"architectures": [5]}, {"model_type": []}, {"model_type": "x"}, {"dtype": "float1"},
        {"attn_implementation": "somebody/kernel"}, {"text_config": {"num_hidden_layers": 10**12}},
    ],
    ids=lambda values: str(values)[:60],
)  # fmt: skip
@pytest.mark.parametrize("name", ["plain", "gptq"])
def test_a_model_that_could_not_be_in_its_files_is_not_made(
    name: str, values: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints[name], tmp_path / "model")
    change(folder / "config.json", lambda config: config.update(values))
    # `architectures` may be nonsense where model_type tells enough, and a plain model may have no layers.
    harmless = name == "plain" and ("architectures" in values or values == {"num_hidden_layers": -1})
    for read in (load, lambda f: quantize(f, tmp_path / "out", QuantConfig(method="rtn"))):
        with laws.limited(), warnings.catch_warnings(), suppress(InputError) if harmless else not_by_allocating():
            warnings.simplefilter("ignore")
            read(folder)


@contextmanager
def not_by_allocating() -> Iterator[None]:
    """Refused, but not because memory ran out."""
    with pytest.raises(InputError) as caught:
        yield
    assert "allocate" not in str(caught.value)


def test_what_a_model_may_hold_is_counted_while_it_is_made(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["plain"]
    config = read_config(folder, trust_remote_code=False)
    config.num_hidden_layers = 5000
    with pytest.raises(InputError, match="much larger model than its safetensors files hold"):
        build_empty_model(config, False, Source(folder))
    config.num_hidden_layers = 30
    assert len(list(build_empty_model(config, False).parameters())) > 200  # nobody counts any more


def test_an_adapter_is_not_followed_to_another_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("plain", "gptq"):
        folder = shutil.copytree(checkpoints[kind], tmp_path / kind)
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
        with pytest.raises(InputError, match="merge it"):
            load(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_refused(key: str, make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(num_hidden_layers=1)
    described = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**described, key: "someone/flash-attention"}))
    for use in (load, lambda folder: quantize(folder, tmp_path / "out", QuantConfig(method="rtn", group_size=32))):
        with pytest.raises(InputError, match=f"{key} 'someone/flash-attention'.* code from the Hub"):
            use(source)


def test_a_forward_that_fails_is_a_sentence(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.ones((2, 8), np.int64), position_ids=np.ones((2, 5), np.int64))
    with pytest.raises(InputError, match="a forward pass of LlamaForCausalLM failed"):
        quantize(checkpoints["plain"], tmp_path / "out", QuantConfig(num_samples=2), calibration=tmp_path / "a.npz")
    assert not list(tmp_path.glob("out*"))


def test_a_generation_config_is_one(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"max_new_tokens": -5, "watermarking_config": 5}')
    with pytest.raises(InputError, match=r"generation_config\.json could not be used"):
        load(folder)


# --- safetensors ------------------------------------------------------------------------------------------------------


def with_header(file: Path, do: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    do(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize(
    "values",
    [
        {"shape": [10**12, 10**12]}, {"shape": [2**63, 2]}, {"shape": [-1]}, {"shape": [0]}, {"shape": "x"},
        {"data_offsets": [0, 2**63]}, {"data_offsets": [8, 0]}, {"data_offsets": [10**12, 10**12 + 4]},
        {"dtype": "F4"}, {"dtype": "C64"}, {"dtype": ""}, {"dtype": 5}, {"dtype": "F64"},
    ],
    ids=str,
)  # fmt: skip
def test_headers_are_held_against_the_file(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(4, 4), "b": torch.ones(2)}, file)
    with_header(file, lambda header: header["a.weight"].update(values))
    with laws.limited(), pytest.raises(InputError, match=r"model\.safetensors is damaged|which is not supported"):
        Source(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 10**8, 2**31, 2**63, 2**64 - 1])
def test_the_length_of_a_header_is_held_against_the_file(size: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}      ")
    with laws.limited(), pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        Source(tmp_path)


def test_a_file_larger_than_the_address_space_is_planned_and_read(tmp_path: Path) -> None:
    rows, columns = 2**20, 2**16  # of bfloat16, 137 GB, as a model of 70 B parameters has them
    size = 2 * rows * columns
    text = json.dumps(
        {"wide": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, size]},
         "last": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]}}
    ).encode()  # fmt: skip
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:  # of which the disk holds a few pages
        opened.write(len(text).to_bytes(8, "little") + text)
        ones = torch.ones(columns).bfloat16().view(torch.uint8).numpy().tobytes()
        opened.seek(size - len(ones), os.SEEK_CUR)
        opened.write(ones + torch.tensor([1.5, -2.0]).numpy().tobytes())
    with laws.limited():
        source = Source(tmp_path)
        assert source.nbytes == size + 8
        assert source.read("last").tolist() == [1.5, -2.0]
        assert source.read("wide", torch.float32, slice(rows - 2, rows)).sum(1).tolist() == [0, columns]
        assert source.read_unchecked("wide", rows - 1).sum() == columns
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match=r"is damaged or cut short .*1 bytes of a tensor are missing"):
        source.read("last")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2Jx", "\u202ex", "a\x00b", "\x9b31m"])
def test_tensors_have_names_that_can_be_printed(name: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="control characters") as caught:
        Source(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["gptq", "pack"])
def test_layers_of_no_size_or_of_any_size_are_refused(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.up_proj"
    suffixes = ("g_idx", "scales", "qzeros", "qweight") if name == "gptq" else ("weight_shape", "weight_scale")
    for suffix in suffixes:
        folder = shutil.copytree(checkpoints[name], tmp_path / suffix)
        tensors = load_file(folder / "model.safetensors")
        before = tensors[f"{layer}.{suffix}"]
        for spoiled in (
            before[:0],
            before.new_zeros((0, 5)),
            before.flatten()[:1],
            before.new_full(before.shape, 2**14),
        ):
            tensors[f"{layer}.{suffix}"] = spoiled.contiguous()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            if suffix in ("qweight", "weight_scale", "scales") and spoiled.shape == before.shape:
                continue  # numbers like others
            with laws.limited(), pytest.raises(InputError, match=layer):
                load(folder)


# --- what the package itself wrote ------------------------------------------------------------------------------------


RECORDS: list[Callable[[dict[str, Any]], object]] = [
    lambda r: r["files"].update({"../secret": "0"}),
    lambda r: r["files"].update({"/etc/passwd": "0"}),
    lambda r: r["files"].update({"a/../b": "0"}),
    lambda r: r["files"].update({"a\nb": "0"}),
    lambda r: r["files"].update({"config.json": 5}),
    lambda r: r.update(files=[]),
    lambda r: r.update(tensors=5),
    lambda r: r.update(layers=[]),
    lambda r: r.update(layers={}),
    lambda r: r.update(layers=[5]),
    lambda r: r.update(layers=r["layers"] * 2),
    lambda r: r.update(config=[]),
    lambda r: r.update(sizes={"file_bytes_before": 3}),
    lambda r: r.update(sizes=5),
    lambda r: r.update(perplexity=5),
    lambda r: r.update(perplexity=[{"perplexity": "x"}]),
    lambda r: r.update(origin=5),
    lambda r: r.update(origin={"format": [], "quantization_config": {}}),
    lambda r: r.update(card_metadata=[1]),
    lambda r: r.update(calibration=5),
    *(
        lambda r, k=key, v=value: r["layers"][0].update({k: v})
        for key, value in (
            ("error", "x"), ("error", float("nan")), ("error", -1), ("rtn_error", 1e300), ("heldout_error", []),
            ("bits", 10**9), ("bits", 0), ("bits", True), ("tokens", -1), ("inputs", 0.5), ("stored", 5),
            ("stored", "a\nb"), ("weight_sha256", None), ("weight_histogram", [1] * 100_000),
            ("code_histogram", [-1]), ("weight_range", "x"), ("group_size", "x"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("do", RECORDS)
def test_a_record_is_held_against_what_records_are(do: Callable[[dict[str, Any]], object], folder: Path) -> None:
    change(folder / RECORD, do)
    with pytest.raises(InputError, match=f"{RECORD} is damaged"):
        read_record(folder)
    for command in ("verify", "report", "inspect"):
        assert cli.main([command, str(folder)]) == 2


@pytest.mark.parametrize(
    "measured",
    [5, [], {}, {"perplexity": "x", "data": ""}, {"perplexity": 1, "data": 5},
     *({"perplexity": 1, "data": "", **more} for more in (
         {"intervals": 5}, {"intervals": {"kl": 5}}, {"intervals": {"kl": [1]}}, {"kl": float("inf")}, {"windows": "x"},
         {"original_perplexity": None}))],
    ids=str,
)  # fmt: skip
def test_a_quality_file_is_held_against_what_they_are(measured: Any, folder: Path) -> None:
    (folder / "quality.json").write_text(json.dumps({"measurements": [measured]}))
    with pytest.raises(InputError, match=r"quality\.json, to be deleted, is damaged"):
        read_measurements(folder)
    assert cli.main(["report", str(folder)]) == 2


def test_a_journal_nested_deeply_is_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("[" * 100_000 + "\n")
    assert Journal(tmp_path).damaged
    assert Journal(tmp_path).entries == []


@pytest.mark.parametrize(
    ("kind", "do"),
    [
        ("begun", lambda entry: entry.update(options=[])),
        ("begun", lambda entry: entry.pop("machine")),
        ("windows", lambda entry: entry.update(count="x")),
        ("measured", lambda entry: entry.update(errors=[0.5])),
        ("block", lambda entry: entry.update(layers=[None])),
        ("block", lambda entry: entry.update(tensors=5)),
        ("block", lambda entry: entry["errors"][0].update(solved="x")),
        ("block", lambda entry: entry.pop("spreads")),
    ],
)
def test_entries_of_a_journal_are_held_against_what_they_are(
    kind: str, do: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    """Though their checksums are right."""
    block = {**BlockResult("a", (), {}, {}).to_entry(), "errors": [{"name": "a", "solved": 1, "tuned": 0.5}]}
    contents: dict[str, dict[str, Any]] = {
        "begun": {"version": {}, "options": {}, "source": {}, "machine": {}},
        "windows": {"count": 4, "sha256": "", "notes": []},
        "measured": {"name": "a", "errors": [[0.5]]},
        "widths": QuantConfig().to_dict(),
        "block": block,
    }
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for folder in (right, wrong):
        folder.mkdir()
        journal = Journal(folder)
        for name, content in contents.items():
            if name == kind and folder == wrong:
                do(content)
            journal.append(name, content)
    assert [name for name, _ in Journal(right).entries] == [*contents]
    assert Journal(wrong).damaged == (kind != "block")  # the last one, which could be torn
    assert [name for name, _ in Journal(wrong).entries] == [*contents][: [*contents].index(kind)]


@pytest.mark.parametrize("content", [b"\x80\x02R.", b"\x80\x02.", b"\x80\x02K\x01.", b"(", b""])
def test_opcodes_without_what_they_work_on_are_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(unpickle.UnreadableError), (tmp_path / "out").open("wb") as out:
        unpickle.convert(tmp_path / "pytorch_model.bin", out, drop_tied=True)


def test_names_reach_the_report_and_the_card_as_text(
    folder: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    evil = "<script>alert(1)</script>.$\\frac{"

    def rename(record: dict[str, Any]) -> None:
        record["layers"][0] |= {"stored": evil, "name": evil, "error": 1e-320}
        record |= {"calibration": evil, "quantizer": evil}
        record["config"]["effort"] = evil

    change(folder / RECORD, rename)
    change(folder / "quality.json", lambda quality: quality["measurements"][0].update(data=evil))
    page, pictures = write_report(folder)
    assert not any("<script" in file.read_text(encoding="utf-8") for file in (page, *pictures))
    assert "&lt;script&gt;" in page.read_text(encoding="utf-8")
    foreign = shutil.copytree(checkpoints["gptq"], tmp_path / "foreign")
    (foreign / RECORD).unlink()
    for name in ("config.json", "quantize_config.json"):
        change(
            foreign / name, lambda c: c.get("quantization_config", c).update(meta={"quantizer": [evil, "a\n---\nb", 5]})
        )
    convert(foreign, tmp_path / "out", "pack-quantized")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "<script" not in card
    assert card.count("\n---\n") == 1
    page, _ = write_report(tmp_path / "out")  # of another tool's layers no error is known
    assert "Relative output error" not in page.read_text(encoding="utf-8")


def test_messages_and_listings_cannot_move_the_cursor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / "config.json", lambda config: config.update(model_type="\x1b[2J\x9bm\u202e"))
    assert cli.main(["convert", str(folder), str(folder / "out"), "--format", "gptq_v2"]) == 2
    printed = capsys.readouterr()
    assert (printed.out + printed.err).replace("\n", "").isprintable()
    assert "\\x1b" in printed.err


# --- calibration data -------------------------------------------------------------------------------------------------


def test_arrays_that_would_unpack_to_gigabytes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("input_ids.npy", "")
        archive.filelist[0].file_size = 300 * 2**20  # as the list at the end of an archive of zeros says
    with pytest.raises(InputError, match=r"would unpack to 0\.3 GB"):
        read_arrays(str(file), 1, 0)


def test_pickles_in_arrays_and_broken_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", input_ids=np.array([{"a": 1}], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "pickled.npz").read_bytes()[:-30])
    (tmp_path / "empty.npz").touch()
    os.mkfifo(tmp_path / "pipe.npz")
    np.savez(tmp_path / "words.npz", input_ids=np.array(["a", "b"]))
    for name in ("pickled", "cut", "empty", "pipe", "words", "absent"):
        with pytest.raises(InputError):
            read_arrays(str(tmp_path / f"{name}.npz"), 1, 0)


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    """pyarrow reads such rows, and fails where they are used."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "abc"}\n{"text": "a\xa2\xffb"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        documents(str(file), "train")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("a.txt", "pipe.txt"):
        with pytest.raises(InputError, match=name):
            documents(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    "row",
    [
        *({"conversations": turns} for turns in (
            [{"from": ["human"], "value": "a"}], [{"from": {}, "value": "a"}], [{"from": "human", "value": [1]}])),
        *({"instruction": asked, "input": more, "output": "a"} for asked, more in (
            (["a"], "b"), ({"a": "b"}, "c"), ("a", [1.5]), (5, None))),
        {"messages": [{"role": ["user"], "content": "a"}]}, {"messages": [[]]}, {"messages": {"role": "user"}},
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_are_no_chats_are_told_of_by_their_number(row: dict[str, Any]) -> None:
    table = Table("a.jsonl", tuple(row), [row])
    with pytest.raises(InputError, match=r"a\.jsonl, row 0"):
        list(tokenized_chats(table, SimpleNamespace(chat_template="x"), 0))  # type: ignore[arg-type]


def test_what_datasets_would_say_of_a_damaged_file_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "abc"}]}
    file.write_bytes(json.dumps(row).encode().replace(b"abc", b"a\xffc") + b"\n")
    table = open_table(str(file), "train")
    with pytest.raises(InputError, match=r"chats\.jsonl, row 0 cannot be read"):
        table.row(0)
    file.write_text('{"text": ')
    with pytest.raises(InputError, match=r"chats\.jsonl could not be read"):
        open_table(str(file), "train")
    assert "Failed" not in capfd.readouterr().err
    assert caplog.records == []


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "folder/metadata.jsonl", "folder/data/train.jsonl"]
)
@pytest.mark.parametrize("content", [b"null", b" \n" * 5000 + b"null\n{}", b"\xef\xbb\xbfnull", b"5", b"PK\x03\x04",
                                     b"[ null, {}]", b"[-Infinity, {}]"])  # fmt: skip
def test_files_that_do_not_begin_as_rows_do_are_not_handed_to_pyarrow(
    name: str, content: bytes, tmp_path: Path
) -> None:
    """It would kill the process, for `null`."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(InputError, match=r"json.* begins with b'.*', which is no json"):
        open_table(str(tmp_path / name.partition("/")[0]), "train")


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", b"PK\x03\x04"), ("a.parquet", b"text"), ("a.csv", b"\x1f\x8b")]
)
def test_archives_are_not_unpacked(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="is it another kind of file"):
        open_table(str(tmp_path / name), "train")


def test_a_pipe_among_images_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"there is no file .*a\.png"):
        read_image("a.png", tmp_path, "row 0")


@pytest.mark.parametrize(
    ("row", "said"),
    [({"text": 5}, "text is int"), ({"text": ["a"]}, "text is list"), ({"images": 5}, "images is int"),
     ({"images": {"a": 1}}, "images is dict"), ({"image": 5}, "the image cannot be read"),
     ({"audio": {"array": "x"}}, "the sound cannot be read")],
    ids=str,
)  # fmt: skip
def test_media_rows_of_other_types_are_told_of_by_their_number(row: dict[str, Any], said: str) -> None:
    processor: Any = SimpleNamespace()
    with pytest.raises(InputError, match=rf"a\.jsonl, row 0: {said}"):
        process_rows(Table("a.jsonl", tuple(row), [row]), processor, processor, 1, 16, 0)


def test_a_tokenizer_that_fails_is_a_sentence(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["plain"], tmp_path / "model")
    change(folder / "tokenizer_config.json", lambda settings: settings.update(model_max_length={}))
    (tmp_path / "a.txt").write_text(seeds.TEXT)
    assert cli.main(["eval", str(folder), "--data", str(tmp_path / "a.txt"), "--seq-len", "16"]) == 2


# --- LeNet's files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "[]", "5", "null", '{"version": 2}', '{"version": 1}', '{"version": 1, "distributions": []}',
     '{"version": 1, "distributions": {"weights": {"a": 5}}}', "[" * 100_000],
    ids=lambda content: content[:60],
)  # fmt: skip
def test_results_that_cannot_be_drawn_are_a_sentence(content: str, tmp_path: Path) -> None:
    plots, compare, model = (pytest.importorskip(f"lenet_baseline.{name}") for name in ("plots", "compare", "model"))
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"results\.json"):
        plots.draw(compare.read_results(tmp_path), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json"}
    os.mkfifo(tmp_path / "float.safetensors")
    with pytest.raises(InputError, match="no such file"):
        model.load(tmp_path / "float.safetensors")


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "pack", "mixed", "mixed-pack", "quantized-experts"])
def test_a_flipped_bit_in_any_tensor_is_found_and_named(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints[name], tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    packed = {layer.stored for layer in read_record(folder).layers}
    draw = np.random.default_rng(0)
    seen = set()
    assert verify.verify(folder).problems == []
    for tensor, entry in header.items():
        kind = tensor.rpartition(".")[2]
        if tensor == "__metadata__" or (name not in ("gptq", "pack") and kind in seen):
            continue  # two files are gone through whole
        seen.add(kind)
        begin, end = entry["data_offsets"]
        spoiled = bytearray(whole)
        spoiled[8 + size + int(draw.integers(begin, end))] ^= 1 << int(draw.integers(8))
        file.write_bytes(spoiled)
        layer = tensor.rpartition(".")[0]
        problems = verify.verify(folder).problems
        assert any((layer if layer in packed else tensor) in problem for problem in problems), tensor
    assert cli.main(["verify", str(folder)]) == 1
    file.write_bytes(whole)
    assert verify.verify(folder).problems == []


def test_missing_and_damaged_shards_are_found_with_the_layers_in_them(make_model: MakeModel, tmp_path: Path) -> None:
    plain = make_model("llama", max_shard_size="40KB")
    quantize(plain, tmp_path / "one", QuantConfig(method="rtn", group_size=32))
    one = tmp_path / "one"
    tensors = load_file(one / "model.safetensors")
    (one / "model.safetensors").unlink()
    layers = sorted({layer.stored for layer in read_record(one).layers})
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for key, tensor in tensors.items():
        parts[key.startswith("model.layers.1.")][key] = tensor
    for number, part in enumerate(parts):
        save_file(part, one / f"model-{number}.safetensors", metadata={"format": "pt"})
    shard_of = {key: f"model-{number}.safetensors" for number, part in enumerate(parts) for key in part}
    (one / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    assert read_index(one) == shard_of
    assert verify.verify(one).problems == []
    lost = [layer for layer in layers if layer.startswith("model.layers.1.")]
    shard = one / "model-1.safetensors"
    whole = shard.read_bytes()
    for spoil in (lambda: os.truncate(shard, 1000), shard.unlink):
        spoil()
        problems = verify.verify(one).problems
        assert "model-1.safetensors" in problems[0]
        named = [problem.split()[0] for problem in problems if "cannot be read, wholly or in part" in problem]
        assert named == lost
        assert "the tensor model.layers.1.input_layernorm.weight cannot be read" in "\n".join(problems)
        assert cli.main(["verify", str(one)]) == 1
    shard.write_bytes(whole)
    assert verify.verify(one).problems == []


def test_a_changed_configuration_is_found_with_the_layers_it_is_about(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints["mixed"], tmp_path / "model")
    config = (folder / "config.json").read_text()
    change(folder / "config.json", lambda c: c["quantization_config"]["dynamic"].clear())
    problems = verify.verify(folder).problems
    assert problems[0] == "config.json was changed after it was written"
    assert [p.split()[0] for p in problems if "was written with 8 bits" in p] == ["model.layers.0.mlp.down_proj"]
    for values in ({"bits": 8}, {"group_size": 32}, {"bits": "4"}, {"quant_method": "awq"}):
        (folder / "config.json").write_text(config)
        change(folder / "config.json", lambda c, v=values: c["quantization_config"].update(v))  # type: ignore[misc]
        assert "config.json was changed after it was written" in verify.verify(folder).problems
    (folder / "config.json").unlink()
    assert "config.json is missing" in verify.verify(folder).problems


@pytest.mark.parametrize("relabelled", [False, True])
def test_damage_is_not_converted_into_a_folder_that_verify_approves(
    relabelled: bool, folder: Path, tmp_path: Path
) -> None:
    file, name = folder / "model.safetensors", "model.norm.weight"
    if relabelled:  # the same bytes, said to be others
        change(folder / RECORD, lambda record: record["layout"].update({name: "torch.bfloat16 (64,)"}))
    else:
        tensors = load_file(file)
        tensors[name][3] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    assert verify.verify(folder).problems
    with pytest.raises(InputError, match=r"model\.norm\.weight in .* was changed after it was written"):
        convert(folder, tmp_path / "out", "gptq_v2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "pack"])
def test_a_removed_record_is_told_of(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints[name], tmp_path / "model")
    (folder / RECORD).unlink()
    for name in ("adapter_config.json", "modeling.py", "sub/other.safetensors", ".hidden.py", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    found = verify.verify(folder)
    assert found.problems == []
    assert found.notes[0] == verify.NO_RECORD
    assert "about it: adapter_config.json, modeling.py, sub/other.safetensors; transformers adds" in found.notes[1]
    assert cli.main(["verify", str(folder)]) == 0
