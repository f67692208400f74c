"""Compiled loops on several threads of this process, as many as torch uses."""

import ctypes
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

Shares = Iterable[tuple[int, ...]]
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_shares(function: Callable[..., None], arguments: tuple[Any, ...], shares: Shares) -> None:
    """function(*arguments, *share) for every share; the function has to let go of the GIL while it works.

    The threads are torch's own where it is built with GNU's OpenMP. After each of torch's operations these spin for a
    while instead of sleeping: threads of ours would wait for a core that long, and spinning ones are there at once.
    """
    left = iter([*shares])
    failures: list[BaseException] = []

    def work(_: object = None) -> None:
        try:
            for share in left:
                function(*arguments, *share)
        except BaseException as failure:  # it cannot cross the C code between; raised again below
            failures.append(failure)

    threads, library = torch.get_num_threads(), _openmp()
    if threads == 1:
        work()
    elif library is not None:
        body = _BODY(work)  # kept until all are done; ctypes.cast would tie it to itself, with all the arguments
        library.GOMP_parallel(body, None, threads, 0)
    else:
        waiting = [_pool(threads).submit(work) for _ in range(threads - 1)]
        work()
        for task in waiting:
            task.result()
    if failures:
        raise failures[0]


def run_compiled(address: int, arguments: tuple[int, ...]) -> None:
    """Call a compiled function on every thread at once, without Python, for work of microseconds.

    Args:
        address: of a void(int64 *), which claims its share of the work by itself (see `gptq.compute.simd.claim`).
        arguments: what it is given, all threads the same; addresses and sizes.
    """
    held = array("q", arguments)  # quicker made than an array of ctypes
    table, _ = held.buffer_info()
    threads, library = torch.get_num_threads(), _openmp()
    if threads > 1 and library is not None:
        library.GOMP_parallel(address, table, threads, 0)
        return
    function = _BODY(address)
    waiting = [_pool(threads).submit(function, table) for _ in range(threads - 1)]
    function(table)
    for task in waiting:
        task.result()


def shares_of(count: int, unit: int) -> Iterator[tuple[int, int]]:
    """0 to `count` as a run for each thread, all but the last a multiple of `unit` long."""
    share = -(-count // (torch.get_num_threads() * unit)) * unit
    return ((start, min(start + share, count)) for start in range(0, count, share))


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch brings along and has loaded."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "GOMP_parallel"):
            library.GOMP_parallel.restype = None
            library.GOMP_parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
            return library
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gptq")
