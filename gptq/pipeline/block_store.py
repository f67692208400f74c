"""Store finished blocks on disk: tensors in the output shards, everything else in the journal."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial

from pydantic import ValidationError
from torch import Tensor

from gptq import formats
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.writer import ShardWriter
from gptq.compute.background import Background
from gptq.compute.distributed import ALONE, Ranks
from gptq.output.record import Record, layer_records
from gptq.pipeline.block_result import BlockResult
from gptq.pipeline.journal import Journal
from gptq.planning.layer_plan import LayerPlan


class BlockStore:
    """Stores the result of each finished block, so that a stopped run can resume after it.

    On a GPU a block is packed and stored while the next one is solved; of several processes each packs its own layers.
    """

    def __init__(
        self, writer: ShardWriter, journal: Journal, check: Callable[[], None], background: Background,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        """`check` is called before a block is stored; it raises an error if the block may not be trusted."""
        self._ranks = ranks
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
        own = [result.tensors.keys(), result.weight_checksums, result.histograms]
        shares = [json.loads(text) for text in self._ranks.gather_texts(json.dumps([[*own[0]], *own[1:]]))]
        for name, tensor in self._arriving(result, [names for names, _, _ in shares]):
            self._writer.write(name, tensor)
        self._writer.sync()
        self._share_checksums([name for names, _, _ in shares for name in names])
        whole = replace(
            result,
            weight_checksums={name: found for _, sums, _ in shares for name, found in sums.items()},
            histograms={name: found for _, _, counts in shares for name, found in counts.items()},
        )
        written = whole.mark_written({n: self._writer.checksums[n] for names, _, _ in shares for n in names})
        self._journal.append("block", written.to_entry())
        self.finished[result.name] = written

    def _arriving(self, result: BlockResult, names: list[list[str]]) -> Iterator[tuple[str, Tensor]]:
        """On the first process yield the tensors of all, one at a time; the others send theirs.

        `names` are those of each process's tensors.
        """
        for owner, own in enumerate(names):
            for name in own:
                info = self._writer.tensors[name]
                tensor = self._ranks.send(result.tensors.get(name), owner, 0, info.shape, info.dtype)
                if self._ranks.rank == 0:
                    yield name, tensor

    def _share_checksums(self, names: list[str]) -> None:
        """Tell the other processes the checksums of tensors that the first has written."""
        own = {name: self._writer.checksums[name] for name in names}
        self._writer.checksums.update(json.loads(self._ranks.broadcast_text(json.dumps(own))))

    def restore(self, planned: Mapping[str, Mapping[str, LayerPlan]]) -> list[str]:
        """Load the blocks that an earlier run finished; return notes for the user.

        If a block's entry lacks a layer or a tensor, or holds what a record cannot, or the tensors on disk do not match
        its checksums, that block and those after it are quantized again. `planned` has the layers of each block by
        their names in the model.
        """
        for entry in self._journal.find("block"):
            result = BlockResult.from_entry(entry)
            layers = planned.get(result.name, {})
            tensors = {f"{one.stored}.{suffix}" for one in layers.values() for suffix in _layout(one)}
            is_whole = result.is_whole(layers.keys(), tensors) and _fits_a_record(result, layers)
            if not is_whole or not self._writer.adopt(result.checksums):
                self._journal.forget_blocks_from(result.name)
                return [f"{result.name} is damaged in the unfinished folder, so it and what follows is done again"]
            self.finished[result.name] = result
        return []

    def weight(self, plan: LayerPlan) -> Tensor:
        """Read the dequantized weight (outputs, inputs) of a finished layer."""
        self.wait()  # the files have one position for reading and writing
        packed = {suffix: self._writer.read(f"{plan.stored}.{suffix}") for suffix in _layout(plan)}
        return formats.decode(packed, plan.scheme).weight()

    def read(self, stored: str) -> Tensor:
        """Read a tensor of the output, by its name in the checkpoint."""
        self.wait()
        return self._writer.read(stored)


def _fits_a_record(result: BlockResult, layers: Mapping[str, LayerPlan]) -> bool:
    """Whether a record can hold what an entry of the journal says of a block."""
    histograms = {name: dict(counts) for name, counts in result.histograms.items()}
    try:
        values = {
            "model": "", "config": None, "calibration": None,
            "layers": layer_records({**layers}, [*result.layers], {**result.weight_checksums}, histograms),
            "blocks": [asdict(error) for error in result.errors],
            "experts": [asdict(seen) for seen in result.coverage],
        }  # fmt: skip
        Record.model_validate(values)
    except ValidationError:
        return False
    return True


def _layout(plan: LayerPlan) -> dict[str, TensorInfo]:
    return formats.layout(plan.scheme, plan.outputs, plan.inputs)
