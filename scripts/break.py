"""Break gptq on purpose: disturb its commands in many ways, and hold the outcome against what is promised.

    python scripts/break.py --minutes 60 --seed 1
    python scripts/break.py --seed 1 --only kill --try 17      # one try again

The script makes a small Llama of its own, and forks a child for each command, so that nothing is imported twice. In
each try one kind of damage comes over one command: a signal, an error of the system before one of its calls, a full
disk, a changed file. These laws have to hold:

- A command ends with a documented exit code and, unless that is 0 or 1, with one sentence. Nobody sees a traceback.
- A folder that looks finished is finished.
- After the same command once more, undisturbed, every byte is as if nothing had happened, and nothing else is left.
- Blocks that were finished stay finished.
- `verify` finds every change of a file that it covers.

A broken law is printed with the command that repeats the try; then the script exits with 1. Most moments are counted in
calls of gptq's own code, so that a try can be repeated; some depend on the clock.
"""

import argparse
import atexit
import errno
import hashlib
import io
import json
import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

PACKAGE = str(Path(__file__).parents[1] / "gptq")
PATIENCE = 300  # seconds until a command counts as hung
RECORD = "quantization_record.json"  # is written twice by `eval --card`, with the card in between
NOT_COVERED = ("quality.json", "report/")  # what `verify` does not look at: measurements, and drawings of the record
Action = Callable[[], None]
Tree = dict[str, str]  # path below a folder: checksum of the file


# --- commands to disturb ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A command, run in a folder that holds copies of `needs`: name there, name on the stage."""

    arguments: str
    needs: dict[str, str]
    code: int = 0


def quantize_task(options: str, source: str = "plain", windows: str = "--samples 4 --calibration text.txt") -> Task:
    return Task(f"quantize model out --seq-len 16 --device cpu {windows} {options}", {"model": source})


def result_task(arguments: str, result: str = "gptq", **needs: str) -> Task:
    return Task(arguments, {"model": result, **needs})


QUANTIZE: dict[str, Task] = {
    "gptq": quantize_task("--group-size 16"),
    "best": quantize_task("--group-size 16 --effort best --tune-steps 2 --bits 3"),
    "v2": quantize_task("--group-size 16 --asym --format gptq_v2 --desc-act --dynamic-groups"),
    "pack": quantize_task("--group-size 32 --format pack-quantized --bits 5 --override down_proj:bits=8", "shards"),
    "mlx": quantize_task("--group-size 32 --asym --format mlx"),
    "gguf": quantize_task("--format gguf"),
    "nvfp4": quantize_task("--format nvfp4-pack-quantized --effort fast"),
    "fp8": quantize_task("--method rtn --format fp8", windows=""),
    "head": quantize_task("--group-size 16 --lm-head --effort fast", "shards"),
    "experts": quantize_task("--group-size 16 --effort fast", "mixtral"),
    "target": quantize_task("--target-bits 6.5 --effort fast"),
    "both": quantize_task("--group-size 16 --effort fast --format gptq --format pack-quantized"),
}
MEASURE = "eval model --data text.txt --seq-len 16 --windows 3 --device cpu"
OTHERS: dict[str, Task] = {
    "to pack": result_task("convert model out --format pack-quantized"),
    "to v2": result_task("convert model out --format gptq_v2", "pack8"),
    "to mlx": result_task("convert model out --format mlx", "wide"),
    "save": result_task(f"{MEASURE} --save"),
    "card": result_task(f"{MEASURE} --save --card --against original", original="plain"),
    "report": result_task("report model"),
    "polish": result_task(
        "polish model --against original --to out --samples 16 --seq-len 16 --steps 4 --device cpu "
        "--calibration text.txt", original="plain",
    ),
    "plan": Task("plan model --seq-len 16 --device cpu --samples 4 --calibration text.txt", {"model": "plain"}),
    "verify": result_task("verify model"),
    "inspect": result_task("inspect model", "pack"),
}  # fmt: skip
TASKS = {**QUANTIZE, **OTHERS}
RESULTS = {  # results that other tasks begin with
    **{name: task for name, task in QUANTIZE.items() if name not in ("both", "best", "target", "head")},
    "pack8": quantize_task("--method rtn --group-size 16 --format pack-quantized --bits 8", windows=""),
    "wide": quantize_task("--method rtn --group-size 32", windows=""),
}  # fmt: skip


# --- a command in a child ---------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a command ended: exit code, or the signal that ended it, and what it printed."""

    code: int
    signal: int
    printed: str
    said: str
    calls: int = 0  # of gptq's own code
    steps: int = 0  # of these, on files

    def sentences(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("gptq: ")]


STEPS = {
    "open", "write", "fsync", "truncate", "rename", "replace", "unlink", "mkdir", "rmdir", "flock", "sendfile", "flush",
    "scandir", "listdir", "stat", "read", "copy_file_range",
}  # fmt: skip
READS = {"stat", "read", "scandir", "listdir"}
OF_FILES = (PACKAGE, "pathlib", "shutil.py")  # code whose calls of these count as steps
IN_MEMORY = (str, bytes, io.BytesIO, io.StringIO)


