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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gptq.calibration.text import Inputs
from gptq.checkpoint.atomic_folder import sync_path
from gptq.checkpoint.reader import Source, sha256
from gptq.config import Override, QuantConfig
from gptq.errors import InputError
from gptq.version import __version__

JOURNAL = "journal.jsonl"
WORK = ("measured", "block")  # entries that took long to come by
HASHED_WHOLE = 2**26  # bytes of a source file; of longer ones a piece every so often
PIECE, EVERY = 2**16, 2**24
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
        changed = _differences(begun, now)
        if changed:
            raise InputError(f"{self.file.parent} was begun with {' and '.join(changed)}; give what it was begun with")
        machine = _changes(begun["machine"], now["machine"])
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


def beginning(
    config: QuantConfig, source: Source, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> dict[str, Any]:
    """What decides which bytes come out. How many windows run at once, and the number of a GPU, do not."""
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "trust_remote_code": trust_remote_code,
    }
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": gpu or torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    described = [*source.files, *source.folder.glob("config.json"), *source.folder.glob("*.py")]
    return {
        "version": {"gptq": __version__},
        "options": {**config.to_dict(), **settings},
        "source": {file.name: fingerprint(file) for file in described},
        "machine": machine,
    }


def fingerprint(file: Path) -> str:
    """Size and checksum; of a long file only pieces are read, so that 140 GB take seconds.

    Content decides, not its date: a model that was downloaded again is the same.
    """
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        if size <= HASHED_WHOLE:
            digest.update(opened.read())
        else:
            for begin in [*range(0, size, EVERY), size - PIECE]:
                opened.seek(begin)
                digest.update(opened.read(PIECE))
    return f"{size} {digest.hexdigest()}"


def checksum_of_windows(windows: Iterable[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        for name, x in sorted(window.items()):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)} {sha256(x)}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    files = {**begun["source"], **now["source"]}
    others = [name for name in files if begun["source"].get(name) != now["source"].get(name)]
    options = _changes(begun["version"], now["version"]) + _changes(begun["options"], now["options"])
    return options + [f"another {name}" for name in others]


def _changes(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before, after = (json.loads(json.dumps(values)) for values in (begun, now))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} {_shown(name, before.get(name))}, now {_shown(name, after.get(name))}" for name in names]


def _shown(name: str, value: Any) -> str:
    if name == "overrides":
        return " ".join(str(Override.of(pair)) for pair in value or []) or "none"
    return "none" if value is None else str(value)
