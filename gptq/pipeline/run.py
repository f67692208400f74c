"""The context of a walk through the blocks, which nothing changes on the way, and who is told of its progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptq.compute.distributed import Ranks
from gptq.config import QuantConfig
from gptq.models.weights import WeightStream
from gptq.pipeline.offload import Shelf
from gptq.planning.plan import LayerPlan


class Observer:
    """Is told how a run goes on; does nothing by itself."""

    def started(self, num_blocks: int, weights: int) -> None: ...

    def going_on(self, blocks: int, weights: int) -> None:
        """An earlier run finished these blocks and weights; called after `started`."""

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def layer_done(self, block: int, name: str, weights: int) -> None: ...

    def prefetched(self, nbytes: int, seconds: float, waited: float) -> None:
        """How much was read ahead of use, how long that took, and how long the run waited for it; at the end."""

    def finished(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """What every step of a walk through the blocks may look up."""

    config: QuantConfig
    layers: Mapping[str, LayerPlan]
    weights: WeightStream
    observer: Observer
    offload: Shelf = field(default_factory=Shelf)  # of activations between blocks
    ranks: Ranks = field(default_factory=Ranks)
    returns_memory: bool = True  # give freed memory back to the system after each layer, where memory is short
    reruns_blocks: bool = False  # a solved block runs again (for measuring or tuning), so its weights stay
