"""Fuzz everything that reads a file with damaged and hostile files; print each violation once, and how to see it again.

    python scripts/fuzz_readers.py --changes 10000 --seed 1
    python scripts/fuzz_readers.py --again 'verify model/gptq config.json:123 model.safetensors:7'

The script makes small valid inputs of every kind (`fuzz_seeds.py`), changes files of one of them (`fuzz_changes.py`),
and runs one command, or one reader, on the result: a target. A change that takes a branch of the package that none took
before is kept, and changed further (from Python 3.12 on; `--reached` lists what was never reached).

The laws: a target ends with success, or with one sentence that names a file or tensor. It takes at most SECONDS of the
processor, ADDITIONAL_BYTES of address space and RESIDENT_BYTES of memory beyond what was there. It prints no control
characters, reads nothing outside the folder, writes nothing but its result, and leaves nothing incomplete. `verify`
finds every changed byte of a recorded file; a conversion of a damaged file is refused or is found by `verify`; a run
that goes on writes the bytes of an undisturbed one; a GGUF file is read as the package gguf reads it.

Targets run in a forked process, which is replaced when a change kills it. The same seed makes the same changes as long
as the code is the same. The script exits with 1 if it has found anything.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import fuzz_changes
import fuzz_seeds
import torch
import transformers
from torch import Tensor

import gptq
from gptq import InputError, QuantConfig, cli, formats, load, quantize
from gptq.calibration.windows import make_windows, read_calibration
from gptq.checkpoint import pickled, unpickle
from gptq.checkpoint.assembled import open_source
from gptq.checkpoint.gguf import GgufFiles
from gptq.checkpoint.untrusted import check_folder
from gptq.evaluation.quality import read_measurements
from gptq.formats import name_rules
from gptq.formats.original import open_original
from gptq.formats.packed_layers import packed_layers, read_packed
from gptq.formats.quantization_config import quantization_of, read_quantization
from gptq.models.build import open_model
from gptq.models.hf_config import read_tokenizer
from gptq.output import verify
from gptq.output.record import read_record
from gptq.output.results import RECORD
from gptq.pipeline.journal import Journal
from gptq.planning import cost

ADDITIONAL_BYTES, RESIDENT_BYTES = 2 * 2**30, 512 * 2**20  # beyond what was there before
SECONDS = 20  # of the processor, for one change
WALL_SECONDS = 300  # until a target that never returns to Python is killed
LIFE = 3000  # changes until the working process is replaced
MOST_EDITS = 4  # changes of files that are made at once
PACKAGE = str(Path(gptq.__file__).parent) + os.sep
UNRECORDED = {RECORD, "quality.json"}  # files of a result that `verify` does not compare with the record
MONITORING: Any = getattr(sys, "monitoring", None)  # Python's, from 3.12 on
Edits = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Change:
    """Changes to the files of one input, and the target to run on the result."""

    target: str
    seed: str
    edits: Edits

    def __str__(self) -> str:
        return " ".join([self.target, self.seed, *(f"{file}:{number}" for file, number in self.edits)])

    @staticmethod
    def parse(text: str) -> "Change":
        target, seed, *edits = text.split(" ")
        return Change(target, seed, tuple((name, int(n)) for name, _, n in (edit.rpartition(":") for edit in edits)))


@dataclass
class Case:
    """A changed input on disk, and what belongs to it."""

    folder: Path  # the changed input
    place: Path  # everything of this case is in it
    original: Path  # the input before it was changed
    seeds: dict[str, Path]
    draw: random.Random  # for choices of the target
    found: dict[str, Tensor] = field(default_factory=dict)  # what a reader read

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def file(self) -> Path:
        """The one file that is changed, or the folder if there are several."""
        files = list(self.original.iterdir())
        return self.folder / files[0].name if len(files) == 1 else self.folder


@dataclass(frozen=True)
class Target:
    """A command or a reader."""

    run: Callable[[Case], int | None]  # returns an exit code; may raise InputError
    kinds: tuple[str, ...]  # of inputs, the word before the slash
    weight: int  # how often, relative to the others
    judge: Callable[[Case, int], str | None] = lambda case, code: None  # what is wrong with the result
    writes: bool = False  # into the folder


# --- readers ----------------------------------------------------------------------------------------------------------


def _read(case: Case) -> None:
    """Read a checkpoint as everything does that opens one, without building its model."""
    check_folder(case.folder)
    said = quantization_of(case.folder)
    source = open_source(case.folder)
    left = set(source.tensors)
    if said is not None:
        packed = packed_layers(source, read_quantization(case.folder / "config.json", said))
        for name, layer in packed.items():
            formats.decode(read_packed(source, name, layer), layer.scheme).weight()
            left -= {f"{name}.{suffix}" for suffix in layer.suffixes}
    for name in sorted(left):
        source.read(name)


def _read_original(case: Case) -> None:
    """Read a checkpoint as one that is to be quantized, decoded."""
    check_folder(case.folder)
    source = open_original(case.folder)
    for name in source.tensors:
        source.read(name)


def _read_gguf(case: Case) -> None:
    """Read a GGUF file; compare what it holds with what the package gguf reads in it."""
    check_folder(case.folder)
    files = GgufFiles([case.folder / "model.gguf"])
    case.found = {name: files.read_floats(name, None) for name in files.floats}


def _judge_gguf(case: Case, code: int) -> str | None:
    if code != 0:
        return None
    import gguf
    import numpy as np

    try:
        reader = gguf.GGUFReader(case.folder / "model.gguf")
        theirs = {}
        for tensor in reader.tensors:
            if tensor.name in case.found:
                with np.errstate(all="ignore"):
                    theirs[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type)
    except Exception:  # it takes less than ours, or another version
        return None
    for name, values in theirs.items():
        mine = case.found[name].float().numpy()
        if mine.shape != values.shape or not np.allclose(mine, values, rtol=1e-3, atol=1e-30, equal_nan=True):
            return f"{name.split('.')[0]} is not what the package gguf reads"
    return None


def _read_records(case: Case) -> None:
    check_folder(case.folder)
    for read in (read_record, read_measurements):
        with contextlib.suppress(InputError):
            read(case.folder)
    read_record(case.folder)


def _read_tokenizer(case: Case) -> None:
    """Read a tokenizer, and use it on a text and a chat."""
    check_folder(case.folder)
    config = QuantConfig(num_samples=1, seq_len=16)
    with contextlib.suppress(InputError):
        _windows(case.seeds["data/a.txt"] / "a.txt", case.folder, config, case)
    _windows(case.seeds["data/chats.jsonl"] / "chats.jsonl", case.folder, config, case)
    read_tokenizer(case.folder, False)


def _read_data(case: Case) -> None:
    config = QuantConfig(num_samples=2, seq_len=16)
    _windows(case.file, case.seeds["model/plain"], config, case)


def _windows(data: Path, model: Path, config: QuantConfig, case: Case) -> None:
    calibration = read_calibration(str(data), config, model)
    make_windows(calibration, 2, model, _network(case.seeds["model/plain"]), config, False)


@functools.cache
def _network(folder: Path) -> Any:
    return open_model(open_source(folder), False).network


def _read_media(case: Case) -> None:
    processor = _processors[case.original.name]
    read_calibration(str(case.file), QuantConfig(num_samples=2, seq_len=16), processor)


_processors: dict[str, Path] = {}


def _read_journal(case: Case) -> None:
    journal = Journal(case.folder)
    journal.describe_kept(2)
    journal.is_worth_keeping()


def _unpickle(case: Case) -> None:
    """Convert pickles as the confined process does, without confining."""
    check_folder(case.folder)
    file = case.folder
    try:
        for file in pickled.find_pickles(case.folder):
            with (case.place / "made.safetensors").open("wb") as out:
                unpickle.convert(file, out, drop_tied=case.draw.random() < 0.5)
    except (unpickle.UnreadableError, MemoryError, OSError) as error:  # of which `unpickle.main` makes sentences
        raise InputError(f"{file} {error}") from error


def _unpickle_confined(case: Case) -> None:
    """Convert pickles in a process of their own, forked, which confines itself."""
    check_folder(case.folder)
    files = pickled.find_pickles(case.folder)
    if files:
        with contextlib.ExitStack() as stack:
            outs = [
                stack.enter_context((case.place / f"{i}.safetensors").open("wb")).fileno() for i in range(len(files))
            ]
            _fork({"files": list(map(str, files)), "descriptors": outs, "drop_tied": True, "seconds": 10}, outs)


def _fork(request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    """Do as `pickled._run` in a forked process, which need not import torch."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            sys.stdin = io.StringIO(json.dumps(request))
            sys.stdout = os.fdopen(writing, "w")
            unpickle.main()
            sys.stdout.flush()
            status = 0
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as opened:
        said = opened.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"the confined process ended with {status}")
    reply: dict[str, Any] = json.loads(said)
    if "error" in reply:
        raise InputError(reply["error"])
    return reply


