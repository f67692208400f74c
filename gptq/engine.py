"""The journey of a checkpoint, top to bottom: one block in memory, one forward per block, every tensor accounted for.

source tensors -> one block -> inputs of each layer -> Hessian -> solver -> codes -> packed words -> output shard
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gptq import formats, solver
from gptq.blocks import (
    Block,
    Names,
    WeightStream,
    check_tensors,
    check_tokens,
    choose_device,
    choose_dtype,
    drop,
    empty_model,
    find_blocks,
    fitting_seq_len,
    read_config,
    read_tokenizer,
    return_freed_memory,
)
from gptq.calibration import documents, draw_windows
from gptq.checkpoint import ShardWriter, Source, appearing_folder, resolve, sha256
from gptq.config import QuantConfig
from gptq.errors import InputError
from gptq.hessian import HessianAccumulator, exact_float32
from gptq.plan import LayerPlan, announce, notes_on_shapes, plan_block
from gptq.record import LayerResult, write_files
from gptq.walk import PausableForward, Pause, identity, pause_before, pause_instead


@dataclass(frozen=True)
class Result:
    """What a run made; sizes are those of the safetensors files."""

    out: str
    layers: list[LayerResult]
    notes: list[str]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Observer:
    """Is told how a run goes on; does nothing by itself."""

    def started(self, num_blocks: int, weights: int) -> None: ...

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def layer_done(self, block: int, layer: LayerResult, weights: int) -> None: ...

    def finished(self) -> None: ...


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: str | Path | Tensor = "c4",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> Result:
    """Quantize a Hugging Face checkpoint into a new folder.

    Args:
        model: folder, or Hub id (then at `revision`).
        out: folder to make; it appears when the run has succeeded and is left untouched otherwise.
        calibration: source of text (see `gptq.calibration`), or ready windows of tokens, (windows, tokens) integers.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU where there is one.
        dtype: of the forward passes: "float32", "bfloat16", "float16"; "auto" is that of config.json, but float32 on a
            CPU without native bfloat16. The solver works in float32 on the stored weights.
        batch_size: how many calibration windows stand in mid-block at once (default all). The others repeat the
            block's forward for each distinct layer input: less memory, more time, the same bytes.

    Raises:
        InputError: anything a user can mend; then nothing is left at `out`.
    """
    started = time.monotonic()
    observer = observer or Observer()
    config = config or QuantConfig()
    calibration = str(calibration) if isinstance(calibration, Path) else calibration
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; at least one window has to be in flight")
    folder = resolve(str(model), revision)
    source = Source(folder)
    hf_config = read_config(folder, trust_remote_code)
    if getattr(hf_config, "quantization_config", None):
        raise InputError(f"{model} is quantized already; start from the original checkpoint")
    network = empty_model(hf_config, trust_remote_code)
    blocks = find_blocks(network)
    names = Names(network, set(source.tensors))
    left_over = check_tensors(network, names, source.tensors)
    plans = {p.name: p for block in blocks for p in plan_block(block, names, config)}
    tensors = announce(source, plans, config)
    notes = [*notes_on_shapes(plans.values(), config), *left_over]
    where = choose_device(device)
    stream = WeightStream(source, names, where, choose_dtype(dtype, hf_config, where))

    with appearing_folder(Path(out), sum(info.nbytes for info in tensors.values())) as partial_out:
        windows = None
        if config.method == "gptq":
            observer.stage(f"reading calibration text from {_describe(calibration)}")
            windows, shortened = _windows(calibration, folder, hf_config, config, trust_remote_code)
            check_tokens(windows, network)
            notes += shortened
        for note in notes:
            observer.note(note)
        observer.started(len(blocks), sum(p.outputs * p.inputs for p in plans.values()))
        writer = ShardWriter(partial_out, tensors)
        try:
            job = _Job(config, plans, stream, writer, observer)
            with torch.no_grad(), exact_float32(where):
                if windows is None:
                    _round_blocks(blocks, job)
                else:
                    _walk_blocks(network, blocks, windows.to(where), batch_size or len(windows), job)
            observer.stage("copying what is not quantized")
            for name in (n for n in source.tensors if n in tensors):
                writer.write(name, source.read(name))
            writer.close()
        finally:
            writer.abandon()
        calibrated_on = None if windows is None else _describe(calibration)
        write_files(
            folder, partial_out, config, plans, job.results, job.weight_checksums, writer.checksums, calibrated_on
        )
        after = _file_bytes(partial_out)
    observer.finished()
    stored = sum(tensors[f"{p.stored}.{suffix}"].nbytes for p in plans.values() for suffix in formats.SUFFIXES)
    return Result(
        out=str(out),
        layers=job.results,
        notes=notes + job.notes,
        bits_per_weight=8 * stored / sum(p.outputs * p.inputs for p in plans.values()),
        bytes_before=source.file_bytes,
        bytes_after=after,
        seconds=time.monotonic() - started,
    )


# --- before the first weight is read ----------------------------------------------------------------------------------


def _windows(
    source: str | Tensor, folder: Path, hf_config: PreTrainedConfig, config: QuantConfig, trust_remote_code: bool
) -> tuple[Tensor, list[str]]:
    if isinstance(source, Tensor):
        if source.ndim != 2 or source.dtype not in (torch.int64, torch.int32) or not source.numel():
            raise InputError("calibration windows are a (windows, tokens) tensor of integer token numbers")
        return source.long(), []
    tokenizer = read_tokenizer(folder, trust_remote_code)
    seq_len, notes = fitting_seq_len(config.seq_len, hf_config)
    rows = documents(source, "train")
    return draw_windows(rows, tokenizer, config.num_samples, seq_len, config.seed), notes


def _describe(source: str | Tensor) -> str:
    return source if isinstance(source, str) else f"{tuple(source.shape)} given tokens"


# --- block by block ---------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What the walk through the blocks carries along."""

    config: QuantConfig
    plans: dict[str, LayerPlan]
    stream: WeightStream
    writer: ShardWriter
    observer: Observer
    results: list[LayerResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weight_checksums: dict[str, str] = field(default_factory=dict)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.observer.note(text)


def _round_blocks(blocks: list[Block], job: _Job) -> None:
    for index, block in enumerate(blocks):
        for name in block.linears:
            _finish_layer(index, block, name, None, 0, job)
        drop(block.module)
        return_freed_memory()


def _walk_blocks(network: PreTrainedModel, blocks: list[Block], windows: Tensor, in_flight: int, job: _Job) -> None:
    """Take every window (windows, tokens) through the model's own forward, block by block."""
    modules = [block.module for block in blocks]
    forwards = [PausableForward(partial(network, input_ids=w[None], use_cache=False)) for w in windows]
    try:
        with job.stream.on_demand(network, blocks) as drop_others, pause_instead(modules) as block_forward:
            calls = [forward.advance() for forward in forwards]
            drop_others()
            for index, block in enumerate(blocks):
                if any(call is None or call.module is not block.module for call in calls):
                    raise InputError(
                        f"{block.name} is not run once per forward, in the order in which the blocks are listed"
                    )
                job.stream.fill(block.module, block.name, skip=block.linears.values())
                run = block_forward[block.module]
                outputs = _walk_block(index, block, run, [call for call in calls if call], in_flight, job)
                drop(block.module)
                return_freed_memory()
                if block is blocks[-1]:
                    break
                for i, forward in enumerate(forwards):
                    calls[i], outputs[i] = forward.advance(outputs[i]), None
                drop_others()
    finally:  # a forward left standing would hold its activations as long as the process lives
        for forward in forwards:
            forward.stop()


def _walk_block(
    index: int, block: Block, run: Callable[..., Any], calls: list[Pause], in_flight: int, job: _Job
) -> list[Any]:
    """Quantize a block's layers in the order in which its forward reaches them; returns its output for every window.

    The first `in_flight` windows run once, standing still before each layer until it is quantized.
    """
    fresh = [partial(run, *call.args, **call.kwargs) for call in calls]
    forwards = [PausableForward(function) for function in fresh[:in_flight]]
    try:
        with pause_before(block.linears.values()):
            for forward in forwards:
                forward.advance()
            done = _solve_as_reached(index, block, forwards, fresh[in_flight:], job)
            for name, linear in block.linears.items():
                if linear not in done:
                    job.note(f"{name}: no calibration token reached it, so it is rounded to nearest")
                    _finish_layer(index, block, name, None, 0, job)
            return [f.result for f in forwards] + [_run_through(function) for function in fresh[in_flight:]]
    finally:
        for forward in forwards:
            forward.stop()


def _solve_as_reached(
    index: int, block: Block, forwards: list[PausableForward], waiting: Sequence[Callable[[], Any]], job: _Job
) -> set[nn.Module]:
    """Solve the layers at which forwards stand until none stands; returns the layers that were reached.

    Layers that get the very same tensors (queries, keys and values, say) share one Hessian and its factor.
    """
    names = {linear: name for name, linear in block.linears.items()}
    rank = {linear: i for i, linear in enumerate(names)}
    done: set[nn.Module] = set()
    factor: solver.Factor | None = None
    tokens = 0
    shared: tuple[dict[int, Tensor], dict[int, object]] = {}, {}  # inputs that factor is of, kept alive, and identities
    while any(forward.standing for forward in forwards):
        linear = min((f.standing.module for f in forwards if f.standing), key=rank.__getitem__)
        here = {i: _input(f.standing) for i, f in enumerate(forwards) if f.standing and f.standing.module is linear}
        identities: dict[int, object] = {i: identity(x) for i, x in here.items()}
        if linear not in done:
            if identities != shared[1]:
                factor = None  # free the old one first
                name = names[linear]
                H, tokens = _hessian(name, _arriving(here, waiting, linear), job.plans[name].inputs, job.stream.device)
                factor, shared = _factorize(name, H, job), (here, identities)
            _finish_layer(index, block, names[linear], factor, tokens, job)
            done.add(linear)
        for i in here:
            forwards[i].advance()
    return done


def _input(pause: Pause) -> Tensor:
    x = pause.args[0] if pause.args else next(iter(pause.kwargs.values()))
    if not isinstance(x, Tensor):
        raise TypeError(f"a linear layer was called on {type(x).__name__}")
    return x


def _arriving(here: dict[int, Tensor], waiting: Iterable[Callable[[], Any]], linear: nn.Module) -> Iterator[Tensor]:
    """The input of `linear` in every window, in their order: those that stand here, then those that run again."""
    for i in sorted(here):
        yield here[i]
    for function in waiting:
        x = _run_until(function, linear)
        if x is not None:
            yield x


def _hessian(name: str, arriving: Iterable[Tensor], num_inputs: int, device: torch.device) -> tuple[Tensor, int]:
    """H (inputs, inputs) of a layer, and its number of tokens."""
    accumulator = HessianAccumulator(num_inputs, device)
    for x in arriving:
        accumulator.add(x)
    H = accumulator.mean()
    if not bool(torch.isfinite(H.diagonal()).all()):
        raise InputError(
            f"the input of {name} holds NaN or infinity for the calibration text; if the original model works on it, "
            "try --dtype float32"
        )
    return H, accumulator.num_tokens


def _run_until(function: Callable[[], Any], linear: nn.Module) -> Tensor | None:
    """Start a forward, and stop it for good where it reaches `linear`; returns the input it has there."""
    forward = PausableForward(function)
    pause = forward.advance()
    while pause and pause.module is not linear:
        pause = forward.advance()
    x = _input(pause) if pause else None
    forward.stop()
    return x


def _run_through(function: Callable[[], Any]) -> Any:
    forward = PausableForward(function)
    while forward.advance():
        pass
    return forward.result


def _factorize(name: str, H: Tensor, job: _Job) -> solver.Factor:
    perm = solver.act_order(H) if job.config.desc_act else solver.natural_order(H)
    try:
        factor = solver.factorize(H, perm, job.config.damp_percent)
    except solver.NotPositiveDefiniteError as error:
        raise InputError(f"the Hessian of {name} is {error}; use more or other calibration text") from error
    if factor.damp > job.config.damp_percent:
        job.note(f"{name}: its Hessian needed {factor.damp:g} of damping instead of {job.config.damp_percent:g}")
    return factor


def _finish_layer(index: int, block: Block, name: str, factor: solver.Factor | None, tokens: int, job: _Job) -> None:
    """Solve one layer, write its packed tensors, and let the forward go on with the weight that was written."""
    began = time.monotonic()
    config, plan, linear = job.config, job.plans[name], block.linears[name]
    W = job.stream.weight(linear, name)  # (outputs, inputs) float32
    try:
        solved = solver.round_to_nearest(W, config.bits, plan.group_size, config.sym)
        if factor is None:
            power = float(W.double().square().sum())
            error = rtn_error = solved.error
        else:
            power = solver.output_power(W, factor.H)
            rtn_error = solver.output_power(W - solved.weight(), factor.H)
            solved = solver.solve(W, factor, config.bits, plan.group_size, config.sym, config.static_groups)
            error = solver.output_power(W - solved.weight(), factor.H)
    except ValueError as problem:
        raise InputError(f"{name}: {problem}; its largest weight is {float(W.abs().max()):.3g}") from problem
    for suffix, tensor in formats.encode(solved, config.bits).items():
        job.writer.write(f"{plan.stored}.{suffix}", tensor)
    Q = solved.weight()
    job.weight_checksums[name] = sha256(Q)
    job.stream.set_weight(linear, Q)
    result = LayerResult(
        name=name,
        bits=config.bits,
        group_size=plan.group_size,
        error=error / power if power else 0.0,
        rtn_error=rtn_error / power if power else 0.0,
        damp=factor.damp if factor else None,
        tokens=tokens,
        seconds=time.monotonic() - began,
    )
    job.results.append(result)
    job.observer.layer_done(index, result, W.numel())


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
