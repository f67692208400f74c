"""Break gptq on purpose: disturb its commands in many ways, and hold the outcome against what is promised.

    python scripts/break.py --minutes 60 --seed 1
    python scripts/break.py --seed 1 --only kill --try 17      # one try again

The script makes a small Llama of its own, and forks a child for each command, so that nothing is imported twice. In
each try one kind of damage comes over one command: a signal, an error of the system before one of its calls, a full
disk, a changed file. These laws have to hold:

- A command ends with a documented exit code and, unless that is 0 or 1, with one sentence. Nobody sees a traceback.
- A folder that looks finished is finished.
- After the same command once more, undisturbed, every byte is as if nothing had happened, and nothing else is left.
- Blocks that were finished stay finished.
- `verify` finds every change of a file that it covers.

A broken law is printed with the command that repeats the try; then the script exits with 1. Most moments are counted in
calls of gptq's own code, so that a try can be repeated; some depend on the clock.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

from break_commands import Stage
from break_damage import KINDS


def attempt(stage: Stage, kind: str, seed: int, number: int) -> list[str]:
    """Make one try; return the laws that were broken."""
    with tempfile.TemporaryDirectory(dir=stage.folder) as place:
        return [*KINDS[kind](stage, Path(place) / "place", Random(f"{seed} {kind} {number}"))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", action="append", choices=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--try", type=int, dest="number", metavar="N", help="this one alone")
    return parser.parse_args()


@contextmanager
def surroundings() -> Iterator[Path]:
    """Yield a folder for everything, in which the caches of all libraries lie too."""
    with tempfile.TemporaryDirectory(prefix="break-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.environ |= {
            "HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hf",
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        import torch

        torch.set_num_threads(1)
        import gptq.cli.commands  # noqa: F401

        yield folder


@dataclass
class Campaign:
    """Tries of one seed, and what they found, by kind of damage."""

    stage: Stage
    seed: int
    tries: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def try_once(self, kind: str, number: int) -> None:
        """Make a try, and print each law that it broke; a line to stderr says that it was made."""
        began, before = time.monotonic(), self.findings[kind]
        for law in attempt(self.stage, kind, self.seed, number):
            self.findings[kind] += 1
            repeat = f"python scripts/break.py --seed {self.seed} --only '{kind}' --try {number}"
            print(f"FOUND {kind}: {law}\n      {repeat}", flush=True)
        self.tries[kind] += 1
        took, found = round(time.monotonic() - began), self.findings[kind] - before
        self.seconds[kind] += took
        print(f"{kind} {number}: {found} findings, {took} s", file=sys.stderr, flush=True)

    def go_on(self, kinds: list[str], minutes: float) -> None:
        """Take turns among the kinds; Ctrl-C ends that too."""
        until = time.monotonic() + 60 * minutes
        with suppress(KeyboardInterrupt):
            for number in count():
                for kind in kinds:
                    if time.monotonic() > until:
                        return
                    self.try_once(kind, number)

    def summary(self) -> str:
        lines = [f"{kind:15}{tries:6} tries{self.findings[kind]:5} findings{self.seconds[kind]:7} s"
                 for kind, tries in self.tries.items()]  # fmt: skip
        return "\n".join([*lines, f"{self.tries.total()} tries, {self.findings.total()} findings"])


def main() -> int:
    args = parse()
    kinds = args.only or [*KINDS]
    with surroundings() as folder:
        stage = Stage(folder)
        stage.warm()
        campaign = Campaign(stage, args.seed)
        if args.number is None:
            campaign.go_on(kinds, args.minutes)
        else:
            for kind in kinds:
                campaign.try_once(kind, args.number)
    print(campaign.summary())
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
