"""Going on with a run that was stopped, from the journal and the tensors it left."""

from functools import partial
from typing import Any

from torch import nn

from gptq.checkpoint.atomic_folder import PartialFolder
from gptq.compute.distributed import Ranks
from gptq.models.blocks import Block
from gptq.models.forward import run_to_end
from gptq.pipeline.block import run_as_original
from gptq.pipeline.block_store import BlockStore
from gptq.pipeline.block_walk import Calls, Outputs
from gptq.pipeline.journal import Copy, Journal
from gptq.pipeline.run import Run


def open_journal(working: PartialFolder, begun: dict[str, Any], blocks: int, ranks: Ranks) -> tuple[Journal, list[str]]:
    """The journal of an earlier run where it has finished something, otherwise a new one; and notes."""
    if ranks.rank:
        copy = Copy(working.root, ranks.broadcast_text(""))
        return copy, copy.require_same(begun)
    journal = Journal(working.root)
    damaged = [f"{journal.file} is damaged; what it does not say any more is done again"] if journal.damaged else []
    if not journal.is_worth_keeping():
        working.clear()
        journal = Journal(working.root)
        journal.append("begun", begun)
    working.describe_kept = partial(journal.promise, blocks)
    notes = journal.require_same(begun)
    working.keep_shards()
    ranks.broadcast_text(journal.text())
    return journal, [*damaged, *notes]


def run_finished(block: Block, calls: Calls, store: BlockStore, run: Run) -> Outputs:
    """The outputs of a finished block for every stream and window, with the weights that lie on disk."""
    if block.is_head():
        return []
    originals = run_as_original(block, calls[1], run) if len(calls) > 1 else []
    for name, linear in block.linears.items():
        run.weights.set_weight(linear, store.weight(run.layers[name]).to(run.weights.device))
    for name, stored in store.finished[block.name].tuned.items():
        module, key = _owner(block, name)
        tensor = store.read(stored).to(module._parameters[key])
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    return [[run.offload.put(run_to_end(call)) for call in calls[0]], *originals]


def _owner(block: Block, name: str) -> tuple[nn.Module, str]:
    """The module that holds a block's parameter called `name` in the model, and the parameter's name there."""
    path, _, key = name.removeprefix(f"{block.name}.").rpartition(".")
    return block.module.get_submodule(path), key