def _allow_pickle(case: Case) -> int:
    """Quantize a model whose weights are pickled."""
    command = ["quantize", str(case.folder), str(case.out), "--method", "rtn", "--group-size", "16", "--allow-pickle"]
    with mock.patch.object(pickled, "_run", _fork), mock.patch.object(pickled, "SECONDS", 10):
        return cli.main(command)


def _read_lenet(case: Case) -> None:
    from lenet_baseline import compare, integer, model

    with contextlib.suppress(InputError):
        model.load(case.folder / "float.safetensors")
    with contextlib.suppress(InputError):
        integer.load_integers(case.folder / "int8.safetensors")
    compare.read_results(case.folder)


def _draw_lenet(case: Case) -> None:
    from lenet_baseline import compare, plots

    plots.draw(compare.read_results(case.folder), case.place)


# --- commands ---------------------------------------------------------------------------------------------------------


def _command(*arguments: str) -> Callable[[Case], int]:
    """A command line; {model}, {out}, {data} and {plain} stand for paths."""

    def run(case: Case) -> int:
        places = {"model": case.folder, "out": case.out, "plain": case.seeds["model/plain"]}
        places["data"] = case.seeds.get("data/a.txt", case.place) / "a.txt"
        return cli.main([argument.format(**places) for argument in arguments])

    return run