@dataclass
class Watch:
    """Counts the calls of gptq's own code in this process, and acts before one of them."""

    call: int = -1
    step: int = -1
    act: Action = lambda: None
    of: str = ""  # name of the steps that count, if not all
    calls: int = 0
    steps: int = 0
    last: str = ""  # name of the last step

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event not in ("call", "c_call"):
            return
        file = frame.f_code.co_filename
        is_step = event == "c_call" and any(part in file for part in OF_FILES) and self._is_step(argument)
        if is_step or file.startswith(PACKAGE):
            self.calls += 1
            self.steps += is_step
            if self.calls == self.call or (is_step and self.steps == self.step):
                self.call = self.step = -1
                self.act()

    def _is_step(self, called: Any) -> bool:
        owner, self.last = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if owner is sys.stdout or owner is sys.stderr or isinstance(owner, IN_MEMORY):
            return False
        return self.last == self.of if self.of else self.last in STEPS


@dataclass(frozen=True)
class Start:
    """How a child is started, besides its arguments."""

    prepare: Action = lambda: None  # called in the child before the command
    watch: Watch | None = None
    names: dict[str, str] = field(default_factory=dict)  # of the environment
    output: str = ""  # where stdout leads, if not to a file of its own: a path, "a pipe" that nobody reads, "nowhere"


def start(arguments: str | list[str], folder: Path, how: Start | None = None) -> int:
    """Start a command in a forked child, in `folder`; return the child's number."""
    sys.stdout.flush()
    if not LOGS.exists():
        LOGS.mkdir()
        atexit.register(shutil.rmtree, LOGS, ignore_errors=True)  # children end without it
    child = os.fork()
    if not child:
        _live(arguments.split() if isinstance(arguments, str) else arguments, folder, how or Start())
    return child


def _live(arguments: list[str], folder: Path, how: Start) -> None:
    """Be the command; does not return."""
    code = 99
    try:
        os.chdir(folder)
        log = LOGS / f"{os.getpid()}"
        os.dup2(_open_output(how.output or f"{log}.1"), 1)
        os.dup2(_open_output(f"{log}.2"), 2)
        encoding = how.names.get("PYTHONIOENCODING", "utf-8")
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb"), encoding, "strict", line_buffering=n == 2)
                                  for n in (1, 2))  # fmt: skip
        if how.output == "nowhere":  # then Python has no stdout either
            os.close(1)
            sys.stdout = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update({"TMPDIR": str(folder / "tmp"), **how.names})
        tempfile.tempdir = None
        sys.argv = ["gptq", *arguments]
        how.prepare()
        code = _main(how.watch)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        if how.watch:
            Path(f"{log}.calls").write_text(f"{how.watch.calls} {how.watch.steps}")
        with suppress(Exception):
            sys.stderr.flush()
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _open_output(where: str) -> int:
    if where == "a pipe":
        reading, writing = os.pipe()
        os.close(reading)
        return writing
    return os.open("/dev/null" if where == "nowhere" else where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _main(watch: Watch | None) -> int:
    from gptq.__main__ import main

    sys.setprofile(watch)
    try:
        return main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.setprofile(None)


def end(child: int, folder: Path, later: tuple[float, Action] | None = None) -> Ended:
    """Wait for a child; `later` is done after so many seconds, if it still lives."""
    began, status, hung = time.monotonic(), 0, False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        passed = time.monotonic() - began
        if later and passed > later[0]:
            later[1]()
            later = None
        if passed > PATIENCE:
            hung = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01 if later else 0.03)
    log = LOGS / f"{child}"
    printed, said, counts = (_take(Path(f"{log}.{name}")) for name in ("1", "2", "calls"))
    said += f"gptq: Traceback, hung for {PATIENCE} s\n" if hung else ""
    calls, steps = (int(part) for part in (counts or "0 0").split())
    return Ended(os.WEXITSTATUS(status), os.WTERMSIG(status), printed, said, calls, steps)


def _take(file: Path) -> str:
    if not file.exists():
        return ""
    text = file.read_text(encoding="utf-8", errors="backslashreplace")
    file.unlink()
    return text


LOGS = Path(tempfile.gettempdir(), f"break-{os.getpid()}")  # on no disk that gets full


def run(arguments: str | list[str], folder: Path, how: Start | None = None) -> Ended:
    return end(start(arguments, folder, how), folder)


# --- the stage: models, results, and what undisturbed commands make of them -------------------------------------------


def tree(folder: Path) -> Tree:
    """Return the checksum of every file below a folder; empty folders count too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace")
        if path.is_symlink() or path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "link"
        elif not any(path.iterdir()):
            found[f"{name}/"] = ""
    return found


def tokenizer() -> Any:
    """Return a small byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


