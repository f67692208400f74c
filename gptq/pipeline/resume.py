"""Going on with a run that was stopped, from the journal and the tensors it left."""

from functools import partial
from typing import Any

from torch import nn

from gptq import formats
from gptq.checkpoint.atomic_folder import Unfinished
from gptq.checkpoint.writer import ShardWriter
from gptq.compute.distributed import Ranks
from gptq.models.blocks import Block
from gptq.models.forward import run_through
from gptq.output.results import BlockError, Coverage, LayerResult
from gptq.pipeline.block import Fresh, run_as_original
from gptq.pipeline.job import Job
from gptq.pipeline.journal import Copy, Journal


def open_journal(working: Unfinished, begun: dict[str, Any], blocks: int, ranks: Ranks) -> tuple[Journal, list[str]]:
    """The journal of an earlier run where it has finished something, otherwise a new one; and notes."""
    if ranks.rank:
        copy = Copy(working.root, ranks.told(""))
        return copy, copy.require_same(begun)
    journal = Journal(working.root)
    damaged = [f"{journal.file} is damaged; what it does not say any more is done again"] if journal.damaged else []
    if not journal.is_worth_keeping():
        working.begin_anew()
        journal = Journal(working.root)
        journal.append("begun", begun)
    working.promise = partial(journal.promise, blocks)
    notes = journal.require_same(begun)
    working.go_on()
    ranks.told(journal.text())
    return journal, [*damaged, *notes]


def restore(blocks: list[Block], job: Job) -> dict[str, dict[str, Any]]:
    """Take over the finished blocks of an earlier run; returns their entries in the journal, by name.

    From a block whose tensors are not what was written, all are done again.
    """
    journal, writer = written_by(job)
    finished: dict[str, dict[str, Any]] = {}
    for entry in journal.find("block"):
        if not writer.adopt(entry["tensors"]):
            job.note(f"{entry['name']} is damaged in the unfinished folder, so it and what follows is done again")
            journal.forget_blocks_from(entry["name"])
            break
        finished[entry["name"]] = entry
    for entry in finished.values():
        job.results += [LayerResult(**result) for result in entry["layers"]]
        job.weight_checksums |= entry["weights"]
        job.spreads |= entry["spreads"]
        job.block_errors += [BlockError(**error) for error in entry["errors"]]
        job.coverage += [Coverage(**seen) for seen in entry["coverage"]]
        for note in entry["notes"]:
            job.note(note)
    job.notes_kept = len(job.notes)
    if finished:
        layers = (job.plans[name] for block in blocks if block.name in finished for name in block.linears)
        job.observer.going_on(len(finished), sum(layer.outputs * layer.inputs for layer in layers))
    return finished


def written_by(job: Job) -> tuple[Journal, ShardWriter]:
    if job.writer is None or job.journal is None:
        raise RuntimeError("a job that measures has nothing to write")
    return job.journal, job.writer


def run_finished(block: Block, fresh: Fresh, entry: dict[str, Any], job: Job) -> list[list[Any]]:
    """The outputs of a finished block for every stream and window, with the weights that lie on disk."""
    if block.is_head():
        return []
    _, writer = written_by(job)
    originals = run_as_original(block, fresh[1], job) if len(fresh) > 1 else []
    for name, linear in block.linears.items():
        plan = job.plans[name]
        packed = {
            suffix: writer.read(f"{plan.stored}.{suffix}").to(job.stream.device)
            for suffix in formats.layout(plan.scheme, plan.outputs, plan.inputs)
        }
        job.stream.set_weight(linear, formats.decode(packed, plan.scheme).weight())
    for name, stored in entry["tuned"].items():
        module, key = _owner(block, name)
        tensor = writer.read(stored).to(module._parameters[key])
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    return [[job.shelf.put(run_through(call)) for call in fresh[0]], *originals]


def _owner(block: Block, name: str) -> tuple[nn.Module, str]:
    """The module that holds a block's parameter called `name` in the model, and the parameter's name there."""
    path, _, key = name.removeprefix(f"{block.name}.").rpartition(".")
    return block.module.get_submodule(path), key
