"""Plants faults in the package and tries whether `scripts/break.py` finds them, whose children are forked.

    python -m tests.planted_faults FOLDER

Prints one JSON object: for each fault what the harness says with it, and what it says without.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch

import gptq.cli.commands  # noqa: F401 (children of this process have it then)
from tests.conftest import load_script

commands, laws, damage = (load_script(f"break_{part}") for part in ("commands", "laws", "damage"))
ROUNDED = commands.quantize_task("--method rtn --group-size 16", windows="")
DRAWN = commands.result_task("report model", "wide")


def killed_while_writing(stage: Any, folder: Path) -> Iterator[str]:
    """Kill a command when a small file that it replaces is written and not yet synced; let it run again."""
    trial = laws.Trial(stage, DRAWN, folder / "killed", Random(0))
    commands.run(DRAWN.arguments, trial.place)
    watch = commands.Watch(step=1, of="fsync", act=damage.die)
    yield from trial.after(commands.run(DRAWN.arguments, trial.place, commands.Start(watch=watch)), signal.SIGKILL)
    yield from trial.once_more()


def stopped_after_a_block(stage: Any, folder: Path) -> Iterator[str]:
    trial = laws.Trial(stage, ROUNDED, folder / "stopped", Random(0))
    commands.run(ROUNDED.arguments, trial.place, commands.Start(partial(damage.do_after, 1)))
    yield from trial.once_more()


def refused(stage: Any, folder: Path) -> Iterator[str]:
    """A call that fails at the end of a run that keeps nothing."""
    trial = laws.Trial(stage, ROUNDED, folder / "refused", Random(0))

    def fail() -> None:
        raise OSError(28, "No space left on device")

    watch = commands.Watch(step=2, of="fsync", act=fail)
    yield from trial.after(commands.run(ROUNDED.arguments, trial.place, commands.Start(watch=watch)))


def flipped_tensors(stage: Any, folder: Path) -> Iterator[str]:
    for number in range(2):
        place = folder / f"{number}"
        stage.place(commands.result_task("verify model", "wide"), place)
        file = place / "model" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1 - number] ^= 1
        file.write_bytes(content)
        yield from laws.judge_verify(commands.run("verify model", place), "flip", file.name)


def write_in_place(path: Path, content: str) -> None:
    if path.parent.name.startswith("."):  # a new folder, which nobody sees yet
        path.write_text(content)
        return
    path.write_text(content[: len(content) // 2])
    damage.die()


def changed_after_a_block(stage: Any, folder: Path) -> Iterator[str]:
    """Change the last bit of every number of the source when a block is finished."""
    trial = laws.Trial(stage, ROUNDED, folder / "changed source", Random(0))
    changed = laws.place_beside(trial, "as it became")

    def change() -> None:
        file = trial.place / "model" / "model.safetensors"
        content = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        content[begin::4] = bytes(byte ^ 1 for byte in content[begin::4])
        file.write_bytes(content)

    ended = commands.run(ROUNDED.arguments, trial.place, commands.Start(partial(damage.do_after, 1, change)))
    yield from laws.judge_sources(trial, ended, changed)
    yield from trial.once_more()


def verify_nothing(*_: object) -> list[str]:
    return []


FAULTS: dict[str, tuple[Any, Callable[[Any, Path], Iterator[str]]]] = {
    "a small file is written in place": (
        lambda: patch("gptq.checkpoint.small_files.write_file", write_in_place),
        killed_while_writing,
    ),
    "finished blocks are forgotten": (
        lambda: patch("gptq.pipeline.journal.Journal.is_worth_keeping", lambda self: False),
        stopped_after_a_block,
    ),
    "a failed run leaves its folder": (
        lambda: patch("gptq.checkpoint.atomic_folder._remove", lambda root: None),
        refused,
    ),
    "a source that changes is not noticed": (
        lambda: patch("gptq.checkpoint.source_state.SourceState.require_same", lambda self, files=None: None),
        changed_after_a_block,
    ),
    "verify looks at no tensor": (
        lambda: patch.multiple(
            "gptq.output.verify", _find_changed_tensors=verify_nothing, _find_changed_weights=verify_nothing
        ),
        flipped_tensors,
    ),
}  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    stage = commands.Stage(folder)
    found = {}
    for number, (fault, (plant, provoke)) in enumerate(FAULTS.items()):
        (folder / f"{number} sound").mkdir()
        (folder / f"{number} planted").mkdir()
        sound = [*provoke(stage, folder / f"{number} sound")]
        with plant():
            found[fault] = {"sound": sound, "planted": [*provoke(stage, folder / f"{number} planted")]}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
