"""The command line as a person or a script meets it: names, JSON, exit codes, sentences instead of tracebacks."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gptq import InputError, QuantConfig, cli, quantize
from gptq import __main__ as start_up
from gptq.__main__ import main as run_main
from gptq.cli import interrupts
from gptq.cli.progress import Progress
from gptq.compute.distributed import process_group
from gptq.output import record
from gptq.output.results import RECORD
from tests.conftest import MakeModel

FAST = ["--group-size", "32", "--samples", "4", "--seq-len", "32"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_quantize_eval_inspect_verify_in_json(
    make_model: MakeModel, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    code, printed, progress = run(capsys, "quantize", source, out, *FAST, "--calibration", text_file, "--json")
    assert code == 0
    made = json.loads(printed)
    assert {"bits_per_weight", "bytes_before", "bytes_after", "layers", "seconds", "peak_rss_bytes"} <= made.keys()
    assert {"name", "bits", "group_size", "error", "damp", "seconds"} <= made["layers"][0].keys()
    assert made["bytes_before"] == (source / "model.safetensors").stat().st_size
    assert made["bytes_after"] == (out / "model.safetensors").stat().st_size
    assert re.search(r"block 1 of 2, \d+ s\nblock 2 of 2, \d+ s\n", progress)  # nothing yet to estimate the rest from

    for model in (source, out):
        code, printed, _ = run(capsys, "eval", model, "--data", text_file, "--seq-len", "32", "--windows", 3, "--json")
        assert code == 0
        assert {"perplexity", "tokens", "windows"} <= json.loads(printed).keys()
        assert json.loads(printed)["tokens"] == 3 * 31

    code, printed, _ = run(capsys, "inspect", out, "--json")
    assert code == 0
    content = json.loads(printed)
    assert [layer["error"] for layer in content["layers"]].count(None) == 0
    assert content["bits_per_weight"] == pytest.approx(made["bits_per_weight"])

    code, printed, _ = run(capsys, "verify", out, "--json")
    assert (code, json.loads(printed)["ok"]) == (0, True)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qweight"][0, 0] ^= 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    code, printed, _ = run(capsys, "verify", out)
    assert code == 1
    assert "model.layers.0.mlp.up_proj" in printed


def test_printed_for_people(
    make_model: MakeModel, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_model("opt"), tmp_path / "out"
    code, printed, _ = run(capsys, "quantize", source, out, "--bits", 3, *FAST, "--calibration", text_file)
    assert code == 0
    assert "12 layers at" in printed
    code, printed, _ = run(capsys, "inspect", out)
    assert code == 0
    known = json.loads(run(capsys, "inspect", out, "--json")[1])["engines"]
    assert len(printed.splitlines()) == 1 + 12 + 1 + len(known)  # a line per layer, and one per engine
    code, printed, _ = run(capsys, "eval", out, "--data", text_file, "--windows", 2)
    assert code == 0
    assert printed.startswith("perplexity ")
    code, printed, _ = run(capsys, "verify", out)
    assert code == 0
    assert "as it was written" in printed
    shutil.copytree(out, tmp_path / "damaged")
    (shard,) = (tmp_path / "damaged").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, printed, _ = run(capsys, "verify", tmp_path / "damaged")
    found = json.loads(run(capsys, "verify", tmp_path / "damaged", "--json")[1])["problems"]
    lines = printed.splitlines()
    assert (code, lines[:20]) == (1, found[:20])  # of thousands, say, the first
    assert lines[20] == f"... and {len(found) - 20} more; --json has all of them"
    code, printed, _ = run(capsys, "report", out)
    assert code == 0
    assert printed.startswith(f"{out / 'report' / 'index.html'}\n{out / 'report' / 'errors.svg'}\n")


def test_eval_against_the_original_says_how_sure_it_is_and_keeps_it(
    make_model: MakeModel, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    assert run(capsys, "quantize", source, out, "--method", "rtn", "--group-size", 32)[0] == 0
    measure = ["eval", out, "--against", source, "--data", text_file, "--seq-len", 32]
    code, printed, _ = run(capsys, *measure, "--windows", 3, "--json", "--save")
    found = json.loads(printed)
    assert code == 0
    assert found["intervals"].keys() == {"perplexity", "original_perplexity", "gap", "kl", "top1_agreement"}
    assert 0 < found["intervals"]["kl"][0] <= found["kl"] <= found["intervals"]["kl"][1]
    assert json.loads((out / "quality.json").read_text()) == {
        "measurements": [{"data": text_file, "original": str(source), **found}]
    }
    code, printed, _ = run(capsys, *measure, "--windows", 1)
    assert code == 0
    assert "KL per token" in printed
    assert "one window gives no interval" in printed
    assert run(capsys, "verify", out)[0] == 0
    code, _, errors = run(capsys, "eval", "nobody/nothing", "--data", text_file, "--save")
    assert (code, "nobody/nothing: no such folder" in errors) == (2, True)


def test_a_models_limit_shortens_windows_and_says_so(
    make_model: MakeModel, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, progress = run(
        capsys, "quantize", make_model("gpt2"), tmp_path / "out", "--samples", 2, "--calibration", text_file
    )
    assert code == 0
    assert "windows are 64 tokens, the model's limit, instead of 2048" in progress


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "9"], "bits is 9; a code has 2 to 8 bits"),
        (["--bits", "5", "--format", "gptq"], "GPTQ files hold 2, 3, 4 or 8 bits, not 5"),
        (["--group-size", "0"], "group_size is 0"),
        (["--damp-percent", "-1"], "damp_percent is -1"),
        (["--samples", "100000"], "100000 windows need 3200000"),
        (["--calibration", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["--device", "meta"], "the device is 'meta'"),
    ],
)
def test_bad_options_are_a_sentence_and_exit_code_2(
    options: list[str], message: str, make_model: MakeModel, text_file: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, out = make_model("llama"), tmp_path / "out"
    code, printed, errors = run(capsys, "quantize", source, out, *FAST, "--calibration", text_file, *options)
    assert (code, printed) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_bad_models_are_a_sentence_and_exit_code_2(
    make_model: MakeModel, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "file"
    file.touch()
    for model, message in (
        (tmp_path / "nowhere", "no such folder"),
        ("nobody/nothing", "neither a folder nor a model that the Hub could give"),
        ("not a name!", "neither a folder nor a model that the Hub could give"),
        (tmp_path / "empty", "is it a model folder?"),
        (file, "is a file"),
    ):
        for command in (
            ["quantize", model, tmp_path / "out", "--calibration", text_file],
            ["eval", model, "--data", text_file],
        ):
            code, printed, errors = run(capsys, *command)
            assert (code, printed) == (2, "")
            assert message in errors
    plain = make_model("llama")
    for name in ("inspect", "verify"):
        code, _, errors = run(capsys, name, plain)
        assert code == 2
        assert "not a quantized checkpoint" in errors
    assert not (tmp_path / "out").exists()


WITHOUT_TORCH = """
import contextlib, io, json, sys
from gptq import cli
found = []
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = cli.main(arguments)
        except SystemExit as ended:  # argparse
            code = ended.code
    found.append([code, said.getvalue(), "torch" in sys.modules or "transformers" in sys.modules])
