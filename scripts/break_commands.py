"""Commands for `break.py` to disturb, the children that run them, and the stage with models that they need."""

import atexit
import faulthandler
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parents[1] / "gptq")
PATIENCE = 300  # seconds until a command counts as hung
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

    with suppress(OSError, RuntimeError):  # without threads or a place to write
        faulthandler.dump_traceback_later(PATIENCE - 10, file=2)  # a command that hangs says where
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
