"""Fuzz everything that reads a file with damaged and hostile files; print each violation once, and how to see it again.

    python scripts/fuzz_readers.py --changes 10000 --seed 1
    python scripts/fuzz_readers.py --again 'verify model/gptq config.json:123 model.safetensors:7'

The script makes small valid inputs of every kind (`fuzz_seeds.py`), changes files of one of them (`fuzz_changes.py`),
and runs one command, or one reader, on the result: a target (`fuzz_targets.py`). A change that takes a branch of the
package that none took before (`fuzz_coverage.py`, from Python 3.12 on; `--reached` lists what was never reached) is
kept, and changed further.

The laws (`fuzz_laws.py`): a target ends with success, or with one sentence that names a file or tensor. It takes at
most SECONDS of the processor, ADDITIONAL_BYTES of address space and RESIDENT_BYTES of memory beyond what was there. It
prints no control characters, reads nothing outside the folder, writes nothing but its result, and leaves nothing
incomplete. `verify` finds every changed byte of a recorded file; a conversion of a damaged file is refused or is found
by `verify`; a run, or a polishing, that goes on writes the bytes of an undisturbed one; a GGUF file is read as the
package gguf reads it.

Targets run in a forked process, which is replaced when a change kills it. The same seed makes the same changes as long
as the code is the same. The script exits with 1 if it has found anything.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import fuzz_seeds
import torch
import transformers
from fuzz_coverage import Coverage, unreached
from fuzz_laws import Change, Edits, broken_law, watch
from fuzz_targets import TARGETS, processors

from gptq import QuantConfig
from gptq.checkpoint import pickled
from gptq.formats import name_rules
from gptq.output.results import RECORD
from gptq.planning import cost

WALL_SECONDS = 300  # until a target that never returns to Python is killed
LIFE = 3000  # changes until the working process is replaced
MOST_EDITS = 4  # changes of files that are made at once


@dataclass
class Campaign:
    """Draws changes, and keeps those that reach something new."""

    seeds: dict[str, Path]
    draw: random.Random
    targets: list[str]
    corpus: dict[str, list[Edits]] = field(default_factory=dict)  # by input

    def __post_init__(self) -> None:
        kinds: dict[str, list[str]] = {}
        for name in sorted(self.seeds):
            kinds.setdefault(name.split("/")[0], []).append(name)
        self._inputs = {t: [n for kind in TARGETS[t].kinds for n in kinds.get(kind, [])] for t in self.targets}
        self.targets = [target for target in self.targets if self._inputs[target]]
        self._files = {name: _weighted_files(path) for name, path in self.seeds.items()}

    def next(self) -> Change:
        """Draw a change: of an input as it is, or a further one of a change that reached something new."""
        (target,) = self.draw.choices(self.targets, [TARGETS[target].weight for target in self.targets])
        seed = self.draw.choice(self._inputs[target])
        kept = self.corpus.get(seed, [])
        edits = self.draw.choice(kept) if kept and self.draw.random() < 0.6 else ()
        decisive = DECISIVE.get(target, [])
        names = decisive if decisive and self.draw.random() < 0.9 else self._files[seed]
        for _ in range(self.draw.choice([1, 1, 1, 2])):
            edits = (*edits[-MOST_EDITS + 1 :], (self.draw.choice(names), self.draw.randrange(2**31)))
        return Change(target, seed, edits)

    def keep(self, change: Change) -> None:
        self.corpus.setdefault(change.seed, []).append(change.edits)


DECISIVE = {  # files that a target reads, of those in its inputs
    "records": [RECORD, RECORD, "quality.json"],
    "tokenizer": ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
}
OFTEN = {
    "config.json", "model.safetensors", "model.safetensors.index.json", "model.gguf", "tensor_index.json",
    "journal.jsonl", "metadata.jsonl", "pytorch_model.bin",
}  # fmt: skip


def _weighted_files(folder: Path) -> list[str]:
    """The files of an input; those that decide much are listed more often."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names for _ in range(6 if name in OFTEN or ("quant" in name and name != RECORD) else 1)]


