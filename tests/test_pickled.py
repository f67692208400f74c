"""Pickled checkpoints: converted in a process that runs no code of theirs, and could do no harm if it did."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptq import InputError, QuantConfig, compare, load, quantize
from gptq.checkpoint import confinement, pickled, unpickle
from gptq.checkpoint.hub import resolve
from gptq.output import verify
from gptq.planning.plan import plan_checkpoint
from tests.conftest import MakeModel

CONFIG = QuantConfig(bits=8, group_size=32, num_samples=6, seq_len=32, effort="fast", format="gptq")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pickled, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gptq" / pickled.CONVERTED


def pickle_model(folder: Path, shards: int = 1, drop: str = "", **options: Any) -> dict[str, Tensor]:
    """Replace a folder's safetensors by what torch.save makes of the model's state; `drop` is taken off the names."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tensors = {name.removeprefix(drop): tensor for name, tensor in model.state_dict().items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return tensors
    names, shard_of = [*tensors], {}
    for number in range(shards):
        shard = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: tensors[name] for name in names[number::shards]}, folder / shard)
        shard_of.update(dict.fromkeys(names[number::shards], shard))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return tensors


@pytest.mark.slow
def test_opt_as_the_hub_has_it_goes_from_file_to_file(
    make_model: MakeModel, windows: Tensor, text_file: str, tmp_path: Path
) -> None:
    source, out = make_model("opt", dtype=torch.float16), tmp_path / "out"
    original: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    pickle_model(source)
    with pytest.raises(InputError, match=r"pytorch_model\.bin\).* --allow-pickle"):
        quantize(source, out, CONFIG, calibration=windows)
    quantize(source, out, CONFIG, calibration=windows, allow_pickle=True)
    assert verify.verify(out).problems == []
    assert not (out / pickled.CONVERSION).exists()
    with torch.no_grad():
        expected, found = original(windows).logits, load(out, dtype="float32")(windows).logits
        assert float((found - expected).norm() / expected.norm()) < 0.05
        assert torch.equal(load(source, dtype="float32", allow_pickle=True)(windows).logits, expected)
    assert compare(out, source, text_file, seq_len=16, windows=2, allow_pickle=True).kl < 0.01


@pytest.mark.slow
def test_bloom_as_the_hub_has_it_is_quantized_as_its_safetensors_are(make_model: MakeModel, tmp_path: Path) -> None:
    """BLOOM's files on the Hub lack the prefix of the model with a head, and old ones are not zip files."""
    source, options = make_model("bloom"), QuantConfig(method="rtn", group_size=32)
    quantize(source, tmp_path / "expected", options)
    pickle_model(source, drop="transformer.", _use_new_zipfile_serialization=False)
    quantize(source, tmp_path / "out", options, allow_pickle=True)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert {name.removeprefix("transformer.") for name in expected} == found.keys()
    assert all(torch.equal(found[name.removeprefix("transformer.")], expected[name]) for name in expected)


@pytest.mark.slow
def test_the_conversion_is_exact_and_made_once(make_model: MakeModel, cache: Path) -> None:
    source = make_model("opt", dtype=torch.bfloat16)
    tensors = pickle_model(source)
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.decoder.embed_tokens.weight"].data_ptr()
    converted = resolve(str(source), None, allow_pickle=True)
    found = load_file(converted / "model.safetensors")
    assert found.keys() == tensors.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    assert (converted / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not [*converted.glob("*.bin")]
    written = (converted / "model.safetensors").stat()
    assert resolve(str(source), None, allow_pickle=True) == converted
    assert (converted / "model.safetensors").stat() == written  # not written again

    before = (converted / "model.safetensors").read_bytes()
    (source / "pytorch_model.bin").touch()  # a file that may have changed is converted again, to the same bytes
    again = resolve(str(source), None, allow_pickle=True)
    assert again != converted
    assert (again / "model.safetensors").read_bytes() == before
    assert {path.suffix for path in cache.iterdir() if path.is_file()} == {".lock"}


@pytest.mark.slow
def test_shards_and_an_untied_head_and_what_the_user_is_told(make_model: MakeModel) -> None:
    source = make_model("opt", tie_word_embeddings=False)
    tensors = pickle_model(source, shards=3)
    plan = plan_checkpoint(str(source), CONFIG, None, False, allow_pickle=True)
    assert {file.name for file in plan.source.files} == {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    assert plan.source.tensors.keys() == tensors.keys()
    assert all(torch.equal(plan.source.read(name), tensors[name]) for name in tensors)
    assert any("was pickled; it was converted by a process" in note for note in plan.notes)


# --- hostile files ----------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled without care, calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.slow
def test_code_in_a_pickle_is_not_run(make_model: MakeModel, cache: Path, tmp_path: Path) -> None:
    source = make_model("opt")
    tensors, mark = pickle_model(source), tmp_path / "ran"
    torch.save({**tensors, "x": Payload(os.system, f"echo >> {mark}")}, source / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin .*than tensors, which was not run: .*system"):
        resolve(str(source), None, allow_pickle=True)
    assert not mark.exists()
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle at all", "is damaged, or holds something else"),
        ([torch.zeros(2)], "holds list, not a table of tensors"),
        ({"a": {"b": torch.zeros(2)}}, "holds 'a', which is dict, not a tensor"),
        ({3: torch.zeros(2)}, "calls a tensor 3"),
        ({"a\x1b[2J": torch.zeros(2)}, "which is no name"),
        ({"a": torch.zeros(1).expand(2**40)}, "larger than the file"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, r"holds 'a' as torch\.complex64"),
        ({"a": torch.eye(3).to_sparse()}, "torch.sparse_coo, which safetensors cannot hold"),
        ({}, "not a table of tensors"),
    ],
)
def test_what_holds_something_else_than_tensors_is_named(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(unpickle.UnreadableError, match=message), (tmp_path / "out").open("wb") as out:
        unpickle.convert(file, out, drop_tied=True)
    assert (tmp_path / "out").stat().st_size == 0


def test_an_archive_with_compressed_members_is_refused(tmp_path: Path) -> None:
    """torch maps the compressed bytes as tensors; and 30 kB can be a pickle of 33 MB."""
    plain, file = tmp_path / "plain.bin", tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(4096.0)}, plain)
    with zipfile.ZipFile(plain) as read, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as written:
        for member in read.infolist():
            written.writestr(member.filename, read.read(member))
    with pytest.raises(unpickle.UnreadableError, match=r"holds '.*' compressed"), (tmp_path / "out").open("wb") as out:
        unpickle.convert(file, out, drop_tied=True)


