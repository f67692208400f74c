"""Taking calibration windows through a model, block by block, and through a block, layer by layer."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gptq.calibration.arrays import Inputs
from gptq.compute.allocator import return_freed_memory
from gptq.compute.matmul import quick_linears
from gptq.errors import InputError
from gptq.models.blocks import Block
from gptq.models.experts import Experts
from gptq.models.forward import (
    PausableForward,
    Pause,
    argument,
    first_of,
    identity,
    input_at,
    pause_before,
    pause_instead,
    run_through,
    run_until,
    sent,
    with_defaults,
)
from gptq.models.uncalled_layers import Unread
from gptq.models.weights import WeightStream, drop, swapped
from gptq.pipeline.job import Job
from gptq.pipeline.layer import original_weights
from gptq.pipeline.layer_inputs import LayerInputs, look_at_inputs
from gptq.pipeline.moe import everywhere, routed, solve_experts
from gptq.pipeline.offload import Shelf

Fresh = list[list[partial[Any]]]  # for each stream and window, the call of a block on what reaches it


def walk_blocks(
    network: PreTrainedModel,
    blocks: list[Block],
    windows: list[Inputs],
    num_streams: int,
    weights: WeightStream,
    visit: Callable[[int, Block, Fresh], list[list[Any]]],
    shelf: Shelf | None = None,
) -> list[Block]:
    """Take every window through the model's own forward, block by block, in the order in which it reaches them.

    With two streams each window goes through twice, as the quantized and as the original model see it. `visit` has the
    weights of one block in memory, but for its linear layers', and returns the block's outputs by stream and window,
    or nothing where the walk is to end. What waits between blocks goes to the shelf. Returns the blocks that were not
    reached.
    """
    shelf = shelf or Shelf()
    left = {block.module: block for block in blocks}
    whole = with_defaults(network)
    streams = [
        [PausableForward(partial(whole, **sent(inputs, weights.device, weights.dtype))) for inputs in windows]
        for _ in range(num_streams)
    ]
    try:
        with weights.on_demand(network, blocks) as drop_others, pause_instead(left) as block_forward:
            calls = [[_shelved(_advance(forward), shelf) for forward in stream] for stream in streams]
            drop_others()
            while standing := calls[0][0]:
                block = left.pop(standing.module, None)
                if block is None or any(call is None or call.module is not block.module for call in chain(*calls)):
                    name = next(b.name for b in blocks if b.module is standing.module)
                    raise InputError(f"{name} is not run once per forward, in the same order for every window")
                weights.fill(block.module, block.name, skip=block.linears.values())
                run = shelf.releasing(block_forward[block.module])
                weights.read_ahead(_next_weights(left))
                fresh = [[partial(run, *c.args, **c.kwargs) for c in stream if c] for stream in calls]
                with quick_linears(block.module):
                    outputs = visit(len(blocks) - len(left) - 1, block, fresh)
                drop(block.module)
                return_freed_memory()
                if not left or not outputs:
                    break
                for stream, out, call in zip(streams, outputs, calls, strict=True):
                    for i, forward in enumerate(stream):
                        call[i] = _shelved(_advance(forward, shelf.put(out[i])), shelf)
                        out[i] = None
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


def _shelved(pause: Pause | None, shelf: Shelf) -> Pause | None:
    if pause is not None:
        shelf.put((pause.args, pause.kwargs))
    return pause


def _next_weights(left: dict[nn.Module, Block]) -> list[str]:
    """Names of the parameters of the block that comes next."""
    block = next(iter(left.values()), None)
    return [] if block is None else [f"{block.name}.{name}" for name, _ in block.module.named_parameters()]


def solve_head(index: int, block: Block, fresh: Fresh, job: Job) -> None:
    """Quantize the output head, whose scores nobody needs any more."""
    name = next(iter(block.linears))
    arguments = [[first_of(call.args, call.keywords) for call in stream] for stream in fresh]
    pairs = zip(arguments[0], arguments[1] if len(arguments) > 1 else [None] * len(arguments[0]), strict=True)
    job.finish(index, block, name, look_at_inputs(name, pairs, len(arguments[0]), job), job)


def walk_block(index: int, block: Block, fresh: Fresh, in_flight: int, job: Job) -> list[list[Any]]:
    """Quantize a block's layers in the order in which its forward reaches them; returns its output for every window.

    `fresh` and what is returned are for each stream one entry per window. The first `in_flight` windows run once,
    standing still before each layer until it is quantized.
    """
    _forget_weights(block.module, block, job.stream.device)
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
            outputs = [[job.shelf.put(forward.result) for forward in flight] for flight in flights]
            outputs[0] += [job.shelf.put(run_through(function)) for function in waiting[0]]
            with swapped(originals):
                for out, functions in zip(outputs[1:], waiting[1:], strict=True):
                    out += [job.shelf.put(run_through(function)) for function in functions]
            return outputs
    finally:
        for forward in chain(*flights):
            forward.stop()


def run_as_original(block: Block, calls: list[partial[Any]], job: Job) -> list[list[Any]]:
    """A stream's outputs of a block with its original weights, as `walk_block` would give them; none of the head."""
    if block.is_head():
        return []
    for name, linear in block.linears.items():
        job.stream.set_weight(linear, job.stream.weight(linear, name))
    return [[job.shelf.put(run_through(call)) for call in calls]]


