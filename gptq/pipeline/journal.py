"""What a run has finished, line by line, so that the same command goes on from there after whatever happened.

OUT.partial/journal.jsonl holds one JSON object per line, {"sha256": of the entry's JSON, "entry": {kind: content}}:

    begun      everything but the calibration that decides which bytes come out; and the machine
    windows    the calibration windows that were drawn: how many, their checksum, notes
    measured   with a target: what each width does to the layers of one block
    widths     with a target: the config with the widths that were chosen
    block      a finished block: checksums of its tensors, and all that the record will say of it

A line is written when what it speaks of is on disk. From the first line that is torn or damaged, the rest does not
count. Activations are not stored: the windows run through the finished blocks once more, forward only, on the same
weights, so the bytes agree.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptq.calibration.arrays import Inputs
from gptq.checkpoint.atomic_folder import sync_path
from gptq.errors import InputError
from gptq.pipeline.run_identity import changes, checksum_of_windows, differences

JOURNAL = "journal.jsonl"
WORK = ("measured", "block")  # entries that took long to come by
Entry = tuple[str, dict[str, Any]]  # kind and content


class Journal:
    """The journal in one working folder."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; a folder without a journal has an empty one."""
        self.file = folder / JOURNAL
        self._take(self.file.read_bytes() if self.file.is_file() else b"")

    def _take(self, content: bytes) -> None:
        self.entries: list[Entry] = []
        self._ends = [0]  # byte behind each entry
        self.damaged = False  # by more than being stopped in the middle of a line
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines):
            entry = _read_line(line)
            if entry is None:
                self.damaged = number < len(lines) - 1 or not self.entries
                break
            self.entries.append(entry)
            self._ends.append(self._ends[-1] + len(line))

    def text(self) -> str:
        return "".join(_line({kind: content}) for kind, content in self.entries)

    def find(self, kind: str) -> list[dict[str, Any]]:
        return [content for own, content in self.entries if own == kind]

    def is_worth_keeping(self) -> bool:
        return any(kind in WORK for kind, _ in self.entries)

    def promise(self, blocks: int) -> str:
        """What can be said when a run over so many blocks fails; nothing where nothing was finished."""
        finished, measured = len(self.find("block")), len(self.find("measured"))
        if not self.is_worth_keeping():
            return ""
        kept = f"{finished} finished of" if finished else f"what was measured in {measured} of"
        return (
            f"{self.file.parent} keeps {kept} {blocks} blocks, and the same command goes on from there; remove it to "
            "start anew"
        )

    def append(self, kind: str, content: dict[str, Any]) -> None:
        """Write an entry so that it survives a power cut."""
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
        """The block called `name`, and what came after it, have to be done again."""
        first = self._first(name)
        del self.entries[first:], self._ends[first + 1 :]
        os.truncate(self.file, self._ends[-1])

    def _first(self, name: str) -> int:
        return next(i for i, (kind, content) in enumerate(self.entries) if kind == "block" and content["name"] == name)

    def require_same(self, now: Mapping[str, Any]) -> list[str]:
        """Compare how the run was begun with how it goes on; returns notes on what may matter.

        Raises:
            InputError: something differs that decides which bytes come out; says what.
        """
        begun = self.find("begun")[0]
        changed = differences(begun, now)
        if changed:
            raise InputError(f"{self.file.parent} was begun with {' and '.join(changed)}; give what it was begun with")
        machine = changes(begun["machine"], now["machine"])
        if not machine:
            return []
        return [
            f"the run was begun with {', '.join(machine)}; the result may differ in the last bits from that of one run"
        ]

    def require_windows(self, windows: list[Inputs], notes: list[str]) -> None:
        """Note which calibration windows are used; raises InputError if they were others before."""
        now = {"count": len(windows), "sha256": checksum_of_windows(windows), "notes": notes}
        before = self.find("windows")
        if not before:
            self.append("windows", now)
        elif (before[0]["count"], before[0]["sha256"]) != (now["count"], now["sha256"]):
            raise InputError(
                f"{self.file.parent} was begun with other calibration windows; give the data it was begun with"
            )


class Copy(Journal):
    """Another process's journal, which alone writes it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.file = folder / JOURNAL
        self._take(text.encode())

    def append(self, kind: str, content: dict[str, Any]) -> None:
        self.entries.append((kind, content))

    def forget_blocks_from(self, name: str) -> None:
        del self.entries[self._first(name) :]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps({"sha256": _checksum(entry), "entry": entry}) + "\n"


def _read_line(line: bytes) -> Entry | None:
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        whole = json.loads(line)
        if line.endswith(b"\n") and whole["sha256"] == _checksum(whole["entry"]):
            ((kind, content),) = whole["entry"].items()
            return kind, content
    return None


def _checksum(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