print(json.dumps(found))
"""
MISTAKES = {
    "quantize model out --samples 0": "num_samples is 0; at least one window is needed",
    "quantize model out --samples many": "'many' is neither a number nor 'auto'",
    "quantize model out --bits four": "argument --bits: 'four' is not a whole number",
    "quantize model out --damp-percent little": "argument --damp-percent: 'little' is not a number",
    "quantize model out --batch-size 0": "argument --batch-size: 0 is less than 1",
    "quantize model out --memory-limit 0": "argument --memory-limit: '0' is no room at all",
    "quantize model out --device gpu": "the device is 'gpu'; it is auto, cpu, cuda, or cuda:N",
    "quantize model out --dtype int8": "dtype is 'int8'; it is auto, float32, bfloat16 or float16",
    "quantize model out --override up_proj:skip=maybe": "override 'up_proj': skip is 'maybe'; it is true or false",
    "quantize model out --format mlx --format mlx": "--format is given twice with the same format",
    "quantize model out --calibration {missing}/book.txt": "book.txt: no such file or folder",
    "quantize model out --calibration rows.csv": "rows.csv: no such file or folder",
    "quantize model out --calibration empty.txt": "empty.txt is empty",
    "quantize model full": "full exists and is not empty; choose another name or remove it",
    "quantize model empty.txt/out": "empty.txt/out cannot be made, because {here}/empty.txt is a file",
    "quantize ./missing out": "missing: no such folder",
    "quantize empty.txt out": "empty.txt is a file; give the folder that holds config.json",
    "quantize full out": "full has no config.json; is it a model folder?",
    "quantize broken out": "broken/config.json is not JSON: ",
    "quantize list out": "list/config.json holds no JSON object, which begins with {{",
    "plan hollow": "hollow/config.json is empty",
    "plan nested": "nested/config.json is no plain file",
    "convert model full --format gptq_v2": "full exists and is not empty; choose another name or remove it",
    "eval model --data {missing}/book.txt": "book.txt: no such file or folder",
    "eval model --data text.txt --against {missing}": "missing: no such folder",
    "eval model --data text.txt --seq-len 1": "--seq-len is 1; a window has at least 2 tokens",
    "eval model --data text.txt --windows 0": "argument --windows: 0 is less than 1",
    "quantize model out --calibraton x": "gptq quantize: unknown argument --calibraton, did you mean --calibration?",
    "quantize model out --memory-limit 3 GB": "gptq quantize: unknown argument GB; see `gptq quantize --help`",
    "quantize model": "gptq quantize: the following arguments are required: OUT; see `gptq quantize --help`",
    "eval nobody/nothing --data text.txt --save": "nobody/nothing: no such folder; --save needs a folder",
    "eval model --data text.txt --card": "--card writes into the model card of a result of gptq, and model has no",
    "inspect nobody/nothing": "nobody/nothing: no such folder; inspect needs a folder on this machine",
    "verify empty.txt": "empty.txt is a file; give the folder that holds config.json",
    "report missing": "missing: no such folder; report needs a folder",
    "report model --to empty.txt": "empty.txt is a file; --to names a folder",
    "quantize model out --revision main": "--revision names a version on the Hub, and model is a folder",
}


def test_a_mistake_that_needs_no_library_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    for name, content in (("model", "{}"), ("broken", "{\n"), ("list", "[]"), ("hollow", ""), ("nested", None)):
        (tmp_path / name / "config.json").mkdir(parents=True) if content is None else (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "full").mkdir()
    for name in ("full/file", "empty.txt"):
        (tmp_path / name).touch()
    (tmp_path / "text.txt").write_text("text")
    paths = {"missing": tmp_path / "missing", "here": tmp_path}
    commands = [arguments.format(**paths).split() for arguments in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps(commands), capture_output=True, text=True, cwd=tmp_path
    )
    for (code, said, imported), (arguments, message) in zip(json.loads(done.stdout), MISTAKES.items(), strict=True):
        assert (code, imported) == (2, False), arguments
        assert message.format(**paths) in said, arguments
        assert re.fullmatch(r"gptq( \w+)?: [^\n]*\n", said), said
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "broken", "list", "hollow", "nested", "full", "empty.txt", "text.txt",
    }  # fmt: skip


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_bad_input(make_model: MakeModel, text_file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["quantize", str(make_model("llama")), str(out), *FAST, "--calibration", text_file]) == 0
    command = [sys.executable, "-m", "gptq", "inspect", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("stderr_works", [True, False])
def test_messages_that_cannot_be_printed_are_no_difference(
    stderr_works: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By itself Python ends with 1, which is verify's."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gptq.cli.arguments.main", full)
    if not stderr_works:
        monkeypatch.setattr("builtins.print", full)
    assert start_up.main() == 2
    assert capsys.readouterr().err == ("gptq: the system: No space left on device\n" if stderr_works else "")


def test_processes_that_do_not_meet_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(*_: object) -> None:
        raise RuntimeError("Connection reset by peer\nframes")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr("torch.distributed.init_process_group", alone)
    with pytest.raises(InputError, match=r"of this run did not meet: Connection reset by peer$"), process_group("cpu"):
        pass


def test_an_interrupt_ends_the_wait_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, until = threading.Event(), time.monotonic() + 5

    def wait_as_torch_does(*_: object) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        while time.monotonic() < until and not ended.is_set():
            with suppress(KeyboardInterrupt):
                ended.wait(0.05)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr("torch.distributed.init_process_group", wait_as_torch_does)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        with pytest.raises(KeyboardInterrupt), process_group("cpu"):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()


def test_a_closed_output_is_no_fault(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize = ["quantize", str(make_model("llama")), str(tmp_path / "out"), "--group-size", "32", "--method", "rtn"]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)  # as Python has it after `>&-`
        assert cli.main(quantize) == 0
    assert run(capsys, "verify", tmp_path / "out")[0] == 0


def test_remote_code_is_not_run_unless_asked_for(
    make_model: MakeModel, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model("llama")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    code, _, errors = run(capsys, "quantize", source, tmp_path / "out", "--calibration", text_file)
    assert code == 2
    assert "config.json could not be used" in errors
    assert not (tmp_path / "ran").exists()


def test_a_file_with_code_of_its_own_is_verified_without_running_it(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    quantize(source, out, QuantConfig(method="rtn", group_size=32))
    (out / RECORD).unlink()
    config = json.loads((out / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (out / "config.json").write_text(json.dumps(config))
    (out / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    )
    code, printed, _ = run(capsys, "verify", out)
    assert code == 0
    assert "its tensors were not compared with what it describes; --trust-remote-code runs it" in printed
    assert "every tensor compared" not in printed
    assert not (tmp_path / "ran").exists()
    known = {**config, "model_type": "llama", "num_hidden_layers": 4000}  # needs no code of its own, and is wrong
    (out / "config.json").write_text(json.dumps(known))
    assert run(capsys, "verify", out)[0] == 1
    (out / "config.json").write_text(json.dumps(config))
    code, printed, _ = run(capsys, "verify", out, "--trust-remote-code")
    assert code == 0
    assert "every tensor compared with the model that config.json describes" in printed
    assert (tmp_path / "ran").exists()


def interruptible(command: list[str]) -> "subprocess.Popen[str]":
    """A process that Ctrl-C reaches, even if these tests run in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_until_it_imports(pid: int) -> None:
    """Until a process has begun to load torch, which the command line imports; by the clock where there is no /proc."""
    maps = Path(f"/proc/{pid}/maps")
    for _ in range(600):
        time.sleep(0.05)
        if maps.is_file() and "/torch/lib/" in maps.read_text():
            return
    time.sleep(1)