def small_model(folder: Path, kind: str, shard: str, **options: Any) -> None:
    """Write a random model of 3 blocks with a tokenizer."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **small, **options, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Do what you like.\n")


TEXT = "".join(f"{number} quick brown foxes jump over {number * 37 % 101} lazy dogs. " for number in range(60))


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # architecture, largest shard, options
    "plain": ("llama", "5GB", {}),
    "shards": ("llama", "30KB", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", "5GB", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


class Stage:
    """A folder with models and results, and what each undisturbed task leaves; made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "text.txt").write_text(TEXT)
        self._expected: dict[str, tuple[Tree, Ended, float]] = {}

    def warm(self) -> None:
        """Run commands in this process, whose children then have everything compiled and imported."""
        from gptq import cli

        place = self.place(QUANTIZE["gptq"], self.folder / "warm")
        before, logs = Path.cwd(), (sys.stdout, sys.stderr)
        sys.stdout = sys.stderr = io.StringIO()
        os.chdir(place)
        try:
            commands = (QUANTIZE["gptq"].arguments, "convert out again --format gptq_v2", "report out", "verify again",
                        f"{MEASURE.replace('model', 'again')} --save --against model")  # fmt: skip
            codes = [cli.main(command.split()) for command in commands]
            said = sys.stderr.getvalue()
        finally:
            os.chdir(before)
            sys.stdout, sys.stderr = logs
        if any(codes):
            raise RuntimeError(f"undisturbed commands end with {codes}: {said}")
        shutil.rmtree(place)

    def place(self, task: Task, folder: Path) -> Path:
        """Make a folder with what the task needs."""
        folder.mkdir()
        (folder / "tmp").mkdir()
        shutil.copyfile(self.folder / "text.txt", folder / "text.txt")
        for name, source in task.needs.items():
            shutil.copytree(self.result(source) if source in RESULTS else self.model(source), folder / name)
        return folder

    def model(self, name: str) -> Path:
        """Return the folder of a model."""
        if not (folder := self.folder / name).exists():
            kind, shard, options = MODELS[name]
            small_model(folder, kind, shard, **options)
        return folder

    def result(self, name: str) -> Path:
        """Return the folder of a finished result."""
        if not (kept := self.folder / f"result {name}").exists():
            place = self.place(RESULTS[name], self.folder / f"making {name}")
            ended = run(RESULTS[name].arguments, place)
            if ended.code:
                raise RuntimeError(f"{RESULTS[name].arguments}: {ended.said}")
            (place / "out").rename(kept)
            shutil.rmtree(place)
        return kept

    def expected(self, task: Task) -> tuple[Tree, Ended, float]:
        """Return the files after the undisturbed command, how it ended, and how many seconds it took."""
        if task.arguments not in self._expected:
            place = self.place(task, self.folder / "expected")
            began = time.monotonic()
            ended = run(task.arguments, place, Start(watch=Watch()))
            if ended.code != task.code or ended.signal:
                raise RuntimeError(f"{task.arguments}: {ended}")
            self._expected[task.arguments] = tree(place), ended, time.monotonic() - began
            shutil.rmtree(place)
        return self._expected[task.arguments]


# --- laws -------------------------------------------------------------------------------------------------------------

CODES = {0, 2, 130, 141, 143}  # documented, beside verify's 1


def complaint(ended: Ended, sent: int = 0, may_differ: bool = False) -> str | None:
    """Return what is wrong with a command's end. `sent` is the signal it got; `may_differ`: verify's 1 is right."""
    said = ended.said
    if ended.signal:
        return None if ended.signal == sent else f"ended by signal {ended.signal}: {said[-300:]!r}"
    if "Traceback" in said or "Error in" in said or "Exception ignored" in said:
        return f"a traceback: {said[-600:]!r}"
    if ended.code not in CODES | ({1} if may_differ else set()):
        return f"exit code {ended.code}: {said[-400:]!r}"
    if ended.code in (2, 130, 143) and len(ended.sentences()) != 1:
        return f"{len(ended.sentences())} sentences with exit code {ended.code}: {said[-400:]!r}"
    if any(not c.isprintable() and c != "\n" for c in said):
        return f"control characters: {said[-300:]!r}"
    return None


def difference(now: Tree, expected: Tree) -> str | None:
    """Name up to three files that are missing, left over or other than they should be."""
    names = sorted(name for name in {**now, **expected} if now.get(name) != expected.get(name))
    what = [f"{name} {'left over' if n not in expected else 'missing' if n not in now else 'differs'}"
            for n in names for name in [n]]  # fmt: skip
    return f"{len(names)} files: {', '.join(what[:3])}" if names else None


def finished_blocks(place: Path) -> int:
    found = 0
    for journal in place.rglob("*.partial/journal.jsonl"):
        found += journal.read_bytes().count(b'{"block": ')
    return found


def looks_finished(place: Path) -> bool:
    """Whether the new folder of a task exists in which a user would take a checkpoint to be."""
    return any(path.parent.name != "checkpoint" for path in (place / "out").rglob("config.json"))


