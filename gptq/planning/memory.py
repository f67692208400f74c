"""How much memory a run will need, and what is done to stay within a limit.

The peak is that of the largest of the moments below, each a sum of what is alive then. n are the inputs of a layer, r
its outputs, and a number takes 4 bytes where nothing else is said.

    gathering     H, and with two streams C, both n^2; the held-out windows' rows, or their n^2
    factorizing   H, C, U
    solving       H, U, and of the layer itself: the weight, what it aims at, the solver's copy, the errors, the codes
    going on      the weight as the forward computes with it, of each stream
    writing       codes of the whole block, the weight of one layer beside them

and always: the process itself, the codes of the block's layers so far, the activations in mid-block of the windows that
stand there, and those of all windows between blocks unless they are in a file; on a GPU two blocks as they are stored,
where there is room for them. Logits are never computed.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptq import solver
from gptq.compute.allocator import return_freed_memory
from gptq.config import QuantConfig
from gptq.errors import InputError
from gptq.models.blocks import Block, group_fused_siblings
from gptq.planning.plan import LayerPlan, Plan
from gptq.solver.coordinate_descent import refine
from gptq.solver.error_propagation import CHUNK_ROWS
from gptq.solver.hessian import CHUNK_TOKENS
from gptq.solver.solve import TILE_ROWS

MARGIN = 0.05  # of a limit that is kept free for what the model does not know of
SHARE = 0.8  # of the memory that is free which a run takes unless it is told otherwise
AMPLE = 0.5  # of a limit: who needs less than that need not count pages
HOLES = 0.2  # of what a run takes beside the process: what the heap's holes add where freed memory is kept
SHELVES = sys.platform == "linux"  # where resident pages of a file can be given back and counted
SLACK = 60_000_000  # bytes: pieces of tensors, packed words, the allocator's own
CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


@dataclass(frozen=True)
class Tokens:
    """What calibration looks like: windows, tokens in each, and how many windows are held out."""

    windows: int
    per_window: int
    held_out: int

    @property
    def seen(self) -> int:
        return (self.windows - self.held_out) * self.per_window


@dataclass(frozen=True)
class Choice:
    """What a run does about memory; none of it changes a byte of the result."""

    in_flight: int  # windows that stand in mid-block at once
    on_disk: bool  # whether activations between blocks are in files
    peak: int  # bytes, estimated
    frugal: bool = False  # whether freed memory goes back to the system after each layer, which takes time
    ahead: bool = False  # whether the next block's weights are copied to the GPU while it works on one


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """Most bytes of this process that were in memory at once."""
    import resource

    # getrusage would count the parent's memory in where the process was forked from a large one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (peak if sys.platform == "darwin" else 1024 * peak)  # kilobytes elsewhere


def _status(key: str) -> int:
    file = Path("/proc/self/status")
    return 1024 * int(file.read_text().split(f"{key}:")[1].split()[0]) if file.is_file() else 0


def available(root: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of host memory that are free for this process: the machine's, or fewer where a container may use less."""
    if meminfo.is_file():
        free = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit, used in CGROUPS:
        if (root / limit).is_file() and (root / used).is_file():
            most = (root / limit).read_text().strip()
            if most.isdigit():
                free = min(free, int(most) - int((root / used).read_text()))
    return max(free, 0)


def choose(plan: Plan, config: QuantConfig, tokens: Tokens, dtype: torch.dtype, batch_size: int | None, limit: int,
           base: int, where: str = "memory", files: bool = True) -> Choice:  # fmt: skip
    """The quickest way that stays within `limit` bytes.

    Everything in memory is the quickest; then files for what waits between blocks, which costs little; then fewer
    windows in flight, whose forwards are repeated. Args: `base` is what the process takes before the work starts.

    Raises:
        InputError: no way does; says what the least is.
    """
    flights = [batch_size] if batch_size else list(_halvings(tokens.windows))
    ways = [(min(flights[0], tokens.windows), False)]
    ways += [(min(count, tokens.windows), files) for count in flights]
    least: Choice | None = None
    for in_flight, on_disk in ways:
        found = Choice(in_flight, on_disk, peak(plan, config, tokens, dtype, in_flight, on_disk, base))
        if found.peak <= limit * (1 - MARGIN):
            return found
        least = found if least is None or found.peak < least.peak else least
    if least is None or least.peak > limit:
        need = 0 if least is None else least.peak
        raise InputError(
            f"the {where} limit of {in_mib(limit)} cannot be kept: this run takes at least {in_mib(need)}"
            f"{'' if batch_size is None else f' with --batch-size {batch_size}'}; fewer or shorter windows, "
            "--effort fast or --dtype bfloat16 need less"
        )
    return least


