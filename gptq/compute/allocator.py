"""Tune glibc's malloc: keep freed memory for the next tensor, or return it to the system."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # the parameters' numbers in malloc.h
USUAL_MMAP, USUAL_TRIM = 2**25, 2**26  # bytes; where glibc's dynamic thresholds end once 32 MiB have been freed


@contextmanager
def malloc_policy(frugal: bool) -> Iterator[None]:
    """Inside, malloc is set by `choose_allocator`; on exit it gets the thresholds that large tensors usually lead to.

    By default glibc raises both thresholds with the largest block that was freed, up to 32 and 64 MiB. Setting a
    threshold stops this for good; so on exit both thresholds are set to these largest values. malloc cannot be asked
    for its settings, so values that the process had set itself are lost.
    """
    choose_allocator(frugal)
    try:
        yield
    finally:
        _set_thresholds(USUAL_MMAP, USUAL_TRIM)


def choose_allocator(frugal: bool) -> None:
    """Set malloc's thresholds: return freed memory to the system if `frugal`, otherwise keep it for the next tensor.

    Each page taken from the system costs a page fault; over a run, page faults add up to a fifth of the time. But
    glibc's heap fragments: a hole can be as large as the largest tensor in it. So blocks far larger than a window's
    activations (from 32 MiB, if frugal from 4 MiB) are always separate mappings, which the system gets back when they
    are freed.
    """
    _set_thresholds(2**22 if frugal else 2**25, 2**17 if frugal else 2**30)


def _set_thresholds(mmap: int, trim: int) -> None:
    """Set both thresholds in bytes; do nothing where the C library has no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, mmap)
        mallopt(M_TRIM_THRESHOLD, trim)


def return_freed_memory() -> None:
    """Return the heap's free pages to the system; otherwise resident memory grows with every block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