def work(connection: Connection, seeds: dict[str, Path], coverage: Coverage) -> None:
    """Run the changes that come through the connection, and answer each; in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    name_rules.PATIENCE = 1.0  # seconds for regular expressions; a minute in earnest
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    sys.addaudithook(watch)
    coverage.start()
    while True:
        change = connection.recv()
        if change is None:
            connection.send(coverage.lines)
            return
        wrong = broken_law(change, seeds)
        connection.send((wrong, coverage.take()))


class Worker:
    """A process that runs changes, and is replaced when it dies, hangs or is old."""

    def __init__(self, seeds: dict[str, Path]) -> None:
        self._seeds = seeds
        self.branches: set[tuple[Any, ...]] = set()
        self.lines: set[tuple[str, int]] = set()
        self._process: Any = None
        self._age = 0

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        coverage = Coverage(self.branches, self.lines)

        def begin() -> None:
            self._connection.close()  # so that this process ends when the other end is gone
            work(theirs, self._seeds, coverage)

        self._process = context.Process(target=begin, daemon=True)
        self._process.start()
        theirs.close()
        self._age = 0

    def run(self, change: Change) -> tuple[str | None, list[tuple[Any, ...]]]:
        """Return the violation and the new branches of a change."""
        if self._process is None or self._age >= LIFE:
            self.stop()
            self._start()
        self._age += 1
        try:
            self._connection.send(change)
            if self._connection.poll(WALL_SECONDS):
                wrong, fresh = self._connection.recv()
                self.branches.update(fresh)
                return wrong, fresh
            self._process.kill()
        except (EOFError, OSError):
            pass
        self._process.join()
        died, self._process = -self._process.exitcode, None
        how = "it did not come back" if died == signal.SIGKILL else f"the process ended by signal {died}"
        return f"{change.target}: {how}", []

    def stop(self) -> None:
        if self._process is not None:
            self._connection.send(None)
            self.lines |= self._connection.recv()
            self._process.join()
            self._process = None


def smallest(change: Change, kind: str, worker: Worker) -> Change:
    """Leave out changes without which a violation is the same."""
    for edit in change.edits:
        fewer = Change(change.target, change.seed, tuple(one for one in change.edits if one != edit))
        wrong, _ = worker.run(fewer)
        if wrong and kind_of(wrong) == kind:
            change = fewer
    return change


def kind_of(wrong: str) -> str:
    """A violation without numbers and quotations, to count each kind once."""
    place = re.search(r"\w+ in \w+\.py, line \d+", wrong)
    if place:
        return f"{wrong.split(':')[0]}: {place[0]}"
    return re.sub(r"[\d.]+", "N", re.sub(r"'.*|\".*", "", wrong.split("): ")[0]))[:200]


def _prepare(folder: Path) -> dict[str, Path]:
    """Make the inputs, in a process of its own, since what computes starts threads."""
    cache = datasets.config.HF_DATASETS_CACHE = folder / "cache"  # HF_HOME was read when datasets was imported
    datasets.config.DOWNLOADED_DATASETS_PATH = datasets.config.EXTRACTED_DATASETS_PATH = cache / "downloads"
    vars(pickled)["HF_HOME"] = str(cache)
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe()

    def make() -> None:
        torch.set_num_threads(1)
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            seeds = fuzz_seeds.make_seeds(folder)
        rates = cost.measure_rates(QuantConfig(), torch.device("cpu"), torch.float32, 0.2)
        writing.send((seeds, fuzz_seeds.make_processors(folder / "processors"), rates))

    process = context.Process(target=make)
    process.start()
    writing.close()
    seeds, made, rates = reading.recv()
    process.join()
    processors.update(made)
    cost.measure_rates = lambda *_, **__: rates  # a second each time it is measured
    return dict(seeds)


def run_changes(
    changes: Iterable[Change], worker: Worker, keep: Callable[[Change], None], whole: bool
) -> tuple[Counter[str], dict[str, Change]]:
    """Run changes until they end or an interrupt comes; return the count by target, and a change for each violation.

    Args:
        keep: called with a change that reached something new.
        whole: leave nothing out of a change that is printed.
    """
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopped.append(received))
    counts: Counter[str] = Counter()
    found: dict[str, Change] = {}
    began = time.monotonic()
    for change in changes:
        if stopped:
            break
        wrong, fresh = worker.run(change)
        counts[change.target] += 1
        if fresh and not wrong:
            keep(change)
        if wrong and kind_of(wrong) not in found:
            found[kind_of(wrong)] = change if whole else smallest(change, kind_of(wrong), worker)
            print(f"FOUND {wrong}\n      --again '{found[kind_of(wrong)]}'", flush=True)
        if counts.total() % 1000 == 0:
            passed = time.monotonic() - began
            print(f"{counts.total()} changes, {passed:.0f} s, {len(worker.branches)} branches", flush=True)
    return counts, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", action="append", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--again", action="append", metavar="CHANGE", help="run one change, as it was printed")
    parser.add_argument("--reached", action="store_true", help="list lines of the readers that no change reached")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        seeds = _prepare(Path(place))
        worker = Worker(seeds)
        campaign = Campaign(seeds, random.Random(args.seed), args.only or list(TARGETS))
        given = [Change.parse(text) for text in args.again or ()]
        changes = given or (campaign.next() for _ in range(args.changes))
        counts, found = run_changes(changes, worker, campaign.keep, whole=bool(given))
        worker.stop()
    print(*(f"{name}: {counts[name]}" for name in TARGETS if counts[name]), sep=", ")
    print(f"{counts.total()} changes, seed {args.seed}, {len(worker.branches)} branches, {len(found)} findings")
    if args.reached:
        print(*unreached(worker.lines, ("checkpoint", "formats", "calibration", "output")), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