def _halvings(count: int) -> Iterator[int]:
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1


def in_mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def peak(plan: Plan, config: QuantConfig, tokens: Tokens, dtype: torch.dtype, in_flight: int, on_disk: bool,
         base: int) -> int:  # fmt: skip
    """Bytes at the largest moment of a run."""
    moments = [_embedding(plan, config, dtype)]
    moments += (max(_moments(block, plan, config, tokens, dtype, in_flight, on_disk)) for block in plan.blocks)
    return base + SLACK + max(moments)


def _embedding(plan: Plan, config: QuantConfig, dtype: torch.dtype) -> int:
    """Tensors outside the blocks: the largest is read once, or copied."""
    inside = {f"{block.name}." for block in plan.all_blocks}
    others = [i for n, i in plan.source.tensors.items() if not any(part in n for part in inside)]
    size = max((info.nbytes // info.dtype.itemsize for info in others), default=0)
    return size * (dtype.itemsize if config.method == "gptq" else 2)


def _moments(block: Block, plan: Plan, config: QuantConfig, tokens: Tokens, dtype: torch.dtype, in_flight: int,
             on_disk: bool) -> Iterator[int]:  # fmt: skip
    layers = [plan.layers[name] for name in block.linears]
    streams = config.streams
    waits = in_flight < tokens.windows
    keeps = waits or bool(config.tune_steps)
    hidden = layers[0].inputs if layers else 0
    window = streams * tokens.per_window * dtype.itemsize  # bytes of one number for each token, of all streams
    between = 0 if on_disk else window * hidden * tokens.windows
    codes = weights = 0
    for names in group_fused_siblings(block.linears):  # they are solved together
        group = [plan.layers[name] for name in names]
        first, size = group[0], sum(layer.outputs * layer.inputs for layer in group)
        if config.method == "gptq":
            own = 0 if on_disk else in_flight * window * first.inputs
            standing = between + own + in_flight * window * (2 * hidden + _beside(first, layers))
            always = codes + weights + standing
            yield from (always + moment for moment in _at_layers(group, config, tokens, dtype))
            back = in_flight * window * (hidden + first.inputs) if on_disk else 0  # read again from the files
            largest = max(layer.outputs * layer.inputs for layer in group)
            weight = dtype.itemsize * (streams + 1) * largest  # of each stream, and one in oneDNN's order
            forward = (
                in_flight * window * max(sum(layer.outputs for layer in group[:-1]), group[-1].outputs) + back + weight
            )
            yield always + size + forward + _known(first, tokens, config, dtype)
        else:
            yield codes + 10 * size
        codes += size
        weights += dtype.itemsize * size * (streams if waits else 1) if keeps else 0
    widest = max((layer.outputs * layer.inputs for layer in layers), default=0)
    yield 2 * codes + weights + 2 * between + 6 * widest


def _beside(layer: LayerPlan, layers: Sequence[LayerPlan]) -> int:
    """Outputs kept beside a layer's input, numbers for each token: queries, keys and values behind attention."""
    parent = layer.name.rpartition(".")[0]
    before = [other for other in layers[: layers.index(layer)] if other.name.rpartition(".")[0] == parent]
    return sum(other.outputs for other in before if other.inputs == layer.inputs)


def _known(layer: LayerPlan, tokens: Tokens, config: QuantConfig, dtype: torch.dtype) -> int:
    """H and U, and the rows or sums of held-out windows."""
    n = layer.inputs
    held_out = tokens.held_out * tokens.per_window
    return 8 * n * n + (dtype.itemsize * held_out if held_out <= n else 4 * n) * config.streams * n


def _at_layers(group: list[LayerPlan], config: QuantConfig, tokens: Tokens, dtype: torch.dtype) -> Iterator[int]:
    n, rows = group[0].inputs, sum(layer.outputs for layer in group)
    C = 4 * n * n if config.two_streams else 0
    known, size = _known(group[0], tokens, config, dtype), 4 * rows * n
    gathered = 2 * config.streams * dtype.itemsize * CHUNK_TOKENS * n  # inputs in one tensor, and in another order
    yield known + C + gathered  # and factorizing; H and C alone are less
    copies = 2 if len(group) > 1 else 1  # the weights one by one, and as one matrix
    aims = size if config.two_streams else 0
    yield known + C + copies * (size + aims) + 20 * CHUNK_ROWS * n
    spent = len(group) == 1 and n > rows
    part = 24 * min(rows, TILE_ROWS) * n  # target, the solver's copy and errors, and what turns and dequantizes them
    yield known + (0 if spent else C) + copies * size + aims + part + rows * n * 2


def _stored_bytes(block: Block, plan: Plan) -> int:
    """Of a block's tensors as the checkpoint has them."""
    names = (plan.names.find_all(f"{block.name}.{name}") for name, _ in block.module.named_parameters())
    return sum(plan.source.tensors[stored].nbytes for own in names for stored in own)


def describe(choice: Choice, tokens: Tokens, limit: int, given: bool) -> str:
    """One line for the user."""
    where = "in files" if choice.on_disk else "in memory"
    flight = "all windows" if choice.in_flight == tokens.windows else f"{choice.in_flight} of {tokens.windows} windows"
    of = "the limit of" if given else "of the free memory, a limit of"
    needs = f"about {in_mib(choice.peak)} of memory ({of} {in_mib(limit)})"
    if not tokens.windows:
        return needs
    return f"{needs}: {flight} in mid-block at once, activations between blocks {where}"


def tokens_of(windows: Sequence[dict[str, Any]], held_out: int, hidden: int) -> Tokens:
    """Of calibration inputs; where they are not text, as many as patches or frames would be."""
    first = windows[0]
    ids = [x.shape[-1] for name, x in first.items() if name.endswith("input_ids")]
    others = [x.numel() // hidden + 1 for x in first.values() if x.is_floating_point()]
    return Tokens(len(windows), max([*ids, *others], default=1), held_out)


def settle(plan: Plan, config: QuantConfig, tokens: Tokens, device: torch.device, dtype: torch.dtype,
           batch_size: int | None, limit: int | None, gpu_limit: int | None) -> tuple[Choice, str]:  # fmt: skip
    """What a run does about memory, and one line that says so. On a GPU, that is where the limit counts.

    Raises:
        InputError: a limit that was given cannot be kept. One taken from the machine is only a guess at what it can.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        given, most, base = gpu_limit, gpu_limit or int(SHARE * torch.cuda.mem_get_info(device)[0]), 0
    else:
        base = warmed_up()
        given, most = limit, limit or base + int(SHARE * available())
    where, files = ("GPU memory", False) if on_gpu else ("memory", SHELVES)
    try:
        choice = choose(plan, config, tokens, dtype, batch_size, most, base, where, files)
    except InputError:
        if given:
            raise
        choice = choose(plan, config, tokens, dtype, batch_size, sys.maxsize, base, where, files)
        choice = replace(choice, in_flight=batch_size or 1, on_disk=files)
        choice = replace(choice, peak=peak(plan, config, tokens, dtype, choice.in_flight, files, base))
    if on_gpu and tokens.windows:
        copies = 2 * max(_stored_bytes(block, plan) for block in plan.blocks)  # see `ahead.CopyAhead`
        if choice.peak + copies <= most * (1 - MARGIN):
            choice = replace(choice, ahead=True, peak=choice.peak + copies)
    if not on_gpu:
        choice = replace(choice, frugal=choice.peak > AMPLE * most)
        choice = choice if choice.frugal else replace(choice, peak=choice.peak + int(HOLES * (choice.peak - base)))
    return choice, describe(choice, tokens, most, given is not None)


def warmed_up() -> int:
    """Bytes of the process once the solver's loops are compiled."""
    W = torch.ones(8, 8)
    factor = solver.Factor(torch.eye(8), torch.arange(8), torch.eye(8), torch.ones(8), 0.0, 0.0)
    refine(W, solver.solve(W, factor, 4, 8, True, search=True), factor, 4, 1)
    return_freed_memory()
    return resident()
