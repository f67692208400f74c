"""Files beside the weights come along; files that change meanwhile, or that are written by several, spoil no result."""

import errno
import json
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq import InputError, PolishConfig, QuantConfig, cli, load, polish, quantize
from gptq.checkpoint import atomic_folder as atomic_folder_module
from gptq.checkpoint import small_files
from gptq.checkpoint.atomic_folder import (
    CONTENT,
    MARKER,
    PartialFolder,
    _exclusive_lock,
    atomic_folder,
    partial_folder,
    require_unused,
)
from gptq.checkpoint.companions import companions
from gptq.checkpoint.small_files import write_file, write_folder
from gptq.checkpoint.source_state import SourceState
from gptq.config import Format
from gptq.evaluation.quality import Measurement, add_measurement, read_measurements
from gptq.output import record, verify
from gptq.output.convert import convert
from gptq.output.model_card import read_card_metadata
from gptq.output.record import PerplexityRecord, digest_of, read_record, write_json, write_record
from gptq.output.results import RECORD
from gptq.pipeline.run import Observer
from gptq.pipeline.run_identity import describe_run
from tests.conftest import MakeModel

CONFIG = QuantConfig(bits=4, group_size=32, effort="fast", format="gptq")
BESIDE = (
    "source.spm", "qwen.tiktoken", "vocab.bpe", "modules.json", "1_Pooling/config.json", "code/layers/own.py",
    "additional_chat_templates/tool_use.jinja", "LICENSE.txt",
)  # fmt: skip


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_whatever_is_neither_weights_nor_hidden_comes_along(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    left = (
        "pytorch_model.bin", "onnx/model.onnx", ".git/config", "old/quantization_record.json", "old/config.json",
        "formats/gptq.partial/.unfinished", "formats/gptq.partial/journal.jsonl",
    )  # fmt: skip
    for name in (*BESIDE, *left):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    result = quantize(source, out, QuantConfig(method="rtn", group_size=32, format="gptq"))
    assert set(BESIDE) <= files_of(out)
    assert set(left).isdisjoint(files_of(out))
    said = next(note for note in result.notes if "not copied" in note)
    assert said.endswith("pytorch_model.bin, formats/gptq.partial/, old/ and 1 more")
    assert verify.verify(out).problems == []
    (out / "1_Pooling" / "config.json").write_text("other")
    assert verify.verify(out).problems == ["1_Pooling/config.json was changed after it was written"]
    (out / "1_Pooling" / "config.json").write_text("1_Pooling/config.json")
    convert(out, tmp_path / "other", "pack-quantized")
    assert set(BESIDE) <= files_of(tmp_path / "other")


def test_weights_of_a_sentence_encoders_further_modules_come_along(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    for name in ("2_Dense", "other"):
        (source / name).mkdir()
        save_file({"linear.weight": torch.ones(2, 2)}, source / name / "model.safetensors")
        (source / name / "pytorch_model.bin").write_bytes(b"a pickle is a program, which is not handed on")
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "./2_Dense/"}, {"idx": 2, "path": "../out"}]
    (source / "modules.json").write_text(json.dumps(modules))
    quantize(source, out, QuantConfig(method="rtn", group_size=32, format="gptq"))
    weights = [file.relative_to(out).as_posix() for file in out.rglob("*.safetensors")]
    assert sorted(weights) == ["2_Dense/model.safetensors", "model.safetensors"]
    assert not [*out.rglob("*.bin")]
    os.truncate(out / "2_Dense" / "model.safetensors", 8)
    assert verify.verify(out).problems == ["2_Dense/model.safetensors was changed after it was written"]
    for broken in ("[", "3", '[{"path": 3}, 4]', "[" * 100_000):
        (source / "modules.json").write_text(broken)
        assert "2_Dense/model.safetensors" in companions(source)[1]


