"""What `fuzz_readers.py` runs on changed files: each reader, each command, and what is right for its result."""

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_seeds
import torch
from torch import Tensor

from gptq import InputError, QuantConfig, cli, formats, load, quantize
from gptq.calibration.windows import make_windows, read_calibration
from gptq.checkpoint import pickled, unpickle
from gptq.checkpoint.assembled import open_source
from gptq.checkpoint.gguf import GgufFiles
from gptq.checkpoint.untrusted import check_folder
from gptq.evaluation.quality import read_measurements
from gptq.formats.original import open_original
from gptq.formats.packed_layers import packed_layers, read_packed
from gptq.formats.quantization_config import quantization_of, read_quantization
from gptq.models.build import open_model
from gptq.models.hf_config import read_tokenizer
from gptq.output import verify
from gptq.output.record import read_record
from gptq.output.results import RECORD
from gptq.pipeline.journal import Journal

PICKLE_SECONDS = 10  # of the processor, until a conversion is stopped; a minute and more in earnest
UNRECORDED = {RECORD, "quality.json"}  # files of a result that `verify` does not compare with the record


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
    processor = processors[case.original.name]
    read_calibration(str(case.file), QuantConfig(num_samples=2, seq_len=16), processor)


processors: dict[str, Path] = {}


def _read_journal(case: Case) -> None:
    journal = Journal(case.folder)
    journal.describe_kept(2)
    journal.is_worth_keeping()


def _unpickle(case: Case) -> None:
    """Convert pickles as the confined process does, with its limit of time, without confining."""
    check_folder(case.folder)

    def late(*_: object) -> None:
        raise unpickle.TooLongError

    file = case.folder
    before = signal.signal(signal.SIGVTALRM, late)
    try:
        for file in pickled.find_pickles(case.folder):
            signal.setitimer(signal.ITIMER_VIRTUAL, PICKLE_SECONDS)
            with (case.place / "made.safetensors").open("wb") as out:
                unpickle.convert(file, out, drop_tied=case.draw.random() < 0.5)
    except (unpickle.UnreadableError, unpickle.TooLongError, MemoryError, OSError) as error:  # as `unpickle.main` does
        raise InputError(f"{file} {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _unpickle_confined(case: Case) -> None:
    """Convert pickles in a process of their own, forked, which confines itself."""
    check_folder(case.folder)
    files = pickled.find_pickles(case.folder)
    if files:
        with contextlib.ExitStack() as stack:
            outs = [
                stack.enter_context((case.place / f"{i}.safetensors").open("wb")).fileno() for i in range(len(files))
            ]
            _fork(
                {"files": list(map(str, files)), "descriptors": outs, "drop_tied": True, "seconds": PICKLE_SECONDS},
                outs,
            )


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
    with mock.patch.object(pickled, "_run", _fork), mock.patch.object(pickled, "SECONDS", PICKLE_SECONDS):
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
