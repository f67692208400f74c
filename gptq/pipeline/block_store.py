"""Finished blocks on disk: their tensors in the output's shards, all else in the journal."""

from torch import Tensor

from gptq import formats
from gptq.checkpoint.writer import ShardWriter
from gptq.pipeline.block_result import BlockResult
from gptq.pipeline.journal import Journal
from gptq.planning.plan import LayerPlan


class BlockStore:
    """Takes the result of each block, so that a run that is stopped goes on after the last one taken."""

    def __init__(self, writer: ShardWriter, journal: Journal) -> None:
        self.finished: dict[str, BlockResult] = {}  # by the block's name, in the order in which they were finished
        self._writer = writer
        self._journal = journal

    def commit(self, result: BlockResult) -> None:
        """Write a block's tensors, and once they are on disk the journal's entry."""
        for name, tensor in result.tensors.items():
            self._writer.write(name, tensor)
        self._writer.sync()
        written = result.on_disk(self._writer.checksums)
        self._journal.append("block", written.to_entry())
        self.finished[result.name] = written

    def restore(self) -> list[str]:
        """Take over the blocks that an earlier run finished; returns notes.

        A block whose tensors are not what was written, and those after it, are done again.
        """
        for entry in self._journal.find("block"):
            result = BlockResult.from_entry(entry)
            if not self._writer.adopt(result.checksums):
                self._journal.forget_blocks_from(result.name)
                return [f"{result.name} is damaged in the unfinished folder, so it and what follows is done again"]
            self.finished[result.name] = result
        return []

    def weight(self, plan: LayerPlan) -> Tensor:
        """The dequantized weight (outputs, inputs) of a layer on disk."""
        layout = formats.layout(plan.scheme, plan.outputs, plan.inputs)
        packed = {suffix: self._writer.read(f"{plan.stored}.{suffix}") for suffix in layout}
        return formats.decode(packed, plan.scheme).weight()

    def read(self, stored: str) -> Tensor:
        """A tensor on disk, by its name in the checkpoint."""
        return self._writer.read(stored)
