"""The laws that `break.py` holds the end of every command against."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from break_commands import Ended, Stage, Task, Tree, run, tree

RECORD = "quantization_record.json"  # is written twice by `eval --card`, with the card in between
NOT_COVERED = ("quality.json", "report/")  # what `verify` does not look at: measurements, and drawings of the record
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


def below(prefix: str, files: Tree) -> Tree:
    return {name.removeprefix(prefix): sha for name, sha in files.items() if name.startswith(prefix)}


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


def judge_verify(ended: Ended, how: str, name: str) -> Iterator[str]:
    """Yield what is wrong with how `verify` ended on a result of which the file `name` was damaged."""
    if wrong := complaint(ended, may_differ=True):
        yield f"{how}, {name}: {wrong}"
    is_told = name == RECORD and how == "gone" and "no record to compare" in ended.printed
    if not ended.code and not name.startswith(NOT_COVERED) and not is_told:
        yield f"verify does not find: {how}, {name}"


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
    if again.code or difference(below("out/", tree(changed)), below("out/", now)):
        yield f"a result of two sources: {wrong}"
    shutil.rmtree(trial.place / "out")