@dataclass
class Trial:
    """One try: a task in a place of its own."""

    stage: Stage
    task: Task
    place: Path
    draw: Random

    def __post_init__(self) -> None:
        self.stage.place(self.task, self.place)
        self.before = tree(self.place)
        self.expected, self.usual, self.seconds = self.stage.expected(self.task)
        self.kept = False  # whether an earlier command has left a working folder

    def after(self, ended: Ended, sent: int = 0) -> Iterator[str]:
        """Yield what is wrong after a disturbed command."""
        if wrong := complaint(ended, sent):
            yield wrong
        now = tree(self.place)
        if looks_finished(self.place):
            finished = {name: sha for name, sha in now.items() if name.startswith("out/")}
            wanted = {name: sha for name, sha in self.expected.items() if name.startswith("out/")}
            if self.is_one_folder() and (wrong := difference(finished, wanted)):
                yield f"out looks finished and is not: {wrong}"
        for name in now:
            is_old_or_new = now[name] in (self.before.get(name), self.expected.get(name))
            if name.startswith("model/") and not is_old_or_new and not name.endswith(RECORD) and "/." not in name:
                yield f"{name} is neither as it was nor as it should be"
        if ended.signal:
            self.kept = True
            return
        if ended.code == self.task.code and (wrong := difference(now, self.expected)):
            yield f"exit code {ended.code}, but {wrong}"
        left = [name for name in now if name.startswith(("out.partial", "tmp/", "out/")) and name != "tmp/"]
        if ended.code and left and "keeps" not in ended.said and now != self.expected and not self.kept:
            yield f"left over without a word: {', '.join(left[:3])}"
        self.kept = bool(left)

    def is_one_folder(self) -> bool:
        return self.task.arguments.count("--format") < 2

    def once_more(self) -> Iterator[str]:
        """Run the command undisturbed, unless it had succeeded; yield what is wrong then."""
        shutil.rmtree(self.place / "tmp", ignore_errors=True)
        (self.place / "tmp").mkdir()
        now = tree(self.place)
        if now == self.expected:
            return
        finished = finished_blocks(self.place)
        ended = run(self.task.arguments, self.place)
        if (self.place / "out").exists() and ended.code == 2 and not difference(tree(self.place), self.expected):
            return  # it had been finished, and only something was left to be removed
        if wrong := complaint(ended, may_differ=self.task.code == 1):
            yield f"once more: {wrong}"
        if ended.code != self.task.code:
            yield f"once more: exit code {ended.code}: {ended.said[-300:]!r}"
        elif wrong := difference(tree(self.place), self.expected):
            yield f"once more: {wrong}"
        if finished and "going on" not in ended.said and self.is_one_folder():
            yield f"once more: {finished} finished blocks were lost: {ended.said[-300:]!r}"


# --- moments ----------------------------------------------------------------------------------------------------------


def disturbed(trial: Trial, act: Callable[[int], None]) -> Ended:
    """Run the task; at a random moment `act` is called with the number of the process."""
    arguments, usual, kind = trial.task.arguments, trial.usual, trial.draw.choice(("call", "step", "step", "clock"))
    if kind == "clock":
        child = start(arguments, trial.place)
        return end(child, trial.place, (trial.draw.random() * trial.seconds, partial(act, child)))
    watch = Watch(act=lambda: act(os.getpid()))
    if kind == "call":
        watch.call = trial.draw.randint(1, usual.calls)
    else:
        watch.step = trial.draw.randint(1, usual.steps)
    return run(arguments, trial.place, Start(watch=watch))


# --- kinds of damage --------------------------------------------------------------------------------------------------


def any_task(draw: Random) -> Task:
    return TASKS[draw.choice([*QUANTIZE, *OTHERS])]


def signals(stage: Stage, place: Path, draw: Random, chosen: tuple[int, ...]) -> Iterator[str]:
    """Send a signal to a command, up to three times; then let it end."""
    trial = Trial(stage, any_task(draw), place, draw)
    for _ in range(draw.randint(1, 3)):
        number, kept = draw.choice(chosen), finished_blocks(place)
        ended = disturbed(trial, lambda process, number=number: os.kill(process, number))  # type: ignore[misc]
        yield from trial.after(ended, number)
        if finished_blocks(place) < kept and not (place / "out").exists():
            yield f"of {kept} finished blocks {finished_blocks(place)} are left"
        if (place / "out").exists() or tree(place) == trial.expected:
            break
    yield from trial.once_more()


WRITE_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE)


def failing_call(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Let one call on a file fail."""
    trial = Trial(stage, any_task(draw), place, draw)

    def fail() -> None:
        code = draw.choice((errno.EIO, errno.EACCES) if watch.last in READS else WRITE_ERRORS)
        raise OSError(code, os.strerror(code))

    watch = Watch(step=draw.randint(1, trial.usual.steps), act=fail)
    ended = run(trial.task.arguments, place, Start(watch=watch))
    yield from trial.after(ended)
    yield from trial.once_more()


def full_disk(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Let a file system get full (as root), or files reach their largest size."""
    task = any_task(draw)
    if os.getuid():
        trial, size = Trial(stage, task, place, draw), int(10 ** draw.uniform(1, 5.5))
        ended = run(task.arguments, place, Start(partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))))
        yield from trial.after(ended)
        yield from trial.once_more()
        return
    disk = place.with_name("disk")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "break", disk], check=True)
    try:
        trial = Trial(stage, task, disk / "place", draw)
        filler = disk / "filler"
        filler.write_bytes(bytes(max(shutil.disk_usage(disk).free - 4096 * draw.randint(0, 80), 0)))
        yield from trial.after(run(task.arguments, trial.place))
        filler.unlink()
        yield from trial.once_more()
    finally:
        subprocess.run(["umount", disk], check=True)


