"""Notice the signals that ask a command to end, wherever in the process they arrive."""

import os
import signal
import sys
import threading
import time
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
    interrupts = _Interrupts()
    in_main_thread = threading.current_thread() is threading.main_thread()
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    watched = [number for number, handler in usual.items() if in_main_thread and signal.getsignal(number) is handler]
    for number in watched:
        signal.signal(number, interrupts.interrupt)
    try:
        with interrupts.sent_again():
            yield interrupts.seen
    finally:
        for number in watched:
            signal.signal(number, usual[number])


class _Interrupts:
    """The signals that were seen, and whether the exception of the last one could come through."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._raised = False  # whether the handler of the last one raised
        self._in_hook = False  # inside Python's hook for exceptions that get lost, where another would get lost too
        self._ended = False

    def interrupt(self, number: int, frame: object) -> None:
        """Handle a signal; without a lock, because another signal may arrive meanwhile, and its handler run inside."""
        raises = not self._in_hook
        self._raised = raises
        self.seen.append(number)
        if raises:
            raise KeyboardInterrupt

    @contextmanager
    def sent_again(self) -> Iterator[None]:
        """Inside, the last signal is sent again where Python would print its KeyboardInterrupt and go on."""
        usual: Callable[[sys.UnraisableHookArgs], Any] = sys.unraisablehook

        def hook(lost: "sys.UnraisableHookArgs") -> None:
            before, self._in_hook = len(self.seen), True
            try:
                is_lost = before > 0 and issubclass(lost.exc_type, KeyboardInterrupt)
                if not is_lost:
                    usual(lost)
                if is_lost or len(self.seen) > before:
                    threading.Thread(target=self._send_until_raised, daemon=True).start()
            finally:
                self._in_hook = False

        sys.unraisablehook = hook
        try:
            yield
        finally:
            sys.unraisablehook = usual
            self._ended = True

    def _send_until_raised(self) -> None:
        """Send the last signal until its handler raises, which it does not while the hook runs."""
        while True:
            time.sleep(AGAIN_SECONDS)
            if self._ended:
                return
            before = len(self.seen)
            os.kill(os.getpid(), self.seen[-1])
            while len(self.seen) == before and not self._ended:
                time.sleep(AGAIN_SECONDS)
            if self._raised:
                return
