"""Quantize a checkpoint, from top to bottom: one block in memory, one forward per block, every tensor accounted for.

source tensors -> one block -> inputs of each layer -> Hessian -> solver -> codes -> packed words -> output shard

`gptq.polishing.quantize` adds the step that takes the whole model.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.calibration.arrays import Inputs
from gptq.calibration.windows import Calibration, count_tokens, held_out_windows, read_calibration
from gptq.checkpoint.atomic_folder import (
    PartialFolder,
    partial_folder,
    partial_folder_of,
    remove_finished,
    require_unused_beside,
)
from gptq.checkpoint.writer import ShardWriter
from gptq.compute.allocator import malloc_policy
from gptq.compute.background import Background
from gptq.compute.device_profile import profile_of
from gptq.compute.distributed import ALONE, Ranks, current_ranks
from gptq.compute.matmul import exact_float32
from gptq.compute.matrices import Matrices
from gptq.compute.torch_state import fresh_torch_state
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.formats import FORMATS
from gptq.models.blocks import Block
from gptq.models.hf_config import choose_device, choose_dtype
from gptq.models.weights import WeightStream
from gptq.output.convert import convert
from gptq.output.files import linears_of, write_files
from gptq.output.record import Record, layer_records, model_name, public_name, read_record
from gptq.output.results import RECORD, LayerResult
from gptq.pipeline.block import quantize_block, round_block
from gptq.pipeline.block_result import BlockResult
from gptq.pipeline.block_store import BlockStore
from gptq.pipeline.block_walk import BlockWalk
from gptq.pipeline.journal import Journal
from gptq.pipeline.offload import ActivationOffload
from gptq.pipeline.resume import open_journal, run_finished_block
from gptq.pipeline.run import Finished, LastStep, Observer, Run
from gptq.pipeline.run_identity import decisive_files, describe_run
from gptq.pipeline.search import choose_widths, find_enough_windows, note_on_samples
from gptq.planning import memory
from gptq.planning.plan import Plan, plan_checkpoint, refuse_other_grids


@dataclass(frozen=True)
class Result:
    """The result of a run; sizes are in bytes and count the files with tensors."""

    out: str
    format: Format
    layers: list[LayerResult]
    notes: list[str]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    seconds: float
    also: list[str]  # folders of the same result in other formats

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """The arguments of `quantize`, checked."""

    model: str
    config: QuantConfig
    calibration: Calibration
    revision: str | None
    trust_remote_code: bool
    allow_pickle: bool
    batch_size: int | None
    memory_limits: tuple[int | None, int | None]  # limits of the process and of the GPU, bytes
    observer: Observer

    def plan(self, config: QuantConfig) -> Plan:
        """Plan the checkpoint with this config."""
        sample = self.calibration.sample
        return plan_checkpoint(
            self.model, config, self.revision, self.trust_remote_code, sample, allow_pickle=self.allow_pickle
        )


@dataclass(frozen=True)
class Prepared:
    """The plan with its final bit widths, and the calibration windows."""

    plan: Plan
    weights: WeightStream
    windows: list[Inputs] | None  # None if the method needs no calibration
    notes: list[str]


@fresh_torch_state()
def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: str | Path | Tensor | Iterable[Any] = "c4",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    memory_limit: int | None = None,
    gpu_memory_limit: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    also: Sequence[Format] = (),
    observer: Observer | None = None,
    last: LastStep | None = None,
) -> Result:
    """Quantize a checkpoint into a new folder; the arguments are those of `gptq.quantize`, which calls this.

    Args:
        last: what changes the finished checkpoint as a whole before it gets its name, which is what `polish_steps` of
            the config asks for.
    Raises:
        InputError: as `gptq.quantize`.
    """
    started = time.monotonic()
    observer, config = observer or Observer(), config or QuantConfig()
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; at least one window has to be in flight")
    limits = memory_limit, gpu_memory_limit
    opened = read_calibration(calibration, config, model, revision, trust_remote_code, allow_pickle)
    request = Request(
        str(model), config, opened, revision, trust_remote_code, allow_pickle, batch_size, limits, observer
    )
    plan = request.plan(config)
    refuse_other_grids(plan, also)
    if also:
        out = Path(out) / plan.format
        require_unused_beside(out, also)
    state = opened.state or plan.state  # before the first look: another plan may be made later
    where = choose_device(device)
    compute = choose_dtype(dtype, plan.hf_config, where)
    ranks = current_ranks(where)
    if ranks.size > 1 and last is not None:
        raise InputError("a model is polished in one process; start one, or set --polish-steps 0")

    with ExitStack() as stack:
        stack.enter_context(malloc_policy(frugal=True))
        working = stack.enter_context(partial_folder(Path(out))) if ranks.rank == 0 else partial_folder_of(Path(out))
        begun = describe_run(config, plan.source, where, compute, trust_remote_code)
        check = partial(state.require_same, decisive_files(plan.source, state.stamps))
        check()  # that what was described is what was planned
        journal, notes = open_journal(working, begun, len(plan.blocks), ranks)
        prepared = _prepare(request, plan, where, compute, journal, ranks)
        refuse_other_grids(prepared.plan, also)  # now with the final widths
        if last is not None:
            last.check(prepared.plan, prepared.windows)
        plan, notes = prepared.plan, [*prepared.plan.notes, *notes, *prepared.notes]
        for note in notes:
            observer.note(note)
        observer.started(len(plan.blocks), sum(layer.outputs * layer.inputs for layer in plan.layers.values()))
        store, writer, told = _quantize_checkpoint(request, prepared, working, journal, check, ranks)
        notes += told
        after, written = plan.file_bytes, []
        if ranks.rank == 0:
            after = _write_files(request, prepared, store, writer, working)
            state.require_same()
            if last is not None:
                notes += last.run(Finished(working, plan, prepared.windows or [], where, compute))
                state.require_same()
            written = _write_others(working.content, Path(out), also, trust_remote_code, observer)
    ranks.barrier()  # wait until the first process has moved the output into place
    prefetcher = prepared.weights.prefetcher
    observer.prefetched(prefetcher.nbytes, prefetcher.seconds, prefetcher.waited)
    observer.finished()
    results = [layer for result in _block_results(plan, store) for layer in result.layers]
    for note in (remarks := note_on_samples(results)):
        observer.note(note)
    return Result(
        out=str(out),
        format=plan.format,
        layers=results,
        notes=[*notes, *remarks],
        bits_per_weight=plan.bits_per_weight,
        bytes_before=plan.source.file_bytes,
        bytes_after=after,
        seconds=time.monotonic() - started,
        also=written,
    )


def _write_files(
    request: Request, prepared: Prepared, store: BlockStore, writer: ShardWriter, working: PartialFolder
) -> int:
    """Write everything that is not a tensor, the record of the run among it; return the size of the tensors' files."""
    plan, record = prepared.plan, _make_record(request, prepared, store)
    working.require_ours()
    return write_files(
        plan.folder, working.content, plan.format, linears_of(plan), record, writer.checksums, plan.changes
    )


