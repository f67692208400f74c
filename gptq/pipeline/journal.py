"""The journal of a run: one line for each finished step, so that the same command can resume after any interruption.

OUT.partial/journal.jsonl holds one JSON object per line, {"sha256": of the entry's JSON, "entry": {kind: content}}:

    begun      everything that the output depends on, except the calibration data; and the machine
    windows    the calibration windows that were drawn: how many, their checksum, notes
    measured   with a target: the error of each width in each layer of one block
    widths     with a target: the config with the chosen widths
    block      a finished block: checksums of its tensors, and everything that the record will say of the block

A line is written when the data that it describes is on disk. The first torn or damaged line and all lines after it are
ignored. Activations are not stored: on resuming, the windows run through the finished blocks again, forward only and
with the same weights, so the output is the same to the byte.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, RootModel

from gptq.calibration.arrays import Inputs
from gptq.checkpoint.small_files import sync_path
from gptq.errors import InputError
from gptq.pipeline.block_result import BlockEntry
from gptq.pipeline.run_identity import checksum_of_windows, find_differences, list_changes

JOURNAL = "journal.jsonl"


class _Begun(BaseModel):
    version: dict[str, str]
    options: dict[str, Any]
    source: dict[str, str]
    machine: dict[str, Any]


class _Windows(BaseModel):
    count: int = Field(gt=0)
    sha256: str
    notes: list[str]


class _Measured(BaseModel):
    name: str
    errors: list[list[float]]


CONTENTS: dict[str, type[BaseModel]] = {  # of each kind of entry; a line that says anything else is damaged
    "begun": _Begun, "windows": _Windows, "measured": _Measured, "widths": RootModel[dict[str, Any]],
    "block": BlockEntry,
}  # fmt: skip
COSTLY = ("measured", "block")  # kinds of entries that took long to compute
Entry = tuple[str, dict[str, Any]]  # kind and content


class Journal:
    """The journal in one working folder."""

    def __init__(self, folder: Path, require_ours: Callable[[], None] = lambda: None) -> None:
        """Read the folder's journal; without a file it is empty. `require_ours` is called before each writing."""
        self.file = folder / JOURNAL
        self._require_ours = require_ours
        self._parse(self.file.read_bytes() if self.file.is_file() else b"")

    def _parse(self, content: bytes) -> None:
        self.entries: list[Entry] = []
        self._ends = [0]  # byte offset of the end of each entry
        self.damaged = False  # more than a torn last line
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines):
            entry = _read_line(line)
            if entry is None:
                self.damaged = number < len(lines) - 1 or not self.entries
                break
            self.entries.append(entry)
            self._ends.append(self._ends[-1] + len(line))

    def text(self) -> str:
        """Return the journal's valid lines."""
        return "".join(_line({kind: content}) for kind, content in self.entries)

    def find(self, kind: str) -> list[dict[str, Any]]:
        """Return the contents of all entries of one kind."""
        return [content for own, content in self.entries if own == kind]

    def is_worth_keeping(self) -> bool:
        """Whether resuming would save work."""
        return self.says_what_was_begun() and any(kind in COSTLY for kind, _ in self.entries)

    def says_what_was_begun(self) -> bool:
        """Whether the first line is there, without which nothing tells what the others belong to."""
        return bool(self.entries) and self.entries[0][0] == "begun"

    def describe_kept(self, blocks: int) -> str:
        """Tell the user of a failed run over `blocks` blocks what the folder keeps; "" if nothing was finished."""
        finished, measured = len(self.find("block")), len(self.find("measured"))
        if not self.is_worth_keeping():
            return ""
        kept = f"{finished} finished of" if finished else f"what was measured in {measured} of"
        return (
            f"{self.file.parent} keeps {kept} {blocks} blocks, and the command that began it goes on from there; "
            "remove it to start anew"
        )

    def append(self, kind: str, content: dict[str, Any]) -> None:
        """Write an entry and sync it to disk, so that it survives a power cut."""
        self._require_ours()
        line = _line({kind: content}).encode()
        with self.file.open("r+b" if self.file.exists() else "w+b") as file:
            file.truncate(self._ends[-1])  # a torn line, if any
            file.seek(self._ends[-1])
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if len(self._ends) == 1:
            sync_path(self.file.parent)
        self.entries.append((kind, content))
        self._ends.append(self._ends[-1] + len(line))

    def forget_blocks_from(self, name: str) -> None:
        """Remove the entry of the block called `name`, and all entries after it."""
        first = self._first(name)
        del self.entries[first:], self._ends[first + 1 :]
        os.truncate(self.file, self._ends[-1])

    def _first(self, name: str) -> int:
        return next(i for i, (kind, content) in enumerate(self.entries) if kind == "block" and content["name"] == name)

    def require_same(self, now: Mapping[str, Any]) -> list[str]:
        """Compare options, model and versions `now` with those that began the run; return notes for the user.

        Raises:
            InputError: a difference would change the output; the message says which.
        """
        begun = self.find("begun")[0]
        changed = find_differences(begun, now)
        if changed:
            raise InputError(f"{self.file.parent} was begun with {' and '.join(changed)}; give what it was begun with")
        machine = list_changes(begun["machine"], now["machine"])
        if not machine:
            return []
        return [
            f"the run was begun with {', '.join(machine)}; the result may differ in the last bits from that of one run"
        ]

    def require_windows(self, windows: list[Inputs], notes: list[str]) -> None:
        """Record the checksum of the calibration windows, or compare it with the recorded one.

        Raises:
            InputError: the run was begun with other windows.
        """
        now = {"count": len(windows), "sha256": checksum_of_windows(windows), "notes": notes}
        before = self.find("windows")
        if not before:
            self.append("windows", now)
        elif (before[0]["count"], before[0]["sha256"]) != (now["count"], now["sha256"]):
            raise InputError(
                f"{self.file.parent} was begun with other calibration windows; give the data it was begun with"
            )


class JournalCopy(Journal):
    """A copy of the first process's journal in memory, for the other processes, which write nothing."""

    def __init__(self, folder: Path, text: str) -> None:
        self.file = folder / JOURNAL
        self._parse(text.encode())

    def append(self, kind: str, content: dict[str, Any]) -> None:
        self.entries.append((kind, content))

    def forget_blocks_from(self, name: str) -> None:
        del self.entries[self._first(name) :]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps({"sha256": _checksum(entry), "entry": entry}) + "\n"


def _read_line(line: bytes) -> Entry | None:
    """Parse a line; None if it is torn or damaged."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = json.loads(line)
        if line.endswith(b"\n") and whole["sha256"] == _checksum(whole["entry"]):
            ((kind, content),) = whole["entry"].items()
            CONTENTS[kind].model_validate(content)
            return kind, content
    return None


def _checksum(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
