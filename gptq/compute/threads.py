"""Run compiled loops on the threads of this process, on as many as torch uses."""

import ctypes
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SHARED = 3  # entries at the begin of a loop's table: the counter of shares taken, the length of a share, the end
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_loop(address: int, end: int, unit: int, *arguments: int | Tensor) -> None:
    """Run a compiled loop over range(end) on every thread; each has a share, whose length is a multiple of `unit`.

    Args:
        address: of the function (see `gptq.compute.machine_code.compile_loop`).
        arguments: its table of whole numbers and of addresses of contiguous tensors on the CPU.
    """
    for given in arguments:
        if isinstance(given, Tensor) and not (given.is_contiguous() and given.device.type == "cpu"):
            raise ValueError("a compiled loop reads contiguous tensors on the CPU")
    share = share_of(end, unit)
    run_compiled(address, (0, share, end, *(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)))


def run_compiled(address: int, arguments: tuple[int, ...]) -> None:
    """Call a compiled function once on every thread, without entering Python there; for work of microseconds.

    Use torch's own OpenMP threads where torch is built with GNU's OpenMP. After every torch operation these threads
    spin for a while before they sleep, so they start at once; other threads would have to wait for a free core.

    Args:
        address: address of a void(int64 *) function. The function takes shares of the work itself, by incrementing a
            shared counter, the first entry of the table.
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


def share_of(count: int, unit: int) -> int:
    """Return the length of a thread's share of range(count), a multiple of `unit`."""
    return -(-count // (torch.get_num_threads() * unit)) * unit


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


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads, and would wait for them for ever
    os.register_at_fork(after_in_child=_pool.cache_clear)