def _write_others(
    content: Path, out: Path, also: Sequence[Format], trust_remote_code: bool, observer: Observer
) -> list[str]:
    """Write a result in other formats, into folders beside the one it will have; return the folders.

    The result gets its name after these, so that a run that is stopped here goes on; what it has written stays.
    """
    written = []
    for chosen in also:
        observer.stage(f"writing the same integers as {chosen}")
        beside = out.with_name(chosen)
        if _holds_same_weights(beside, content):
            remove_finished(partial_folder_of(beside).root)
            written.append(str(beside))
            continue
        converted = convert(content, beside, chosen, trust_remote_code=trust_remote_code)
        for note in converted.notes:
            observer.note(note)
        written.append(converted.out)
    return written


def _holds_same_weights(one: Path, other: Path) -> bool:
    """Whether both are finished results, and the same weights were written into them."""
    if not all((folder / RECORD).is_file() for folder in (one, other)):
        return False
    first, second = ({own.stored: own.weight_sha256 for own in read_record(folder).layers} for folder in (one, other))
    return first == second


def _prepare(
    request: Request, plan: Plan, device: torch.device, dtype: torch.dtype, journal: Journal, ranks: Ranks
) -> Prepared:
    """Read the calibration windows. For a target size, choose the bit widths and plan the checkpoint with these."""
    config, observer = request.config, request.observer
    weights = WeightStream(plan.source, plan.names, device, dtype)
    if config.method != "gptq":
        return Prepared(plan, weights, None, [])
    observer.stage(f"reading calibration data from {request.calibration.name}")
    windows, notes = find_enough_windows(
        request.calibration, plan, config, weights, request.trust_remote_code, observer, journal
    )
    if config.chooses_widths:
        in_flight = request.batch_size or len(windows)
        plan = request.plan(_widths_from_journal(plan, config, windows, in_flight, weights, observer, journal, ranks))
        weights = WeightStream(plan.source, plan.names, device, dtype)
    return Prepared(plan, weights, windows, notes)


def _widths_from_journal(
    plan: Plan, config: QuantConfig, windows: list[Inputs], in_flight: int, weights: WeightStream, observer: Observer,
    journal: Journal, ranks: Ranks,
) -> QuantConfig:  # fmt: skip
    """Return the config with the widths from the journal; if the journal has none, choose widths and record them."""
    known = journal.find("widths")
    if known:
        return QuantConfig.from_dict(known[0])
    found = choose_widths(plan, config, windows, in_flight, weights, observer, journal, ranks)
    journal.append("widths", found.to_dict())
    return found


