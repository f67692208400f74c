"""Prefetch tensors in a background thread: from disk to the page cache, or to GPU memory."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from gptq.checkpoint.reader import Source


class ReadAhead:
    """Reads tensors in a background thread, so that the system's page cache holds them when they are needed.

    The object holds no tensors; the system evicts pages of the cache under memory pressure.
    """

    def __init__(self, source: Source) -> None:
        self.seconds = 0.0  # time the thread spent reading
        self.waited = 0.0  # time `join` waited for the thread
        self.nbytes = 0  # bytes read
        self._source = source
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def start(self, names: list[str]) -> None:
        """Start to read these tensors; first wait for an earlier call to finish."""
        self.join()
        self._stop.clear()
        self._thread = threading.Thread(target=self._fetch, args=(names,), name="gptq-read-ahead", daemon=True)
        self._thread.start()

    def take(self, name: str) -> Tensor | None:
        """Return None: the caller reads the tensor itself, from the page cache."""
        return None

    def join(self, cancel: bool = False) -> None:
        """Wait for the thread to finish; with `cancel` it stops after the current piece."""
        began = time.perf_counter()
        if cancel:
            self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.waited += time.perf_counter() - began

    def _fetch(self, names: list[str]) -> None:
        began, piece = time.perf_counter(), memoryview(bytearray(2**20))
        with suppress(OSError):  # prefetching only saves time; the actual read reports errors
            for name in (stored for wanted in names for stored in self._source.stored_names(wanted)):
                with self._source.file_of(name).open("rb", buffering=0) as file:
                    start, stop = self._source.byte_range(name)
                    file.seek(start)
                    while start < stop and not self._stop.is_set() and (count := file.readinto(piece[: stop - start])):
                        start, self.nbytes = start + count, self.nbytes + count
        self.seconds += time.perf_counter() - began


class CopyAhead:
    """Reads tensors in a background thread and copies them to a GPU on its own CUDA stream, in their stored dtype.

    The tensors of the last two calls of `start` are held, because the tensors of the earlier call are needed when the
    later call starts; and some twice, because the original model runs beside the quantized one.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self.seconds = 0.0  # time the thread spent reading
        self.waited = 0.0  # time `take` waited for the thread
        self.nbytes = 0  # bytes read
        self._source = source
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gptq-copy-ahead")
        self._last: dict[str, Future[tuple[Tensor, torch.cuda.Event | None]]] = {}
        self._next: dict[str, Future[tuple[Tensor, torch.cuda.Event | None]]] = {}

    def start(self, names: list[str]) -> None:
        """Queue these tensors behind the tensors of the last call; drop the tensors of the call before the last."""
        for forgotten in self._last.values():
            forgotten.cancel()
        self._last, self._next = self._next, {name: self._thread.submit(self._fetch, name) for name in names}

    def take(self, name: str) -> Tensor | None:
        """Return a tensor on the GPU, not to be changed; None if it was not prefetched, or GPU memory was short.

        Raises:
            InputError: the tensor holds NaN or infinity.
        """
        coming = self._last.get(name) or self._next.get(name)
        if coming is None:
            return None
        began = time.perf_counter()
        try:
            tensor, arrived = coming.result()
        except RuntimeError:  # out of GPU or pinned memory: the caller reads the tensor itself
            return None
        finally:
            self.waited += time.perf_counter() - began
        if arrived is not None:
            used_by = torch.cuda.current_stream(self._device)
            used_by.wait_event(arrived)
            tensor.record_stream(used_by)  # keeps the allocator from reusing the memory before this stream is done
        return tensor

    def join(self, cancel: bool = False) -> None:
        """Wait for the thread and end it; with `cancel` drop tensors not yet begun. `start` fails after this."""
        self._thread.shutdown(cancel_futures=cancel)
        self._last, self._next = {}, {}

    def _fetch(self, name: str) -> tuple[Tensor, torch.cuda.Event | None]:
        began = time.perf_counter()
        tensor, arrived = self._source.read(name), None
        if self._stream is not None:
            with torch.cuda.stream(self._stream):  # copies from pinned memory are asynchronous
                tensor = tensor.pin_memory().to(self._device, non_blocking=True)
                arrived = self._stream.record_event()
        self.nbytes += tensor.nbytes
        self.seconds += time.perf_counter() - began
        return tensor, arrived
