"""Store finished blocks on disk: tensors in the output shards, everything else in the journal."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from gptq import formats
from gptq.checkpoint.writer import ShardWriter
from gptq.compute.background import Background
from gptq.pipeline.block_result import BlockResult
from gptq.pipeline.journal import Journal
from gptq.planning.plan import LayerPlan


class BlockStore:
    """Stores the result of each finished block, so that a stopped run can resume after it.

    On a GPU a block is packed and stored while the next one is solved.
    """

    def __init__(
        self, writer: ShardWriter, journal: Journal, check: Callable[[], None], background: Background
    ) -> None:
        """`check` is called before a block is stored; it raises an error if the block may not be trusted."""
        self.finished: dict[str, BlockResult] = {}  # by block name, in the order in which they finished
        self._writer = writer
        self._journal = journal
        self._check = check
        self.background = background

    def commit(self, pack: Callable[[Background], BlockResult]) -> None:
        """Pack a block, write its tensors to disk, and then its entry in the journal.

        Errors of a block that is stored behind the caller are raised by the next call, or by `wait`.
        """
        self.background.start(partial(self._store, pack))

    def wait(self) -> None:
        """Wait until all blocks are stored."""
        self.background.wait()

    def _store(self, pack: Callable[[Background], BlockResult]) -> None:
        self._check()
        result = pack(self.background)
        for name, tensor in result.tensors.items():
            self._writer.write(name, tensor)
        self._writer.sync()
        written = result.mark_written(self._writer.checksums)
        self._journal.append("block", written.to_entry())
        self.finished[result.name] = written

    def restore(self) -> list[str]:
        """Load the blocks that an earlier run finished; return notes for the user.

        If the tensors on disk do not match a block's checksums, that block and those after it are quantized again.
        """
        for entry in self._journal.find("block"):
            result = BlockResult.from_entry(entry)
            if not self._writer.adopt(result.checksums):
                self._journal.forget_blocks_from(result.name)
                return [f"{result.name} is damaged in the unfinished folder, so it and what follows is done again"]
            self.finished[result.name] = result
        return []

    def weight(self, plan: LayerPlan) -> Tensor:
        """Read the dequantized weight (outputs, inputs) of a finished layer."""
        self.wait()  # the files have one position for reading and writing
        layout = formats.layout(plan.scheme, plan.outputs, plan.inputs)
        packed = {suffix: self._writer.read(f"{plan.stored}.{suffix}") for suffix in layout}
        return formats.decode(packed, plan.scheme).weight()

    def read(self, stored: str) -> Tensor:
        """Read a tensor of the output, by its name in the checkpoint."""
        self.wait()
        return self._writer.read(stored)
