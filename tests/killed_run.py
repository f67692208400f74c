"""Quantizes a model again and again in forked processes that are killed, and compares with a run that was not.

    python -m tests.killed_run MODEL FOLDER

Writes one JSON object to stdout. One process imports and compiles; its children start in no time. Kills come twenty
times by the clock; in another run at steps on the file system, at the end before each one.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptq import InputError, QuantConfig, quantize
from gptq.checkpoint.atomic_folder import require_unused
from gptq.checkpoint.writer import ShardWriter
from gptq.pipeline.journal import Journal

KILLS = 20
CONFIG = QuantConfig(group_size=32, seq_len=32, num_samples=4, effort="balanced", format="gptq")


def run(model: Path, out: Path, windows: torch.Tensor, batch_size: int | None = None) -> None:
    quantize(model, out, CONFIG, calibration=windows, device="cpu", batch_size=batch_size)


def forked(body: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        body()
        status = 0
    finally:
        os._exit(status)


def ended_by(child: int) -> int:
    """The signal that ended a process, 0 for none; raises RuntimeError where it failed by itself."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise RuntimeError("a run failed that was not killed")
    return 0


def finished_blocks(out: Path) -> int:
    return len(Journal(out.with_name(out.name + ".partial")).find("block"))


def killed_by_the_clock(model: Path, folder: Path, windows: torch.Tensor, seconds: float) -> Iterator[tuple[Path, int]]:
    """Yields each result with the number of times its run was killed; the last of them lives to its end."""
    draw = random.Random(0)
    kills = 0
    while kills < KILLS:
        out, own = folder / f"killed{kills}", 0
        while not out.exists():
            in_flight = draw.choice((None, 2))
            child = forked(partial(run, model, out, windows, in_flight))
            if kills < KILLS:
                time.sleep(draw.uniform(0, 0.35) * seconds)
                os.kill(child, signal.SIGKILL)
            if ended_by(child) == signal.SIGKILL:
                kills, own = kills + 1, own + 1
        yield out, own


@contextmanager
def dying_at(step: int) -> Iterator[list[int]]:
    """Inside, the process is killed before its step-th step on the file system; yields how many there have been."""
    count = [0]

    def counted(step_taken: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any, **kwargs: Any) -> Any:
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return step_taken(*args, **kwargs)

        return do

    taken = {
        (owner, name): getattr(owner, name)
        for owner, names in ((os, ("fsync", "unlink", "rmdir", "rename", "replace", "truncate")),
                             (Path, ("unlink", "rmdir", "replace", "mkdir", "touch", "write_text")),
                             (shutil, ("copyfile", "rmtree")), (ShardWriter, ("write",)))
        for name in names
    }  # fmt: skip
    try:
        for (owner, name), function in taken.items():
            setattr(owner, name, counted(function))
        yield count
    finally:
        for (owner, name), function in taken.items():
            setattr(owner, name, function)


def killed_at_steps(model: Path, folder: Path, windows: torch.Tensor, blocks: int) -> tuple[Path, int]:
    """A run that dies in the midst of blocks, and when all are finished, once before each step that is left.

    Returns its result and the number of lives.
    """
    out, lives, step, last_steps = folder / "stepwise", 0, 0, False

    def live() -> None:
        with dying_at(step):
            run(model, out, windows)

    while not out.exists():
        lives, all_finished = lives + 1, finished_blocks(out) == blocks
        step = 40 + lives if not all_finished else step + 1 if last_steps else 0  # a block takes about 30
        last_steps = all_finished
        ended_by(forked(live))
    return out, lives


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    windows = torch.randint(1, 320, (4, 32), generator=torch.Generator().manual_seed(5))
    run(model, folder / "first", windows)  # compiles
    began = time.monotonic()
    run(model, folder / "whole", windows)
    seconds = time.monotonic() - began
    whole = content(folder / "whole")
    if content(folder / "first") != whole:
        raise RuntimeError("two undisturbed runs differ")
    by_the_clock = [
        {"kills": kills, "same": content(out) == whole}
        for out, kills in killed_by_the_clock(model, folder, windows, seconds)
    ]
    blocks = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    out, lives = killed_at_steps(model, folder, windows, blocks)
    same = content(out) == whole
    shutil.rmtree(out)  # what a life that ended after the renaming left behind is in nobody's way
    run(model, out, windows)
    stepwise = {"lives": lives, "same": same and content(out) == whole}
    for path in [*folder.iterdir()]:  # a kill right after the renaming leaves what the next command of the name removes
        with suppress(InputError):
            require_unused(path)
    left = [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
    json.dump({"seconds": seconds, "by_the_clock": by_the_clock, "stepwise": stepwise, "left": left}, sys.stdout)


if __name__ == "__main__":
    main()
