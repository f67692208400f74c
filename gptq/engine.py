"""The journey of a checkpoint, top to bottom: one block in memory, one forward per block, every tensor accounted for.

source tensors -> one block -> inputs of each layer -> Hessian -> solver -> codes -> packed words -> output shard
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq import formats, memory
from gptq.blocks import Block, WeightStream, choose_device, choose_dtype, drop, return_freed_memory
from gptq.calibration import Inputs
from gptq.checkpoint import ShardWriter, appearing_folder, require_free, sha256
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.hessian import exact_float32
from gptq.layer import Job, Observer, finish_layer, is_held_out
from gptq.plan import Plan, plan_checkpoint
from gptq.record import (
    BlockError,
    LayerResult,
    code_histogram,
    layer_entries,
    linears_of,
    model_name,
    public_name,
    write_files,
)
from gptq.sequence import Fresh, solve_head, walk_block, walk_blocks
from gptq.shelf import Shelf
from gptq.trials import choose_widths, enough_windows, notes_on_samples
from gptq.tune import first_tensor, tune
from gptq.walk import run_through
from gptq.windows import as_given, count_tokens, describe


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
    read_ahead_bytes: int  # that were read from the disk while something else was computed
    read_ahead_seconds: float  # which that took
    read_ahead_waited: float  # of which the computation stood still

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        out: folder to make; it appears when the run has succeeded and is left untouched otherwise.
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
        InputError: anything a user can mend; then nothing is left at `out`.
    """
    started = time.monotonic()
    observer = observer or Observer()
    config = config or QuantConfig()
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; at least one window has to be in flight")
    given = as_given(calibration, config)
    described, sample = describe(given), given[0] if isinstance(given, list) else None
    plan = plan_checkpoint(str(model), config, revision, trust_remote_code, sample)
    where = choose_device(device)
    shortened: list[str] = []
    if config.target_bits is not None or config.target_size is not None:
        require_free(Path(out))
        first = WeightStream(plan.source, plan.names, where, choose_dtype(dtype, plan.hf_config, where))
        given, shortened = enough_windows(given, plan, config, first, trust_remote_code, observer)
        found = choose_widths(plan, config, given, batch_size or len(given), first, observer)
        plan = plan_checkpoint(str(model), found, revision, trust_remote_code, sample)
    source, blocks = plan.source, plan.blocks
    plans, tensors, notes = plan.layers, plan.tensors, [*plan.notes, *shortened]
    stream = WeightStream(source, plan.names, where, choose_dtype(dtype, plan.hf_config, where))

    with appearing_folder(Path(out), sum(info.nbytes for info in tensors.values())) as partial_out:
        windows = None
        if config.method == "gptq":
            observer.stage(f"reading calibration data from {described}")
            windows, shortened = enough_windows(given, plan, config, stream, trust_remote_code, observer)
            notes += shortened
        for note in notes:
            observer.note(note)
        observer.started(len(blocks), sum(p.outputs * p.inputs for p in plans.values()))
        writer = ShardWriter(partial_out, tensors)
        try:
            job = Job(config, plans, stream, writer, observer)
            in_flight = _settle_memory(plan, windows, partial_out, batch_size, memory_limit, gpu_memory_limit, job)
            with torch.no_grad(), exact_float32(where):
                if windows is None:
                    _round_blocks(blocks, job)
                else:
                    streams = 2 if config.two_streams else 1
                    visit = partial(_quantize_block, in_flight=in_flight, job=job)
                    left = walk_blocks(plan.network, blocks, windows, streams, stream, visit, job.shelf)
                    for index, block in enumerate(left, start=len(blocks) - len(left)):
                        job.note(f"{block.name}: no calibration input reached it, so it is rounded to nearest")
                        _round_block(index, block, job)
            stream.ahead.join(at_once=True)
            observer.stage("copying what is not quantized")
            for name in (n for n in source.tensors if n in tensors):
                writer.write(name, job.changed[name] if name in job.changed else source.read(name))
            writer.close()
        finally:
            stream.ahead.join(at_once=True)
            writer.abandon()
        after = _file_bytes(partial_out)
        record = {
            "model": model_name(model),
            "config": config.to_dict(),
            "calibration": None if windows is None else public_name(described),
            "sizes": {
                "bits_per_weight": plan.bits_per_weight,
                "quantized_bytes_before": sum(
                    source.tensors[p.source].nbytes for p in plans.values() if p.source not in tensors
                ),
                "quantized_bytes_after": plan.packed_bytes,
                "file_bytes_before": source.file_bytes,
                "file_bytes_after": after,
                "calibration_tokens": count_tokens(windows or []),
            },
            "layers": layer_entries(plans, job.results, job.weight_checksums, job.spreads),
            "blocks": [asdict(error) for error in job.block_errors],
            **({"experts": [asdict(found) for found in job.coverage]} if job.coverage else {}),
        }
        chosen = next(iter(plans.values())).format
        write_files(plan.folder, partial_out, chosen, linears_of(plan), record, writer.checksums, plan.changes)
    observer.finished()
    for note in notes_on_samples(job.results):
        job.note(note)
    return Result(
        out=str(out),
        format=chosen,
        layers=job.results,
        notes=notes + job.notes,
        bits_per_weight=plan.bits_per_weight,
        bytes_before=source.file_bytes,
        bytes_after=after,
        seconds=time.monotonic() - started,
        read_ahead_bytes=stream.ahead.nbytes,
        read_ahead_seconds=stream.ahead.seconds,
        read_ahead_waited=stream.ahead.waited,
    )


