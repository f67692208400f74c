"""`Run`, the context of a walk through the blocks; `Observer` reports progress; `LastStep` follows the last block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from gptq.calibration.arrays import Inputs
from gptq.checkpoint.atomic_folder import PartialFolder
from gptq.compute.distributed import Ranks
from gptq.compute.matrices import IN_MEMORY, Matrices
from gptq.config import QuantConfig
from gptq.models.weights import WeightStream
from gptq.pipeline.offload import ActivationOffload
from gptq.planning.layer_plan import LayerPlan
from gptq.planning.plan import Plan


class Observer:
    """Receives the progress of a run; override what you want to see. The methods here do nothing."""

    def started(self, num_blocks: int, weights: int) -> None: ...

    def resumed(self, blocks: int, weights: int) -> None:
        """An earlier run has finished this many blocks and weights; called after `started`."""

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def layer_done(self, block: int, name: str, weights: int) -> None: ...

    def prefetched(self, nbytes: int, seconds: float, waited: float) -> None:
        """At the end: bytes prefetched, seconds spent on reading them, and seconds that the run waited for them."""

    def window_done(self, done: int, total: int) -> None: ...

    def step_done(self, done: int, total: int) -> None: ...

    def finished(self) -> None: ...


class LayerProgress(Observer):
    """Forwards only `layer_done` to another observer; notes are kept, and told later or not at all."""

    def __init__(self, observer: Observer) -> None:
        self.layer_done = observer.layer_done  # type: ignore[method-assign]


@dataclass(frozen=True)
class Finished:
    """A checkpoint that is whole but for its name, and what it was made with."""

    working: PartialFolder
    plan: Plan
    windows: Sequence[Inputs]
    device: torch.device
    dtype: torch.dtype  # of forward passes


class LastStep(Protocol):
    """What changes a finished checkpoint as a whole before it gets its name."""

    def check(self, plan: Plan, windows: Sequence[Inputs] | None) -> None:
        """Raises InputError before the first block if the step cannot follow."""

    def run(self, finished: Finished) -> list[str]:
        """Write the changed checkpoint into a folder of its own, and make that the content; return notes."""


@dataclass(frozen=True)
class Run:
    """The context that every step of a walk through the blocks reads; nothing changes it."""

    config: QuantConfig
    layers: Mapping[str, LayerPlan]
    weights: WeightStream
    observer: Observer
    offload: ActivationOffload = field(default_factory=ActivationOffload)  # between blocks
    ranks: Ranks = field(default_factory=Ranks)
    returns_memory: bool = True  # whether freed memory is returned to the system after each layer
    reruns_blocks: bool = False  # whether solved blocks run again, to be measured or tuned; then their weights stay
    matrices: Matrices = IN_MEMORY  # makes Hessians and their factors

    @property
    def divides_experts(self) -> bool:
        """Whether each process reads, solves and runs its own experts only."""
        return self.ranks.size > 1 and not self.reruns_blocks
