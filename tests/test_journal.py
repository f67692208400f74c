"""A run that stops anywhere and is started again writes what an undisturbed one writes, byte for byte."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq import InputError, QuantConfig, quantize
from gptq.checkpoint import source_state
from gptq.checkpoint.atomic_folder import CONTENT, MARKER, SHARDS
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.writer import ShardWriter
from gptq.output import files, record
from gptq.pipeline import run_identity, search
from gptq.pipeline.block_walk import BlockWalk
from gptq.pipeline.journal import JOURNAL, Journal
from gptq.pipeline.run import Observer
from tests.conftest import MakeModel

OPTIONS: dict[str, Any] = {"group_size": 32, "seq_len": 32}
CONFIG = QuantConfig(**OPTIONS)


class StoppedError(Exception):
    pass


class Stops(Observer):
    """Stops a run when so many blocks are finished and the next one has its first layer, or at a stage.

    With a target the blocks of the second pass count where `passes` is 2.
    """

    def __init__(self, after: int = 99, when: str = "", passes: int = 1) -> None:
        self.after, self.when, self.passes = after, when, passes
        self.went_on_after: list[int] = []
        self.notes: list[str] = []
        self._blocks: list[int] = []

    def started(self, num_blocks: int, weights: int) -> None:
        self._blocks = []
        self.passes -= 1

    def resumed(self, blocks: int, weights: int) -> None:
        self.went_on_after.append(blocks)
        self._blocks = [-1] * blocks

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, text: str) -> None:
        if self.when and self.when in text:
            raise StoppedError

    def layer_done(self, block: int, name: str, weights: int) -> None:
        if block not in self._blocks:
            self._blocks.append(block)
        if len(self._blocks) > self.after and self.passes <= 0:
            raise StoppedError


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def stop(source: Path, out: Path, config: QuantConfig = CONFIG, after: int = 1, **arguments: Any) -> None:
    """A run that ends after some blocks, and leaves what it finished."""
    with pytest.raises(StoppedError):
        quantize(source, out, config, observer=Stops(after), **arguments)
    assert not out.exists()
    assert len(Journal(partial_of(out)).find("block")) == after


@pytest.mark.slow
def test_twenty_kills_and_the_bytes_agree(make_model: MakeModel, tmp_path: Path) -> None:
    model, folder = make_model("llama", num_hidden_layers=5), tmp_path / "runs"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_run", str(model), str(folder)],
        cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert sum(run["kills"] for run in found["by_the_clock"]) == 20
    assert all(run["same"] for run in found["by_the_clock"])
    assert found["stepwise"]["same"]
    assert found["stepwise"]["lives"] > 20  # the end alone has more steps
    assert found["left"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "model_options", "after"),
    [
        ("llama", {}, {"num_hidden_layers": 3}, 2),
        ("llama", {"effort": "best", "tune_steps": 6, "bits": 3}, {"num_hidden_layers": 3}, 2),
        ("gpt2", {"effort": "best", "tune_steps": 6, "format": "gptq"}, {}, 1),
        ("llama", {"lm_head": True}, {"tie_word_embeddings": True}, 2),
        ("llama", {"lm_head": True, "effort": "fast"}, {}, 3),  # nothing is left but copying
        ("llama", {"sym": False, "desc_act": True, "static_groups": False, "format": "gptq_v2"}, {}, 1),
        ("llama", {"sym": False, "bits": 3, "overrides": (("down_proj", {"bits": 5}),)}, {}, 1),
        ("qwen3", {"bits": 3, "group_size": 48, "effort": "fast"}, {"dtype": torch.bfloat16}, 1),
        ("mixtral", {}, {}, 1),
        ("deepseek_v3", {}, {}, 1),
        ("t5", {}, {}, 3),
        ("gemma2", {"method": "rtn"}, {}, 1),
    ],
)  # fmt: skip
def test_a_run_goes_on_at_a_block(
    kind: str, options: dict[str, Any], model_options: dict[str, Any], after: int, make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model(kind, **model_options)
    config = QuantConfig(**{**OPTIONS, **options})
    windows = torch.randint(1, 320, (9, 32), generator=torch.Generator().manual_seed(7))
    undisturbed = quantize(source, tmp_path / "whole", config, calibration=windows)
    out = tmp_path / "stopped"
    if after == 3 and kind == "llama":
        with pytest.raises(StoppedError):
            quantize(source, out, config, calibration=windows, observer=Stops(when="copying"))
    else:
        stop(source, out, config, after, calibration=windows, batch_size=2)
    observer = Stops()
    result = quantize(source, out, config, calibration=windows, observer=observer)
    assert observer.went_on_after == [after]
    assert all_bytes(out) == all_bytes(tmp_path / "whole")
    assert result.notes == undisturbed.notes
    assert not partial_of(out).exists()


def test_blocks_that_nothing_reaches_are_finished_too(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of the model a walk leaves out is rounded, and that is journaled like the rest."""
    source = make_model("llama", num_hidden_layers=3)
    windows = torch.randint(1, 320, (4, 32), generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(BlockWalk, "resume_with", lambda self, outputs: None)  # the walk ends after the first block
    with pytest.raises(InputError, match=r"reached model.layers.1; leave .* --override 'model.layers:skip'"):
        quantize(source, tmp_path / "whole", CONFIG, calibration=windows)
    shutil.rmtree(partial_of(tmp_path / "whole"))
    monkeypatch.setattr("gptq.pipeline.quantize._refuse_unreached", lambda *_: None)
    whole = quantize(source, tmp_path / "whole", CONFIG, calibration=windows)
    assert sum(layer.tokens == 0 for layer in whole.layers) == 2 * 7
    stop(source, tmp_path / "out", after=2, calibration=windows)
    assert quantize(source, tmp_path / "out", CONFIG, calibration=windows).notes == whole.notes
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_a_target_is_not_measured_twice(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = make_model("llama", num_hidden_layers=3), QuantConfig(target_bits=4.5, effort="fast", **OPTIONS)
    quantize(source, tmp_path / "whole", config, calibration=windows)
    out = tmp_path / "out"
    with pytest.raises(StoppedError):  # among the measuring
        quantize(source, out, config, calibration=windows, observer=Stops(2))
    assert len(Journal(partial_of(out)).find("measured")) == 2
    observer = Stops(2)
    with pytest.raises(StoppedError):
        quantize(source, out, config, calibration=windows, observer=observer)
    assert observer.went_on_after == [2]
    again = Stops(1, passes=2)
    with pytest.raises(StoppedError):  # among the blocks, for the widths are known
        quantize(source, out, config, calibration=windows, observer=again)
    assert len(Journal(partial_of(out)).find("block")) == 1
    monkeypatch.delattr(search, "_measure")
    quantize(source, out, config, calibration=windows)
    assert all_bytes(out) == all_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_enough_windows_are_not_searched_twice(
    make_model: MakeModel, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = make_model("llama"), QuantConfig(num_samples="auto", effort="fast", **OPTIONS)
    monkeypatch.setattr(search, "MAX_WINDOWS", 32)
    quantize(source, tmp_path / "whole", config, calibration=text_file)
    stop(source, tmp_path / "out", config, calibration=text_file)
    monkeypatch.delattr(search, "_search_windows")
    quantize(source, tmp_path / "out", config, calibration=text_file)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_fills_up_and_is_freed(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes ever more bytes, and every run before the last one finds it full somewhere else."""
    source, out = make_model("llama", num_hidden_layers=4), tmp_path / "out"
    quantize(source, tmp_path / "whole", CONFIG, calibration=windows)
    write, left = ShardWriter.write, [0]

    def fills_up(self: ShardWriter, name: str, tensor: Tensor) -> None:
        left[0] -= tensor.nbytes
        if left[0] < 0:
            if tensor.numel() > 4:  # half a tensor gets there
                shard, offset = self._offsets[name]
                self._files[shard].seek(offset)
                self._files[shard].write(b"\xee" * (tensor.nbytes // 2))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", fills_up)
    failures, most = [], 0
    while not out.exists():
        left[0] = most = most + 12_000
        try:
            quantize(source, out, CONFIG, calibration=windows)
        except InputError as error:
            failures.append(str(error))
    assert "nothing is left there" in failures[0]
    assert len(failures) > 4
    for message in failures[2:]:
        assert "the disk at /" in message
        assert "is full (No space left on device)" in message
        assert "of 4 blocks, and the command that began it goes on from there" in message
    assert all_bytes(out) == all_bytes(tmp_path / "whole")


def test_too_little_room_for_the_rest_is_said_before_the_work(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    stop(source, out, calibration=windows)
    with monkeypatch.context() as patched:
        patched.setattr("gptq.checkpoint.atomic_folder.shutil.disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(InputError, match=r"needs .* MB more and the disk has 0\.0 MB free; .* keeps 1 finished of"):
            quantize(source, out, CONFIG, calibration=windows)
    quantize(source, out, CONFIG, calibration=windows)


def test_other_options_models_and_data_are_refused_with_the_difference(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    quantize(source, tmp_path / "whole", CONFIG, calibration=windows)
    stop(source, out, calibration=windows)
    kept = {file: file.read_bytes() for file in partial_of(out).rglob("*") if file.is_file()}
    for options, message in (
        ({"bits": 3}, r"out\.partial was begun with bits 4, now 3; give what it was begun with"),
        ({"group_size": 64, "damp_percent": 0.02}, r"group_size 32, now 64 and damp_percent 0\.01, now 0\.02"),
        ({"overrides": (("v_proj", {"bits": 8}),)}, "overrides none, now v_proj:bits=8"),
        ({"effort": "best"}, "effort balanced, now best and sweeps 2, now 4"),
        ({"method": "rtn"}, "method gptq, now rtn"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            quantize(source, out, QuantConfig(**{**OPTIONS, **options}), calibration=windows)
        assert "keeps 1 finished of 2 blocks, and the command that began it goes on from there; remove it" in str(
            refused.value
        )
    with pytest.raises(InputError, match="dtype float32, now bfloat16"):
        quantize(source, out, CONFIG, calibration=windows, dtype="bfloat16")
    with pytest.raises(InputError, match="begun with other calibration windows"):
        quantize(source, out, CONFIG, calibration=windows.flip(0))
    monkeypatch.setattr(run_identity, "__version__", "9.9")
    with pytest.raises(InputError, match=r"gptq .*, now 9\.9"):
        quantize(source, out, CONFIG, calibration=windows)
    monkeypatch.undo()

    file = source / "model.safetensors"
    original = file.read_bytes()
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"begun with another model\.safetensors"):
        quantize(source, out, CONFIG, calibration=windows)
    file.write_bytes(original)  # downloaded again: its date is another, and it is the same
    assert {f: f.read_bytes() for f in partial_of(out).rglob("*") if f.is_file()} == kept
    observer = Stops()
    quantize(source, out, CONFIG, calibration=windows, observer=observer, batch_size=1)
    assert observer.went_on_after == [1]
    assert all_bytes(out) == all_bytes(tmp_path / "whole")


def test_where_nothing_was_finished_other_options_begin_anew(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    with pytest.raises(StoppedError):
        quantize(source, out, CONFIG, calibration=windows, observer=Stops(0))
    assert not partial_of(out).exists()
    partial_of(out).mkdir()  # of a run that was killed
    (partial_of(out) / MARKER).touch()
    Journal(partial_of(out)).append("begun", {"options": "others"})
    quantize(source, out, CONFIG, calibration=windows)
    assert out.exists()


def test_another_machine_is_noted(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("gptq.pipeline.run_identity.transformers.__version__", "0.0")
        stop(source, out, calibration=windows)
    observer = Stops()
    quantize(source, out, CONFIG, calibration=windows, observer=observer)
    assert any("begun with transformers 0.0, now" in note for note in observer.notes)


@pytest.mark.slow
def test_damage_is_done_again(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    """A flipped bit in a finished block, a torn line, a damaged line, a journal or a shard cut short, or gone."""
    source = make_model("llama", num_hidden_layers=4)
    quantize(source, tmp_path / "whole", CONFIG, calibration=windows)

    def flip(file: Path, byte: int) -> None:
        content = bytearray(file.read_bytes())
        content[byte] ^= 4
        file.write_bytes(content)

    def in_block_1(folder: Path) -> None:
        shard = folder / CONTENT / "model.safetensors"
        header = int.from_bytes(shard.read_bytes()[:8], "little")
        name = "model.layers.1.mlp.down_proj.qweight"
        flip(shard, 8 + header + json.loads(shard.read_bytes()[8 : 8 + header])[name]["data_offsets"][0] + 5)

    def torn(folder: Path) -> None:
        os.truncate(folder / JOURNAL, (folder / JOURNAL).stat().st_size - 9)

    def damaged_line(folder: Path) -> None:
        lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
        flip(folder / JOURNAL, sum(map(len, lines[:4])) - 500)

    def cut_short(folder: Path) -> None:
        os.truncate(folder / JOURNAL, 100)

    def shorter(folder: Path) -> None:
        os.truncate(folder / CONTENT / "model.safetensors", 30_000)

    def gone(folder: Path) -> None:
        (folder / CONTENT / "model.safetensors").unlink()

    def swapped(folder: Path) -> None:
        *lines, second, third = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
        (folder / JOURNAL).write_bytes(b"".join([*lines, third, second]))

    ways = ((in_block_1, 1), (torn, 2), (damaged_line, 1), (cut_short, 0), (shorter, 0), (gone, 0), (swapped, 3))
    for number, (damage, left) in enumerate(ways):
        out, observer = tmp_path / f"out{number}", Stops()
        stop(source, out, after=3, calibration=windows)
        damage(partial_of(out))
        quantize(source, out, CONFIG, calibration=windows, observer=observer)
        assert observer.went_on_after == ([left] if left else []), damage.__name__
        said = " ".join(observer.notes)
        assert ("damaged in the unfinished folder" in said) == (damage in (in_block_1, shorter, gone))
        assert (f"{JOURNAL} is damaged" in said) == (damage in (damaged_line, cut_short))
        assert all_bytes(out) == all_bytes(tmp_path / "whole"), damage.__name__


def test_a_flipped_bit_anywhere_in_an_unfinished_file_does_not_reach_the_result(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.arange(5, dtype=torch.uint8), "c": torch.ones(2, 3).half()}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def write(names: Iterable[str], finished: dict[str, str]) -> ShardWriter:
        writer = ShardWriter(tmp_path, infos, reuse_shards=True)
        left = set() if writer.adopt(finished) else {"a", "b"}
        for name in sorted({*names, *left} - {name for name in finished if writer.checksums[name]}):
            writer.write(name, tensors[name])
        writer.abandon()
        return writer

    finished = {name: write(["a", "b"], {}).checksums[name] for name in ("a", "b")}
    stopped = (tmp_path / "model.safetensors").read_bytes()
    write(["c"], finished)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for byte in range(0, len(stopped), 3):
        spoiled = bytearray(stopped)
        spoiled[byte] ^= 1 << byte % 8
        (tmp_path / "model.safetensors").write_bytes(spoiled)
        write(["c"], finished)
        assert (tmp_path / "model.safetensors").read_bytes() == whole, byte


@pytest.mark.slow
def test_links_and_strange_files_in_an_unfinished_folder_reach_neither_the_result_nor_what_they_point_to(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, out, mine = make_model("llama"), tmp_path / "out", tmp_path / "mine"
    quantize(source, tmp_path / "whole", CONFIG, calibration=windows)
    stop(source, out, calibration=windows)
    shutil.copytree(partial_of(out), tmp_path / "kept")
    save_file({"x": torch.ones(2)}, tmp_path / "kept" / CONTENT / "more.safetensors")
    for name in (f"{CONTENT}/model.safetensors", CONTENT, JOURNAL):
        for folder in (partial_of(out), mine):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "kept", folder)
        (partial_of(out) / name).rename(tmp_path / f"was {name.replace('/', ' ')}")
        (partial_of(out) / name).symlink_to(mine / name)
        before, observer = tree(mine), Stops()
        quantize(source, out, CONFIG, calibration=windows, observer=observer)
        assert observer.went_on_after == []
        assert all_bytes(out) == all_bytes(tmp_path / "whole"), name
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert tree(mine) == before, name
        shutil.rmtree(out)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", ["tensors", "weights", "layers", "spreads"])
def test_a_block_whose_entry_lacks_something_is_done_again(
    part: str, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    """An entry with a right checksum of its own, as a fault in an earlier version could leave it."""
    source, out, observer = make_model("llama"), tmp_path / "out", Stops()
    config = QuantConfig.from_dict({**OPTIONS, "effort": "fast"})
    quantize(source, tmp_path / "whole", config, calibration=windows)
    stop(source, out, config, after=1, calibration=windows)
    journal = Journal(partial_of(out))
    (entry,) = journal.find("block")
    journal.forget_blocks_from(entry["name"])
    one = next(iter(entry[part])) if part != "layers" else -1
    if part == "spreads":
        entry[part][one]["code_histogram"] = 7  # which no record can hold
    else:
        del entry[part][one]
    journal.append("block", entry)
    quantize(source, out, config, calibration=windows, observer=observer)
    assert observer.went_on_after == []
    assert any("damaged in the unfinished folder" in note for note in observer.notes)
    assert all_bytes(out) == all_bytes(tmp_path / "whole")


def test_finished_blocks_outlive_the_files_that_are_made_of_them(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX has the experts of a layer in one tensor, which is made when all blocks are finished."""
    source, config = make_model("mixtral"), QuantConfig(group_size=32, seq_len=32, effort="fast", format="mlx")
    quantize(source, tmp_path / "whole", config, calibration=windows)
    out, write = tmp_path / "out", record.write_json

    def stops(path: Path, content: dict[str, Any]) -> None:
        if (partial_of(out) / SHARDS).exists():
            raise StoppedError
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_json", stops)
        with pytest.raises(StoppedError):
            quantize(source, out, config, calibration=windows)
    assert (partial_of(out) / SHARDS / "model.safetensors").is_file()
    observer = Stops()
    quantize(source, out, config, calibration=windows, observer=observer)
    assert observer.went_on_after == [2]
    assert all_bytes(out) == all_bytes(tmp_path / "whole")
    assert not partial_of(out).exists()


def block_entry(named: str, **other: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "tensors": {},
        "tuned": {},
        "layers": [],
        "weights": {},
        "errors": [],
        "coverage": [],
        "notes": [],
    }
    return {"name": named, **empty, "spreads": {"layer": {"floats": [0.1, 1e-30, float("inf")]}}, **other}


@pytest.mark.parametrize("other", [{"notes": 5}, {"layers": [{}]}, {"weights": {"a": 1}}, {"name": None}, {"more": 1}])
def test_a_line_with_a_right_checksum_and_wrong_content_is_damaged_too(other: dict[str, Any], tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("block", block_entry("0"))
    journal.append("block", block_entry("1", **other))
    journal.append("block", block_entry("2"))
    read = Journal(tmp_path)
    assert ([entry["name"] for entry in read.find("block")], read.damaged) == (["0"], True)


def test_a_damaged_end_is_cut_off_before_more_is_written(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    for number in range(3):
        first.append("block", block_entry(str(number)))
    assert Journal(tmp_path).entries == first.entries
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"sha256": "')
    again = Journal(tmp_path)
    again.append("block", block_entry("3"))
    assert [entry["name"] for entry in Journal(tmp_path).find("block")] == ["0", "1", "2", "3"]
    again.forget_blocks_from("1")
    again.append("block", block_entry("new"))
    assert [entry["name"] for entry in Journal(tmp_path).find("block")] == ["0", "new"]


def test_an_unfinished_folder_is_no_checkpoint(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    with pytest.raises(StoppedError):
        quantize(source, out, CONFIG, calibration=windows, observer=Stops(when="copying"))
    folder = partial_of(out)
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, CONTENT, JOURNAL]
    assert [path.name for path in (folder / CONTENT).iterdir()] == ["model.safetensors"]
    with pytest.raises(InputError):
        Source(folder)
    (folder / CONTENT / "config.json").write_text("{}")  # killed while the last files are written
    with pytest.raises(StoppedError):
        quantize(source, out, CONFIG, calibration=windows, observer=Stops(when="copying"))
    assert not (folder / CONTENT / "config.json").exists()


def test_a_long_file_is_told_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_HASHED_WHOLE", 1000), ("PIECE_BYTES", 10), ("PIECE_STRIDE", 100)):
        monkeypatch.setattr(source_state, name, value)
    file = tmp_path / "file"
    content = bytearray(2005)

    def told(at: int, length: int) -> bool:
        file.write_bytes(content)
        before = source_state.fingerprint(file)
        file.write_bytes(content[:at] + b"x" * length + content[at + length :])
        return source_state.fingerprint(file) != before

    assert told(0, 1)
    assert told(2004, 1)
    assert all(told(at, 100) for at in range(0, 1900, 37))
    content = content[:1000]
    assert all(told(at, 1) for at in range(0, 1000, 37))