def _settle_memory(
    plan: Plan, windows: list[Inputs] | None, folder: Path, batch_size: int | None,
    limit: int | None, gpu_limit: int | None, job: Job,
) -> int:  # fmt: skip
    """Say what will be done, and how memory will be kept in bounds; returns how many windows stand in mid-block."""
    count = len(windows or [])
    hidden = next(iter(plan.layers.values())).inputs
    tokens = memory.Tokens(0, 0, 0)
    if windows is not None:
        tokens = memory.tokens_of(windows, sum(is_held_out(i, count) for i in range(count)), hidden)
    stream = job.stream
    choice, says = memory.settle(
        plan, job.config, tokens, stream.device, stream.dtype, batch_size, limit, gpu_limit
    )  # fmt: skip
    job.observer.stage(f"{plan.in_short}; {says}")
    job.shelf = Shelf(folder if choice.on_disk else None)
    return choice.in_flight


def _round_blocks(blocks: list[Block], job: Job) -> None:
    for index, block in enumerate(blocks):
        _round_block(index, block, job)


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
    tuned = tune(
        block.module, fresh, [first_tensor(out) for out in outputs[1]], held_out, layers, job.stream.computed_with,
        {linear: job.plans[name].bits for name, linear in block.linears.items()}, job.config.tune_steps or 0,
        job.config.seed,
    )  # fmt: skip
    job.block_errors.append(BlockError(block.name, tuned.error_before, tuned.error_after))
    if tuned.layers is layers:
        job.note(f"{block.name}: tuning did not bring it closer to the original, so it stays as it was solved")
        return
    for name, linear in block.linears.items():
        job.solved[name] = tuned.layers[linear]
        job.stream.set_weight(linear, job.solved[name].weight())
    full_names = {m: ".".join(filter(None, (block.name, path))) for path, m in block.module.named_modules()}
    for (module, key), tensor in tuned.parameters.items():
        stored, rounded = job.stream.as_stored(f"{full_names[module]}.{key}", tensor)
        job.changed[stored] = rounded
        module._parameters[key] = nn.Parameter(rounded.to(tensor), requires_grad=False)
    outputs[0][:] = [run_through(function) for function in fresh]


def _write_block(block: Block, job: Job) -> None:
    if job.writer is None:
        raise RuntimeError("a job that measures has nothing to write")
    for name in block.linears:
        solved, plan = job.solved.pop(name), job.plans[name]
        for suffix, tensor in formats.encode(solved, plan.scheme).items():
            job.writer.write(f"{plan.stored}.{suffix}", tensor)
        job.spreads[name] |= code_histogram(solved.codes, plan.bits)
        job.weight_checksums[name] = sha256(solved.weight())


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
