"""Run all windows through a model's own forward, block by block, with one block in memory at a time.

with BlockWalk(network, blocks, windows, num_streams=1, weights=weights) as walk:
    for block, calls in walk:
        walk.resume_with([[run_to_end(call) for call in stream] for stream in calls])
    for window, output in walk.outputs():
        ...
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

from transformers import PreTrainedModel

from gptq.calibration.arrays import Inputs
from gptq.compute.allocator import return_freed_memory
from gptq.compute.distributed import ALONE, Ranks
from gptq.compute.matmul import onednn_linears
from gptq.errors import InputError
from gptq.models.attention import attention_by_products
from gptq.models.blocks import Block
from gptq.models.experts import Experts
from gptq.models.forward import (
    PausableForward,
    Pause,
    forward_without_cache,
    leave_out_rescaling,
    pause_instead,
    to_device,
    without_caches,
)
from gptq.models.weights import WeightStream
from gptq.pipeline.offload import ActivationOffload

Calls = list[list[partial[Any]]]  # by stream and window: the call of a block on the inputs that reach it
Outputs = list[list[Any]]  # by stream and window: the output of a block


class BlockWalk:
    """The forwards of all windows. Where the model would run a block, a forward pauses instead.

    With two streams every window is run twice: with activations of the quantized model and of the original model.
    Iterating yields each block with the calls that run it, in the order in which the forwards reach the blocks. The
    block's parameters are in memory by then, except the weights of `block.linears`. The loop body passes the block's
    outputs to `resume_with`; if it passes none, the walk ends.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        blocks: list[Block],
        windows: Sequence[Inputs],
        num_streams: int,
        weights: WeightStream,
        offload: ActivationOffload | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`offload` stores activations between blocks; by default they stay in memory. `ranks` share out experts."""
        self._ranks = ranks
        self._network, self._blocks, self._weights = network, blocks, weights
        self._offload = offload or ActivationOffload()
        self._left = {block.module: block for block in blocks}
        forward = forward_without_cache(network)
        leave_out_rescaling(network)
        self._streams = [
            [PausableForward(partial(forward, **to_device(x, weights.device, weights.dtype))) for x in windows]
            for _ in range(num_streams)
        ]
        self._pauses: list[list[Pause | None]] = []
        self._outputs: Outputs = []  # outputs of the current block, once the caller has passed them
        self._stack = ExitStack()
        self._steps: Generator[tuple[Block, Calls], None, None] | None = None

    def __enter__(self) -> "BlockWalk":
        self._stack.callback(self._stop)  # a paused forward would keep its activations alive forever
        self._stack.enter_context(attention_by_products())
        self._drop_others = self._stack.enter_context(self._weights.read_on_demand(self._network, self._blocks))
        self._forward_of = self._stack.enter_context(pause_instead(self._left))
        return self

    def __exit__(self, *_: object) -> None:
        if self._steps is not None:
            self._steps.close()
        self._stack.close()

    def _stop(self) -> None:
        for forward in chain(*self._streams):
            forward.stop()

    @property
    def unreached(self) -> list[Block]:
        """Return the blocks that no window has reached yet."""
        return [*self._left.values()]

    def resume_with(self, outputs: Outputs) -> None:
        """Pass on the current block's outputs. An output is replaced by None once its window's forward has resumed."""
        self._outputs = outputs

    def __iter__(self) -> Iterator[tuple[Block, Calls]]:
        """Yield (block, calls).

        Raises:
            InputError: a forward fails, or does not run the same blocks in the same order as the other windows.
        """
        self._steps = self._walk()
        return self._steps

    def _walk(self) -> Generator[tuple[Block, Calls], None, None]:
        self._pauses = [[self._offloaded(_advance(forward)) for forward in stream] for stream in self._streams]
        self._drop_others()
        while standing := self._pauses[0][0]:
            block = self._left.pop(standing.module, None)
            if block is None or any(p is None or p.module is not block.module for p in chain(*self._pauses)):
                name = next(b.name for b in self._blocks if b.module is standing.module)
                raise InputError(f"{name} is not run once per forward, in the same order for every window")
            self._weights.fill(block.module, block.name, skip=block.linears.values())
            self._weights.prefetch(_parameters_of_next(self.unreached, self._ranks))
            self._outputs = []
            with onednn_linears(block.module):
                yield block, self._calls(block)
            self._weights.defer(block.module, block.name, block.linears.values())
            return_freed_memory()
            if not self._outputs or not self._left:
                return
            for stream, outputs, pauses in zip(self._streams, self._outputs, self._pauses, strict=True):
                for i, forward in enumerate(stream):
                    pauses[i] = self._offloaded(_advance(forward, self._offload.put(outputs[i])))
                    outputs[i] = None
            self._drop_others()

    def outputs(self) -> Iterator[tuple[int, Any]]:
        """After the last block, yield each window's number and the model's output, computed one window at a time.

        Raises:
            InputError: a forward fails, or runs a block again (ALBERT's layers share one).
        """
        for i, forward in enumerate(self._streams[0]):
            again = _advance(forward, self._outputs[0][i])
            if again is not None:
                name = next(b.name for b in self._blocks if b.module is again.module)
                raise InputError(f"{name} is run more than once per forward, and cannot be read block by block")
            self._outputs[0][i] = None
            yield i, forward.result
            forward.result = None

    def _calls(self, block: Block) -> Calls:
        run = self._offload.release_before(self._forward_of[block.module])
        pauses = [[pause for pause in stream if pause] for stream in self._pauses]
        return [[partial(run, *without_caches(p.args), **without_caches(p.kwargs)) for p in own] for own in pauses]

    def _offloaded(self, pause: Pause | None) -> Pause | None:
        if pause is not None:
            self._offload.put((pause.args, pause.kwargs))
        return pause


def _advance(forward: PausableForward, answer: Any = None) -> Pause | None:
    """Resume a forward until its next pause.

    Raises:
        InputError: the model fails on its inputs.
    """
    try:
        return forward.advance(answer)
    except (ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the model does not run on its inputs: {reason}") from error


def _parameters_of_next(left: list[Block], ranks: Ranks) -> list[str]:
    """Return the names of the next block's parameters, of its experts those that this process owns."""
    if not left:
        return []
    lists = {path: module for path, module in left[0].module.named_modules() if isinstance(module, Experts)}
    others = tuple(f"{path}.{n}." for path, own in lists.items() for n in range(len(own)) if not ranks.owns(n))
    names = (name for name, _ in left[0].module.named_parameters() if not name.startswith(others))
    return [f"{left[0].name}.{name}" for name in names]