def few_resources(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Allow a command few open files, or little memory."""
    trial = Trial(stage, any_task(draw), place, draw)
    if draw.random() < 0.5:
        kind, limit = resource.RLIMIT_NOFILE, draw.randint(8, 60)
    else:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        kind, limit = resource.RLIMIT_AS, now + draw.randint(0, 200_000_000)
    ended = run(trial.task.arguments, place, Start(partial(resource.setrlimit, kind, (limit, limit))))
    yield from trial.after(ended)
    yield from trial.once_more()


# --- an unfinished run ------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def do_after(blocks: int, act: Action = die) -> None:
    """Have this process killed when so many blocks are in the journal, or have it do something else then."""
    from gptq.pipeline.journal import Journal

    append = Journal.append

    def count(self: Journal, kind: str, content: dict[str, Any]) -> None:
        append(self, kind, content)
        if kind == "block" and len(self.find("block")) == blocks:
            act()

    Journal.append = count  # type: ignore[method-assign]


def unfinished(stage: Stage, place: Path, draw: Random) -> tuple[Trial, Path]:
    """Return a trial whose first run was killed after a block, and its working folder."""
    trial = Trial(stage, QUANTIZE[draw.choice([name for name in QUANTIZE if name != "both"])], place, draw)
    run(trial.task.arguments, place, Start(partial(do_after, draw.randint(1, 3))))
    return trial, place / "out.partial"


Lines = list[bytes]


def _some(draw: Random, lines: Lines) -> int:
    return draw.randrange(len(lines))


def change_value(tree_of: Any, draw: Random) -> None:
    """Change a value somewhere in a JSON tree."""
    keys = list(tree_of) if isinstance(tree_of, dict) else list(range(len(tree_of)))
    if not keys:
        return
    key = draw.choice(keys)
    if isinstance(tree_of[key], dict | list) and tree_of[key] and draw.random() < 0.8:
        change_value(tree_of[key], draw)
    elif draw.random() < 0.2 and isinstance(tree_of, dict):
        del tree_of[key]
    else:
        values = [None, True, -1, 0, 7, 2**70, 0.5, "", "x", "../x", [], {}, [1], {"a": 1}]
        tree_of[key] = draw.choice([value for value in values if value != tree_of[key]])


def edit_field(lines: Lines, draw: Random, signed: bool = False) -> None:
    at = _some(draw, lines)
    whole = json.loads(lines[at])
    change_value(whole["entry"] if signed else whole, draw)
    if signed:
        whole["sha256"] = hashlib.sha256(json.dumps(whole["entry"], sort_keys=True).encode()).hexdigest()
    lines[at] = json.dumps(whole).encode() + b"\n"


def cut_line(lines: Lines, draw: Random) -> None:
    at = _some(draw, lines)
    lines[at] = lines[at][: draw.randrange(len(lines[at]))]


def swap_lines(lines: Lines, draw: Random) -> None:
    a, b = _some(draw, lines), _some(draw, lines)
    lines[a], lines[b] = lines[b], lines[a]


def flip_in_line(lines: Lines, draw: Random) -> None:
    at = _some(draw, lines)
    lines[at] = flipped(lines[at], draw)


EDITS: dict[str, Callable[[Lines, Random], None]] = {
    "field": edit_field,
    "signed field": partial(edit_field, signed=True),
    "cut line": cut_line,
    "swapped": swap_lines,
    "flip": flip_in_line,
    "dropped": lambda lines, draw: lines.__delitem__(_some(draw, lines)),
    "first dropped": lambda lines, draw: lines.__delitem__(0),
    "twice": lambda lines, draw: lines.insert(_some(draw, lines), lines[_some(draw, lines)]),
    "garbage": lambda lines, draw: lines.insert(_some(draw, lines), draw.randbytes(40) + b"\n"),
    "odd line": lambda lines, draw: lines.insert(_some(draw, lines), draw.choice((b"\n", b"{}\n", b"[1]\n"))),
    "end of lines": lambda lines, draw: lines.__setitem__(slice(None), [line[:-1] + b"\r\n" for line in lines]),
    "last newline": lambda lines, draw: lines.__setitem__(-1, lines[-1][:-1]),
    "empty": lambda lines, draw: lines.clear(),
}  # fmt: skip


def journal(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Edit the journal of an unfinished run, which then goes on."""
    trial, working = unfinished(stage, place, draw)
    file, how = working / "journal.jsonl", draw.choice([*EDITS])
    lines = file.read_bytes().splitlines(keepends=True)
    EDITS[how](lines, draw)
    file.write_bytes(b"".join(lines))
    yield from (f"{how}: {wrong}" for wrong in go_on(trial, working, may_differ=how == "signed field"))


def go_on(trial: Trial, working: Path, may_differ: bool = False) -> Iterator[str]:
    """Go on in a damaged working folder: the right bytes come out at the end, or a sentence about the folder."""
    ended = run(trial.task.arguments, trial.place)
    if wrong := complaint(ended):
        yield wrong
    elif ended.code:
        if working.name not in ended.said:
            yield f"a sentence that does not name {working.name}: {ended.said[-300:]!r}"
        shutil.rmtree(working, ignore_errors=True)
        yield from trial.once_more()
    elif not may_differ and (wrong := difference(tree(trial.place), trial.expected)):
        yield f"went on, but {wrong}"


def working_folder(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Damage a file of the working folder of an unfinished run, other than the journal."""
    trial, working = unfinished(stage, place, draw)
    file = draw.choice([path for path in sorted(working.rglob("*")) if path.name != "journal.jsonl"])
    how = draw.choice([*DAMAGE]) if file.is_file() else "gone"
    DAMAGE[how](file, draw)
    yield from (f"{how}, {file.name}: {wrong}" for wrong in go_on(trial, working))


# --- damaged files ----------------------------------------------------------------------------------------------------


def flipped(content: bytes, draw: Random) -> bytes:
    """Change one bit; those of the first kilobytes come more often."""
    at = draw.randrange(min(len(content), 10 ** draw.randint(1, 6)))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def flip(file: Path, draw: Random) -> None:
    file.write_bytes(flipped(file.read_bytes(), draw) if file.stat().st_size else b"x")


def cut(file: Path, draw: Random) -> None:
    os.truncate(file, draw.randrange(max(file.stat().st_size, 1)))


def lengthen(file: Path, draw: Random) -> None:
    with file.open("ab") as opened:
        opened.write(draw.choice((b"\0", b" ", b"\n", bytes(4096))))


def zero_out(file: Path, draw: Random) -> None:
    content = bytearray(file.read_bytes())
    begin = draw.randrange(max(len(content), 1))
    content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
    file.write_bytes(content)


def remove(file: Path, draw: Random) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def replace_by_folder(file: Path, draw: Random) -> None:
    file.unlink()
    file.mkdir()


def link_away(file: Path, draw: Random) -> None:
    file.unlink()
    file.symlink_to(draw.choice((file.name, "/dev/zero", "nothing")))


DAMAGE: dict[str, Callable[[Path, Random], None]] = {
    "flip": flip, "cut": cut, "longer": lengthen, "zeros": zero_out, "gone": remove, "folder": replace_by_folder,
    "link": link_away,
}  # fmt: skip
READERS = (
    "inspect model", "report model", f"{MEASURE} --save --card", "quantize model out --method rtn",
    *(f"convert model out --format {chosen}" for chosen in ("gptq_v2", "mlx", "gguf")),
)  # fmt: skip


def damaged_result(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Damage one file of a result. `verify` has to find it; other commands have to end well."""
    command = draw.choice(("verify model", "verify model", draw.choice(READERS)))
    stage.place(result_task(command, draw.choice([*RESULTS])), place)
    files = [path for path in sorted((place / "model").rglob("*")) if path.is_file()]
    file, how = draw.choice(files), draw.choice(("flip", "flip", "flip", *DAMAGE))
    before = file.read_bytes()
    DAMAGE[how](file, draw)
    ended = run(command, place)
    name = file.relative_to(place / "model").as_posix()
    if not command.startswith("verify"):
        if wrong := complaint(ended):
            yield f"{how}, {name}, {command}: {wrong}"
    elif not file.is_file() or file.read_bytes() != before:
        yield from judge_verify(ended, how, name)
    if ended.code and (left := [path.name for path in place.iterdir() if path.name.startswith("out")]):
        yield f"{how}, {name}, {command}: left over: {left}"


def judge_verify(ended: Ended, how: str, name: str) -> Iterator[str]:
    """Yield what is wrong with how `verify` ended on a result of which the file `name` was damaged."""
    if wrong := complaint(ended, may_differ=True):
        yield f"{how}, {name}: {wrong}"
    is_told = name == RECORD and how == "gone" and "no record to compare" in ended.printed
    if not ended.code and not name.startswith(NOT_COVERED) and not is_told:
        yield f"verify does not find: {how}, {name}"


def changing_source(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Change a source while a command reads it."""
    makers = [task for task in TASKS.values() if " out" in task.arguments]
    trial = Trial(stage, draw.choice(makers), place, draw)
    how = draw.choice(("flip", "cut", "longer", "gone", "zeros", "other", "new"))
    file = draw.choice([path for name in trial.task.needs for path in sorted((place / name).iterdir())])

    def change(_: int) -> None:
        if how == "other":
            for path in file.parent.glob("*.safetensors"):
                flip(path, draw)
        elif how == "new":
            (file.parent / draw.choice(("added_tokens.json", "notes.txt"))).write_text("{}")
        else:
            DAMAGE[how](file, draw)

    changed = place_beside(trial, "changed")
    what, ended = f"{how}, {file.relative_to(place)}", disturbed(trial, change)
    yield from (f"{what}: {wrong}" for wrong in judge_sources(trial, ended, changed))
    yield from (f"{what}: {wrong}" for wrong in trial.once_more())


def place_beside(trial: Trial, name: str) -> Path:
    return trial.stage.place(trial.task, trial.place.with_name(name))


def judge_sources(trial: Trial, ended: Ended, changed: Path) -> Iterator[str]:
    """Yield what is wrong with the end of a command whose sources have changed since it began.

    A result is wholly that of the sources as they were, or wholly that of the sources as they are now. `changed` is a
    place with the former, which go back into the trial's place.
    """
    for name in trial.task.needs:
        aside = (changed / name).rename(changed / "aside")
        (trial.place / name).rename(changed / name)
        aside.rename(trial.place / name)
    if wrong := complaint(ended):
        yield wrong
    now = tree(trial.place)
    if ended.code or ended.signal or not (wrong := difference(now, trial.expected)):
        return
    again = run(trial.task.arguments, changed)
    if again.code or difference(_below("out/", tree(changed)), _below("out/", now)):
        yield f"a result of two sources: {wrong}"
    shutil.rmtree(trial.place / "out")


# --- other processes --------------------------------------------------------------------------------------------------


def together(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Run a command twice at the same time, in the same folder; perhaps remove the working folder meanwhile."""
    names = [name for name in TASKS if name not in ("card", "both")]
    trial = Trial(stage, TASKS[draw.choice(names)], place, draw)
    working, sweeps = place / "out.partial", draw.choice(("", "removed", "moved"))

    def sweep() -> None:
        if working.exists():
            shutil.rmtree(working, ignore_errors=True) if sweeps == "removed" else working.rename(place / "aside")

    first = start(trial.task.arguments, place)
    time.sleep(draw.random() * trial.seconds)
    if sweeps:
        sweep()
    second = start(trial.task.arguments, place)
    ends = [end(first, place), end(second, place)]
    shutil.rmtree(place / "aside", ignore_errors=True)
    yield from (f"{sweeps or 'together'}: {wrong}" for ended in ends if (wrong := complaint(ended)))
    if not sweeps and all(ended.code for ended in ends):
        yield f"neither of two succeeded: {[ended.said[-200:] for ended in ends]}"
    if looks_finished(place) and (wrong := difference(tree(place / "out"), _below("out/", trial.expected))):
        yield f"{sweeps or 'together'}: out looks finished and is not: {wrong}"
    yield from (f"{sweeps or 'together'}: {wrong}" for wrong in trial.once_more())


def _below(prefix: str, files: Tree) -> Tree:
    return {name.removeprefix(prefix): sha for name, sha in files.items() if name.startswith(prefix)}


def start_ranks(trial: Trial, count: int, watches: list[Watch | None]) -> list[int]:
    """Start a command in several processes, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "break", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    return [start(trial.task.arguments, trial.place,
                  Start(names={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, watch=watches[rank]))
            for rank in range(count)]  # fmt: skip


def two_ranks(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Kill one of two processes that share a run; then the other is ended as torchrun does it."""
    names = [name for name in QUANTIZE if name not in ("both", "best")]
    trial = Trial(stage, QUANTIZE[draw.choice(names)], place, draw)
    number, victim = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)), draw.randrange(2)
    watch = Watch(act=lambda: os.kill(os.getpid(), number), step=draw.randint(1, trial.usual.steps))
    watches: list[Watch | None] = (
        [None, None] if draw.random() < 0.2 else [watch, None] if victim == 0 else [None, watch]
    )
    children = start_ranks(trial, 2, watches)
    ends = [end(children[victim], place)]
    dead = ends[0].code or ends[0].signal
    other = children[1 - victim]
    ends.append(end(other, place, (5.0, lambda: os.kill(other, signal.SIGTERM)) if dead else None))
    yield from (wrong for ended, sent in zip(ends, (number, 0), strict=True) if (wrong := complaint(ended, sent)))
    if not dead and (wrong := difference(tree(place), trial.expected)):
        yield f"two processes: {wrong}"
    yield from trial.once_more()


# --- surroundings -----------------------------------------------------------------------------------------------------


def as_nobody() -> None:
    if not os.getuid():
        nobody = pwd.getpwnam("nobody")
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)


