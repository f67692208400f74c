"""The harness that breaks commands finds what is broken, and says nothing of what is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.conftest import load_script

commands, laws, damage = (load_script(f"break_{part}") for part in ("commands", "laws", "damage"))


def ended(code: int = 0, said: str = "", signal: int = 0) -> Any:
    return commands.Ended(code, signal, "", said)


@pytest.mark.parametrize(
    ("how", "sent", "wrong"),
    [
        (ended(), 0, None),
        (ended(2, "block 1 of 2, 0 s\ngptq: the disk is full\n"), 0, None),
        (ended(2, ""), 0, "0 sentences with exit code 2"),
        (ended(2, "gptq: a\ngptq: b\n"), 0, "2 sentences with exit code 2"),
        (ended(130, ""), 0, "0 sentences with exit code 130"),
        (ended(1, "gptq: x\n"), 0, "exit code 1"),
        (ended(3, "gptq: KeyError\n"), 0, "exit code 3"),
        (ended(2, "Traceback (most recent call last):\ngptq: x\n"), 0, "a traceback"),
        (ended(2, "gptq: \x1b[31m\n"), 0, "control characters"),
        (ended(signal=9), 9, None),
        (ended(signal=11), 9, "ended by signal 11"),
    ],
)
def test_an_end_is_judged(how: Any, sent: int, wrong: str | None) -> None:
    found = laws.complaint(how, sent)
    assert found is None if wrong is None else found.startswith(wrong)


def test_trees_are_compared(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "c").write_text("x")
    before = commands.tree(tmp_path)
    assert before.keys() == {"a/b/", "a/c"}
    assert laws.difference(before, before) is None
    (tmp_path / "a" / "c").write_text("y")
    (tmp_path / "a" / "b" / "d").touch()
    assert laws.difference(commands.tree(tmp_path), before) == ("3 files: a/b/ missing, a/b/d left over, a/c differs")


@pytest.mark.parametrize("edit", [*damage.EDITS])
def test_edits_of_a_journal_change_it(edit: str) -> None:
    lines = [json.dumps({"sha256": "", "entry": {"block": {"name": str(n)}}}).encode() + b"\n" for n in range(3)]
    changed = 0
    for seed in range(8):
        edited = [*lines]
        damage.EDITS[edit](edited, Random(seed))
        changed += edited != lines
    assert changed


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.planted_faults", str(tmp_path)], cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 5
    for fault, said in found.items():
        assert said["sound"] == [], fault
        assert said["planted"], fault
