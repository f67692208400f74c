"""Tensors fetched while something else is computed: from the disk, and to a GPU."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from gptq.checkpoint.reader import Source


class ReadAhead:
    """Brings tensors from the disk into the page cache in a thread of its own, so that reading them later is quick.

    It holds no memory itself: the cache is the system's, which takes it back when it has better use for it.
    """

    def __init__(self, source: Source) -> None:
        self.seconds = 0.0  # that the thread spent reading, beside whatever else went on
        self.waited = 0.0  # that `join` stood still for it
        self.nbytes = 0
        self._source = source
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start(self, names: list[str]) -> None:
        """Fetch these tensors; a fetch under way comes to its end first."""
        self.join()
        self._stop.clear()
        self._thread = threading.Thread(target=self._fetch, args=(names,), name="gptq-read-ahead", daemon=True)
        self._thread.start()

    def take(self, name: str) -> Tensor | None:
        """Nothing: whoever wants a tensor reads it."""
        return None

    def join(self, cancel: bool = False) -> None:
        """Wait for what is under way; `cancel` gives it up."""
        began = time.perf_counter()
        if cancel:
            self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.waited += time.perf_counter() - began

    def _fetch(self, names: list[str]) -> None:
        began, piece = time.perf_counter(), memoryview(bytearray(2**20))
        with suppress(OSError):  # it only saves time: who really reads will say what is wrong
            for name in names:
                with self._source.file_of(name).open("rb", buffering=0) as file:
                    start, stop = self._source.byte_range(name)
                    file.seek(start)
                    while start < stop and not self._stop.is_set() and (count := file.readinto(piece[: stop - start])):
                        start, self.nbytes = start + count, self.nbytes + count
        self.seconds += time.perf_counter() - began


class CopyAhead:
    """Brings tensors to a GPU, as they are stored, in a thread and a CUDA stream of its own, and holds them there.

    At once it holds at most those of the last two calls of `start`, as the first of these may still be in use.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self.seconds = 0.0  # that the thread spent reading, beside whatever else went on
        self.waited = 0.0  # that `take` stood still for it
        self.nbytes = 0
        self._source = source
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gptq-copy-ahead")
        self._last: dict[str, Future[tuple[Tensor, torch.cuda.Event | None]]] = {}
        self._next: dict[str, Future[tuple[Tensor, torch.cuda.Event | None]]] = {}

    def start(self, names: list[str]) -> None:
        """Fetch these tensors, after those of the last call; what is older is forgotten."""
        for forgotten in self._last.values():
            forgotten.cancel()
        self._last, self._next = self._next, {name: self._thread.submit(self._fetch, name) for name in names}

    def take(self, name: str) -> Tensor | None:
        """The tensor, on the GPU, in memory of its own; None where it was not fetched, or was taken before.

        Raises:
            InputError: it holds NaN or infinity.
        """
        coming = self._last.pop(name, None) or self._next.pop(name, None)
        if coming is None:
            return None
        began = time.perf_counter()
        try:
            tensor, arrived = coming.result()
        except RuntimeError:  # no memory, on the GPU or to be pinned: this only saves time, so it is read once more
            return None
        finally:
            self.waited += time.perf_counter() - began
        if arrived is not None:
            used_by = torch.cuda.current_stream(self._device)
            used_by.wait_event(arrived)
            tensor.record_stream(used_by)  # or its memory might be given to the next copy too early
        return tensor

    def join(self, cancel: bool = False) -> None:
        """Wait for what is under way; `cancel` gives up what has not begun. Nothing can be fetched after this."""
        self._thread.shutdown(cancel_futures=cancel)
        self._last, self._next = {}, {}

    def _fetch(self, name: str) -> tuple[Tensor, torch.cuda.Event | None]:
        began = time.perf_counter()
        tensor, arrived = self._source.read(name), None
        if self._stream is not None:
            with torch.cuda.stream(self._stream):  # a copy from pinned memory is made while this thread goes on
                tensor = tensor.pin_memory().to(self._device, non_blocking=True)
                arrived = self._stream.record_event()
        self.nbytes += tensor.nbytes
        self.seconds += time.perf_counter() - began
        return tensor, arrived