@pytest.mark.slow
def test_ctrl_c_is_a_sentence_and_leaves_what_is_finished(
    make_model: MakeModel, text_file: str, tmp_path: Path
) -> None:
    source = make_model("llama", num_hidden_layers=60)
    command = [
        sys.executable,
        "-m",
        "gptq",
        "quantize",
        str(source),
        str(tmp_path / "out"),
        "--samples",
        "32",
        "--seq-len",
        "64",
    ]
    process = interruptible([*command, "--calibration", text_file])
    assert process.stderr is not None
    assert any(line.startswith("block 3") for line in process.stderr)  # two are finished
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(
        r"interrupted; .*out\.partial keeps \d+ finished of 60 blocks, and the command that began it goes on", errors
    )
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]


def test_ctrl_c_during_start_up_is_a_sentence_too() -> None:
    process = interruptible([sys.executable, "-m", "gptq", "demo"])
    wait_until_it_imports(process.pid)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_the_time_left_is_that_of_blocks_after_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of four took 50 s, most of them for compiling; the others take 2 s each."""
    clock = iter([0.0, 0.0, 0.0, 0.0, 50.0, 50.0, 52.0, 52.0, 54.0, 54.0])
    monkeypatch.setattr("gptq.cli.progress.time.monotonic", lambda: next(clock))
    progress = Progress()
    progress.started(4, 400)
    for block in range(4):
        progress.layer_done(block, "layer", 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "block 1 of 4, 0 s", "block 2 of 4, 50 s", "block 3 of 4, 52 s, about 4 s left",
        "block 4 of 4, 54 s, about 2 s left",
    ]  # fmt: skip


def test_a_bar_is_drawn_on_a_terminal(
    make_model: MakeModel,
    text_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, progress = run(capsys, "quantize", make_model("llama"), tmp_path / "o", *FAST, "--calibration", text_file)
    assert code == 0
    assert "block 2/2 down_proj" in progress
    assert "100%" in progress


ARGUMENTS = """
import sys
from gptq.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("torch" in sys.modules or "transformers" in sys.modules, end.code)
"""


def test_a_width_for_all_and_widths_for_each_are_a_contradiction(capsys: pytest.CaptureFixture[str]) -> None:
    for target in (["--target-bits", "3.5"], ["--target-size", "1GB"]):
        with pytest.raises(SystemExit) as end:
            run(capsys, "quantize", "MODEL", "OUT", "--bits", "3", *target)
        assert end.value.code == 2
        assert "--bits is the width of all layers" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [(["quantize", "--help"], 0), (["quantize", "MODEL"], 2)])
def test_arguments_are_read_before_the_libraries(arguments: list[str], code: int) -> None:
    """Which take seconds."""
    done = subprocess.run([sys.executable, "-c", ARGUMENTS, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"False {code}"


def interrupt_inside_a_library(number: int, *_: object, **__: object) -> None:
    try:
        os.kill(os.getpid(), number)
        time.sleep(5)
    except KeyboardInterrupt as error:
        raise ValueError("a library's own words") from error


class Callback:
    """An object whose finalizer runs Python, from which no exception comes out."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0.001)