def _open_writer(working: PartialFolder, plan: Plan, ranks: Ranks) -> ShardWriter:
    """Open the output writer. Only the first process writes; the other processes use it to read finished tensors."""
    if ranks.rank == 0:
        working.require_disk_space(FORMATS[plan.format].disk_bytes(plan.tensors, plan.folder))
        writer = ShardWriter(working.content, plan.tensors, reuse_shards=True)
        working.keep_only(writer.file_names())
        ranks.barrier()
        return writer
    ranks.barrier()  # wait until the first process has created the shards
    return ShardWriter(working.content, plan.tensors, reuse_shards=True, read_only=True)


# --- the blocks -------------------------------------------------------------------------------------------------------


def _quantize_checkpoint(
    request: Request, prepared: Prepared, working: PartialFolder, journal: Journal, check: Callable[[], None],
    ranks: Ranks,
) -> tuple[BlockStore, ShardWriter, list[str]]:  # fmt: skip
    """Write every tensor of the output: quantize the blocks, and copy the rest; return what was written, and notes.

    `check` raises an error if the source has changed; it is called before a block is stored.
    """
    plan, weights = prepared.plan, prepared.weights
    writer = _open_writer(working, plan, ranks)
    background = Background(weights.device, profile_of(weights.device, ranks.size).packing_threads)
    store = BlockStore(writer, journal, check, background, ranks)
    try:
        notes = _quantize_blocks(request, prepared, store, writer, working.root, ranks)
        _copy_unquantized(plan, weights, writer, ranks, request.observer)
    finally:
        weights.prefetcher.join(cancel=True)
        background.close()
        writer.abandon()
    return store, writer, notes


def _quantize_blocks(
    request: Request, prepared: Prepared, store: BlockStore, writer: ShardWriter, folder: Path, ranks: Ranks
) -> list[str]:
    """Quantize the blocks that an earlier run has not finished; return the notes on all blocks."""
    plan, observer, config = prepared.plan, request.observer, request.config
    windows = _own_windows(prepared.windows, ranks)
    memory_plan = _decide_memory(request, prepared, prepared.windows if config.tune_steps else windows)
    run = Run(
        config,
        plan.layers,
        prepared.weights,
        observer,
        ActivationOffload(folder if memory_plan.on_disk else None),
        ranks,
        returns_memory=memory_plan.returns_memory,
        reruns_blocks=bool(config.tune_steps),
        matrices=Matrices(folder if memory_plan.wide_on_disk else None),
    )
    notes = _restore(plan, store, observer)
    ranks.barrier()  # no process may write while another still reads the shards
    if store.background.is_behind:
        store.background.start(partial(_copy_outside_blocks, plan, writer, ranks))
    with malloc_policy(memory_plan.returns_memory), torch.no_grad(), exact_float32(run.weights.device):
        unreached = plan.blocks
        if windows is not None and len(store.finished) < len(plan.blocks):
            unreached = _quantize_reached(plan, windows, memory_plan.in_flight, store, run)
        for block in unreached:
            if block.name not in store.finished:
                _refuse_unreached(block, plan, windows)
                store.commit(round_block(block, run))
        store.wait()
    return notes + [note for result in store.finished.values() for note in result.notes]


def _refuse_unreached(block: Block, plan: Plan, windows: list[Inputs] | None) -> None:
    """Check that a block is to be rounded to nearest: nothing is calibrated, or an override asks for its layers.

    Raises:
        InputError: the plan expected the calibration inputs to reach the block.
    """
    if windows is not None and not plan.rounded.issuperset(block.linears):
        parent = block.name.rpartition(".")[0]
        raise InputError(
            f"no calibration input reached {block.name}; leave such blocks as they are with --override "
            f"'{parent}:skip', or have them rounded to nearest with --override '{parent}:bits=8'"
        )


def _quantize_reached(plan: Plan, windows: list[Inputs], in_flight: int, store: BlockStore, run: Run) -> list[Block]:
    """Quantize blocks, each on the outputs of the blocks before it; return the blocks that no window reached."""
    ranks = run.ranks if run.divides_experts else ALONE
    walk = BlockWalk(plan.network, plan.blocks, windows, run.config.streams, run.weights, run.offload, ranks)
    with walk:
        for block, calls in walk:
            if block.name in store.finished:
                run.observer.stage(f"{block.name} is finished; taking the windows through it")
                outputs = run_finished_block(block, calls, store, run)
            else:
                outputs, pack = quantize_block(block, calls, in_flight, run)
                store.commit(pack)
                del pack  # free what it holds
            walk.resume_with(outputs)
    return walk.unreached


