"""Shards byte for byte as safetensors writes them; a folder that appears whole or not at all; damage is named."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptq import InputError
from gptq.checkpoint.atomic_folder import MARKER, atomic_folder
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import DTYPES, INDEX, TensorInfo
from gptq.checkpoint.writer import ShardWriter


def some_tensors(rng: torch.Generator) -> dict[str, torch.Tensor]:
    numbers = torch.randn(7, 5, generator=rng)
    tensors = {f"{code}.t": (numbers * 10).to(dtype) for code, dtype in DTYPES.items() if not code.startswith("U")}
    return {
        **tensors,
        "odd": numbers[:1, :3].half().contiguous(),
        "scalar": torch.tensor(1.5),
        "none": torch.empty(0, 4),
    }


def announce(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_a_shard_is_what_safetensors_writes_whatever_the_order(tmp_path: Path, rng: torch.Generator) -> None:
    tensors = some_tensors(rng)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    writer = ShardWriter(tmp_path, announce(tensors))
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_and_index_follow_the_hub(tmp_path: Path, rng: torch.Generator) -> None:
    tensors = some_tensors(rng)
    writer = ShardWriter(tmp_path, announce(tensors), max_shard_bytes=300)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    read = {name: t for file in files for name, t in load_file(tmp_path / file).items()}
    assert read.keys() == tensors.keys()
    source = Source(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(read[name].float(), tensor.float())
        assert torch.equal(source.read_unchecked(name).float(), tensor.float())


def test_the_writer_wants_exactly_what_was_announced(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": TensorInfo(torch.int32, (2,)), "b": TensorInfo(torch.int32, (1,))})
    with pytest.raises(ValueError, match="announced as"):
        writer.write("a", torch.zeros(2))
    writer.write("a", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="already"):
        writer.write("a", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="the first is b"):
        writer.close()
    writer.abandon()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out, 10) as working:
        (working / "file").write_text("x")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["file"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_folder(tmp_path / "out", 10) as working:  # noqa: PT012
        (working / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_occupied_folders_small_disks_and_second_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"), atomic_folder(tmp_path / "full", 1):
        pass
    with pytest.raises(InputError, match="MB free"), atomic_folder(tmp_path / "big", 10**18):
        pass
    assert not (tmp_path / "big.partial").exists()
    with atomic_folder(tmp_path / "out", 1) as working:
        (working / "mine").touch()
        with pytest.raises(InputError, match="another run"), atomic_folder(tmp_path / "out", 1):
            pass
        assert (working / "mine").exists()


def test_left_overs_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").touch()
    (tmp_path / "out.partial" / MARKER).touch()
    with atomic_folder(tmp_path / "out", 1) as working:
        (working / "new").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def sharded(folder: Path, rng: torch.Generator) -> Path:
    folder.mkdir()
    tensors = some_tensors(rng)
    writer = ShardWriter(folder, announce(tensors), max_shard_bytes=300)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    return folder


def test_damaged_checkpoints_are_named(tmp_path: Path, rng: torch.Generator) -> None:
    folder = sharded(tmp_path / "model", rng)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole, index = shard.read_bytes(), (folder / INDEX).read_text()
    os.truncate(shard, len(whole) - 1)
    with pytest.raises(InputError, match=f"{shard.name} is damaged or cut short"):
        Source(folder)
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(InputError, match=f"{shard.name} is a pointer of Git LFS, not the file itself; .*git lfs pull"):
        Source(folder)
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        Source(folder)
    shard.unlink()
    with pytest.raises(InputError, match=f"names the shard {shard.name}, which is missing"):
        Source(folder)
    shard.write_bytes(whole)
    (folder / INDEX).write_text(index.replace(shard.name, f"../model/{shard.name}"))
    with pytest.raises(InputError, match="not a safetensors file beside it"):
        Source(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(InputError, match="not a safetensors index"):
        Source(folder)
    (folder / INDEX).write_text(index.replace('"odd"', '"even"'))
    with pytest.raises(InputError, match="lists even, which is in none of its shards"):
        Source(folder)


def entry(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", other: str = "1") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets},"other":{other}}}'


TWICE = '0,"shape":[2]'
HEADERS = {  # the JSON of a header before 8 bytes of tensors, and whether it is one
    f'{{"a":{entry()}}}': True,
    f' {{"a":{entry()}}}  ': True,
    f'{{"__metadata__":{{"format":"pt"}},"a":{entry()}}}': True,
    f'{{"b":{entry(shape="[1]", offsets="[4,8]")},"a":{entry("I16", "[1,2]", "[0,4]")}}}': True,
    f'{{"b":{entry(shape="[0,3]", offsets="[8,8]")},"a":{entry("F64", "[]")}}}': True,
    f'{{"a":{entry(other="[1]")}}}': True,
    f'{{"a":{entry()}}}\0': False,
    f'[{{"a":{entry()}}}]': False,
    f'{{"a":{entry()},"a":{entry(shape="[8]", dtype="I8")}}}': False,
    f'{{"__metadata__":{{"format":1}},"a":{entry()}}}': False,
    f'{{"a":{entry(other="NaN")}}}': False,
    f'{{"a":{entry(other=TWICE)}}}': False,
    f'{{"a":{entry(shape="[2.0]")}}}': False,
    f'{{"a":{entry(shape="[true,2]")}}}': False,
    f'{{"a":{entry(shape="[-1,-2]")}}}': False,
    f'{{"a":{entry(offsets="[0,8,8]")}}}': False,
    f'{{"a":{entry(offsets="[8,0]")}}}': False,
    f'{{"a":{entry(offsets="[1,9]")}}}': False,
    f'{{"a":{entry(shape="[1]", offsets="[0,4]")}}}': False,
    f'{{"a":{entry(shape="[1]", offsets="[4,8]")}}}': False,
    f'{{"a":{entry(shape="[1]", offsets="[0,4]")},"b":{entry(shape="[2]", offsets="[0,8]")}}}': False,
    f'{{"a":{entry(shape="[0,1152921504606846976,2]", offsets="[0,0]")},"b":{entry()}}}': False,
    f'{{"a":{entry("U4", "[16]")}}}': False,
    '{"a":[]}': False,
    '{"a":' * 100_000: False,
}


@pytest.mark.parametrize("text", HEADERS, ids=lambda text: text[:80])
def test_what_is_read_as_a_header_is_one_for_safetensors_too(text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(range(8)))
    if not HEADERS[text]:
        with pytest.raises(InputError, match=r"model\.safetensors (is damaged|holds)"):
            Source(tmp_path)
        return
    source = Source(tmp_path)
    with safe_open(file, "pt") as theirs:
        assert [*source.tensors] == [*theirs.keys()]
        for name in source.tensors:
            tensor = theirs.get_tensor(name)
            found = source.read_unchecked(name)
            assert (found.dtype, found.shape, found.tolist()) == (tensor.dtype, tensor.shape, tensor.tolist())


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no"):
        Source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(InputError, match="pickled checkpoint"):
        Source(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float) -> None:
    save_file({"fine": torch.ones(2), "broken.weight": torch.tensor([1.0, bad])}, tmp_path / "model.safetensors")
    source = Source(tmp_path)
    assert torch.equal(source.read("fine"), torch.ones(2))
    with pytest.raises(InputError, match=r"broken\.weight in .* holds NaN or infinity"):
        source.read("broken.weight")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="is in the way"), atomic_folder(tmp_path / "out", 1):
        pass
    assert (tmp_path / "out.partial" / "precious.txt").read_text() == "x"


def test_links_and_parents(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link", 1) as working:
        (working / "file").touch()
    assert (tmp_path / "real" / "file").exists()
    with pytest.raises(RuntimeError, match="x"), atomic_folder(tmp_path / "a" / "b" / "out", 1):
        raise RuntimeError("x")
    assert not (tmp_path / "a").exists()
