"""Compare two runs of a benchmark; report what changed by more than the noise in their own repetitions.

    python scripts/bench_quantize.py --repeat 5 --json before.json
    python scripts/bench_quantize.py --repeat 5 --json after.json
    python scripts/bench_compare.py before.json after.json

Input is the JSON of the other bench scripts, or any JSON with named numbers. Runs in a list with the same `effort`,
`name`, `dtype`, `bits`, ... are repetitions, and so are the numbers of a list. A figure has changed if the medians
differ by more than

    3 x 1.4826 x sqrt(MAD_A^2 / n_A + MAD_B^2 / n_B)          MAD: median absolute deviation from the median

(three standard errors of normal noise) and by at least --least percent. With a single run on both sides the noise is
unknown and only --least counts. A note is printed if threads, torch or the number of cores differ. Exit code: 0 nothing
changed, 1 something changed, 2 the files cannot be compared.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

NAMING = ("effort", "name", "dtype", "bits", "stage", "vary", "value")  # keys that identify a run in a list
MACHINE = ("torch", "cores", "threads", "machine")  # keys whose differences are noted
INPUTS = ("windows", "tokens", "width", "blocks", "vocab", "group_size", "prompt", "rounds")  # keys that must agree
NORMAL = 1.4826  # ratio of the standard deviation to the median absolute deviation of normal noise
ERRORS = 3.0  # standard errors by which medians must differ

Figures = dict[str, list[float]]  # values of each figure in all repetitions


def figures(value: Any, path: str = "", found: Figures | None = None) -> Figures:
    """Collect all numbers of a benchmark's JSON by name; numbers with the same name are repetitions."""
    found = defaultdict(list) if found is None else found
    if isinstance(value, dict):
        own = [str(value[key]) for key in NAMING if isinstance(value.get(key), str | int) and path]
        inside = "/".join([part for part in (path, *own) if part])
        for key, item in value.items():
            if key not in NAMING and key not in MACHINE + INPUTS:
                figures(item, f"{inside}/{key}" if inside else key, found)
    elif isinstance(value, list):
        for item in value:
            figures(item, path, found)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        found[path].append(float(value))
    return found


def spread(values: list[float]) -> float:
    """Squared standard error, estimated from the repetitions; 0 for a single value."""
    middle = statistics.median(values)
    deviation = NORMAL * statistics.median(abs(value - middle) for value in values)
    return deviation**2 / len(values)


def changes(before: Figures, after: Figures, least: float) -> list[tuple[str, float, float, float]]:
    """(name, median before, median after, noise) of figures that changed by more than noise and fraction `least`."""
    found = []
    for name in before.keys() & after.keys():
        old, new = statistics.median(before[name]), statistics.median(after[name])
        noise = ERRORS * math.sqrt(spread(before[name]) + spread(after[name]))
        if abs(new - old) > max(noise, least * abs(old)):
            found.append((name, old, new, noise))
    return sorted(found, key=lambda change: -abs(math.log(max(abs(change[2]), 1e-12) / max(abs(change[1]), 1e-12))))


def read(path: Path) -> dict[str, Any]:
    """Read a benchmark's JSON; exit with 2 if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(refused(f"{path} cannot be read: {error}"))
    if not isinstance(content, dict):
        sys.exit(refused(f"{path} holds no benchmark"))
    return content


def refused(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=2.0, metavar="PERCENT", help="default: %(default)s")
    args = parser.parse_args()
    old, new = read(args.before), read(args.after)
    differing = [key for key in INPUTS if old.get(key) != new.get(key)]
    if differing:
        sys.exit(refused(f"the files measure different work: {', '.join(differing)} differ"))
    for key in MACHINE:
        if old.get(key) != new.get(key):
            print(f"note: {key} was {old.get(key)} and is {new.get(key)}")
    before, after = figures(old), figures(new)
    if not before.keys() & after.keys():
        sys.exit(refused("the files have no figure in common"))
    for name in sorted(before.keys() ^ after.keys()):
        print(f"only {'before' if name in before else 'after'}: {name}")
    found = changes(before, after, args.least / 100)
    for name, was, now, noise in found:
        change = f"{100 * (now / was - 1):+.1f} %" if was else "from 0"
        print(f"{name:60} {was:12.5g} -> {now:12.5g}  {change:>9}   noise {noise:.2g}")
    print(f"{len(found)} of {len(before.keys() & after.keys())} figures changed beyond noise and {args.least:g} %")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