def _solve_as_reached(
    index: int, block: Block, flights: list[list[PausableForward]], waiting: Fresh, job: Job
) -> tuple[set[nn.Module], dict[nn.Module, nn.Parameter | None]]:
    """Solve the layers at which forwards stand until none stands.

    Layers that get the very same tensors (queries, keys and values, say) share one Hessian and its factor. Returns the
    layers that were solved, and original weights as far as waiting windows will need them.
    """
    names = block.stops()
    rank = {linear: i for i, linear in enumerate(names)}
    solved: set[nn.Module] = set()
    originals: dict[nn.Module, nn.Parameter | None] = {}
    known: LayerInputs | None = None
    shared: list[dict[int, object]] = []  # identities of the inputs that are known
    while (at := job.ranks.least(min((rank[m] for m in _standing(flights)), default=len(rank)))) < len(rank):
        linear, name = [*names.items()][at]
        here = [_standing_at(linear, flight) for flight in flights]
        if linear not in solved and job.ranks.any(bool(here[0])):
            if isinstance(linear, Experts):
                routes = (routed(*pauses) for pauses in _arriving(flights, waiting, linear, originals))
                own = len(flights[0]) + len(waiting[0])
                solve_experts(index, block, name, linear, everywhere(routes, own, job), job)
            else:
                spent = known is not None and known.spent and name not in known.ahead
                if spent or job.ranks.any(here != shared):
                    known = None  # free the old one first
                    arriving = _arriving(flights, waiting, linear, originals)
                    pairs = ((input_at(pause), input_at(original)) for pause, original in arriving)
                    known = look_at_inputs(name, pairs, len(flights[0]) + len(waiting[0]), job)
                    for flight in flights:  # nobody needs them for a while
                        job.shelf.put([argument(pause) for pause in _pauses_at(linear, flight).values()])
                    shared = here = [_standing_at(linear, flight) for flight in flights]
                job.shelf.release()
                job.finish(index, block, name, known, job)
            solved.update(linear.modules())
        _ensure_weights(linear, block, job)
        _go_on(linear, here, flights, originals if any(waiting) else {}, block, job)
        if not any(waiting) and not job.keeps_weights:
            _forget_weights(linear, block, job.stream.device)
    return solved, originals


def _ensure_weights(stop: nn.Module, block: Block, job: Job) -> None:
    """Bring back what `_forget_weights` has forgotten, where a forward comes by a second time."""
    for name, linear in block.linears.items():
        if name in job.solved and linear.weight.is_meta and linear in stop.modules():
            job.stream.set_weight(linear, job.solved[name].weight())


def _forget_weights(stop: nn.Module, block: Block, device: torch.device) -> None:
    inside = set(stop.modules())
    for name, linear in block.linears.items():
        if linear in inside:
            linear._parameters["weight"] = Unread.of(linear, name, device)


def _standing(flights: list[list[PausableForward]]) -> list[nn.Module]:
    return [forward.standing.module for forward in chain(*flights) if forward.standing]


def _go_on(
    linear: nn.Module,
    here: list[dict[int, object]],
    flights: list[list[PausableForward]],
    originals: dict[nn.Module, nn.Parameter | None],
    block: Block,
    job: Job,
) -> None:
    """Let the forwards that stand `here` run the layer, each with its own stream's weights; `originals` gets those."""
    if len(here) > 1 and here[1]:
        own = original_weights(linear, block, job)
        originals |= own
        with swapped(own):
            for i in here[1]:
                flights[1][i].advance()
    for i in here[0]:
        flights[0][i].advance()


def _standing_at(linear: nn.Module, flight: list[PausableForward]) -> dict[int, object]:
    """The identity of the input that each window has at `linear` if it stands there."""
    return {i: identity(argument(pause)) for i, pause in _pauses_at(linear, flight).items()}


def _pauses_at(linear: nn.Module, flight: list[PausableForward]) -> dict[int, Pause]:
    return {i: f.standing for i, f in enumerate(flight) if f.standing and f.standing.module is linear}


def _arriving(
    flights: list[list[PausableForward]],
    waiting: Fresh,
    linear: nn.Module,
    originals: dict[nn.Module, nn.Parameter | None],
) -> Iterator[tuple[Pause | None, Pause | None]]:
    """Every window's pause at `linear` and the original model's, in the windows' order; None for one that passes it by.

    First come those in flight, then those that run again.
    """
    here = [_pauses_at(linear, flight) for flight in flights]
    for i in range(len(flights[0])):
        yield here[0].get(i), here[1].get(i) if len(here) > 1 else None
    for i, function in enumerate(waiting[0]):
        pause, original = run_until(function, linear), None
        if len(waiting) > 1:
            with swapped(originals):
                original = run_until(waiting[1][i], linear)
        yield pause, original
