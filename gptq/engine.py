"""The journey of a checkpoint, top to bottom: one block in memory, one forward per block, every tensor accounted for.

source tensors -> one block -> inputs of each layer -> Hessian -> solver -> codes -> packed words -> output shard
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq import formats, solver
from gptq.blocks import (
    Block,
    WeightStream,
    check_tokens,
    choose_device,
    choose_dtype,
    drop,
    fitting_seq_len,
    read_tokenizer,
    return_freed_memory,
    with_defaults,
)
from gptq.budget import Unit, choose, overrides_for, units_of
from gptq.calibration import Inputs, as_inputs, documents, draw_windows, frame_of, is_arrays, read_arrays
from gptq.checkpoint import ShardWriter, appearing_folder, require_free, sha256
from gptq.config import Format, QuantConfig
from gptq.drift import best_share, full_correction
from gptq.errors import InputError
from gptq.experts import Expert, Experts, blend, pseudo_tokens
from gptq.hessian import HessianAccumulator, exact_float32
from gptq.plan import LayerPlan, Plan, plan_checkpoint
from gptq.record import (
    BlockError,
    Coverage,
    LayerResult,
    code_histogram,
    layer_entries,
    linears_of,
    model_name,
    public_name,
    weight_histogram,
    write_files,
)
from gptq.refine import refine
from gptq.tune import first_tensor, tune
from gptq.walk import PausableForward, Pause, identity, pause_before, pause_instead

FEWEST_WINDOWS, MOST_WINDOWS = 16, 1024  # that a search for enough windows tries
ENOUGH = 0.1  # held-out error above the calibration's by so little that more windows would change it by half of that
HELD_OUT = 8  # one calibration window in so many measures what the solver learned from the others
FULL_SHARE = 0.5  # of the drift that is made up for, where too few windows leave none to find it by (QEP's choice)
TINY = 1e-30  # instead of a layer's output power where that is zero


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Observer:
    """Is told how a run goes on; does nothing by itself."""

    def started(self, num_blocks: int, weights: int) -> None: ...

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def layer_done(self, block: int, name: str, weights: int) -> None: ...

    def finished(self) -> None: ...


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: str | Path | Tensor | Iterable[Mapping[str, Any]] = "c4",
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
        calibration: source of text or of arrays (see `gptq.calibration`); or ready windows of tokens, (windows, tokens)
            integers; or what the model is called on, as dicts of arrays whose first dimension counts windows
            (`pixel_values` of images, say, or `input_ids` and `attention_mask` of padded texts).
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
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; at least one window has to be in flight")
    given = _given(calibration, config)
    described, sample = _describe(given), given[0] if isinstance(given, list) else None
    plan = plan_checkpoint(str(model), config, revision, trust_remote_code, sample)
    where = choose_device(device)
    shortened: list[str] = []
    if config.target_bits is not None or config.target_size is not None:
        require_free(Path(out))
        first = WeightStream(plan.source, plan.names, where, choose_dtype(dtype, plan.hf_config, where))
        given, shortened = _enough_windows(given, plan, config, first, trust_remote_code, observer)
        found = _choose_widths(plan, config, given, batch_size or len(given), first, observer)
        plan = plan_checkpoint(str(model), found, revision, trust_remote_code, sample)
    source, blocks = plan.source, plan.blocks
    plans, tensors, notes = plan.layers, plan.tensors, [*plan.notes, *shortened]
    stream = WeightStream(source, plan.names, where, choose_dtype(dtype, plan.hf_config, where))

    with appearing_folder(Path(out), sum(info.nbytes for info in tensors.values())) as partial_out:
        windows = None
        if config.method == "gptq":
            observer.stage(f"reading calibration data from {described}")
            windows, shortened = _enough_windows(given, plan, config, stream, trust_remote_code, observer)
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
                    streams = 2 if config.two_streams else 1
                    visit = partial(_quantize_block, in_flight=batch_size or len(windows), job=job)
                    left = _walk_blocks(plan.network, blocks, windows, streams, stream, visit)
                    for index, block in enumerate(left, start=len(blocks) - len(left)):
                        job.note(f"{block.name}: no calibration input reached it, so it is rounded to nearest")
                        _round_block(index, block, job)
            observer.stage("copying what is not quantized")
            for name in (n for n in source.tensors if n in tensors):
                writer.write(name, job.changed[name] if name in job.changed else source.read(name))
            writer.close()
        finally:
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
                "calibration_tokens": _count_tokens(windows or []),
            },
            "layers": layer_entries(plans, job.results, job.weight_checksums, job.spreads),
            "blocks": [asdict(error) for error in job.block_errors],
            **({"experts": [asdict(found) for found in job.coverage]} if job.coverage else {}),
        }
        chosen = next(iter(plans.values())).format
        write_files(plan.folder, partial_out, chosen, linears_of(plan), record, writer.checksums, plan.changes)
    observer.finished()
    if any(result.heldout_error is not None for result in job.results):
        excess = _heldout_excess(job.results)
        job.note(
            f"on windows held out, layer errors are {excess:+.0%} beside those on the calibration windows; "
            + ("more samples would help" if excess > ENOUGH else "more samples would change little")
        )
    return Result(
        out=str(out),
        format=chosen,
        layers=job.results,
        notes=notes + job.notes,
        bits_per_weight=plan.bits_per_weight,
        bytes_before=source.file_bytes,
        bytes_after=after,
        seconds=time.monotonic() - started,
    )


# --- before the first weight is read ----------------------------------------------------------------------------------


Given = str | Tensor | list[Inputs]


def _given(calibration: str | Path | Tensor | Iterable[Mapping[str, Any]], config: QuantConfig) -> Given:
    """What to calibrate on: a source of text, windows of tokens, or what the model is called on in each window."""
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.dtype not in (torch.int64, torch.int32) or not calibration.numel():
            raise InputError("calibration windows are a (windows, tokens) tensor of integer token numbers")
        return calibration.long()
    if not isinstance(calibration, str | Path):
        return as_inputs(calibration)
    if config.method == "gptq" and is_arrays(str(calibration)):
        return read_arrays(
            str(calibration), MOST_WINDOWS if config.num_samples == "auto" else config.num_samples, config.seed
        )
    return str(calibration)


def _windows(
    given: Given, num_samples: int, plan: Plan, config: QuantConfig, trust_remote_code: bool
) -> tuple[list[Inputs], list[str]]:
    """What the model is called on in each window, and notes."""
    if isinstance(given, list):
        return given, []
    notes: list[str] = []
    network = plan.network
    if isinstance(given, str):
        tokenizer = read_tokenizer(plan.folder, trust_remote_code)
        seq_len, notes = fitting_seq_len(config.seq_len, network.config, network)
        frame = frame_of(tokenizer) if not network.can_generate() else []
        rows = documents(given, "train")
        given = draw_windows(rows, tokenizer, num_samples, seq_len, config.seed, frame)
    check_tokens(given, network)
    if not network.config.is_encoder_decoder:
        return [{"input_ids": window[None]} for window in given], notes
    half = given.shape[1] // 2
    notes.append("the encoder reads the first half of each window, the decoder the second")
    return [{"input_ids": w[None, :half], "decoder_input_ids": w[None, half:]} for w in given], notes


def _describe(given: Given) -> str:
    if isinstance(given, str):
        return given
    if isinstance(given, Tensor):
        return f"{tuple(given.shape)} given tokens"
    return f"{len(given)} given windows of {', '.join(given[0])}"


def _count_tokens(windows: list[Inputs]) -> int:
    """Of text; 0 for other inputs."""
    return sum(x.numel() for inputs in windows for name, x in inputs.items() if name.endswith("input_ids"))


def _enough_windows(
    given: Given, plan: Plan, config: QuantConfig, stream: WeightStream, trust_remote_code: bool, observer: Observer
) -> tuple[list[Inputs], list[str]]:
    """As many windows as the config says; for "auto" twice as many, until more would change little.

    That is when the first block's layers err on those held out nearly as little as on the others. Their ratio is about
    1 + 2 n / tokens for n inputs, so that it tells what more tokens could bring. Windows that were given are all used.
    """
    if config.num_samples != "auto":
        return _windows(given, config.num_samples, plan, config, trust_remote_code)
    windows, notes = _windows(given, FEWEST_WINDOWS, plan, config, trust_remote_code)
    if not isinstance(given, str):
        return windows, notes
    alone = replace(config, effort="fast", two_streams=False, tune_steps=0, target_bits=None, target_size=None)
    while True:
        excess = _heldout_excess(_results_of_first_block(windows, plan, alone, stream))
        observer.stage(
            f"{len(windows)} windows: held-out error of the first block {excess:+.0%} beside the calibration's"
        )
        if excess <= ENOUGH or 2 * len(windows) > MOST_WINDOWS:
            return windows, notes
        try:
            windows, notes = _windows(given, 2 * len(windows), plan, config, trust_remote_code)
        except InputError:  # the text has no more
            return windows, [*notes, f"the calibration text ends at {len(windows)} windows; more would help"]


def _results_of_first_block(
    windows: list[Inputs], plan: Plan, config: QuantConfig, stream: WeightStream
) -> list[LayerResult]:
    job = _Job(config, plan.layers, stream, None, Observer())

    def visit(index: int, block: Block, fresh: Fresh) -> list[list[Any]]:
        _walk_block(index, block, fresh, len(windows), job)
        return []

    with torch.no_grad(), exact_float32(stream.device):
        _walk_blocks(plan.network, plan.blocks, windows, 1, stream, visit)
    return job.results


def _heldout_excess(results: list[LayerResult]) -> float:
    """How much larger the sum of the layers' errors is on windows held out than on those learned from."""
    both = [(r.error, r.heldout_error) for r in results if r.heldout_error is not None]
    return sum(held for _, held in both) / max(sum(error for error, _ in both), TINY) - 1 if both else 0.0


