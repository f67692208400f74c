"""The journey of a checkpoint, top to bottom: one block in memory, one forward per block, every tensor accounted for.

source tensors -> one block -> inputs of each layer -> Hessian -> solver -> codes -> packed words -> output shard
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq import formats
from gptq.calibration.arrays import Inputs
from gptq.calibration.windows import Given, as_given, count_tokens, describe, is_held_out
from gptq.checkpoint.atomic_folder import Unfinished, unfinished_folder, working_folder
from gptq.checkpoint.tensors import TensorInfo, sha256
from gptq.checkpoint.writer import ShardWriter, file_bytes
from gptq.compute.allocator import return_freed_memory
from gptq.compute.distributed import Ranks, joined
from gptq.compute.matmul import exact_float32
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.models.blocks import Block
from gptq.models.forward import run_through
from gptq.models.hf_config import choose_device, choose_dtype
from gptq.models.weights import WeightStream, drop
from gptq.output.record import layer_entries, linears_of, model_name, public_name, write_files
from gptq.output.results import BlockError, LayerResult, code_histogram
from gptq.pipeline.block import Fresh, solve_head, walk_block, walk_blocks
from gptq.pipeline.job import Job, Observer
from gptq.pipeline.journal import Journal
from gptq.pipeline.layer import finish_layer
from gptq.pipeline.offload import Shelf
from gptq.pipeline.resume import open_journal, restore, run_finished, written_by
from gptq.pipeline.run_identity import beginning
from gptq.pipeline.search import choose_widths, enough_windows, notes_on_samples
from gptq.pipeline.tune import first_tensor, tune
from gptq.planning import memory
from gptq.planning.plan import Plan, plan_checkpoint


@dataclass(frozen=True)
class Result:
    """What a run made; sizes are those of the safetensors files."""

    out: str
    format: Format
    layers: list[LayerResult]
    notes: list[str]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    seconds: float
    read_ahead_bytes: int  # that were fetched, on a GPU to its memory, while something else was computed
    read_ahead_seconds: float  # which that took
    read_ahead_waited: float  # of which the computation stood still

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """What `quantize` was called with, as far as it is handed on."""

    model: str
    given: Given
    revision: str | None
    trust_remote_code: bool
    batch_size: int | None
    observer: Observer

    def plan(self, config: QuantConfig) -> Plan:
        sample = self.given[0] if isinstance(self.given, list) else None
        return plan_checkpoint(self.model, config, self.revision, self.trust_remote_code, sample)


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: str | Path | Tensor | Iterable[Mapping[str, Any]] = "c4",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    memory_limit: int | None = None,
    gpu_memory_limit: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> Result:
    """Quantize a Hugging Face checkpoint into a new folder.

    Args:
        model: folder, or Hub id (then at `revision`).
        out: folder to make; it appears when the run has succeeded and is left untouched otherwise. When a run fails or
            is killed after the first block, OUT.partial stays, and the same call goes on after the last finished block.
        calibration: source of text or of arrays (see `gptq.calibration`); or ready windows of tokens, (windows, tokens)
            integers; or what the model is called on, as dicts of arrays whose first dimension counts windows
            (`pixel_values` of images, say, or `input_ids` and `attention_mask` of padded texts).
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU where there is one.
        dtype: of the forward passes: "float32", "bfloat16", "float16"; "auto" is that of config.json, but float32 on a
            CPU without native bfloat16. The solver works in float32 on the stored weights.
        batch_size: how many calibration windows stand in mid-block at once (default all). The others repeat the
            block's forward for each distinct layer input: less memory, more time, the same bytes.
        memory_limit: bytes of this process that may be in memory; by default most of what the machine has free. It
            decides on `batch_size` and whether activations between blocks are in files, and never on a byte that is
            written. On a GPU, `gpu_memory_limit` does the same for its memory.

    Raises:
        InputError: anything a user can mend; then nothing is left at `out`. Among it an OUT.partial that was begun with
            other options, another model or other calibration windows.
    """
    started = time.monotonic()
    observer, config = observer or Observer(), config or QuantConfig()
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; at least one window has to be in flight")
    task = Task(str(model), as_given(calibration, config), revision, trust_remote_code, batch_size, observer)
    plan = task.plan(config)
    where = choose_device(device)
    compute = choose_dtype(dtype, plan.hf_config, where)
    ranks = joined(where)
    if ranks.size > 1 and config.tune_steps:
        raise InputError("blocks are tuned in one process; start one, or choose another --effort than 'best'")

    with unfinished_folder(Path(out)) if ranks.rank == 0 else nullcontext(working_folder(Path(out))) as working:
        begun = beginning(config, plan.source, where, compute, trust_remote_code)
        journal, notes = open_journal(working, begun, len(plan.blocks), ranks)
        plan, stream, windows, noted = _prepare(task, plan, config, where, compute, journal)
        notes = [*plan.notes, *notes, *noted]
        for note in notes:
            observer.note(note)
        observer.started(len(plan.blocks), sum(layer.outputs * layer.inputs for layer in plan.layers.values()))
        writer = _writer(working, plan.tensors, ranks)
        job = Job(config, plan.layers, stream, writer, observer, finish_layer, ranks=ranks, journal=journal)
        try:
            own = _own(windows, ranks)
            limits = memory_limit, gpu_memory_limit
            in_flight = _settle_memory(plan, own, working.root, batch_size, limits, job)
            finished = restore(plan.blocks, job)
            ranks.wait()  # before one of them writes what another still looks at
            with torch.no_grad(), exact_float32(where):
                _quantize_blocks(plan, own, in_flight, finished, job)
            _copy_the_rest(plan, job)
        finally:
            stream.ahead.join(at_once=True)
            writer.abandon()
        chosen, after = next(iter(plan.layers.values())).format, file_bytes(plan.tensors)
        record = _record(task, windows, plan, after, job)
        if ranks.rank == 0:
            write_files(plan.folder, working.content, chosen, linears_of(plan), record, writer.checksums, plan.changes)
    ranks.wait()  # until OUT is there
    observer.finished()
    for note in notes_on_samples(job.results):
        job.note(note)
    return Result(
        out=str(out),
        format=chosen,
        layers=job.results,
        notes=notes + job.notes,
        bits_per_weight=plan.bits_per_weight,
        bytes_before=plan.source.file_bytes,
        bytes_after=after,
        seconds=time.monotonic() - started,
        read_ahead_bytes=stream.ahead.nbytes,
        read_ahead_seconds=stream.ahead.seconds,
        read_ahead_waited=stream.ahead.waited,
    )


def _prepare(
    task: Task, plan: Plan, config: QuantConfig, device: torch.device, dtype: torch.dtype, journal: Journal
) -> tuple[Plan, WeightStream, list[Inputs] | None, list[str]]:
    """The plan, with other widths where these are to be chosen; its weights; calibration windows; and notes on them."""
    stream = WeightStream(plan.source, plan.names, device, dtype)
    if config.method != "gptq":
        return plan, stream, None, []
    task.observer.stage(f"reading calibration data from {describe(task.given)}")
    windows, notes = enough_windows(task.given, plan, config, stream, task.trust_remote_code, task.observer, journal)
    if config.target_bits is not None or config.target_size is not None:
        in_flight = task.batch_size or len(windows)
        plan = task.plan(_chosen_widths(plan, config, windows, in_flight, stream, task.observer, journal))
        stream = WeightStream(plan.source, plan.names, device, dtype)
    return plan, stream, windows, notes


def _copy_the_rest(plan: Plan, job: Job) -> None:
    """Write the tensors that are not quantized.

    Raises:
        ValueError: an announced tensor never came.
    """
    _, writer = written_by(job)
    job.observer.stage("copying what is not quantized")
    if job.ranks.rank == 0:
        for name in plan.source.tensors:
            if name in plan.tensors and not writer.checksums[name]:
                writer.write(name, plan.source.read(name))
        writer.close()


def _record(task: Task, windows: list[Inputs] | None, plan: Plan, after: int, job: Job) -> dict[str, Any]:
    """What is written about the run beside the tensors."""
    source, layers = plan.source, plan.layers
    replaced = (layer.source for layer in layers.values() if layer.source not in plan.tensors)
    return {
        "model": model_name(task.model),
        "config": job.config.to_dict(),
        "calibration": None if windows is None else public_name(describe(task.given)),
        "sizes": {
            "bits_per_weight": plan.bits_per_weight,
            "quantized_bytes_before": sum(source.tensors[name].nbytes for name in replaced),
            "quantized_bytes_after": plan.packed_bytes,
            "file_bytes_before": source.file_bytes,
            "file_bytes_after": after,
            "calibration_tokens": count_tokens(windows or []),
        },
        "layers": layer_entries(layers, job.results, job.weight_checksums, job.spreads),
        "blocks": [asdict(error) for error in job.block_errors],
        **({"experts": [asdict(found) for found in job.coverage]} if job.coverage else {}),
    }


def _settle_memory(
    plan: Plan, windows: list[Inputs] | None, folder: Path, batch_size: int | None,
    limits: tuple[int | None, int | None], job: Job,
) -> int:  # fmt: skip
    """Say what will be done, and how memory will be kept in bounds; returns how many windows stand in mid-block."""
    count, tokens = len(windows or []), memory.Tokens(0, 0, 0)
    if windows is not None:
        hidden = next(iter(plan.layers.values())).inputs
        tokens = memory.tokens_of(windows, sum(is_held_out(i, count) for i in range(count)), hidden)
    device, dtype = job.stream.device, job.stream.dtype
    choice, says = memory.settle(plan, job.config, tokens, device, dtype, batch_size, *limits)
    job.observer.stage(f"{plan.in_short}; {says}")
    job.shelf, job.frugal = Shelf(folder if choice.on_disk else None), choice.frugal
    if choice.ahead:
        job.stream.copy_ahead()
    return choice.in_flight


def _own(windows: list[Inputs] | None, ranks: Ranks) -> list[Inputs] | None:
    """Those windows that run through the model in this process."""
    if windows is not None and len(windows) < ranks.size:
        raise InputError(f"{len(windows)} calibration windows cannot be shared by {ranks.size} processes")
    return None if windows is None else [windows[i] for i in ranks.windows(len(windows))]


def _writer(working: Unfinished, tensors: dict[str, TensorInfo], ranks: Ranks) -> ShardWriter:
    """The first process writes; the others compute the same."""
    if ranks.rank == 0:
        working.require_room(sum(info.nbytes for info in tensors.values()))
        writer = ShardWriter(working.content, tensors, going_on=True)
        ranks.wait()
        return writer
    ranks.wait()  # until the shards are laid out
    return ShardWriter(working.content, tensors, going_on=True, muted=True)


def _chosen_widths(
    plan: Plan, config: QuantConfig, windows: list[Inputs], in_flight: int, stream: WeightStream, observer: Observer,
    journal: Journal,
) -> QuantConfig:  # fmt: skip
    known = journal.find("widths")
    if known:
        return QuantConfig.from_dict(known[0])
    found = choose_widths(plan, config, windows, in_flight, stream, observer, journal)
    journal.append("widths", found.to_dict())
    return found


def _quantize_blocks(
    plan: Plan, windows: list[Inputs] | None, in_flight: int, finished: dict[str, dict[str, Any]], job: Job
) -> None:
    blocks = plan.blocks
    index_of = {block.name: index for index, block in enumerate(blocks)}
    left = [block for block in blocks if block.name not in finished]
    if windows is not None and left:

        def visit(index: int, block: Block, fresh: Fresh) -> list[list[Any]]:
            if block.name in finished:
                job.observer.stage(f"{block.name} is finished; taking the windows through it")
                return run_finished(block, fresh, finished[block.name], job)
            return _quantize_block(index, block, fresh, in_flight, job)

        not_reached = walk_blocks(plan.network, blocks, windows, job.config.streams, job.stream, visit, job.shelf)
        left = [block for block in not_reached if block.name not in finished]
    for block in left:
        if windows is not None:
            job.note(f"{block.name}: no calibration input reached it, so it is rounded to nearest")
        _round_block(index_of[block.name], block, job)


def _round_block(index: int, block: Block, job: Job) -> None:
    for name in block.linears:
        finish_layer(index, block, name, None, job)
    _write_block(block, job)
    drop(block.module)
    return_freed_memory()


def _quantize_block(index: int, block: Block, fresh: Fresh, in_flight: int, job: Job) -> list[list[Any]]:
    outputs: list[list[Any]] = []
    if block.is_head():
        solve_head(index, block, fresh, job)
    else:
        outputs = walk_block(index, block, fresh, in_flight, job)
        if job.config.tune_steps:
            _tune_block(block, fresh[0], outputs, job)
    _write_block(block, job)
    return outputs


def _tune_block(block: Block, fresh: list[partial[Any]], outputs: list[list[Any]], job: Job) -> None:
    """Bring a solved block closer to the original one's outputs, and renew the quantized stream's outputs."""
    layers = {block.linears[name]: solved for name, solved in job.solved.items()}
    held_out = [i for i in range(len(fresh)) if is_held_out(i, len(fresh))]
    full_names = {m: ".".join(filter(None, (block.name, path))) for path, m in block.module.named_modules()}
    named = {(m, key): f"{full_name}.{key}" for m, full_name in full_names.items() for key in m._parameters}
    kept = {key for key, name in named.items() if not job.stream.has_own(name)}
    tuned = tune(
        block.module, fresh, [first_tensor(out) for out in outputs[1]], held_out, layers, job.stream.computed_with,
        {linear: job.plans[name].bits for name, linear in block.linears.items()}, job.config.tune_steps or 0,
        job.config.seed, kept,
    )  # fmt: skip
    job.block_errors.append(BlockError(block.name, tuned.error_before, tuned.error_after))
    if tuned.layers is layers:
        job.note(f"{block.name}: tuning did not bring it closer to the original, so it stays as it was solved")
        return
    for name, linear in block.linears.items():
        job.solved[name] = tuned.layers[linear]
        job.stream.set_weight(linear, job.solved[name].weight())
    for (module, key), tensor in tuned.parameters.items():
        name = named[module, key]
        _, rounded = job.stream.as_stored(name, tensor)
        job.tuned[name] = rounded
        module._parameters[key] = nn.Parameter(rounded.to(tensor), requires_grad=False)
    outputs[0][:] = [run_through(function) for function in fresh]


def _write_block(block: Block, job: Job) -> None:
    """Write a block's tensors, and when they are on disk the journal's entry."""
    journal, writer = written_by(job)
    tensors: dict[str, Tensor] = {}
    for name in block.linears:
        solved, plan = job.solved.pop(name), job.plans[name]
        tensors |= {f"{plan.stored}.{key}": t for key, t in formats.encode(solved, plan.scheme).items()}
        job.spreads[name] |= code_histogram(solved.codes, plan.bits)
        job.weight_checksums[name] = sha256(solved.weight())
    tuned = {name: job.stream.as_stored(name, tensor) for name, tensor in job.tuned.items()}
    tensors |= dict(tuned.values())
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.sync()
    journal.append(
        "block",
        {
            "name": block.name,
            "tensors": {name: writer.checksums[name] for name in tensors},
            "tuned": {name: stored for name, (stored, _) in tuned.items()},
            "layers": [asdict(result) for result in job.results if result.name in block.linears],
            "weights": {name: job.weight_checksums[name] for name in block.linears},
            "spreads": {name: job.spreads[name] for name in block.linears},
            "errors": [asdict(error) for error in job.block_errors if error.name == block.name],
            "coverage": [asdict(found) for found in job.coverage if found.name.startswith(f"{block.name}.")],
            "notes": job.notes[job.notes_kept :],
        },
    )
    job.tuned.clear()
    job.notes_kept = len(job.notes)