def _restore(plan: Plan, store: BlockStore, observer: Observer) -> list[str]:
    """Load the blocks that an earlier run finished; return notes on damaged blocks."""
    notes = store.restore({block.name: {name: plan.layers[name] for name in block.linears} for block in plan.blocks})
    for note in [*notes, *(note for result in store.finished.values() for note in result.notes)]:
        observer.note(note)
    if store.finished:
        layers = (plan.layers[name] for b in plan.blocks if b.name in store.finished for name in b.linears)
        observer.resumed(len(store.finished), sum(layer.outputs * layer.inputs for layer in layers))
    return notes


def _decide_memory(request: Request, prepared: Prepared, windows: list[Inputs] | None) -> memory.MemoryPlan:
    """Decide how the run stays within its memory limit, and tell the observer."""
    plan, weights = prepared.plan, prepared.weights
    count, tokens = len(windows or []), memory.Tokens(0, 0, 0)
    if windows is not None:
        hidden = next(iter(plan.layers.values())).inputs
        tokens = memory.size_of_windows(windows, len(held_out_windows(count)), hidden)
    chosen, says = memory.decide_memory(
        plan, request.config, tokens, weights.device, weights.dtype, request.batch_size, *request.memory_limits
    )
    request.observer.stage(f"{plan.summary}; {says}")
    if chosen.prefetches_to_gpu:
        weights.prefetch_to_device()
    return chosen


def _own_windows(windows: list[Inputs] | None, ranks: Ranks) -> list[Inputs] | None:
    """Return the windows that this process runs through the model.

    Raises:
        InputError: there are fewer windows than processes.
    """
    if windows is not None and len(windows) < ranks.size:
        raise InputError(f"{len(windows)} calibration windows cannot be shared by {ranks.size} processes")
    return None if windows is None else [windows[i] for i in ranks.own_windows(len(windows))]


# --- the rest ---------------------------------------------------------------------------------------------------------


def _copy_unquantized(plan: Plan, weights: WeightStream, writer: ShardWriter, ranks: Ranks, observer: Observer) -> None:
    """Copy the tensors that are not quantized, and close the output.

    Raises:
        ValueError: a tensor of the plan was not written.
    """
    observer.stage("copying what is not quantized")
    if ranks.rank == 0:
        _copy(
            plan, writer, {plan.source.undivided(name)[0]: None for name in plan.source.tensors} | plan.source.tensors
        )
        for stored, parameter in plan.slices.items():
            writer.write(stored, weights.read(parameter, plan.tensors[stored].dtype).cpu())
        writer.close()


def _copy_outside_blocks(plan: Plan, writer: ShardWriter, ranks: Ranks) -> None:
    """Copy the tensors outside the blocks, the embedding and the head above all; tuning does not change them."""
    prefixes = tuple(f"{block.name}." for block in plan.all_blocks)
    if ranks.rank == 0:
        _copy(plan, writer, [name for name in plan.source.tensors if not any(prefix in name for prefix in prefixes)])


def _copy(plan: Plan, writer: ShardWriter, names: Iterable[str]) -> None:
    """Copy those of these tensors that the output holds as they are, and that are not written yet."""
    for name in names:
        if name in plan.tensors and not writer.checksums[name]:
            read = plan.source.read_unchecked if name in plan.masks else plan.source.read
            writer.write(name, read(name))


def _make_record(request: Request, prepared: Prepared, store: BlockStore) -> Record:
    """Return the record of the run that is written next to the tensors."""
    plan, windows = prepared.plan, prepared.windows
    source, layers, results = plan.source, plan.layers, _block_results(plan, store)
    checksums = {name: checksum for result in results for name, checksum in result.weight_checksums.items()}
    histograms = {name: dict(counts) for result in results for name, counts in result.histograms.items()}
    coverage = [asdict(seen) for result in results for seen in result.coverage]
    values = {
        "model": model_name(request.model),
        "config": request.config.to_dict(),
        "calibration": None if windows is None else public_name(request.calibration.name),
        "sizes": {
            "bits_per_weight": plan.bits_per_weight,
            "quantized_bytes_before": sum(plan.source_bytes(layer) for layer in layers.values()),
            "quantized_bytes_after": plan.packed_bytes,
            "file_bytes_before": source.file_bytes,
            "file_bytes_after": plan.file_bytes,
            "calibration_tokens": count_tokens(windows or []),
        },
        "layers": layer_records(layers, [own for result in results for own in result.layers], checksums, histograms),
        "blocks": [asdict(error) for result in results for error in result.errors],
        **({"experts": coverage} if coverage else {}),
    }
    return Record.model_validate(values)


def _block_results(plan: Plan, store: BlockStore) -> list[BlockResult]:
    """Return what the blocks yielded, in the model's order, whatever the order of a resumed run's journal."""
    return [store.finished[block.name] for block in plan.blocks if block.name in store.finished]