@pytest.mark.slow
def test_a_pickle_that_keeps_the_processor_busy_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch searches its own message, which has a name of the file in it, in a time quadratic in its length."""
    file = tmp_path / "model" / "pytorch_model.bin"
    file.parent.mkdir()
    torch.save({"a": Payload(os.system, "x")}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as read, zipfile.ZipFile(file, "w") as written:
        for member in read.infolist():
            written.writestr(member.filename, read.read(member).replace(b"system", b"system" * 500_000))
    monkeypatch.setattr(pickled, "SECONDS", 1)
    with pytest.raises(InputError, match=r"pytorch_model\.bin keeps the processor busy for more than 1 s"):
        resolve(str(file.parent), None, allow_pickle=True)


def test_a_pickle_that_is_cut_short_or_missing_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("opt")
    pickle_model(source)
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(unpickle.UnreadableError, match="is damaged"), (tmp_path / "out").open("wb") as out:
        unpickle.convert(file, out, drop_tied=True)
    file.rename(source / "weights.bin")
    with pytest.raises(InputError, match=r"holds no pytorch_model\.bin"):
        resolve(str(source), None, allow_pickle=True)
    index = source / "pytorch_model.bin.index.json"
    for weight_map, message in (
        ({"a": "../x.bin"}, "not a .bin file beside it"),
        ({"a": "pytorch_model-1.bin"}, "which is missing"),
        ({"a": 3}, "not an index of tensors"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            resolve(str(source), None, allow_pickle=True)


CONFINED = """
import _socket, ctypes, fcntl, importlib.util, json, os, resource, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("confinement", sys.argv[1])
confinement = importlib.util.module_from_spec(spec)
spec.loader.exec_module(confinement)
mark, mine, out = sys.argv[2], sys.argv[3], int(sys.argv[4])
held = confinement.confine([Path(mine)])
found = {}
for attempt in json.loads(sys.argv[5]):
    try:
        found[attempt] = repr(eval(attempt))
    except (OSError, ValueError) as error:  # ValueError: a limit that may not be raised
        found[attempt] = type(error).__name__