# --- block by block ---------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What the walk through the blocks carries along."""

    config: QuantConfig
    plans: dict[str, LayerPlan]
    stream: WeightStream
    writer: ShardWriter | None  # None where nothing is written yet
    observer: Observer
    results: list[LayerResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weight_checksums: dict[str, str] = field(default_factory=dict)
    solved: dict[str, solver.SolvedLayer] = field(default_factory=dict)  # of the block at hand
    changed: dict[str, Tensor] = field(default_factory=dict)  # tuned tensors that are not packed, by stored name
    block_errors: list[BlockError] = field(default_factory=list)
    finish: Callable[..., None] = field(default_factory=lambda: _finish_layer)  # what is done with a layer it stands at
    spreads: dict[str, dict[str, Any]] = field(default_factory=dict)  # histograms of weights and codes
    coverage: list[Coverage] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.observer.note(text)


def _round_blocks(blocks: list[Block], job: _Job) -> None:
    for index, block in enumerate(blocks):
        _round_block(index, block, job)


def _round_block(index: int, block: Block, job: _Job) -> None:
    for name in block.linears:
        _finish_layer(index, block, name, None, job)
    _write_block(block, job)
    drop(block.module)
    return_freed_memory()


Fresh = list[list[partial[Any]]]  # for each stream and window, the call of a block on what reaches it


def _walk_blocks(
    network: PreTrainedModel,
    blocks: list[Block],
    windows: list[Inputs],
    num_streams: int,
    weights: WeightStream,
    visit: Callable[[int, Block, Fresh], list[list[Any]]],
) -> list[Block]:
    """Take every window through the model's own forward, block by block, in the order in which it reaches them.

    With two streams each window goes through twice, as the quantized and as the original model see it. `visit` has the
    weights of one block in memory, but for its linear layers', and returns the block's outputs by stream and window,
    or nothing where the walk is to end. Returns the blocks that were not reached.
    """
    left = {block.module: block for block in blocks}
    whole = with_defaults(network)
    streams = [
        [PausableForward(partial(whole, **weights.to_device(inputs))) for inputs in windows] for _ in range(num_streams)
    ]
    try:
        with weights.on_demand(network, blocks) as drop_others, pause_instead(left) as block_forward:
            calls = [[_advance(forward) for forward in stream] for stream in streams]
            drop_others()
            while standing := calls[0][0]:
                block = left.pop(standing.module, None)
                if block is None or any(call is None or call.module is not block.module for call in chain(*calls)):
                    name = next(b.name for b in blocks if b.module is standing.module)
                    raise InputError(f"{name} is not run once per forward, in the same order for every window")
                weights.fill(block.module, block.name, skip=block.linears.values())
                run = block_forward[block.module]
                outputs = visit(
                    len(blocks) - len(left) - 1,
                    block,
                    [[partial(run, *c.args, **c.kwargs) for c in stream if c] for stream in calls],
                )
                drop(block.module)
                return_freed_memory()
                if not left or not outputs:
                    break
                for stream, out, call in zip(streams, outputs, calls, strict=True):
                    for i, forward in enumerate(stream):
                        call[i], out[i] = _advance(forward, out[i]), None
                drop_others()
    finally:  # a forward left standing would hold its activations as long as the process lives
        for forward in chain(*streams):
            forward.stop()
    return [*left.values()]


def _advance(forward: PausableForward, answer: Any = None) -> Pause | None:
    """Raises InputError where the model refuses its calibration inputs."""
    try:
        return forward.advance(answer)
    except (ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the model does not run on the calibration inputs: {reason}") from error


def _quantize_block(index: int, block: Block, fresh: Fresh, in_flight: int, job: _Job) -> list[list[Any]]:
    outputs: list[list[Any]] = []
    if block.is_head():
        _solve_head(index, block, fresh, job)
    else:
        outputs = _walk_block(index, block, fresh, in_flight, job)
        if job.config.tune_steps:
            _tune_block(block, fresh[0], outputs, job)
    _write_block(block, job)
    return outputs


def _solve_head(index: int, block: Block, fresh: Fresh, job: _Job) -> None:
    """Quantize the output head, whose scores nobody needs any more."""
    name = next(iter(block.linears))
    arguments = [[_first(call.args, call.keywords) for call in stream] for stream in fresh]
    pairs = zip(arguments[0], arguments[1] if len(arguments) > 1 else [None] * len(arguments[0]), strict=True)
    job.finish(index, block, name, _look_at_inputs(name, pairs, len(arguments[0]), job), job)


def _walk_block(index: int, block: Block, fresh: Fresh, in_flight: int, job: _Job) -> list[list[Any]]:
    """Quantize a block's layers in the order in which its forward reaches them; returns its output for every window.

    `fresh` and what is returned are for each stream one entry per window. The first `in_flight` windows run once,
    standing still before each layer until it is quantized.
    """
    flights = [[PausableForward(function) for function in stream[:in_flight]] for stream in fresh]
    waiting = [stream[in_flight:] for stream in fresh]
    try:
        with pause_before(block.stops()):
            for forward in chain(*flights):
                forward.advance()
            solved, originals = _solve_as_reached(index, block, flights, waiting, job)
            for name, linear in block.linears.items():
                if linear not in solved:
                    job.note(f"{name}: no calibration token reached it, so it is rounded to nearest")
                    job.finish(index, block, name, None, job)
            outputs = [[forward.result for forward in flight] for flight in flights]
            outputs[0] += [_run_through(function) for function in waiting[0]]
            with _swapped(originals):
                for out, functions in zip(outputs[1:], waiting[1:], strict=True):
                    out += [_run_through(function) for function in functions]
            return outputs
    finally:
        for forward in chain(*flights):
            forward.stop()


def _solve_as_reached(
    index: int, block: Block, flights: list[list[PausableForward]], waiting: Fresh, job: _Job
) -> tuple[set[nn.Module], dict[nn.Module, nn.Parameter | None]]:
    """Solve the layers at which forwards stand until none stands.

    Layers that get the very same tensors (queries, keys and values, say) share one Hessian and its factor. Returns the
    layers that were solved, and original weights as far as waiting windows will need them.
    """
    names = block.stops()
    rank = {linear: i for i, linear in enumerate(names)}
    solved: set[nn.Module] = set()
    originals: dict[nn.Module, nn.Parameter | None] = {}
    known: _Inputs | None = None
    shared: list[dict[int, tuple[Tensor, object]]] = []  # the inputs that are known, kept alive, and their identities
    while standing := [f.standing.module for f in chain(*flights) if f.standing]:
        linear = min(standing, key=rank.__getitem__)
        name = names[linear]
        here = [_standing_at(linear, flight) for flight in flights]
        if linear not in solved and here[0]:
            if isinstance(linear, Experts):
                arriving = _arriving([_pauses_at(linear, flight) for flight in flights], waiting, linear, originals)
                _solve_experts(index, block, name, linear, [_routed(*pauses) for pauses in arriving if pauses[0]], job)
            else:
                if _identities(here) != _identities(shared):
                    known = None  # free the old one first
                    arriving = _arriving([_pauses_at(linear, flight) for flight in flights], waiting, linear, originals)
                    pairs = ((_input(pause), _input(original)) for pause, original in arriving)
                    known, shared = _look_at_inputs(name, pairs, len(flights[0]) + len(waiting[0]), job), here
                job.finish(index, block, name, known, job)
            solved.update(linear.modules())
        _go_on(linear, here, flights, originals if any(waiting) else {}, block, job)
    return solved, originals


def _go_on(
    linear: nn.Module,
    here: list[dict[int, tuple[Tensor, object]]],
    flights: list[list[PausableForward]],
    originals: dict[nn.Module, nn.Parameter | None],
    block: Block,
    job: _Job,
) -> None:
    """Let the forwards that stand `here` run the layer, each with its own stream's weights; `originals` gets those."""
    if len(here) > 1 and here[1]:
        own = _original_weights(linear, block, job)
        originals |= own
        with _swapped(own):
            for i in here[1]:
                flights[1][i].advance()
    for i in here[0]:
        flights[0][i].advance()


def _standing_at(linear: nn.Module, flight: list[PausableForward]) -> dict[int, tuple[Tensor, object]]:
    """The input that each window has at `linear` if it stands there, and its identity."""
    return {i: (x := _argument(pause), identity(x)) for i, pause in _pauses_at(linear, flight).items()}


def _pauses_at(linear: nn.Module, flight: list[PausableForward]) -> dict[int, Pause]:
    return {i: f.standing for i, f in enumerate(flight) if f.standing and f.standing.module is linear}


def _original_weights(stop: nn.Module, block: Block, job: _Job) -> dict[nn.Module, nn.Parameter | None]:
    """What the original model computes with where a forward stands, of what is quantized there."""
    names = {linear: name for name, linear in block.linears.items()}
    return {
        linear: nn.Parameter(job.stream.computed_with(linear, job.stream.weight(linear, names[linear])), False)
        for linear in stop.modules()
        if linear in names
    }


def _identities(inputs: list[dict[int, tuple[Tensor, object]]]) -> list[dict[int, object]]:
    return [{i: same for i, (_, same) in stream.items()} for stream in inputs]


def _argument(pause: Pause, number: int = 0) -> Tensor:
    return _first(pause.args, pause.kwargs, number)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int = 0) -> Tensor:
    x = [*args, *kwargs.values()][number]
    if not isinstance(x, Tensor):
        raise TypeError(f"a layer was called on {type(x).__name__}")
    return x


def _input(pause: Pause | None) -> Tensor | None:
    return _argument(pause) if pause else None


def _arriving(
    here: list[dict[int, Pause]],
    waiting: Fresh,
    linear: nn.Module,
    originals: dict[nn.Module, nn.Parameter | None],
) -> Iterator[tuple[Pause | None, Pause | None]]:
    """Every window's pause at `linear` and the original model's, in the windows' order.

    First come those that stand here, then those that run again.
    """
    for i in sorted(here[0]):
        yield here[0][i], here[1].get(i) if len(here) > 1 else None
    for i, function in enumerate(waiting[0]):
        pause, original = _run_until(function, linear), None
        if len(waiting) > 1:
            with _swapped(originals):
                original = _run_until(waiting[1][i], linear)
        yield pause, original


@dataclass(frozen=True)
class _Inputs:
    """What is known of the inputs of a layer; each part is None where there is none of its kind."""

    factor: solver.Factor
    drift: Tensor | None  # (inputs, inputs) mean of (x~ - x) x^T, see gptq.drift
    unseen_hessian: Tensor | None  # (inputs, inputs) of windows that neither of the above has seen
    unseen_drift: Tensor | None
    tokens: int


def _look_at_inputs(
    name: str, arriving: Iterable[tuple[Tensor | None, Tensor | None]], windows: int, job: _Job
) -> _Inputs:
    """Average over the windows; one in HELD_OUT is kept out of what the solver works with, to measure it."""
    return _known(name, _accumulated(job.plans[name].inputs, arriving, windows, job), None, job)


Sums = tuple[HessianAccumulator, HessianAccumulator]  # over windows to learn from, and over those held out


def _accumulated(inputs: int, arriving: Iterable[tuple[Tensor | None, Tensor | None]], windows: int, job: _Job) -> Sums:
    seen, unseen = (HessianAccumulator(inputs, job.stream.device) for _ in range(2))
    for i, (x, original) in enumerate(arriving):
        if x is not None:
            (unseen if _is_held_out(i, windows) else seen).add(x, original)
    return seen, unseen


def _known(name: str, own: Sums, everyone: Sums | None, job: _Job) -> _Inputs:
    """A layer's input sums as the solver wants them; where those of `everyone` are given, blended with them."""
    seen, unseen = own
    missing = 0 if everyone is None else pseudo_tokens(seen.num_tokens, job.plans[name].inputs)
    share = seen.num_tokens / (seen.num_tokens + missing) if missing else 1.0
    all_seen, all_unseen = everyone or own
    H, C = blend(seen, all_seen, share)
    if not bool(torch.isfinite(H.diagonal()).all()):
        raise InputError(
            f"the input of {name} holds NaN or infinity for the calibration data; if the original model works on it, "
            "try --dtype float32"
        )
    unseen_H, unseen_C = blend(unseen, all_unseen, share if unseen.num_tokens else 0.0)
    return _Inputs(
        factor=_factorize(name, H, job),
        drift=C,
        unseen_hessian=unseen_H if all_unseen.num_tokens else None,
        unseen_drift=unseen_C if all_unseen.num_tokens else None,
        tokens=seen.num_tokens + unseen.num_tokens,
    )


def _is_held_out(window: int, windows: int) -> bool:
    return windows >= HELD_OUT and window % HELD_OUT == HELD_OUT - 1


def _run_until(function: Callable[[], Any], linear: nn.Module) -> Pause | None:
    """Start a forward, and stop it for good where it reaches `linear`; returns the pause it has there."""
    forward = PausableForward(function)
    pause = forward.advance()
    while pause and pause.module is not linear:
        pause = forward.advance()
    forward.stop()
    return pause


def _run_through(function: Callable[[], Any]) -> Any:
    forward = PausableForward(function)
    while forward.advance():
        pass
    return forward.result


@contextmanager
def _swapped(weights: Mapping[nn.Module, nn.Parameter | None]) -> Iterator[None]:
    """Inside, layers compute with these weights instead of their own."""
    own = {linear: linear._parameters["weight"] for linear, weight in weights.items() if weight is not None}
    try:
        for linear in own:
            linear._parameters["weight"] = weights[linear]
        yield
    finally:
        for linear, weight in own.items():
            linear._parameters["weight"] = weight


def _factorize(name: str, H: Tensor, job: _Job) -> solver.Factor:
    perm = solver.act_order(H) if job.config.desc_act else solver.natural_order(H)
    try:
        factor = solver.factorize(H, perm, job.config.damp_percent)
    except solver.NotPositiveDefiniteError as error:
        raise InputError(f"the Hessian of {name} is {error}; use more or other calibration text") from error
    if factor.damp > job.config.damp_percent:
        job.note(f"{name}: its Hessian needed {factor.damp:g} of damping instead of {job.config.damp_percent:g}")
    return factor


def _tune_block(block: Block, fresh: list[partial[Any]], outputs: list[list[Any]], job: _Job) -> None:
    """Bring a solved block closer to the original one's outputs, and renew the quantized stream's outputs."""
    layers = {block.linears[name]: solved for name, solved in job.solved.items()}
    held_out = [i for i in range(len(fresh)) if _is_held_out(i, len(fresh))]
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
    outputs[0][:] = [_run_through(function) for function in fresh]


def _write_block(block: Block, job: _Job) -> None:
    if job.writer is None:
        raise RuntimeError("a job that measures has nothing to write")
    for name in block.linears:
        solved, plan = job.solved.pop(name), job.plans[name]
        for suffix, tensor in formats.encode(solved, plan.scheme).items():
            job.writer.write(f"{plan.stored}.{suffix}", tensor)
        job.spreads[name] |= code_histogram(solved.codes, plan.bits)
        job.weight_checksums[name] = sha256(solved.weight())


# --- experts ----------------------------------------------------------------------------------------------------------

Routed = tuple[Tensor, Tensor, Tensor | None]  # x (tokens, hidden), experts (tokens, k), x of the original model


def _routed(pause: Pause | None, original: Pause | None) -> Routed:
    if pause is None:
        raise ValueError("a window passed by its experts")
    return _argument(pause), _argument(pause, 1), _input(original)


def _solve_experts(index: int, block: Block, name: str, experts: Experts, windows: list[Routed], job: _Job) -> None:
    """Quantize a layer's experts, each for its own tokens, blended with all of the layer's where these are too few."""
    everyone = _accumulated(windows[0][0].shape[-1], ((x, original) for x, _, original in windows), len(windows), job)
    tokens, blended = [], []
    for number, expert in enumerate(experts):
        if not isinstance(expert, Expert):
            raise TypeError(f"{name}.{number} is a {type(expert).__name__}")
        own = [(routes == number).any(-1) for _, routes, _ in windows]  # (tokens,) each
        tokens.append(sum(int(rows.sum()) for rows in own))
        layers = {f"{name}.{number}.{part}": linear for part, linear in expert.named_children()}
        planned = {linear: layer for layer, linear in layers.items() if layer in job.plans}
        gate_up = [planned[linear] for linear in (expert.gate_proj, expert.up_proj) if linear in planned]
        few = False
        if gate_up:
            pairs = [
                (x[rows], None if original is None else original[rows])
                for (x, _, original), rows in zip(windows, own, strict=True)
            ]
            sums = _accumulated(job.plans[gate_up[0]].inputs, pairs, len(windows), job)
            known = _known(gate_up[0], sums, everyone, job)
            few = pseudo_tokens(sums[0].num_tokens, job.plans[gate_up[0]].inputs) > 0
            for layer in gate_up:
                job.finish(index, block, layer, known, job)
        if expert.down_proj in planned:
            few |= _solve_down(
                index, block, planned[expert.down_proj], expert, list(zip(windows, own, strict=True)), job
            )
        if few:
            blended.append(number)
    _report_coverage(Coverage(name, sum(len(x) for x, _, _ in windows), tokens, blended), job)


def _solve_down(
    index: int, block: Block, name: str, expert: Expert, windows: list[tuple[Routed, Tensor]], job: _Job
) -> bool:
    """Quantize an expert's down_proj behind its quantized gate and up; whether its own tokens were too few."""
    originals = _original_weights(expert, block, job)
    inputs = job.plans[name].inputs

    def inner(everyone: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        for (x, _, original), own in windows:
            rows = torch.ones_like(own) if everyone else own
            h = expert.intermediate(x[rows])
            if original is None:
                yield h, None
            else:
                with _swapped(originals):
                    yield h, expert.intermediate(original[rows])

    sums = _accumulated(inputs, inner(False), len(windows), job)
    few = pseudo_tokens(sums[0].num_tokens, inputs) > 0
    all_sums = _accumulated(inputs, inner(True), len(windows), job) if few else None
    job.finish(index, block, name, _known(name, sums, all_sums, job), job)
    return few


def _report_coverage(found: Coverage, job: _Job) -> None:
    job.coverage.append(found)
    if job.writer is None:  # only measured
        return
    if found.blended:
        least = min(range(len(found.tokens)), key=found.tokens.__getitem__)
        job.note(
            f"{found.name}: {len(found.blended)} of {len(found.tokens)} experts saw too few of {found.all_tokens} "
            f"tokens (the least, expert {least}, {found.tokens[least]}); their Hessians are blended with that of all"
        )


# --- choosing widths --------------------------------------------------------------------------------------------------


def _choose_widths(
    plan: Plan, config: QuantConfig, windows: list[Inputs], in_flight: int, stream: WeightStream, observer: Observer
) -> QuantConfig:
    """The config with an override for every layer, so that the target is met; takes one pass over the original model.

    A choice is judged by what it does to the output of its block when it alone is quantized: the squared change of a
    token's output relative to the token's own, as the norms of the blocks that follow will see it.
    """
    units, chosen_format = units_of(plan, config)
    choose(plan, config, units, chosen_format)  # an impossible target is refused before the work
    observer.stage("measuring what each width does to each layer")
    observer.started(len(plan.blocks), sum(p.outputs * p.inputs for p in plan.layers.values()))
    job = _Job(config, plan.layers, stream, None, observer)
    trials: dict[str, dict[tuple[int, int], solver.SolvedLayer]] = {}
    job.finish = partial(_try_choices, units={name: unit for unit in units for name in unit.layers}, trials=trials)
    measured: list[Unit] = []

    def visit(index: int, block: Block, fresh: Fresh) -> list[list[Any]]:
        outputs: list[list[Any]] = []
        if block.is_head():
            _solve_head(index, block, fresh, job)
        else:
            outputs = _walk_block(index, block, fresh, in_flight, job)
        inside = [unit for unit in units if unit.layers[0] in block.linears]
        measured.extend(
            _measure(unit, block, fresh[0], outputs[0] if outputs else None, trials, job) for unit in inside
        )
        trials.clear()
        return outputs

    with torch.no_grad(), exact_float32(stream.device):
        left = _walk_blocks(plan.network, plan.blocks, windows, 1, stream, visit)
    measured += [unit for block in left for unit in units if unit.layers[0] in block.linears]  # none sees a difference
    observer.finished()
    overrides = overrides_for(measured, choose(plan, config, measured, chosen_format))
    return replace(config, overrides=(*config.overrides, *overrides), format=chosen_format)


def _try_choices(
    index: int, block: Block, name: str, known: _Inputs | None, job: _Job,
    units: dict[str, Unit], trials: dict[str, dict[tuple[int, int], solver.SolvedLayer]],
) -> None:  # fmt: skip
    """Solve a layer in every way it could be stored, and let the forward go on with the original weight."""
    plan, linear = job.plans[name], block.linears[name]
    W = job.stream.weight(linear, name)  # (outputs, inputs) float32
    trials[name] = {}
    for choice in units[name].choices:
        group_size = plan.inputs if choice.group_size == -1 else min(choice.group_size, plan.inputs)
        if known is None:
            solved = solver.round_to_nearest(W, choice.bits, group_size, plan.sym)
        else:
            solved = solver.solve(W, known.factor, choice.bits, group_size, plan.sym, search=bool(job.config.search))
        trials[name][choice.bits, choice.group_size] = solved
    job.stream.set_weight(linear, W)
    job.observer.layer_done(index, name, W.numel())


def _measure(
    unit: Unit, block: Block, fresh: list[partial[Any]], outputs: list[Any] | None,
    trials: dict[str, dict[tuple[int, int], solver.SolvedLayer]], job: _Job,
) -> Unit:  # fmt: skip
    """The unit with the error that each choice brings into the block's output, on held-out windows.

    Where the original `outputs` are not given, each is computed when it is compared.
    """
    windows = [i for i in range(len(fresh)) if _is_held_out(i, len(fresh))] or list(range(len(fresh)))
    choices = []
    for choice in unit.choices:
        weights: dict[nn.Module, nn.Parameter | None] = {}
        for name in unit.layers:
            linear = block.linears[name]
            Q = trials[name][choice.bits, choice.group_size].weight()
            weights[linear] = nn.Parameter(job.stream.computed_with(linear, Q), requires_grad=False)
        errors = []
        for i in windows:
            original = outputs[i] if outputs else _run_through(fresh[i])
            with _swapped(weights):
                errors.append(_relative_change(_run_through(fresh[i]), original))
        choices.append(replace(choice, error=sum(errors) / len(errors)))
    return replace(unit, choices=tuple(choices))


def _relative_change(output: Any, original: Any) -> float:
    """Mean over tokens of ||y - y'||^2 / ||y'||^2."""
    y, wanted = first_tensor(output).double(), first_tensor(original).double()  # (..., tokens, width)
    return float(((y - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=TINY)).mean())


# --- layer by layer ---------------------------------------------------------------------------------------------------


def _finish_layer(index: int, block: Block, name: str, known: _Inputs | None, job: _Job) -> None:
    """Solve one layer and let the forward go on with the weight that its codes stand for."""
    began = time.monotonic()
    plan, linear = job.plans[name], block.linears[name]
    W = job.stream.weight(linear, name)  # (outputs, inputs) float32
    try:
        solved, figures = _solve_layer(W, plan, known, job.config)
    except ValueError as problem:
        raise InputError(f"{name}: {problem}; its largest weight is {float(W.abs().max()):.3g}") from problem
    job.solved[name] = solved
    job.spreads[name] = weight_histogram(W)
    job.stream.set_weight(linear, solved.weight())
    result = LayerResult(
        name=name, bits=plan.bits, group_size=plan.group_size, **figures, seconds=time.monotonic() - began
    )
    job.results.append(result)
    job.observer.layer_done(index, name, W.numel())
    return_freed_memory()


def _solve_layer(
    W: Tensor, plan: LayerPlan, known: _Inputs | None, config: QuantConfig
) -> tuple[solver.SolvedLayer, dict[str, Any]]:
    """The codes of W (outputs, inputs), and the figures of its LayerResult."""
    nearest = solver.round_to_nearest(W, plan.bits, plan.group_size, plan.sym)
    if known is None:
        error = nearest.error / max(float(W.double().square().sum()), TINY)
        figures = {"error": error, "rtn_error": error, "heldout_error": None, "share": None, "damp": None, "tokens": 0}
        return nearest, figures
    factor, share, target = known.factor, None, W
    if known.drift is not None:
        correction = full_correction(W, known.drift, factor)
        share = FULL_SHARE
        if known.unseen_hessian is not None and known.unseen_drift is not None:
            share = best_share(W, correction, known.unseen_drift, known.unseen_hessian)
        target = W + share * correction
    solved = solver.solve(
        target, factor, plan.bits, plan.group_size, plan.sym, config.static_groups, bool(config.search)
    )
    if config.sweeps:
        solved = refine(target, solved, factor, plan.bits, config.sweeps)

    off, power = target - solved.weight(), max(solver.output_power(W, factor.H), TINY)
    heldout_error = None
    if (unseen := known.unseen_hessian) is not None:
        heldout_error = solver.output_power(off, unseen) / max(solver.output_power(W, unseen), TINY)
    figures = {
        "error": solver.output_power(off, factor.H) / power,
        "rtn_error": solver.output_power(target - nearest.weight(), factor.H) / power,
        "heldout_error": heldout_error,
        "share": share,
        "damp": factor.damp,
        "tokens": known.tokens,
    }
    return solved, figures


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
