"""What the C library does with memory that was freed."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


def choose_allocator(frugal: bool) -> None:
    """Tell the C library what to do with freed memory: `frugal`, give it back, otherwise keep it for the next tensor.

    Each page of memory that is taken anew costs a fault, which in a run adds up to a fifth of its time. But glibc's
    heap fragments: its holes can be as large as the largest tensor in it. So those that are much larger than a window's
    activations (frugal: from 4 MB up) go back to the system in any case.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**22 if frugal else 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**17 if frugal else 2**30)  # M_TRIM_THRESHOLD


@contextmanager
def malloc_policy(frugal: bool) -> Iterator[None]:
    """Inside, freed memory is handled as `choose_allocator` says; afterwards with the C library's defaults."""
    choose_allocator(frugal)
    try:
        yield
    finally:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 2**17)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**17)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Give back to the system what the C library has kept; otherwise a process grows with every block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
