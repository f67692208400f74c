"""Progress of a command, printed to stderr."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm

from gptq.errors import printable
from gptq.pipeline.run import Observer


class Progress(Observer):
    """Shows a bar with the remaining time on a terminal or in a notebook, else a line a block or tenth of the work."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._began = time.monotonic()
        self._blocks = self._weights = self._done = self._before = 0
        self._block = -1
        self._pace: tuple[float, int] | None = None  # time and weights done when the first block of this run was done

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.finished()

    def note(self, text: str) -> None:
        _print_above_bar(f"note: {text}")

    def stage(self, text: str) -> None:
        if self._bar:
            self._bar.set_description(printable(text))
        else:
            _print_above_bar(text)

    def started(self, num_blocks: int, weights: int) -> None:
        self._blocks, self._weights, self._began = num_blocks, weights, time.monotonic()
        self._done, self._before, self._block, self._pace = 0, 0, -1, None
        self._open_bar(weights)

    def resumed(self, blocks: int, weights: int) -> None:
        self.stage(f"going on after block {blocks} of {self._blocks}")
        self._before = self._done = weights
        if self._bar is not None:
            self._bar.update(weights)

    def layer_done(self, block: int, name: str, weights: int) -> None:
        before, self._done = self._done, self._done + weights
        if self._bar is not None:
            self._bar.set_description(f"block {block + 1}/{self._blocks} {name.rpartition('.')[2]}")
            self._bar.update(weights)
        elif block != self._block:
            self._print_line(f"block {block + 1} of {self._blocks}", self._seconds_left(before))
            self._block = block

    def _seconds_left(self, done: int) -> float | None:
        """Estimate the time left from the blocks after the first, in which code is compiled; None before the third."""
        now = time.monotonic()
        if self._pace is None:
            self._pace = (now, done) if done > self._before else None
            return None
        since, earlier = self._pace
        return (now - since) * (self._weights - done) / (done - earlier)

    def window_done(self, done: int, total: int) -> None:
        self._show_count("window", done, total)

    def step_done(self, done: int, total: int) -> None:
        self._show_count("step", done, total)

    def layer_written(self, done: int, total: int) -> None:
        self._show_count("layer", done, total)

    def _show_count(self, what: str, done: int, total: int) -> None:
        if done == 1:
            self._began, self._done = time.monotonic(), 0
            self._open_bar(total)
        if self._bar is not None:
            self._bar.set_description(f"{what} {done}/{total}")
            self._bar.update(done - self._done)
        elif done == total or done * 10 // total != self._done * 10 // total:
            elapsed = time.monotonic() - self._began  # since the first was done
            self._print_line(f"{what} {done} of {total}", elapsed * (total - done) / (done - 1) if done > 1 else None)
        self._done = done

    def finished(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open_bar(self, total: int) -> None:
        if sys.stderr.isatty() or _is_notebook():
            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, file=sys.stderr)

    def _print_line(self, text: str, left: float | None) -> None:
        """Print a line with the time so far and the time left, if that is known."""
        about = f", about {left:.0f} s left" if left is not None and left >= 0.5 else ""
        _print_above_bar(f"{text}, {time.monotonic() - self._began:.0f} s{about}")


def _is_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel, where tqdm draws a widget."""
    find_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return find_shell is not None and hasattr(find_shell(), "kernel")


def _print_above_bar(text: str) -> None:
    """Print a line above the bar, without buffering."""
    tqdm.write(printable(text), file=sys.stderr)
    sys.stderr.flush()
