"""What a run carries from layer to layer, and who is told of its progress."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gptq import solver
from gptq.checkpoint.writer import ShardWriter
from gptq.compute.distributed import Ranks
from gptq.config import QuantConfig
from gptq.models.weights import WeightStream
from gptq.output.results import BlockError, Coverage, LayerResult
from gptq.pipeline.journal import Journal
from gptq.pipeline.offload import Shelf
from gptq.planning.plan import LayerPlan


class Observer:
    """Is told how a run goes on; does nothing by itself."""

    def started(self, num_blocks: int, weights: int) -> None: ...

    def going_on(self, blocks: int, weights: int) -> None:
        """So much was done by an earlier run; comes after `started`."""

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def layer_done(self, block: int, name: str, weights: int) -> None: ...

    def finished(self) -> None: ...


@dataclass
class Job:
    """What the walk through the blocks carries along."""

    config: QuantConfig
    plans: dict[str, LayerPlan]
    stream: WeightStream
    writer: ShardWriter | None  # None where nothing is written yet
    observer: Observer
    finish: Callable[..., None]  # what is done with a layer at which all forwards stand
    results: list[LayerResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weight_checksums: dict[str, str] = field(default_factory=dict)
    solved: dict[str, solver.SolvedLayer] = field(default_factory=dict)  # of the block at hand
    tuned: dict[str, Tensor] = field(default_factory=dict)  # of the block at hand, not packed, by name in the model
    block_errors: list[BlockError] = field(default_factory=list)
    spreads: dict[str, dict[str, Any]] = field(default_factory=dict)  # histograms of weights and codes
    coverage: list[Coverage] = field(default_factory=list)
    shelf: Shelf = field(default_factory=Shelf)  # for activations between blocks
    ranks: Ranks = field(default_factory=Ranks)
    frugal: bool = True  # whether memory is short, so that what is freed goes back to the system
    journal: Journal | None = None
    notes_kept: int = 0  # of `notes`, in the journal

    @property
    def keeps_weights(self) -> bool:
        """Whether a solved block is run again, so that its layers' weights have to stay."""
        return self.writer is None or bool(self.config.tune_steps)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.observer.note(text)