def read_only(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Forbid writing to a folder, or reading of a file or folder, to a user who is not root."""
    trial = Trial(stage, any_task(draw), place, draw)
    place.parent.chmod(0o755)
    everything = [place, *place.rglob("*")]
    if not os.getuid():
        nobody = pwd.getpwnam("nobody")
        for path in everything:
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    path = draw.choice([place, place, place / "model", place / "tmp", *everything])
    mode, before = draw.choice((0o555, 0o000, 0o444)) if path != place else 0o555, path.stat().st_mode
    path.chmod(mode)
    home = draw.choice(("/proc", str(place), "/nowhere"))
    names = {"HOME": home, "HF_HOME": f"{home}/hf"}
    ended = run(trial.task.arguments, place, Start(as_nobody, names=names))
    path.chmod(before)
    where = f"{mode:o} {path.relative_to(place)}"
    if wrong := complaint(ended, may_differ=trial.task.arguments.startswith("verify")):
        yield f"{where}: {wrong}"
    if not ended.code and (wrong := difference(tree(place), trial.expected)):
        yield f"{where}: {wrong}"
    if ended.code == 2 and not any(name in ended.said for name in ("/", "out", "model", "text.txt")):
        yield f"{where}: a sentence that names no path: {ended.said[-300:]!r}"
    yield from (f"{where}: {wrong}" for wrong in trial.once_more())


NAMES = (
    b"caf\xe9", b"\xff\xfe", b"a b", b"a\nb", b"x" * 200, b"'\"`$(x)", b"%s{0}", b"a:b", b"#?*", b"-dash", b"a.partial",
    *(text.encode() for text in ("\u00fcber", "\u202eabc", "\ud55c\uad6d")),
)  # fmt: skip


def odd_names(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Give a folder or file an odd name, which perhaps the terminal cannot print."""
    task = any_task(draw)
    expected, _, _ = stage.expected(task)
    stage.place(task, place)
    arguments, name = task.arguments.split(), os.fsdecode(draw.choice(NAMES))
    for old in draw.sample(["model", "out", "text.txt"], draw.randint(1, 3)):
        new = f"{name}.txt" if old == "text.txt" else f"{name}-{old}"
        arguments = [new if part == old else part for part in arguments]
        if (place / old).exists():
            (place / old).rename(place / new)
    if any(part.startswith("-dash") for part in arguments):
        arguments = [f"./{part}" if part.startswith("-dash") else part for part in arguments]
    encoding = draw.choice(("utf-8", "ascii", "latin-1"))
    ended = run(arguments, place, Start(names={"PYTHONIOENCODING": encoding}))
    if wrong := complaint(ended):
        yield f"{name!a}, {encoding}: {wrong}"
    made = {sha for path, sha in tree(place).items() if path.endswith((".safetensors", ".gguf"))}
    if not ended.code and not made >= {sha for path, sha in expected.items() if path.endswith(".safetensors")}:
        yield f"{name!a}, {encoding}: other tensors"
    if ended.code and (left := [path.name for path in place.glob("*.partial*") if path.name not in arguments]):
        yield f"{name!a}, {encoding}: left over: {left}"


def lost_output(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Let the output lead to a full device, to a pipe that nobody reads, or nowhere."""
    trial = Trial(stage, any_task(draw), place, draw)
    how, arguments = (
        draw.choice(("/dev/full", "a pipe", "nowhere")),
        trial.task.arguments + draw.choice(("", " --json")),
    )
    ended = run(arguments, place, Start(output=how))
    if wrong := complaint(ended):
        yield f"{how}: {wrong}"
    if how == "a pipe" and ended.code not in (0, 141):
        yield f"{how}: exit code {ended.code}: {ended.said[-300:]!r}"
    if wrong := difference(tree(place), trial.expected):
        yield f"{how}: {wrong}"


KINDS: dict[str, Callable[[Stage, Path, Random], Iterator[str]]] = {
    "kill": partial(signals, chosen=(signal.SIGKILL,)),
    "interrupt": partial(signals, chosen=(signal.SIGINT, signal.SIGTERM)),
    "failing call": failing_call,
    "full disk": full_disk,
    "few resources": few_resources,
    "journal": journal,
    "working folder": working_folder,
    "damaged result": damaged_result,
    "changing source": changing_source,
    "together": together,
    "two ranks": two_ranks,
    "read-only": read_only,
    "odd names": odd_names,
    "lost output": lost_output,
}


# --- the campaign -----------------------------------------------------------------------------------------------------


def attempt(stage: Stage, kind: str, seed: int, number: int) -> list[str]:
    """Make one try; return the laws that were broken."""
    with tempfile.TemporaryDirectory(dir=stage.folder) as place:
        return [*KINDS[kind](stage, Path(place) / "place", Random(f"{seed} {kind} {number}"))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", action="append", choices=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--try", type=int, dest="number", metavar="N", help="this one alone")
    return parser.parse_args()


@contextmanager
def surroundings() -> Iterator[Path]:
    """Yield a folder for everything, in which the caches of all libraries lie too."""
    with tempfile.TemporaryDirectory(prefix="break-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.environ |= {
            "HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hf",
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        import torch

        torch.set_num_threads(1)
        import gptq.cli.commands  # noqa: F401

        yield folder


@dataclass
class Campaign:
    """Tries of one seed, and what they found, by kind of damage."""

    stage: Stage
    seed: int
    tries: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def try_once(self, kind: str, number: int) -> None:
        """Make a try, and print each law that it broke; a line to stderr says that it was made."""
        began, before = time.monotonic(), self.findings[kind]
        for law in attempt(self.stage, kind, self.seed, number):
            self.findings[kind] += 1
            repeat = f"python scripts/break.py --seed {self.seed} --only '{kind}' --try {number}"
            print(f"FOUND {kind}: {law}\n      {repeat}", flush=True)
        self.tries[kind] += 1
        took, found = round(time.monotonic() - began), self.findings[kind] - before
        self.seconds[kind] += took
        print(f"{kind} {number}: {found} findings, {took} s", file=sys.stderr, flush=True)

    def go_on(self, kinds: list[str], minutes: float) -> None:
        """Take turns among the kinds; Ctrl-C ends that too."""
        until = time.monotonic() + 60 * minutes
        with suppress(KeyboardInterrupt):
            for number in count():
                for kind in kinds:
                    if time.monotonic() > until:
                        return
                    self.try_once(kind, number)

    def summary(self) -> str:
        lines = [f"{kind:15}{tries:6} tries{self.findings[kind]:5} findings{self.seconds[kind]:7} s"
                 for kind, tries in self.tries.items()]  # fmt: skip
        return "\n".join([*lines, f"{self.tries.total()} tries, {self.findings.total()} findings"])


def main() -> int:
    args = parse()
    kinds = args.only or [*KINDS]
    with surroundings() as folder:
        stage = Stage(folder)
        stage.warm()
        campaign = Campaign(stage, args.seed)
        if args.number is None:
            campaign.go_on(kinds, args.minutes)
        else:
            for kind in kinds:
                campaign.try_once(kind, args.number)
    print(campaign.summary())
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