def _load(case: Case) -> None:
    load(case.folder, device="cpu")


def _convert(case: Case) -> int:
    chosen = case.draw.choice(["gptq", "gptq_v2", "pack-quantized", "gguf", "mlx", "int-quantized"])
    return cli.main(["convert", str(case.folder), str(case.out), "--format", chosen])


def _copy_partial(case: Case) -> None:
    """Copy the changed OUT.partial beside OUT, with pipes as pipes."""

    def copy(source: str, to: str) -> None:
        (os.mkfifo if Path(source).is_fifo() else functools.partial(shutil.copy2, source))(to)

    shutil.copytree(case.folder, case.place / "out.partial", symlinks=True, copy_function=copy)


def _polish_on(case: Case) -> None:
    """Go on with a polishing whose OUT.partial was changed."""
    _copy_partial(case)
    fuzz_seeds.polish_again(case.original.parent, case.out)


def _go_on(case: Case) -> None:
    """Go on with a run whose OUT.partial was changed."""
    _copy_partial(case)
    windows = torch.arange(32).reshape(2, 16) + 3
    quantize(case.original.parent / "plain", case.out, fuzz_seeds.RESUMED, calibration=windows, device="cpu")


WINDOWS = ["--seq-len", "16", "--device", "cpu"]
CALIBRATED = [
    "quantize",
    "{model}",
    "{out}",
    "--group-size",
    "16",
    "--samples",
    "2",
    "--calibration",
    "{data}",
    *WINDOWS,
]
MEASURED = ["eval", "{model}", "--data", "{data}", "--windows", "1", *WINDOWS]


# --- what is right ----------------------------------------------------------------------------------------------------


