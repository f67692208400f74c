"""Work that goes on behind the caller, on threads that have CUDA streams of their own; and copies to pinned memory."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Found = TypeVar("Found")


class Background:
    """Runs one job at a time behind the caller; a job may share out its parts. Without threads the caller runs all.

    A thread computes on its own stream, behind everything that the caller has launched before `start`; and it waits for
    its stream at the end, so that tensors of the job can be freed at once.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device, self._threads = device, threads
        self._jobs = ThreadPoolExecutor(1, thread_name_prefix="gptq-background") if threads else None
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="gptq-background-part") if threads else None
        self._running: Future[Any] | None = None
        self._launched: Any = None  # event: what the caller had launched when the job started

    @property
    def is_behind(self) -> bool:
        """Whether `start` returns before the job is done."""
        return self._jobs is not None

    def start(self, job: Callable[[], object]) -> None:
        """Run a job, after the one before it; errors of that one are raised here."""
        if self._jobs is None:
            job()
            return
        self.wait()
        self._launched = torch.cuda.current_stream(self._device).record_event() if self._on_gpu else None
        self._running = self._jobs.submit(self._run, job)

    def map(self, work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
        """Do a part of a job for each item; called by the job."""
        if self._workers is None:
            return [work(item) for item in items]
        return list(self._workers.map(lambda item: self._run(lambda: work(item)), items))

    def wait(self) -> None:
        """Wait for the job, and raise its error if it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """End the threads, after what they do now; errors are ignored."""
        for threads in (self._jobs, self._workers):
            if threads is not None:
                threads.shutdown(cancel_futures=True)

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _run(self, work: Callable[[], Found]) -> Found:
        stream = torch.cuda.Stream(self._device) if self._on_gpu else None
        with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else nullcontext():
            if stream is not None:
                stream.wait_event(self._launched)
            try:
                return work()
            finally:
                if stream is not None:
                    stream.synchronize()


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host; from a GPU through pinned memory, which is faster and stops one stream only."""
    if not tensor.is_cuda:
        return tensor.cpu()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copy
