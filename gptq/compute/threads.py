"""Run compiled loops on the threads of this process, on as many as torch uses."""

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
    """Call function(*arguments, *share) for every share, in parallel; the function must release the GIL.

    Use torch's own OpenMP threads where torch is built with GNU's OpenMP. After every torch operation these threads
    spin for a while before they sleep, so they start at once; other threads would have to wait for a free core.
    """
    left = iter([*shares])
    failures: list[BaseException] = []

    def work(_: object = None) -> None:
        try:
            for share in left:
                function(*arguments, *share)
        except BaseException as failure:  # cannot pass through the C frames of OpenMP; it is raised again below
            failures.append(failure)

    threads, library = torch.get_num_threads(), _openmp()
    if threads == 1:
        work()
    elif library is not None:
        body = _BODY(work)  # no ctypes.cast, which makes a reference cycle that would keep all arguments alive
        library.GOMP_parallel(body, None, threads, 0)
    else:
        waiting = [_pool(threads).submit(work) for _ in range(threads - 1)]
        work()
        for task in waiting:
            task.result()
    if failures:
        raise failures[0]


def run_compiled(address: int, arguments: tuple[int, ...]) -> None:
    """Call a compiled function once on every thread, without entering Python there; for work of microseconds.

    Args:
        address: address of a void(int64 *) function. The function takes shares of the work itself, by incrementing a
            shared counter (see `gptq.compute.simd.fetch_and_increment`).
        arguments: the int64 table that every thread gets: addresses and sizes.
    """
    held = array("q", arguments)  # faster to make than a ctypes array
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
    """Split range(count) into one (start, stop) per thread; all but the last are multiples of `unit` long."""
    share = -(-count // (torch.get_num_threads() * unit)) * unit
    return ((start, min(start + share, count)) for start in range(0, count, share))


@cache
def _openmp() -> ctypes.CDLL | None:
    """Return GNU's OpenMP library, which torch ships and has loaded; None if torch uses another OpenMP library."""
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