def _tree(folder: Path) -> dict[str, bytes]:
    """The bytes of each plain file, by its path; "" in front of what is something else."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else b"other"
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def _judge_verify(case: Case, code: int) -> str | None:
    """`verify` finds every change of a folder that has a record."""
    before, after = _tree(case.original), _tree(case.folder)
    if code != 0 or before.get(RECORD) != after.get(RECORD) or RECORD not in before:
        return None
    silent = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    silent = sorted(set(silent) - UNRECORDED)
    return f"verify does not see that {Path(silent[0]).suffix} was changed" if silent else None


def _judge_conversion(case: Case, code: int) -> str | None:
    """What `verify` finds wrong with the tensors of a file, it finds wrong with what the file is converted to."""
    before, after = _tree(case.original), _tree(case.folder)
    same_record = before.get(RECORD) == after.get(RECORD) and RECORD in before
    if code != 0 or not same_record:
        return None
    tensors = [
        text for text in _problems(case.folder) if re.match(r"the tensor .* was changed|.* does not unpack", text)
    ]
    if tensors and not _problems(case.out):
        return "a damaged tensor is converted, and verify approves of the result"
    return None


def _problems(folder: Path) -> list[str]:
    try:
        return verify.verify(folder).problems
    except InputError as error:
        return [str(error)]


def _judge_whole(case: Case, code: int) -> str | None:
    """A run that goes on comes to the bytes of an undisturbed one; to its weights, if entries have right checksums."""
    if code != 0:
        return None
    known = Journal(case.original).entries
    forged = any(entry not in known for entry in Journal(case.folder).entries)
    written, right = _tree(case.out), _tree(case.original.parent / "whole")
    names = [name for name in right if name.endswith(".safetensors")] if forged else sorted(right.keys() | written)
    wrong = [name for name in names if written.get(name) != right.get(name)]
    return f"a run that goes on writes another {wrong[0]}" if wrong else None


def _judge_polished(case: Case, code: int) -> str | None:
    """A polishing that goes on comes to the bytes of an undisturbed one."""
    written, right = _tree(case.out), _tree(case.original.parent / "whole")
    wrong = [name for name in sorted(right.keys() | written) if code == 0 and written.get(name) != right.get(name)]
    return f"a polishing that goes on writes another {wrong[0]}" if wrong else None


TARGETS: dict[str, Target] = {
    "read": Target(_read, ("model",), 300),
    "original": Target(_read_original, ("model",), 150),
    "gguf": Target(_read_gguf, ("gguf",), 80, _judge_gguf),
    "records": Target(_read_records, ("model",), 60),
    "unpickle": Target(_unpickle, ("pickle",), 60),
    "journal": Target(_read_journal, ("journal",), 50),
    "lenet": Target(_read_lenet, ("lenet",), 40),
    "data": Target(_read_data, ("data",), 50),
    "media": Target(_read_media, ("media",), 12),
    "tokenizer": Target(_read_tokenizer, ("model",), 30),
    "inspect": Target(_command("inspect", "{model}"), ("model",), 40),
    "verify": Target(_command("verify", "{model}"), ("model",), 40, _judge_verify),
    "load": Target(_load, ("model",), 30),
    "convert": Target(_convert, ("model",), 20, _judge_conversion),
    "report": Target(_command("report", "{model}"), ("model",), 14, writes=True),
    "plan": Target(_command("plan", "{model}", "--group-size", "16", "--override", "up_proj:bits=8"), ("model",), 12),
    "eval": Target(_command(*MEASURED), ("model",), 6),
    "card": Target(_command(*MEASURED, "--card", "--save"), ("model",), 4, writes=True),
    "against": Target(_command(*MEASURED, "--against", "{plain}"), ("model",), 2),
    "quantize": Target(
        _command("quantize", "{model}", "{out}", "--method", "rtn", "--group-size", "16"), ("model",), 5),
    "calibrate": Target(_command(*CALIBRATED, "--effort", "fast"), ("model",), 2),
    "balanced": Target(_command(*CALIBRATED), ("model",), 2),
    "best": Target(_command(*CALIBRATED, "--effort", "best"), ("model",), 1),
    "go-on": Target(_go_on, ("journal",), 4, _judge_whole),
    "polish-on": Target(_polish_on, ("polish",), 6, _judge_polished),
    "polish": Target(
        _command("polish", "{model}", "--against", "{plain}", "--to", "{out}", "--steps", "1", "--samples", "8",
                 "--calibration", "{data}", *WINDOWS), ("model",), 2),
    "allow-pickle": Target(_allow_pickle, ("pickled",), 8),
    "confined": Target(_unpickle_confined, ("pickle",), 4),
    "lenet-plot": Target(_draw_lenet, ("lenet",), 1),
}  # fmt: skip


# --- one change -------------------------------------------------------------------------------------------------------

opened: list[tuple[str, bool]] = []  # paths that Python opened while a target ran, and whether for writing


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and arguments and isinstance(arguments[0], str | bytes | os.PathLike):
        mode, flags = arguments[1], arguments[2] if isinstance(arguments[2], int) else 0
        writing = bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        opened.append((os.fsdecode(arguments[0]), writing))


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Inside, ADDITIONAL_BYTES more of address space can be had; a TimeoutError ends SECONDS of work or of waiting."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} seconds")

    used = time.process_time()

    def look(*_: object) -> None:
        nonlocal used
        if time.process_time() - used < 0.02:
            raise TimeoutError(f"it took more than {SECONDS} seconds, and waits")
        used = time.process_time()

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = signal.signal(signal.SIGPROF, late), signal.signal(signal.SIGALRM, look)
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDITIONAL_BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handlers[0])
        signal.signal(signal.SIGALRM, handlers[1])


def _resident(word: str) -> int:
    """Bytes of memory that this process has (VmRSS), or had most since /proc/self/clear_refs (VmHWM)."""
    found = re.search(rf"{word}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def broken_law(change: Change, seeds: dict[str, Path]) -> str | None:
    """Run a change; return the violation with its place in the code, or None."""
    target, original = TARGETS[change.target], seeds[change.seed]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        folder, outside = place / "model", place / "elsewhere.json"
        shutil.copytree(original, folder)
        outside.write_text('{"bits": 4, "secret": 1}')
        fuzz_changes.apply(folder, change.edits, seeds, outside)
        case = Case(folder, place, original, seeds, random.Random(str(change)))
        before = _listing(folder)
        said = io.StringIO()
        opened.clear()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the largest memory so far is now the current one
        began, memory = time.process_time(), _resident("VmRSS")
        try:
            code = _run(target, case, said)
        except BaseException as error:  # any exception that leaves a target is a violation
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{change.target}: {_place_of(error)}"
        used, grown = time.process_time() - began, _resident("VmHWM") - memory
        wrong = _complaint(target, case, code, said.getvalue(), used, grown) or _written(target, case, before, code)
        return f"{change.target}: {wrong}" if wrong else None


def _run(target: Target, case: Case, said: io.StringIO) -> int:
    with (
        limited(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        warnings.simplefilter("ignore")
        try:
            return target.run(case) or 0
        except InputError as error:
            print(f"gptq: {error}")
            return 2


def _complaint(target: Target, case: Case, code: int, said: str, used: float, grown: int) -> str | None:
    """Check the exit code, the output, time and memory; return the violation, if any."""
    sentences = [line for line in said.splitlines() if line.startswith("gptq: ")]
    end = said[-300:]
    checks = {
        f"exit code {code}: {end!r}": code not in (0, 1, 2),
        f"{len(sentences)} sentences: {end!r}": code == 2 and len(sentences) != 1,
        f"a traceback was printed: {end!r}": "Traceback" in said,
        f"control characters were printed: {end!r}": any(not c.isprintable() and c != "\n" for c in said),
        f"a huge allocation: {end!r}": re.search(
            r"out of memory|allocate memory|MemoryError|larger than its size", said
        ),
        f"a hang: {end!r}": used > SECONDS or "TimeoutError" in said or f"more than {SECONDS} seconds" in said,
        f"{grown / 1e6:.0f} MB more memory": grown > RESIDENT_BYTES,
        f"names nothing: {end!r}": code == 2 and not _names_something(sentences[0] if sentences else "", case),
    }
    return next((text for text, wrong in checks.items() if wrong), None) or target.judge(case, code)


def _names_something(sentence: str, case: Case) -> bool:
    """Whether a sentence names a file, a folder, a tensor or a layer."""
    names = {path.name for folder in (case.original, case.folder) for path in folder.rglob("*")}
    return (
        str(case.place) in sentence
        or any(name in sentence for name in names)
        or any(str(path) in sentence for path in case.seeds.values())
        or re.search(r"\b(model|lm_head|layers)\.|the calibration text|the tokenizer|of the original", sentence)
        is not None
    )


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            state = os.lstat(f"{parent}/{name}")
            found[f"{parent}/{name}"] = (state.st_size, state.st_mtime_ns)
    return found


def _written(target: Target, case: Case, before: dict[str, tuple[int, int]], code: int) -> str | None:
    """Check what was opened, and what is on disk afterwards."""
    outside = str(case.place / "elsewhere.json")
    if any(path == outside for path, _ in opened):
        return "a file outside the folder was opened"
    cache = str(datasets.config.HF_DATASETS_CACHE)
    allowed = (str(case.place), cache, os.environ.get("NUMBA_CACHE_DIR", cache), "/dev/null", "/proc/")
    beyond = [path for path, writing in opened if writing and path.startswith("/") and not path.startswith(allowed)]
    if beyond:
        return f"a file outside was written: {beyond[0]}"
    if not target.writes and _listing(case.folder) != before:
        return "the folder was changed"
    if code != 0 and case.out.exists():
        return "something half-written was left"
    return None


def _place_of(error: BaseException) -> str:
    """The exception, and the innermost line of the package that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE) or "lenet_baseline" in frame.filename]
    last, own_last = frames[-1], (own or list(frames))[-1]
    where = f"{Path(own_last.filename).name}:{own_last.lineno} {own_last.name}"
    return f"{type(error).__name__} at {where} (raised in {Path(last.filename).name} {last.name}): {str(error)[:200]!r}"