def test_a_card_says_what_became_of_the_rest(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source, rest = make_model(), "everything else is as it was"

    def card(out: Path) -> str:
        return (out / "README.md").read_text(encoding="utf-8")

    pytest.importorskip("gguf")
    base: dict[str, Any] = {"group_size": 32, "seq_len": 32, "format": "gptq"}
    plain = QuantConfig(**base, effort="fast")
    for name, config in {
        "plain": plain,
        "tuned": QuantConfig(**base, effort="best", tune_steps=4),
        "polished": replace(plain, polish_steps=4),
        "gguf": replace(plain, format="gguf"),
    }.items():
        quantize(source, tmp_path / name, config, calibration=windows.repeat(3, 1))
    assert rest in card(tmp_path / "plain")
    assert "embeddings and the output head are rounded" in card(tmp_path / "gguf")
    assert "norms and biases of their blocks were tuned with them" in card(tmp_path / "tuned")
    assert "scales, norms, biases and embeddings were polished" in card(tmp_path / "polished")
    assert "nats per token, after 4 steps of polishing" in card(tmp_path / "polished")
    assert all(rest not in card(tmp_path / name) for name in ("gguf", "tuned", "polished"))


def test_a_perplexity_stays_with_the_numbers_it_was_measured_of(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, measured = make_model(), PerplexityRecord(perplexity=7.5, data="text", tokens=9, seq_len=10)
    for name, bits, group_size in (("out", 8, -1), ("coarse", 2, 32)):
        config = QuantConfig(method="rtn", bits=bits, group_size=group_size, format="gptq")
        quantize(source, tmp_path / name, config)
        verify.record_perplexity(tmp_path / name, measured)
    convert(tmp_path / "out", tmp_path / "same", "pack-quantized")
    convert(tmp_path / "out", tmp_path / "rounds", "int-quantized")
    options = PolishConfig(steps=8, seq_len=32)
    polish(tmp_path / "coarse", source, tmp_path / "polished", options, calibration=windows.repeat(3, 1))
    assert read_record(tmp_path / "polished").polish.steps > 0  # type: ignore[union-attr]
    found = {name: read_record(tmp_path / name).perplexity for name in ("out", "same", "rounds", "polished")}
    assert [name for name, own in found.items() if own] == ["out", "same"]


@pytest.mark.parametrize(
    "front", ["\ufeff---\nlicense: mit\n---\n", "---\nlicense: mit\n---", "--- \nlicense: mit\n--- \n"]
)
def test_a_licence_is_found_however_the_front_matter_ends(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(front, encoding="utf-8")
    assert read_card_metadata(tmp_path / "README.md") == {"license": " mit"}


def test_links_that_lead_out_of_a_folder_inside_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source, secret = make_model(), tmp_path / "secret"
    secret.write_text("x")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").symlink_to(secret)
    with pytest.raises(InputError, match=r"1_Pooling/config.json is a link to .*secret, outside"):
        quantize(source, tmp_path / "out", QuantConfig(method="rtn"))


class Does(Observer):
    """Does something when the first layer of a block is done, or when a stage begins."""

    def __init__(self, do: Callable[[], object], block: int = 1, stage: str = "") -> None:
        self.do, self.block, self.at = do, block, stage

    def _once(self) -> None:
        do, self.do = self.do, lambda: None
        do()

    def layer_done(self, block: int, name: str, weights: int) -> None:
        if not self.at and block == self.block:
            self._once()

    def stage(self, text: str) -> None:
        if self.at and text.startswith(self.at):
            self._once()


def rewrite(source: Path) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def cut(source: Path) -> None:
    os.truncate(source / "model.safetensors", 100_000)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (rewrite, "model.safetensors"),
    "cut short": (cut, "model.safetensors"),
    "options": (lambda source: (source / "config.json").write_text("{}"), "config.json"),
    "tokenizer": (lambda source: (source / "tokenizer.json").unlink(), "tokenizer.json"),
    "one more": (lambda source: (source / "added_tokens.json").write_text("{}"), "added_tokens.json"),
}


@pytest.mark.parametrize("stage", ["", "copying"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_gives_no_result(
    change: str, stage: str, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, out = make_model(), tmp_path / "out"
    do, name = CHANGES[change]
    with pytest.raises(InputError, match=rf"{name}.*(was changed, replaced or removed|was added|damaged or cut short)"):
        quantize(source, out, CONFIG, calibration=windows, observer=Does(lambda: do(source), stage=stage))
    assert not out.exists()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "shards.gguf", "1_Pooling/config.json"])
def test_every_file_that_may_be_read_is_watched(name: str, tmp_path: Path) -> None:
    for one in (name, "config.json", ".hidden", "pytorch_model.bin", "other/quantization_record.json"):
        (tmp_path / one).parent.mkdir(exist_ok=True)
        (tmp_path / one).write_text("x")
    state = SourceState.of(tmp_path)
    for one in (".hidden", "pytorch_model.bin", "other/quantization_record.json", "other/more"):
        (tmp_path / one).write_text("y")
    state.require_same()
    (tmp_path / name).write_text("y")
    with pytest.raises(InputError, match=f"{name} was changed"):
        state.require_same()
    (tmp_path / name).write_text("x")
    state.require_same()
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="was changed, replaced or removed"):
        state.require_same()


def test_a_file_that_goes_before_the_run_is_described_leaves_no_journal(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the journal says that the run was begun without it, and the same command does not go on."""
    source = make_model()

    def describe(*arguments: Any) -> Any:
        (source / "config.json").unlink()
        return describe_run(*arguments)

    monkeypatch.setattr("gptq.pipeline.quantize.describe_run", describe)
    with pytest.raises(InputError, match=r"config.json was changed, replaced or removed"):
        quantize(source, tmp_path / "out", CONFIG, calibration=windows)
    assert [*tmp_path.iterdir()] == [source]


def test_a_source_that_only_looks_newer_is_the_same(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source = make_model()
    quantize(source, tmp_path / "out", CONFIG, calibration=windows, observer=Does((source / "config.json").touch))
    assert verify.verify(tmp_path / "out").problems == []


def test_a_run_whose_folder_was_taken_away_writes_into_no_other(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, out, partial = make_model(), tmp_path / "out", tmp_path / "out.partial"

    def replace_folder() -> None:
        shutil.rmtree(partial)
        (partial / "checkpoint").mkdir(parents=True)
        (partial / "checkpoint" / "another's").touch()

    with pytest.raises(InputError, match=r"out.partial was removed or replaced while"):
        quantize(source, out, CONFIG, calibration=windows, observer=Does(replace_folder))
    assert files_of(partial) == {"checkpoint/another's"}
    shutil.rmtree(partial)
    with pytest.raises(InputError, match="removed or replaced"), partial_folder(out) as working:  # noqa: PT012
        working.clear()
        (working.content / "file").touch()
        replace_folder()
    assert not out.exists()
    assert files_of(partial) == {"checkpoint/another's"}


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what a safetensors file says of its tensors, and not a byte of them."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    file.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "dtype": (
        lambda header: header["model.layers.0.mlp.up_proj.scales"].update(dtype="BF16"),
        "the tensor model.layers.0.mlp.up_proj.scales was written as F16 2x96 and is now said to be BF16 2x96",
    ),
    "shape": (
        lambda header: header["model.embed_tokens.weight"]["shape"].reverse(),
        "the tensor model.embed_tokens.weight was written as F32 320x64 and is now said to be F32 64x320",
    ),
    "metadata": (
        lambda header: header["__metadata__"].update(format="pT"),
        "the header of model.safetensors was changed after it was written",
    ),
}


@pytest.mark.parametrize("change", HEADERS)
def test_verify_compares_what_a_file_says_of_its_tensors(change: str, make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model(), out, QuantConfig(method="rtn", group_size=32, format="gptq"))
    record = json.loads((out / RECORD).read_text())
    edit, expected = HEADERS[change]
    edit_header(out / "model.safetensors", edit)
    assert expected in verify.verify(out).problems
    del record["layout"], record["headers"]  # as records were before
    (out / RECORD).write_text(json.dumps(record))
    assert expected not in verify.verify(out).problems


def test_a_small_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_file(file, "old")
    (tmp_path / "other").write_text("other")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "other").read_text() == "other"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"No space left.*/file'"):
        write_file(file, "new")
    assert file.read_text() == "old"
    assert files_of(tmp_path) == {"file", "other", "link"}


def test_a_new_folder_appears_with_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "a" / "folder", []

    def write(path: Path, content: str) -> None:
        write_file(path, content)
        seen.append(folder.exists())
        if content == "stop":
            raise KeyboardInterrupt

    monkeypatch.setattr(small_files, "write_file", write)
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, {"x": "1", "y": "stop"})
    assert [*tmp_path.rglob("*")] == [folder.parent]
    write_folder(folder, {"x": "1", "y": "2"})
    assert seen == [False] * 4
    (folder / "own").touch()
    write_folder(folder, {"x": "3", "z": "4"})
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"own": "", "x": "3", "y": "2", "z": "4"}
    with pytest.raises(OSError, match=r"File exists.*/own'"):
        write_folder(folder / "own" / "folder", {"x": "1"})


def test_of_two_that_make_a_folder_the_second_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: str) -> None:
        monkeypatch.undo()
        quicker = threading.Thread(target=write_folder, args=(tmp_path / "folder", {"x": "1", "y": "2"}))
        quicker.start()
        quicker.join()
        write_file(path, content)

    monkeypatch.setattr(small_files, "write_file", write)
    write_folder(tmp_path / "folder", {"x": "3"})
    assert {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == {"x": "3", "y": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_of_a_small_file_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, living = (tmp_path / f".file.{process}-1" for process in (ended.pid, os.getppid()))
    for file in (dead, living, tmp_path / f".file2.{ended.pid}-1"):
        file.touch()
    (tmp_path / f".file.{ended.pid}-2").mkdir()
    (tmp_path / f".file.{ended.pid}-2" / "x").touch()
    write_file(tmp_path / "file", "new")
    assert files_of(tmp_path) == {"file", living.name, f".file2.{ended.pid}-1"}
    assert not (tmp_path / f".file.{ended.pid}-2").exists()


def test_a_kill_between_card_and_record_leaves_no_contradiction(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(make_model(), tmp_path / "whole", QuantConfig(method="rtn", group_size=32))
    found = PerplexityRecord(perplexity=7.0, data="text", tokens=9, seq_len=10)
    for written in range(3):
        out = tmp_path / f"out{written}"
        shutil.copytree(tmp_path / "whole", out)
        left = [written]

        def dies(path: Path, content: str, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write_file(path, content)

        with monkeypatch.context() as patched:
            for place in ("gptq.output.files.write_file", "gptq.output.record.write_file"):
                patched.setattr(place, dies)
            with pytest.raises(KeyboardInterrupt):
                verify.record_perplexity(out, found)
        assert verify.verify(out).problems == [], written
        verify.record_perplexity(out, found)
    verify.record_perplexity(tmp_path / "whole", found)
    for name in ("README.md", "quantization_record.json"):
        assert len({(tmp_path / out / name).read_bytes() for out in ("whole", "out0", "out1", "out2")}) == 1


def test_a_name_that_cannot_be_read_is_refused_before_the_work(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / os.fsdecode(b"\xff\xfe-out")
    with pytest.raises(InputError, match="is a path that is not UTF-8"):
        quantize(source, out, QuantConfig(method="rtn", group_size=32), observer=Does(pytest.fail, block=0))
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), KeyboardInterrupt("Too many open")])
def test_folders_that_lead_to_a_result_go_with_it(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise error

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises((InputError, KeyboardInterrupt), match="Too many open"):
        partial_folder(tmp_path / "a" / "b" / "out").__enter__()
    assert [*tmp_path.iterdir()] == []


def test_a_step_that_the_system_refuses_once_leaves_no_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Path] = []
    rmdir = Path.rmdir

    def refuse_once(folder: Path) -> None:
        if not refused:
            refused.append(folder)
            raise OSError(errno.EIO, "Input/output error")
        rmdir(folder)

    monkeypatch.setattr(Path, "rmdir", refuse_once)
    with atomic_folder(tmp_path / "out", 0) as folder:
        (folder / "config.json").touch()
    assert refused == [tmp_path / "out.partial"]
    assert files_of(tmp_path) == {"out/config.json"}
    assert not refused[0].exists()


def test_what_is_left_beside_a_finished_result_is_removed(tmp_path: Path) -> None:
    """A run that was killed when OUT had its name and OUT.partial was still there."""
    out, working = tmp_path / "out", tmp_path / "out.partial"
    out.mkdir()
    (out / "config.json").touch()
    (working / CONTENT).mkdir(parents=True)
    (working / MARKER).touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        require_unused(out)
    assert (working / CONTENT).is_dir()  # an unfinished run's
    (working / CONTENT).rmdir()
    with _exclusive_lock(working, out), pytest.raises(InputError, match="exists and is not empty"):
        require_unused(out)
    assert working.is_dir()  # another process is about to remove it
    with pytest.raises(InputError, match="exists and is not empty"):
        require_unused(out)
    assert not working.exists()


def test_several_that_measure_lose_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model(), out, QuantConfig(method="rtn", group_size=32))

    def measure(number: int) -> None:
        found = PerplexityRecord(perplexity=float(number), data=f"text{number}", tokens=9, seq_len=10)
        verify.record_perplexity(out, found)
        add_measurement(out, Measurement(data=f"text{number}", perplexity=float(number)))

    threads = [threading.Thread(target=measure, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.perplexity for one in read_record(out).perplexity or []} == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert len(read_measurements(out)) == 6
    assert verify.verify(out).problems == []


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def written_once(kept: Path, make_model: MakeModel, windows: Tensor) -> Path:
    """A result that all tests read, and none changes."""
    if not (kept / "out").exists():
        quantize(make_model(), kept / "out", CONFIG, calibration=windows)
    return kept / "out"


@pytest.mark.parametrize(
    ("part", "key", "change"),
    [("layers", "error", 0.5), ("layers", "tokens", 7), ("layers", "bits", 3), ("layers", "group_size", 16),
     ("layers", "outputs", 1), ("layers", "inputs", 1), ("layers", "damp", 1.0), ("sizes", "bits_per_weight", 1.0),
     ("sizes", "quantized_bytes_after", 1), ("sizes", "file_bytes_after", 1), ("sizes", "file_bytes_before", 1),
     ("config", "seed", 9)],
)  # fmt: skip
def test_no_number_of_a_record_changes_unseen(
    part: str, key: str, change: float, written_once: Path, tmp_path: Path
) -> None:
    """A changed record is found by its digest; what the files say, by the files too, whoever wrote the digest."""
    folder = shutil.copytree(written_once, tmp_path / "model")
    values = json.loads((folder / RECORD).read_text())
    assert values["digest"] == digest_of(values)
    (values[part][0] if part == "layers" else values[part])[key] = change
    (folder / RECORD).write_text(json.dumps(values))
    changed = f"{RECORD} was changed after it was written"
    assert changed in verify.verify(folder).problems
    assert cli.main(["verify", str(folder)]) == 1
    write_record(folder, values)
    found, of_the_files = verify.verify(folder).problems, {"bits", "group_size", "outputs", "inputs", "bits_per_weight"}
    assert changed not in found
    assert bool(found) == (key in of_the_files | {"quantized_bytes_after", "file_bytes_after"}), found
    del values["digest"]
    write_json(folder / RECORD, values)
    assert verify.verify(folder).notes == [verify.NO_DIGEST]


@pytest.mark.parametrize("change", [lambda b: b + b" ", lambda b: b[:-1], lambda b: b.replace(b"\n", b"\r\n", 1)])
def test_not_a_byte_of_a_record_changes_unseen(
    change: Callable[[bytes], bytes], written_once: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(written_once, tmp_path / "model")
    (folder / RECORD).write_bytes(change((folder / RECORD).read_bytes()))
    assert verify.verify(folder).problems == [f"{RECORD} was changed after it was written"]


def test_verify_says_what_was_checked_for_each_engine(
    written_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promised = {engine.name for engine in verify.inspect(written_once).engines if engine.takes}
    found = verify.verify(written_once)
    assert found.checked.keys() == promised
    assert len(promised) > 2
    assert cli.main(["verify", str(written_once)]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{printed}" for name in promised)
    network = transformers.AutoModelForCausalLM.from_pretrained(written_once)
    network.save_pretrained(tmp_path / "again")
    assert cli.main(["verify", str(tmp_path / "again")]) == 0
    assert "there is no record to compare it with" in capsys.readouterr().out


@pytest.mark.parametrize("chosen", ["gptq_v2", "pack-quantized"])
def test_a_converted_folder_has_its_own_sizes(chosen: Format, written_once: Path, tmp_path: Path) -> None:
    convert(written_once, tmp_path / "out", chosen)
    assert verify.verify(tmp_path / "out").problems == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", RECORD, "tokenizer.json"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_what_the_system_does_not_let_read_is_no_difference(
    name: str, number: int, written_once: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return open_path(path, *arguments, **options)

    open_path = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    assert cli.main(["verify", str(written_once)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert os.strerror(number) in said
    assert "damaged" not in said


def test_a_folder_in_the_place_of_the_record_is_no_missing_record(written_once: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written_once, tmp_path / "out")
    (folder / RECORD).unlink()
    assert verify.verify(folder).notes == [verify.NO_RECORD]
    (folder / RECORD).mkdir()
    with pytest.raises(InputError, match=f"{RECORD} is no plain file"):
        verify.verify(folder)


def test_a_file_that_is_not_there_is_a_difference(written_once: Path, tmp_path: Path) -> None:
    shutil.copytree(written_once, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "generation_config.json").unlink()
    problems = verify.verify(tmp_path / "out").problems
    assert "generation_config.json is missing" in problems
    assert len(problems) > 2


def test_what_an_earlier_run_left_stays_until_a_run_has_looked_into_it(tmp_path: Path) -> None:
    """Ctrl-C right after the start, or an early mistake, costs no finished block; a run that began anew cleans up."""
    out, left = tmp_path / "out", tmp_path / "out.partial" / "journal.jsonl"
    left.parent.mkdir()
    (left.parent / MARKER).touch()
    left.write_text("blocks")
    with pytest.raises(KeyboardInterrupt) as caught, partial_folder(out):
        raise KeyboardInterrupt
    assert "keeps what an earlier run has left" in " ".join(caught.value.__notes__)
    with pytest.raises(InputError, match=r"too few; .*out.partial keeps what an earlier run"), partial_folder(out):
        raise InputError("too few")
    assert left.read_text() == "blocks"
    with pytest.raises(KeyboardInterrupt), partial_folder(out) as working:  # noqa: PT012
        working.clear()
        raise KeyboardInterrupt
    assert not left.parent.exists()


@pytest.mark.parametrize("step", ["sync_path", "_remove"])
def test_a_signal_after_the_result_has_its_name_leaves_the_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out, do = tmp_path / "out", getattr(atomic_folder_module, step)

    def interrupted_once(path: Path) -> None:
        if out.exists():
            monkeypatch.undo()
            raise KeyboardInterrupt
        do(path)

    def make() -> None:
        with partial_folder(out) as working:
            working.clear()
            working.describe_kept = lambda: "some blocks are kept"
            (working.content / "file").touch()
            (working.root / "journal.jsonl").touch()
            monkeypatch.setattr(atomic_folder_module, step, interrupted_once)

    with pytest.raises(KeyboardInterrupt) as caught:
        make()
    assert vars(caught.value)["__notes__"] == [f"{out} is complete"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_folder_that_someone_half_removed_is_still_known_as_ours(tmp_path: Path) -> None:
    """As by `rm -r OUT.partial` while a run writes into it: the marker goes, the folder, not empty, stays."""
    out = tmp_path / "out"

    def half_remove() -> None:
        with partial_folder(out) as working:
            working.clear()
            working.describe_kept = lambda: "something is kept"
            (working.root / MARKER).unlink()
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        half_remove()
    with partial_folder(out) as working:
        working.keep_shards()
    assert out.is_dir()
    assert not working.root.exists()


def test_a_working_folder_that_cannot_be_listed_is_not_left_and_nothing_in_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Iterator[Path]:
        if path.name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return iterdir(path)

    iterdir = Path.iterdir
    for kept in (False, True):
        if kept:
            (tmp_path / "out.partial").mkdir()
            (tmp_path / "out.partial" / MARKER).touch()
            (tmp_path / "out.partial" / "journal.jsonl").touch()
        with monkeypatch.context() as patched:
            patched.setattr(Path, "iterdir", refuse)
            with pytest.raises((InputError, OSError)), partial_folder(tmp_path / "out"):
                pytest.fail("was entered")
        assert (tmp_path / "out.partial" / "journal.jsonl").exists() == kept
        assert (tmp_path / "out.partial").exists() == kept


def test_what_cannot_be_removed_is_not_called_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def write() -> None:
        with atomic_folder(tmp_path / "out", 0) as folder:
            (folder / "a").touch()
            monkeypatch.setattr(shutil, "rmtree", refuse)
            refuse()

    with pytest.raises(InputError, match=r"out\.partial could not be removed"):
        write()
    monkeypatch.undo()
    with atomic_folder(tmp_path / "out", 0) as folder:
        assert not any(folder.iterdir())


def test_an_empty_folder_that_a_killed_run_left_beside_its_result_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out, 0) as folder:
        (folder / "a").touch()
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InputError, match="exists and is not empty"):
        require_unused(out)
    assert not (tmp_path / "out.partial").exists()


def test_an_adapter_beside_a_model_is_refused_before_the_work(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter"):
        quantize(source, tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    assert not (tmp_path / "out").exists()


def test_a_tensor_with_the_name_of_a_part_belongs_to_no_packed_layer(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.quantizer.scales"] = torch.ones(3)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, tmp_path / "out", QuantConfig(method="rtn", group_size=32, format="gptq"))
    assert verify.verify(tmp_path / "out").problems == []
    load(tmp_path / "out")


def test_links_that_lead_to_each_other_are_no_output(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be made"):
        quantize(make_model("llama"), tmp_path / "a", QuantConfig(method="rtn", group_size=32))


def test_json_keeps_texts_that_look_like_lists() -> None:
    content = {"text": "[1,  2]", "numbers": [1, 2, 3]}
    assert json.loads(record.json_text(content)) == content
    assert "[ 1, 2, 3 ]" in record.json_text(content)


@pytest.mark.parametrize(
    ("chosen", "kind", "twice"),
    [("gguf", "llama", True), ("mlx", "llama", False), ("mlx", "mixtral", True), ("gptq", "mixtral", False)],
)
def test_the_disk_holds_what_is_assembled_beside_its_parts(
    chosen: Format, kind: str, twice: bool, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(PartialFolder, "require_disk_space", lambda _, nbytes: asked.append(nbytes))
    config = QuantConfig(method="rtn", group_size=32, format=chosen)
    made = quantize(make_model(kind), tmp_path / "out", config)
    assert (asked[0] > 1.7 * made.bytes_after) is twice
