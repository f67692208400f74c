"""Several processes at one run: each has some of the windows and some of the work, and the bytes are those of one.

Float sums depend on their order, so nothing is added up across processes. What reaches a layer goes round, window by
window, from the process whose forward it is to all; each adds its own tiles of the Hessian in the order of the windows
and solves its own rows; tiles and rows are then exchanged. What a tile is does not depend on how many processes there
are.

Processes are started by `torchrun` or `accelerate launch`, and joined with gloo on CPUs and NCCL on GPUs.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gptq.errors import InputError

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
MOST_DIMENSIONS = 6
CPU = torch.device("cpu")
LOST = "another process of this run has ended; its own message says why"

Item = tuple[Tensor | None, ...]  # what one window brings to a layer


@dataclass(frozen=True)
class Ranks:
    """This process's number among all of the run, and where tensors are when they go round."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def windows(self, count: int) -> range:
        """Those of `count` windows that run through the model here."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def in_order(self, own: Iterable[Item], count: int, parts: int) -> Iterator[Item]:
        """Every window's item of `parts` tensors in the order of the windows, `own` being those of this process.

        Raises:
            InputError: another process has ended.
        """
        if self.size == 1:
            yield from own
            return
        arriving = iter(own)
        for owner in range(self.size):
            for _ in Ranks(owner, self.size).windows(count):
                item = next(arriving) if owner == self.rank else (None,) * parts
                yield tuple(self.broadcast(x, owner) for x in item)

    def broadcast(self, x: Tensor | None, owner: int) -> Tensor | None:
        """The owner's tensor; None where it has none."""
        header = torch.full((3 + MOST_DIMENSIONS,), -1, dtype=torch.int64)  # present, dtype, dimensions, shape
        if owner == self.rank and x is not None:
            header[:3] = torch.tensor([1, DTYPES.index(x.dtype), x.ndim])
            header[3 : 3 + x.ndim] = torch.tensor(x.shape, dtype=torch.int64)
        header = self._sent(header.to(self.device), owner)
        present, dtype, dimensions, *shape = header.tolist()
        if present < 0:
            return None
        if owner != self.rank or x is None:
            x = torch.empty(shape[:dimensions], dtype=DTYPES[dtype], device=self.device)
        return self._sent(x.detach().contiguous(), owner)

    def _sent(self, x: Tensor, owner: int) -> Tensor:
        try:
            if x.numel():
                dist.broadcast(x.reshape(-1).view(torch.uint8), owner)  # bytes: a backend need not know the dtype
        except RuntimeError as error:
            raise InputError(LOST) from error
        return x

    def least(self, number: int) -> int:
        """The least of all processes' numbers."""
        return number if self.size == 1 else self._reduced(number, dist.ReduceOp.MIN)

    def total(self, number: int) -> int:
        """The sum of all processes' numbers."""
        return number if self.size == 1 else self._reduced(number, dist.ReduceOp.SUM)

    def wait(self) -> None:
        """Until all processes are here."""
        self.least(0)

    def any(self, flag: bool) -> bool:
        """Whether it holds for one of the processes."""
        return self.least(0 if flag else 1) == 0

    def _reduced(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        found = torch.tensor(number, dtype=torch.int64, device=self.device)
        try:
            dist.all_reduce(found, operation)
        except RuntimeError as error:
            raise InputError(LOST) from error
        return int(found)

    def owns(self, piece: int) -> bool:
        """Whether this process does a piece of the work at a layer; they take turns."""
        return piece % self.size == self.rank

    def exchange(self, own: Mapping[int, Tensor], count: int) -> list[Tensor]:
        """All of `count` pieces in order, where every process has its `own`."""
        pieces = (self.piece(own.get(number), number) for number in range(count))
        return [piece for piece in pieces if piece is not None]

    def piece(self, own: Tensor | None, number: int) -> Tensor | None:
        """A piece of the work, from the process that `owns` it."""
        return own if self.size == 1 else self.broadcast(own, number % self.size)

    def told(self, text: str) -> str:
        """What the first process says."""
        if self.size == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        found = self.broadcast(content if self.rank == 0 else None, 0)
        return "" if found is None else bytes(found.tolist()).decode()


ALONE = Ranks()  # the processes, where there is one


@contextmanager
def launched_together(device: str) -> Iterator[None]:
    """Inside, processes that `torchrun` or `accelerate launch` has started are joined; others stay alone."""
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def joined(device: torch.device) -> Ranks:
    """The processes that torch.distributed has joined; this one alone where none were."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
