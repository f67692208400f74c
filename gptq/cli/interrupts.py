"""Notice the signals that ask a command to end, wherever in the process they arrive."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_SECONDS = 0.01  # after which a signal whose exception got lost is sent again


@contextmanager
def noticing_interrupts() -> Iterator[list[int]]:
    """Yield a list of the signals that asked this process to end: Ctrl-C's, and SIGTERM, which job schedulers send.

    Both become a KeyboardInterrupt, which some libraries turn into errors of their own. Python lets no exception out of
    a finalizer or the callback of a weak reference, but prints it and goes on: an interrupt there is sent again.
    """
    seen: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    watched = [number for number, handler in usual.items() if in_main_thread and signal.getsignal(number) is handler]
    for number in watched:
        signal.signal(number, interrupt)
    try:
        with _sending_again(seen):
            yield seen
    finally:
        for number in watched:
            signal.signal(number, usual[number])


@contextmanager
def _sending_again(seen: list[int]) -> Iterator[None]:
    """Send the last signal of `seen` again where Python would print its KeyboardInterrupt and go on."""
    timers: list[threading.Timer] = []
    usual: Callable[[sys.UnraisableHookArgs], Any] = sys.unraisablehook

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if not seen or not issubclass(lost.exc_type, KeyboardInterrupt):
            usual(lost)
            return
        timers.append(threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), seen[-1])))  # now would be inside it again
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for timer in timers:
            timer.cancel()
