"""Which branches of the package `fuzz_readers.py` reaches, from Python 3.12 on."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import gptq

PACKAGE = str(Path(gptq.__file__).parent) + os.sep
MONITORING: Any = getattr(sys, "monitoring", None)  # Python's, from 3.12 on


class Coverage:
    """Which lines and branches of the package a process has reached; each is reported once and costs nothing then."""

    def __init__(self, branches: set[tuple[Any, ...]], lines: set[tuple[str, int]]) -> None:
        self.branches, self.lines = branches, lines
        self.fresh: list[tuple[Any, ...]] = []
        self._ways: dict[tuple[Any, ...], set[int]] = {}  # taken in this process

    def start(self) -> None:
        if MONITORING is None:
            return
        monitoring = MONITORING
        monitoring.use_tool_id(monitoring.COVERAGE_ID, "fuzz")
        monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.BRANCH, self._branch)
        monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, self._line)
        monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.BRANCH | monitoring.events.LINE)

    def _branch(self, code: CodeType, offset: int, destination: int) -> Any:
        if not (PACKAGE and code.co_filename.startswith(PACKAGE)):  # the name is gone while Python ends
            return MONITORING.DISABLE
        at = (code.co_filename, code.co_firstlineno, offset)
        if (*at, destination) not in self.branches:
            self.branches.add((*at, destination))
            self.fresh.append((*at, destination))
        ways = self._ways.setdefault(at, set())
        ways.add(destination)
        return MONITORING.DISABLE if len(ways) > 1 else None

    def _line(self, code: CodeType, line: int) -> Any:
        if PACKAGE and code.co_filename.startswith(PACKAGE):  # the name is gone while Python ends
            self.lines.add((code.co_filename, line))
        return MONITORING.DISABLE

    def take(self) -> list[tuple[Any, ...]]:
        found, self.fresh = self.fresh, []
        return found


def unreached(lines: set[tuple[str, int]], rooms: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of functions in these rooms that were never reached, a file each."""
    for room in rooms:
        for file in sorted(Path(PACKAGE, room).rglob("*.py")):
            inner: set[int] = set()
            codes = [
                const for const in compile(file.read_text(), str(file), "exec").co_consts if isinstance(const, CodeType)
            ]
            while codes:
                code = codes.pop()
                codes += [const for const in code.co_consts if isinstance(const, CodeType)]
                if code.co_name.isidentifier() and code.co_flags & 2:  # a function's, not a class's
                    inner |= {line for _, _, line in code.co_lines() if line and line > code.co_firstlineno}
            missed = sorted(inner - {line for name, line in lines if name == str(file)})
            if missed:
                yield f"{file.relative_to(PACKAGE)}: {', '.join(map(str, missed))}"
