"""Resume a stopped run from its journal and the tensors on disk."""

from functools import partial
from typing import Any

from torch import nn

from gptq.checkpoint.atomic_folder import PartialFolder
from gptq.compute.distributed import Ranks
from gptq.models.blocks import Block
from gptq.models.forward import run_to_end
from gptq.pipeline.block_store import BlockStore
from gptq.pipeline.block_walk import Calls, Outputs
from gptq.pipeline.journal import Journal, JournalCopy
from gptq.pipeline.layer_walk import run_original
from gptq.pipeline.run import Run


def open_journal(working: PartialFolder, begun: dict[str, Any], blocks: int, ranks: Ranks) -> tuple[Journal, list[str]]:
    """Return the journal of an earlier run if resuming saves work, otherwise a new journal; and notes for the user.

    Raises:
        InputError: the earlier run was begun with other options or another model.
    """
    if ranks.rank:
        copy = JournalCopy(working.root, ranks.broadcast_text(""))
        return copy, copy.require_same(begun)
    journal = Journal(working.root, working.require_ours)
    is_damaged = journal.damaged or (journal.entries and not journal.says_what_was_begun())
    damaged = [f"{journal.file} is damaged; what it does not say any more is done again"] if is_damaged else []
    if not journal.is_worth_keeping():
        working.clear()
        journal = Journal(working.root, working.require_ours)
        journal.append("begun", begun)
    working.describe_kept = partial(journal.describe_kept, blocks)
    notes = journal.require_same(begun)
    working.keep_shards()
    ranks.broadcast_text(journal.text())
    return journal, [*damaged, *notes]


def run_finished_block(block: Block, calls: Calls, store: BlockStore, run: Run) -> Outputs:
    """Return the outputs of a finished block for every stream and window, computed with the weights on disk."""
    if block.is_head():
        return []
    originals = run_original(block, calls[1], run) if len(calls) > 1 else []
    for name, linear in block.linears.items():
        run.weights.set_weight(name, linear, store.weight(run.layers[name]).to(run.weights.device))
    for name, stored in store.finished[block.name].tuned.items():
        module, key = _find_parameter(block, name)
        tensor = store.read(stored).to(module._parameters[key])
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    return [[run.offload.put(run_to_end(call)) for call in calls[0]], *originals]


def _find_parameter(block: Block, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the parameter called `name` in the model, and its name in that module."""
    path, _, key = name.removeprefix(f"{block.name}.").rpartition(".")
    return block.module.get_submodule(path), key