def interrupt_inside_a_finalizer(number: int, *_: object, **__: object) -> None:
    """As a signal that arrives while Python collects garbage: the work must not go on as if nothing had been asked."""
    Callback(number)
    time.sleep(5)
    raise AssertionError("the interrupt got lost")


def raises(error: Exception, *_: object, **__: object) -> None:
    raise error


NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("does", "code", "said"),
    [
        (partial(interrupt_inside_a_library, signal.SIGINT), 130, "interrupted; nothing half-written was left behind"),
        (partial(interrupt_inside_a_library, signal.SIGTERM), 143, "interrupted; nothing half-written was left behind"),
        (partial(interrupt_inside_a_finalizer, signal.SIGINT), 130, "interrupted; nothing half-written"),
        (partial(interrupt_inside_a_finalizer, signal.SIGTERM), 143, "interrupted; nothing half-written"),
        (
            partial(raises, KeyError("weight")),
            3,
            "KeyError in .*'weight'; this is a fault of gptq or of a library",
        ),
        (partial(raises, MemoryError()), 2, "out of memory .MemoryError.; fewer --samples .*; nothing half-written"),
        (
            partial(raises, RuntimeError("could not create a primitive")),
            2,
            "out of memory .could not create a primitive",
        ),
        (partial(raises, RuntimeError(NO_MEMORY)), 2, "out of memory .*; fewer --samples .*; nothing half-written was"),
    ],
)
def test_what_a_library_raises_is_a_sentence_and_no_difference(
    does: Any, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("gptq.cli.commands.verify.verify", does)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["verify", str(tmp_path)]) == code
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert re.search(said, lines[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_comes_back_too_early_is_not_lost_either(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a busy machine: it is sent again while Python still tells of the one before."""
    start = threading.Thread.start

    def start_and_take_long(thread: threading.Thread) -> None:
        start(thread)
        time.sleep(0.05)

    monkeypatch.setattr(interrupts, "AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(threading.Thread, "start", start_and_take_long)
    monkeypatch.setattr("gptq.cli.commands.verify.verify", partial(interrupt_inside_a_finalizer, number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["verify", str(tmp_path)]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert "interrupted; nothing half-written" in lines[0]


MANY_SIGNALS = """
import os, subprocess, sys, time
from gptq.cli.interrupts import noticing_interrupts

SENDER = "import os, sys\\nfor i in range(30000): os.kill(int(sys.argv[1]), (2, 15)[i % 2])"
raised = 0

def outlast(end, levels):  # an interrupt inside one level's `except` is caught by the next
    global raised
    while time.monotonic() < end:
        try:
            if levels:
                outlast(end, levels - 1)
        except KeyboardInterrupt:
            raised += 1

with noticing_interrupts() as seen:
    subprocess.Popen([sys.executable, "-c", SENDER, str(os.getpid())])
    outlast(time.monotonic() + 10, 20)
print(len(seen), raised)
"""


@pytest.mark.slow
def test_signals_that_arrive_while_others_are_handled_block_nothing() -> None:
    found = subprocess.run([sys.executable, "-c", MANY_SIGNALS], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    noticed, raised = map(int, found.stdout.split())
    assert noticed >= raised > 1


def test_an_interrupt_comes_through_after_a_thread_could_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts.noticing_interrupts():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", fails)
                with pytest.raises(RuntimeError, match="start new thread"):
                    sys.unraisablehook(SimpleNamespace(exc_type=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_names_that_are_not_utf_8_and_the_root_of_everything(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model(), tmp_path / "out"
    assert cli.main(["quantize", str(source), "/", "--method", "rtn"]) == 2
    assert "root of the file system" in capsys.readouterr().err
    assert cli.main(["quantize", str(source), str(out), "--method", "rtn", "--group-size", "32"]) == 0
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfc"))
    out.rename(odd)
    buffers = [io.BytesIO(), io.BytesIO()]
    streams = [io.TextIOWrapper(buffer, encoding="ascii") for buffer in buffers]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    for command, code in (("report", 0), ("verify", 2), ("inspect", 2), ("plan", 2)):
        monkeypatch.setattr(sys, "argv", ["gptq", command, str(odd)])
        assert run_main() == code
    for stream in streams:
        stream.flush()
    said = b"".join(buffer.getvalue() for buffer in buffers)
    assert b"\\udcfc/report/index.html" in said
    assert said.count(b"its path is not UTF-8; rename the folder") == 3
    assert "<h1>\\udcfc" in (odd / "report" / "index.html").read_text(encoding="utf-8")
    assert record.model_name(odd) == "\\udcfc"


def test_control_characters_in_a_name_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().stage("reading calibration data from \u202eabc\x1b[2J.txt")
    assert capsys.readouterr().err == "reading calibration data from \\u202eabc\\x1b[2J.txt\n"


def test_a_plan_is_of_the_run_that_would_follow(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model("llama")
    code, _, said = run(capsys, "plan", source, "--group-size", "32", "--target-bits", "1")
    assert code == 2
    assert "at their smallest" in said
    code, _, said = run(capsys, "plan", source, "--group-size", "32", "--method", "rtn", "--ranks", "2")
    assert code == 2
    assert "leave --ranks out" in said

    def planned(*more: object) -> dict[str, Any]:
        code, out, _ = run(capsys, "plan", source, "--group-size", "32", "--json", *more)
        assert code == 0
        found: dict[str, Any] = json.loads(out)
        return found

    text, nothing = planned(), planned("--method", "rtn")
    assert nothing["in_flight"] == 0
    assert nothing["peak_bytes"] < text["peak_bytes"]
    ids = np.ones((10, 16), dtype=np.int64)
    np.savez(tmp_path / "few.npz", input_ids=ids, attention_mask=ids)
    few = planned("--calibration", tmp_path / "few.npz")
    assert few["in_flight"] == 10
    assert few["operations"] < text["operations"] / 20
