"""The laws that every target of `fuzz_readers.py` keeps, whatever was changed: one change, run and judged."""

import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fuzz_changes
from fuzz_targets import TARGETS, Case, Target

import gptq
from gptq import InputError

ADDITIONAL_BYTES, RESIDENT_BYTES = 2 * 2**30, 512 * 2**20  # beyond what was there before
SECONDS = 20  # of the processor, for one change
PACKAGE = str(Path(gptq.__file__).parent) + os.sep
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


opened: list[tuple[str, bool]] = []  # paths that Python opened while a target ran, and whether for writing


def watch(event: str, arguments: tuple[Any, ...]) -> None:
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