# --- coverage ---------------------------------------------------------------------------------------------------------


class Coverage:
    """Which lines and branches of the package a process has reached; each is reported once and costs nothing then."""

    def __init__(self, branches: set[tuple[Any, ...]], lines: set[tuple[str, int]]) -> None:
        self.branches, self.lines = branches, lines
        self.fresh: list[tuple[Any, ...]] = []
        self._ways: dict[tuple[Any, ...], set[int]] = {}  # taken in this process

    def start(self) -> None:
        if MONITORING is None:
            return
        monitoring = MONITORING
        monitoring.use_tool_id(monitoring.COVERAGE_ID, "fuzz")
        monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.BRANCH, self._branch)
        monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, self._line)
        monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.BRANCH | monitoring.events.LINE)

    def _branch(self, code: CodeType, offset: int, destination: int) -> Any:
        if not (PACKAGE and code.co_filename.startswith(PACKAGE)):  # the name is gone while Python ends
            return MONITORING.DISABLE
        at = (code.co_filename, code.co_firstlineno, offset)
        if (*at, destination) not in self.branches:
            self.branches.add((*at, destination))
            self.fresh.append((*at, destination))
        ways = self._ways.setdefault(at, set())
        ways.add(destination)
        return MONITORING.DISABLE if len(ways) > 1 else None

    def _line(self, code: CodeType, line: int) -> Any:
        if PACKAGE and code.co_filename.startswith(PACKAGE):  # the name is gone while Python ends
            self.lines.add((code.co_filename, line))
        return MONITORING.DISABLE

    def take(self) -> list[tuple[Any, ...]]:
        found, self.fresh = self.fresh, []
        return found


