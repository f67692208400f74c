"""Data-parallel quantization: several processes share one run, and its output equals that of one process bit for bit.

A floating-point sum depends on its order, so no sum is reduced across processes. Each process runs the forward of its
own windows and broadcasts each layer's inputs, window by window. Every process adds up its own panels of the Hessian in
the order of the windows and solves its own tiles of rows; panels and tiles are then gathered. The size of a panel or
tile does not depend on the number of processes. An expert of a mixture belongs to one process, which alone reads it,
solves it and computes with it.

Start the processes with `torchrun` or `accelerate launch`; they communicate by gloo on CPUs and by NCCL on GPUs.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gptq.errors import InputError, first_line

BROADCAST_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
MAX_DIMENSIONS = 6
CPU = torch.device("cpu")
PROCESS_ENDED = "another process of this run has ended; its own message says why"

Item = tuple[Tensor | None, ...]  # the tensors that reach a layer in one window


@dataclass(frozen=True)
class Ranks:
    """This process's rank in the run, the number of processes, and the device that communicates."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def own_windows(self, count: int) -> range:
        """Indices of the windows, out of `count`, whose forward this process runs."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather_windows(self, own: Iterable[Item], count: int, parts: int) -> Iterator[Item]:
        """Yield the items of all windows in order; each process passes the items of its own windows.

        Args:
            own: items of this process's windows, in order.
            count: number of windows of all processes.
            parts: tensors in an item.
        Raises:
            InputError: another process has ended.
        """
        if self.size == 1:
            yield from own
            return
        arriving = iter(own)
        for owner in range(self.size):
            for _ in Ranks(owner, self.size).own_windows(count):
                item = next(arriving) if owner == self.rank else (None,) * parts
                yield tuple(self.broadcast(x, owner) for x in item)

    def broadcast(self, x: Tensor | None, owner: int) -> Tensor | None:
        """Return the tensor that the process `owner` passes as x, on every process; None if the owner passes None."""
        header = torch.full((3 + MAX_DIMENSIONS,), -1, dtype=torch.int64)  # present, dtype, dimensions, shape
        if owner == self.rank and x is not None:
            header[:3] = torch.tensor([1, BROADCAST_DTYPES.index(x.dtype), x.ndim], dtype=torch.int64)
            header[3 : 3 + x.ndim] = torch.tensor(x.shape, dtype=torch.int64)
        header = self._broadcast_bytes(header.to(self.device), owner)
        present, dtype, dimensions, *shape = header.tolist()
        if present < 0:
            return None
        if owner != self.rank or x is None:
            x = torch.empty(shape[:dimensions], dtype=BROADCAST_DTYPES[dtype], device=self.device)
        return self._broadcast_bytes(x.detach().contiguous(), owner)

    def _broadcast_bytes(self, x: Tensor, owner: int) -> Tensor:
        """Broadcast a contiguous tensor as bytes, in place; raises InputError if another process has ended."""
        try:
            if x.numel():
                dist.broadcast(x.reshape(-1).view(torch.uint8), owner)  # bytes: a backend need not know the dtype
        except RuntimeError as error:
            raise InputError(PROCESS_ENDED) from error
        return x

    def minimum(self, number: int) -> int:
        """Return the smallest of the numbers that the processes pass."""
        return number if self.size == 1 else self._all_reduce(number, dist.ReduceOp.MIN)

    def total(self, number: int) -> int:
        """Return the sum of the numbers that the processes pass."""
        return number if self.size == 1 else self._all_reduce(number, dist.ReduceOp.SUM)

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self.minimum(0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process."""
        return self.minimum(0 if flag else 1) == 0

    def _all_reduce(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        """Combine all processes' integers, which is exact; raises InputError if another process has ended."""
        found = torch.tensor(number, dtype=torch.int64, device=self.device)
        try:
            dist.all_reduce(found, operation)
        except RuntimeError as error:
            raise InputError(PROCESS_ENDED) from error
        return int(found)

    def owns(self, piece: int) -> bool:
        """Whether this process computes the given piece of the work; see `owner_of`."""
        return self.owner_of(piece) == self.rank

    def owner_of(self, piece: int) -> int:
        """Return the process that computes a piece (a panel or tile of a layer, an expert).

        Pieces are dealt to the processes in turns, forwards and backwards, because later panels of a Hessian are less
        work.
        """
        turn, place = divmod(piece, self.size)
        return self.size - 1 - place if turn % 2 else place

    def gather_pieces(self, own: Mapping[int, Tensor], count: int) -> list[Tensor]:
        """Return all `count` pieces in order; each process passes the pieces that it `owns`, by number."""
        pieces = (self.broadcast_piece(own.get(number), number) for number in range(count))
        return [piece for piece in pieces if piece is not None]

    def broadcast_piece(self, own: Tensor | None, number: int) -> Tensor | None:
        """Return a piece on every process; the process that `owns` the piece passes it as `own`, the others None."""
        return own if self.size == 1 else self.broadcast(own, self.owner_of(number))

    def broadcast_text(self, text: str, owner: int = 0) -> str:
        """Return the text that the process `owner` passes, on every process."""
        if self.size == 1:
            return text
        content = None
        if text and self.rank == owner:
            content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)
        found = self.broadcast(content, owner)
        return "" if found is None else found.cpu().numpy().tobytes().decode()

    def gather_texts(self, text: str) -> list[str]:
        """Return the texts that all processes pass, by rank, on every process."""
        return [self.broadcast_text(text, owner) for owner in range(self.size)]

    def send(self, x: Tensor | None, sender: int, receiver: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pass a tensor from one process to another; both know its shape and dtype, and call this in the same order.

        Returns the tensor on the receiver, and an empty one on the others.

        Raises:
            InputError: another process has ended.
        """
        if sender == receiver == self.rank and x is not None:
            return x
        found = torch.empty(shape if self.rank == receiver else (0,), dtype=dtype, device=self.device)
        try:
            if math.prod(shape) and self.rank == sender != receiver and x is not None:
                dist.send(x.detach().to(self.device).contiguous().view(-1).view(torch.uint8), receiver)
            elif found.numel() and sender != receiver:
                dist.recv(found.view(-1).view(torch.uint8), sender)
        except RuntimeError as error:
            raise InputError(PROCESS_ENDED) from error
        return found


SIGNAL_SECONDS = 0.1  # within which a signal ends the wait for other processes
ALONE = Ranks()  # a run of a single process


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Inside, the processes of a `torchrun` or `accelerate launch` form torch's default process group.

    Do nothing in a process that was started alone, or where a group exists already.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    try:
        _meet("nccl" if on_gpu else "gloo")
    except RuntimeError as error:
        raise InputError(f"the processes of this run did not meet: {first_line(error)}") from error
    try:
        yield
    finally:
        if dist.is_initialized():  # an interrupt can come between
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Form the process group in a thread of its own, so that Ctrl-C and SIGTERM end the wait for the other processes.

    Torch waits up to half an hour without a step of Python, and between those alone signals are noticed.
    """
    failed: list[Exception] = []

    def meet() -> None:
        try:
            if backend == "nccl":
                torch.cuda.set_device(dist.get_node_local_rank())  # which is the thread's
            dist.init_process_group(backend)
        except Exception as error:
            failed.append(error)

    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    while meeting.is_alive():
        meeting.join(SIGNAL_SECONDS)  # a signal that another thread received wakes nobody
    if failed:
        raise failed[0]


def current_ranks(device: torch.device) -> Ranks:
    """This process's rank in torch's default process group; rank 0 of 1 if there is no group."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