print(json.dumps([held, found]))
"""
FORBIDDEN = [
    "open(mark, 'w')", "os.open(mark, os.O_CREAT | os.O_RDONLY)", "open(mine, 'r+b')", "os.truncate(mine, 0)",
    "os.mkdir(mark)", "os.symlink('/', mark)", "os.link(mine, mark)", "os.rename(mine, mark)", "os.unlink(mine)",
    "os.chmod(mine, 0)", "os.utime(mine)", "os.mkfifo(mark)", "os.fork()", "os.execv('/bin/sh', ['sh', '-c', 'exit'])",
    "os.posix_spawn('/bin/true', ['true'], {})", "_socket.socket()", "_socket.socket(_socket.AF_UNIX)",
    "_socket.socketpair()", "os.kill(os.getppid(), 0)", "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "os.memfd_create('x')", "os.setsid()", "os.chdir('/')", "fcntl.fcntl(out, fcntl.F_SETOWN, os.getppid())",
    "fcntl.fcntl(out, 10, 9)", "fcntl.fcntl(out, fcntl.F_SETFL, os.O_ASYNC)",
]  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp and Landlock are Linux's")
def test_code_that_did_run_could_do_no_harm(tmp_path: Path) -> None:
    """The second wall, for code that weights_only does not stop."""
    mine, mark, out = tmp_path / "mine", tmp_path / "mark", tmp_path / "out"
    mine.write_text("mine")
    allowed = [
        "open(mine).read()",
        "os.write(out, b'tensors')",
        "os.dup(0) > 0",
        "resource.getrlimit(resource.RLIMIT_CORE)[0] < 0",
    ]
    others = ["open('/etc/passwd').read(4)", "os.listdir('/')"]
    with out.open("wb") as opened:
        attempts = json.dumps([*allowed, *FORBIDDEN, *others])
        command = [sys.executable, "-c", CONFINED, confinement.__file__, str(mark), str(mine)]
        command += [str(opened.fileno()), attempts]
        done = subprocess.run(command, capture_output=True, text=True, pass_fds=[opened.fileno()], check=True)
    held, found = json.loads(done.stdout)
    if "seccomp" not in held:
        pytest.skip("this kernel or machine has no seccomp that is known")
    assert {found[attempt] for attempt in FORBIDDEN} <= {"PermissionError", "ValueError"}, found
    assert [found[attempt] for attempt in allowed[:3]] == ["'mine'", "7", "True"]
    if "Landlock" in held:
        assert {found[attempt] for attempt in others} == {"PermissionError"}
    assert (mine.read_text(), out.read_bytes(), mark.exists()) == ("mine", b"tensors", False)


@pytest.mark.slow
def test_a_module_in_the_folder_is_not_run(make_model: MakeModel, cache: Path, tmp_path: Path) -> None:
    """Though the command is given in that folder."""
    source, mark = make_model("opt"), tmp_path / "ran"
    pickle_model(source)
    blob = (source / "pytorch_model.bin").rename(source.parent / "blob")  # elsewhere, as in the Hub's cache
    (source / "pytorch_model.bin").symlink_to(blob)
    for name in ("json", "torch"):
        (source / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    code = f"import sys; sys.path[:] = {[p for p in sys.path if p]!r} + ['']; from gptq.checkpoint import pickled\n"
    code += "from pathlib import Path; sys.path.insert(0, '.'); print(pickled.convert_pickles(Path('.')))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=source, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_who_waits_for_a_conversion_and_is_interrupted_leaves_it_alone(
    make_model: MakeModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("opt")
    pickle_model(source)
    at_work: list[Path] = []

    def interrupted(path: Path) -> None:
        partial = path.with_suffix(".partial")  # another process has the lock, and writes there
        partial.mkdir()
        at_work.append(partial)
        raise KeyboardInterrupt

    monkeypatch.setattr(pickled, "_lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pickled.convert_pickles(source)
    assert at_work[0].is_dir()


def test_the_files_that_come_along_are_those_that_were_looked_at(make_model: MakeModel, tmp_path: Path) -> None:
    source, private = make_model("opt"), tmp_path / "private.txt"
    tensors = pickle_model(source)
    private.write_text("private")
    (source / "1_Pooling").mkdir()
    setting = source / "1_Pooling" / "config.json"
    setting.write_text('{"pooling": "mean"}')
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "a.txt").symlink_to(private)
    (source / "many").mkdir()
    for number in range(1001):
        (source / "many" / str(number)).symlink_to(private)
    first = resolve(str(source), None, allow_pickle=True)
    assert {path.name for path in first.rglob("*") if path.is_dir()} == {"1_Pooling"}
    assert (first / "1_Pooling" / "config.json").read_text() == '{"pooling": "mean"}'
    setting.write_text('{"pooling": "cls"}')  # of a file that comes along, the conversion knows too
    again = resolve(str(source), None, allow_pickle=True)
    assert (again / "1_Pooling" / "config.json").read_text() == '{"pooling": "cls"}'
    assert load_file(again / "model.safetensors").keys() == tensors.keys() - {"lm_head.weight"}


def test_copies_of_shared_embeddings_fit(tmp_path: Path) -> None:
    """As in T5 1.1: one embedding under three names, which are all kept where the configuration ties nothing."""
    folder = tmp_path / "model"
    folder.mkdir()
    shared, names = torch.zeros(2**19, 40), [f"{part}.weight" for part in ("shared", "encoder", "decoder")]  # 84 MB
    torch.save(dict.fromkeys(names, shared), folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    converted = resolve(str(folder), None, allow_pickle=True)
    assert {name: tuple(t.shape) for name, t in load_file(converted / "model.safetensors").items()} == dict.fromkeys(
        names, (2**19, 40)
    )


def test_blocks_that_share_memory_have_each_its_own(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("qwen2", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(source)
    shared = model.state_dict()
    for name in [name for name in shared if name.startswith("model.layers.1.")]:
        shared[name] = shared[name.replace("layers.1.", "layers.0.")]
    (source / "model.safetensors").unlink()
    torch.save(shared, source / "pytorch_model.bin")
    out = tmp_path / "out"
    quantize(source, out, CONFIG, calibration=torch.ones(8, 16, dtype=torch.long), allow_pickle=True)
    assert verify.verify(out).problems == []
    names = load_file(out / "model.safetensors").keys()
    assert any(name.startswith("model.layers.1.") for name in names)
    assert "lm_head.weight" not in names