def unreached(lines: set[tuple[str, int]], rooms: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of functions in these rooms that were never reached, a file each."""
    for room in rooms:
        for file in sorted(Path(PACKAGE, room).rglob("*.py")):
            inner: set[int] = set()
            codes = [
                const for const in compile(file.read_text(), str(file), "exec").co_consts if isinstance(const, CodeType)
            ]
            while codes:
                code = codes.pop()
                codes += [const for const in code.co_consts if isinstance(const, CodeType)]
                if code.co_name.isidentifier() and code.co_flags & 2:  # a function's, not a class's
                    inner |= {line for _, _, line in code.co_lines() if line and line > code.co_firstlineno}
            missed = sorted(inner - {line for name, line in lines if name == str(file)})
            if missed:
                yield f"{file.relative_to(PACKAGE)}: {', '.join(map(str, missed))}"


# --- many changes -----------------------------------------------------------------------------------------------------


@dataclass
class Campaign:
    """Draws changes, and keeps those that reach something new."""

    seeds: dict[str, Path]
    draw: random.Random
    targets: list[str]
    corpus: dict[str, list[Edits]] = field(default_factory=dict)  # by input

    def __post_init__(self) -> None:
        kinds: dict[str, list[str]] = {}
        for name in sorted(self.seeds):
            kinds.setdefault(name.split("/")[0], []).append(name)
        self._inputs = {t: [n for kind in TARGETS[t].kinds for n in kinds.get(kind, [])] for t in self.targets}
        self.targets = [target for target in self.targets if self._inputs[target]]
        self._files = {name: _weighted_files(path) for name, path in self.seeds.items()}

    def next(self) -> Change:
        """Draw a change: of an input as it is, or a further one of a change that reached something new."""
        (target,) = self.draw.choices(self.targets, [TARGETS[target].weight for target in self.targets])
        seed = self.draw.choice(self._inputs[target])
        kept = self.corpus.get(seed, [])
        edits = self.draw.choice(kept) if kept and self.draw.random() < 0.6 else ()
        decisive = DECISIVE.get(target, [])
        names = decisive if decisive and self.draw.random() < 0.9 else self._files[seed]
        for _ in range(self.draw.choice([1, 1, 1, 2])):
            edits = (*edits[-MOST_EDITS + 1 :], (self.draw.choice(names), self.draw.randrange(2**31)))
        return Change(target, seed, edits)

    def keep(self, change: Change) -> None:
        self.corpus.setdefault(change.seed, []).append(change.edits)


DECISIVE = {  # files that a target reads, of those in its inputs
    "records": [RECORD, RECORD, "quality.json"],
    "tokenizer": ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
}
OFTEN = {
    "config.json", "model.safetensors", "model.safetensors.index.json", "model.gguf", "tensor_index.json",
    "journal.jsonl", "metadata.jsonl", "pytorch_model.bin",
}  # fmt: skip


def _weighted_files(folder: Path) -> list[str]:
    """The files of an input; those that decide much are listed more often."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names for _ in range(6 if name in OFTEN or ("quant" in name and name != RECORD) else 1)]


def work(connection: Connection, seeds: dict[str, Path], coverage: Coverage) -> None:
    """Run the changes that come through the connection, and answer each; in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    name_rules.PATIENCE = 1.0  # seconds for regular expressions; a minute in earnest
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    sys.addaudithook(_watch)
    coverage.start()
    while True:
        change = connection.recv()
        if change is None:
            connection.send(coverage.lines)
            return
        wrong = broken_law(change, seeds)
        connection.send((wrong, coverage.take()))


class Worker:
    """A process that runs changes, and is replaced when it dies, hangs or is old."""

    def __init__(self, seeds: dict[str, Path]) -> None:
        self._seeds = seeds
        self.branches: set[tuple[Any, ...]] = set()
        self.lines: set[tuple[str, int]] = set()
        self._process: Any = None
        self._age = 0

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        coverage = Coverage(self.branches, self.lines)

        def begin() -> None:
            self._connection.close()  # so that this process ends when the other end is gone
            work(theirs, self._seeds, coverage)

        self._process = context.Process(target=begin, daemon=True)
        self._process.start()
        theirs.close()
        self._age = 0

    def run(self, change: Change) -> tuple[str | None, list[tuple[Any, ...]]]:
        """Return the violation and the new branches of a change."""
        if self._process is None or self._age >= LIFE:
            self.stop()
            self._start()
        self._age += 1
        try:
            self._connection.send(change)
            if self._connection.poll(WALL_SECONDS):
                wrong, fresh = self._connection.recv()
                self.branches.update(fresh)
                return wrong, fresh
            self._process.kill()
        except (EOFError, OSError):
            pass
        self._process.join()
        died, self._process = -self._process.exitcode, None
        how = "it did not come back" if died == signal.SIGKILL else f"the process ended by signal {died}"
        return f"{change.target}: {how}", []

    def stop(self) -> None:
        if self._process is not None:
            self._connection.send(None)
            self.lines |= self._connection.recv()
            self._process.join()
            self._process = None


def smallest(change: Change, kind: str, worker: Worker) -> Change:
    """Leave out changes without which a violation is the same."""
    for edit in change.edits:
        fewer = Change(change.target, change.seed, tuple(one for one in change.edits if one != edit))
        wrong, _ = worker.run(fewer)
        if wrong and kind_of(wrong) == kind:
            change = fewer
    return change


def kind_of(wrong: str) -> str:
    """A violation without numbers and quotations, to count each kind once."""
    place = re.search(r"\w+ in \w+\.py, line \d+", wrong)
    if place:
        return f"{wrong.split(':')[0]}: {place[0]}"
    return re.sub(r"[\d.]+", "N", re.sub(r"'.*|\".*", "", wrong.split("): ")[0]))[:200]


def _prepare(folder: Path) -> dict[str, Path]:
    """Make the inputs, in a process of its own, since what computes starts threads."""
    cache = datasets.config.HF_DATASETS_CACHE = folder / "cache"  # HF_HOME was read when datasets was imported
    datasets.config.DOWNLOADED_DATASETS_PATH = datasets.config.EXTRACTED_DATASETS_PATH = cache / "downloads"
    vars(pickled)["HF_HOME"] = str(cache)
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe()

    def make() -> None:
        torch.set_num_threads(1)
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            seeds = fuzz_seeds.make_seeds(folder)
        rates = cost.measure_rates(QuantConfig(), torch.device("cpu"), torch.float32, 0.2)
        writing.send((seeds, fuzz_seeds.make_processors(folder / "processors"), rates))

    process = context.Process(target=make)
    process.start()
    writing.close()
    seeds, processors, rates = reading.recv()
    process.join()
    _processors.update(processors)
    cost.measure_rates = lambda *_, **__: rates  # a second each time it is measured
    return dict(seeds)


def run_changes(
    changes: Iterable[Change], worker: Worker, keep: Callable[[Change], None], whole: bool
) -> tuple[Counter[str], dict[str, Change]]:
    """Run changes until they end or an interrupt comes; return the count by target, and a change for each violation.

    Args:
        keep: called with a change that reached something new.
        whole: leave nothing out of a change that is printed.
    """
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopped.append(received))
    counts: Counter[str] = Counter()
    found: dict[str, Change] = {}
    began = time.monotonic()
    for change in changes:
        if stopped:
            break
        wrong, fresh = worker.run(change)
        counts[change.target] += 1
        if fresh and not wrong:
            keep(change)
        if wrong and kind_of(wrong) not in found:
            found[kind_of(wrong)] = change if whole else smallest(change, kind_of(wrong), worker)
            print(f"FOUND {wrong}\n      --again '{found[kind_of(wrong)]}'", flush=True)
        if counts.total() % 1000 == 0:
            passed = time.monotonic() - began
            print(f"{counts.total()} changes, {passed:.0f} s, {len(worker.branches)} branches", flush=True)
    return counts, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", action="append", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--again", action="append", metavar="CHANGE", help="run one change, as it was printed")
    parser.add_argument("--reached", action="store_true", help="list lines of the readers that no change reached")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        seeds = _prepare(Path(place))
        worker = Worker(seeds)
        campaign = Campaign(seeds, random.Random(args.seed), args.only or list(TARGETS))
        given = [Change.parse(text) for text in args.again or ()]
        changes = given or (campaign.next() for _ in range(args.changes))
        counts, found = run_changes(changes, worker, campaign.keep, whole=bool(given))
        worker.stop()
    print(*(f"{name}: {counts[name]}" for name in TARGETS if counts[name]), sep=", ")
    print(f"{counts.total()} changes, seed {args.seed}, {len(worker.branches)} branches, {len(found)} findings")
    if args.reached:
        print(*unreached(worker.lines, ("checkpoint", "formats", "calibration", "output")), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
