"""Estimate the peak memory of a run, and decide how it stays within a memory limit.

The peak is the largest of these moments, each a sum of the tensors that are alive at that time. A layer has n inputs
and r outputs; an element takes 4 bytes unless said otherwise.

    gathering     H (n, n), and with two streams the drift, C (n, n) or S (r, n); the inputs and drifts of held-out
                  windows, or the sums over them; for S also the weight in the forward's dtype
    factorizing   H, C or S, U
    solving       H, U, and for the layer: the weight, its target, the solver's copy, the errors, the codes
    forward       the weight in the forward's dtype, once per stream
    tuning        the logits of all codes of the block with gradients and Adam's moments, the activations of a window
    writing       the codes of the whole block, and the weight of one layer

At every moment there are also the process itself, the codes of the block's layers so far, the activations of windows
in mid-block, and the activations of all windows between blocks unless they are offloaded to files. On a GPU, two blocks
in their stored dtype are added if there is room to prefetch these blocks. Logits are never computed.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptq import solver
from gptq.compute import matrices
from gptq.compute.allocator import return_freed_memory
from gptq.compute.attention import kept_bytes
from gptq.compute.device_profile import CPU, DeviceProfile, profile_of
from gptq.config import TUNE_TOKENS, TUNE_WINDOWS, QuantConfig
from gptq.errors import InputError
from gptq.models.blocks import Block, group_fused_siblings
from gptq.planning.layer_plan import LayerPlan, drifts_by_output, passes_at_once
from gptq.planning.plan import Plan
from gptq.solver.coordinate_descent import refine
from gptq.solver.wide_factor import PANEL_COLUMNS, PANELS_IN_MEMORY

MARGIN = 0.05  # fraction of a limit kept free for what the estimate leaves out
DEFAULT_LIMIT = 0.8  # without a given limit, a run may use this fraction of the free memory
RETURN_ABOVE = 0.5  # a run whose peak exceeds this fraction of its limit returns freed memory after every layer
FRAGMENTATION = 0.2  # without returning freed memory, the heap grows by this fraction of the run's own memory
CAN_OFFLOAD = sys.platform == "linux"  # on other systems resident pages of a mapped file cannot be released and counted
PACKING_BYTES = 16  # per weight of a layer that is packed: codes as int32, words, and the dequantized weight
FOLLOWERS = 8  # windows of the original stream that go through layers together; each time, wide weights are reordered
HEAD_WIDTH = 64  # of attention, where its scores are counted; most models have wider heads and fewer scores
OVERHEAD = 60_000_000  # bytes for temporary slices of tensors, packed words and the allocator's bookkeeping
CGROUPS = (  # limit and current use of a container's memory, cgroup v2 and v1
    ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Size of the calibration set: windows, tokens per window, and how many of the windows are held out."""

    windows: int
    per_window: int
    held_out: int

    @property
    def seen(self) -> int:
        """Number of tokens that the solver learns from: those of all windows that are not held out."""
        return (self.windows - self.held_out) * self.per_window


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses memory; nothing here changes the result."""

    in_flight: int  # windows that are in mid-block at the same time
    on_disk: bool  # whether activations between blocks are offloaded to files
    peak: int  # estimated peak, bytes
    returns_memory: bool = False  # whether freed memory is returned to the system after each layer, which takes time
    prefetches_to_gpu: bool = False  # whether the next block is copied to the GPU while this one is quantized
    wide_on_disk: bool = False  # whether H, U and C of wide layers are in files (see `compute.matrices`)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return _read_status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    import resource

    # VmHWM is preferred: after a fork, ru_maxrss includes the parent process's peak.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _read_status("VmHWM") or (peak if sys.platform == "darwin" else 1024 * peak)  # kilobytes elsewhere


def _read_status(key: str) -> int:
    """Return a field of /proc/self/status in bytes; 0 on systems without that file."""
    file = Path("/proc/self/status")
    return 1024 * int(file.read_text().split(f"{key}:")[1].split()[0]) if file.is_file() else 0


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that this process can still use."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def available_bytes(root: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the host memory that this process can still use: the machine's free memory, or less in a container."""
    if meminfo.is_file():
        free = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit, used in CGROUPS:
        if (root / limit).is_file() and (root / used).is_file():
            cap = (root / limit).read_text().strip()
            if cap.isdigit():
                free = min(free, int(cap) - int((root / used).read_text()))
    return max(free, 0)


def find_memory_plan(
    plan: Plan, config: QuantConfig, tokens: Tokens, dtype: torch.dtype, batch_size: int | None, limit: int,
    base: int, where: str = "memory", files: bool = True, profile: DeviceProfile = CPU,
) -> MemoryPlan:  # fmt: skip
    """Return the fastest memory plan that stays within `limit` bytes.

    In order of speed: everything in memory; activations between blocks offloaded to files, which costs little; fewer
    windows in flight, so that the forwards of the remaining windows are repeated; the matrices of wide layers in files.

    Args:
        base: resident memory of the process before the run.
        where: name of the memory in error messages.
        files: whether activations can be offloaded to files.

    Raises:
        InputError: no plan stays within the limit; the message says how much memory the smallest plan needs.
    """
    counts = [batch_size] if batch_size else list(_halving_counts(tokens.windows))
    counts = [min(count, tokens.windows) for count in counts]
    candidates = [(counts[0], False, False), *((count, files, False) for count in counts)]
    if files and has_wide_layers(plan):
        candidates += [(count, True, True) for count in counts]
    least: MemoryPlan | None = None
    for in_flight, on_disk, wide in candidates:
        peak = estimate_peak(plan, config, tokens, dtype, in_flight, on_disk, base, profile, wide_on_disk=wide)
        found = MemoryPlan(in_flight, on_disk, peak, wide_on_disk=wide)
        if found.peak <= limit * (1 - MARGIN):
            return found
        least = found if least is None or found.peak < least.peak else least
    if least is None or least.peak > limit:
        need = 0 if least is None else least.peak
        raise InputError(
            f"the {where} limit of {format_mib(limit)} cannot be kept: this run takes at least {format_mib(need)}"
            f"{'' if batch_size is None else f' with --batch-size {batch_size}'}; fewer or shorter windows, "
            "--effort fast or --dtype bfloat16 need less"
        )
    return least


def has_wide_layers(plan: Plan) -> bool:
    """Whether a layer of the blocks has H, U and C that can be in files."""
    return any(plan.layers[name].inputs > matrices.WIDE for block in plan.blocks for name in block.linears)


def _halving_counts(count: int) -> Iterator[int]:
    """Yield `count` and its halves, rounded up, down to 1."""
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1


def format_mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def estimate_peak(
    plan: Plan, config: QuantConfig, tokens: Tokens, dtype: torch.dtype, in_flight: int, on_disk: bool, base: int,
    profile: DeviceProfile = CPU, ranks: int = 1, wide_on_disk: bool = False,
) -> int:  # fmt: skip
    """Return the estimated peak memory of a run in bytes, of one process if there are several.

    Args:
        tokens, in_flight: of the windows that this process runs.
    """
    moments = [_outside_blocks(plan, config, dtype)]
    given = plan, config, tokens, dtype, in_flight, on_disk, profile, ranks, wide_on_disk
    moments += (max(_moments(block, *given)) for block in plan.blocks)
    return base + OVERHEAD + max(moments) + _behind(plan, profile)


def _behind(plan: Plan, profile: DeviceProfile) -> int:
    """Return the bytes of a block that is packed while the next one is solved: its codes, and each thread's layer."""
    if not profile.packing_threads:
        return 0
    sizes = [[plan.layers[name].outputs * plan.layers[name].inputs for name in block.linears] for block in plan.blocks]
    widest = max((max(own, default=0) for own in sizes), default=0)
    return max(map(sum, sizes), default=0) + PACKING_BYTES * profile.packing_threads * widest


def _outside_blocks(plan: Plan, config: QuantConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the largest tensor outside the blocks, usually the embedding, while it is read or copied."""
    prefixes = {f"{block.name}." for block in plan.all_blocks}
    others = [i for n, i in plan.source.tensors.items() if not any(prefix in n for prefix in prefixes)]
    size = max((info.nbytes // info.dtype.itemsize for info in others), default=0)
    return size * (dtype.itemsize if config.method == "gptq" else 2)


def _moments(block: Block, plan: Plan, config: QuantConfig, tokens: Tokens, dtype: torch.dtype, in_flight: int,
             on_disk: bool, profile: DeviceProfile, ranks: int, wide_on_disk: bool) -> Iterator[int]:  # fmt: skip
    """Yield the bytes that each moment of a block needs, apart from the process itself.

    Of several processes each has its own experts, their inputs in the windows of all processes, and, until they are
    sent, their outputs, which are about as many as the inputs of all experts in its own windows.
    """
    layers = [plan.layers[name] for name in block.linears]
    streams = config.streams
    waits = in_flight < tokens.windows
    keeps = waits or bool(config.tune_steps)
    hidden = layers[0].inputs if layers else 0
    single = tokens.per_window * dtype.itemsize  # bytes of one feature of one window
    window = streams * single  # in all streams
    between = 0 if on_disk else window * hidden * tokens.windows
    codes = weights = 0
    # Features per token that stay in memory with a layer's input, by parent and inputs: queries, keys and the like.
    outputs: Counter[tuple[str, int]] = Counter()
    divided = block.expert_layers() if ranks > 1 and not config.tune_steps else set()
    routed = window * ranks * tokens.windows * hidden if divided else 0
    for names in group_fused_siblings(block.linears):  # siblings are solved together
        group = [plan.layers[name] for name in names]
        first, size = group[0], sum(layer.outputs * layer.inputs for layer in group)
        owned, kind = names[0] in divided, (first.name.rpartition(".")[0], first.inputs)
        if config.method == "gptq":
            running = (in_flight + (streams - 1) * min(in_flight, FOLLOWERS)) * single  # in all streams
            paused = running if passes_at_once(group) else in_flight * window
            own = 0 if on_disk else paused * first.inputs
            standing = between + own + in_flight * window * 2 * hidden + running * outputs[kind]
            always = codes + weights + standing + 2 * routed * owned
            moments = _solving_moments(group, config, tokens, dtype, profile, wide_on_disk)
            yield from (always + moment for moment in moments)
            back = in_flight * window * hidden + paused * first.inputs if on_disk else 0  # paged in from the files
            largest = max(layer.outputs * layer.inputs for layer in group)
            weight = dtype.itemsize * (streams + 1) * largest  # once per stream, and one copy in oneDNN's layout
            forward = running * max(sum(layer.outputs for layer in group[:-1]), group[-1].outputs) + back + weight
            yield always + size + forward + _layer_inputs(group, tokens, config, dtype, wide_on_disk)
        else:
            yield codes + 10 * size
        outputs[kind] += sum(layer.outputs for layer in group)
        codes += size // (ranks if owned else 1)
        weights += 0 if owned else dtype.itemsize * size * (streams if waits else 1) if keeps else 0
    if config.tune_steps and config.method == "gptq":
        yield codes + weights + 2 * between + _tuning(layers, tokens, dtype, profile)
    widest = max((layer.outputs * layer.inputs for layer in layers), default=0)
    yield 2 * codes + weights + 2 * between + 6 * widest


def _tuning(layers: Sequence[LayerPlan], tokens: Tokens, dtype: torch.dtype, profile: DeviceProfile) -> int:
    """Return the bytes that a step of tuning holds beside the solved block.

    Of each weight: two logits, with gradient, two moments of Adam and the temporary of an update; the weight that they
    stand for, in the forward's dtype, and its gradient. Of one layer: what its weight is made of. Of the windows that
    are run together: the inputs and outputs of all layers, and the attention scores that are kept.
    """
    sizes = [layer.outputs * layer.inputs for layer in layers]
    features = sum(layer.outputs + layer.inputs for layer in layers)
    together = max(tokens.per_window, min(TUNE_TOKENS, TUNE_WINDOWS * tokens.per_window))  # tokens of one forward
    of_window = together * (3 * dtype.itemsize * features + 4 * max(layer.outputs for layer in layers))
    heads = layers[0].inputs // HEAD_WIDTH
    scores = profile.score_bytes * heads * together * tokens.per_window
    if not scores:
        scores = kept_bytes(heads * (together // tokens.per_window), tokens.per_window, tokens.per_window, dtype)
    return sum(sizes) * (2 * 4 * 5 + 2 * dtype.itemsize) + 40 * max(sizes) + of_window + scores


def _layer_inputs(
    fused: Sequence[LayerPlan], tokens: Tokens, config: QuantConfig, dtype: torch.dtype, wide_on_disk: bool
) -> int:
    """Return the bytes of H, of U, and of the held-out windows (stored as input rows, or as summed products)."""
    n, held_out = fused[0].inputs, tokens.held_out * tokens.per_window
    known = 2 * _square(n, wide_on_disk)
    if held_out > n:
        return known + _square(n, wide_on_disk) + _drift(fused, config, wide_on_disk)
    drifts = 0 if config.streams == 1 else fused[0].outputs if drifts_by_output(fused) else n
    return known + dtype.itemsize * held_out * (n + drifts)


def _drift(fused: Sequence[LayerPlan], config: QuantConfig, wide_on_disk: bool) -> int:
    """Return the bytes of C or S."""
    if config.streams == 1:
        return 0
    n = fused[0].inputs
    return 4 * fused[0].outputs * n if drifts_by_output(fused) else _square(n, wide_on_disk)


def _square(n: int, wide_on_disk: bool) -> int:
    """Return the bytes of an (n, n) matrix in memory."""
    return 0 if wide_on_disk and n > matrices.WIDE else 4 * n * n


def _solving_moments(
    group: list[LayerPlan], config: QuantConfig, tokens: Tokens, dtype: torch.dtype, profile: DeviceProfile,
    wide_on_disk: bool,
) -> Iterator[int]:  # fmt: skip
    """Yield the bytes of gathering, correcting and solving the layers of one group of siblings."""
    n, rows = group[0].inputs, sum(layer.outputs for layer in group)
    by_output, drift = drifts_by_output(group), _drift(group, config, wide_on_disk)
    known, size = _layer_inputs(group, tokens, config, dtype, wide_on_disk), 4 * rows * n
    gathered = 2 * config.streams * dtype.itemsize * profile.hessian_tokens * n  # a chunk of inputs, and its transpose
    weight = dtype.itemsize * rows * n if by_output else 0
    panels = 4 * n * PANEL_COLUMNS * PANELS_IN_MEMORY if n > matrices.WIDE else 0
    yield known + drift + max(gathered + weight, panels)  # otherwise factorizing needs less
    kept, targets = (0, drift) if by_output else (drift, size if drift else 0)  # the corrections of S replace it
    yield known + kept + size + targets + 20 * min(profile.correction_rows, max(rows, n)) * n
    tile = (
        24 * min(rows, profile.tile_rows(rows)) * n
    )  # target, the solver's copy, errors, and temporaries to permute and dequantize
    whole = 4 * n * n - _square(n, wide_on_disk) if group[0].group_size >= n else 0  # sweeps read all of H at once
    yield known + whole + kept + size + targets + tile + rows * n * 2


def _stored_bytes(block: Block, plan: Plan) -> int:
    """Return the bytes of a block's tensors in the checkpoint."""
    names = (plan.names.find_all(f"{block.name}.{name}") for name, _ in block.module.named_parameters())
    return sum(plan.source.tensors[stored].nbytes for own in names for stored in own)


def describe_memory_plan(chosen: MemoryPlan, tokens: Tokens, limit: int, given: bool) -> str:
    """Describe a memory plan in one line for the user; `given` says whether the user gave the limit."""
    where = "in files" if chosen.on_disk else "in memory"
    flight = "all windows" if chosen.in_flight == tokens.windows else f"{chosen.in_flight} of {tokens.windows} windows"
    of = "the limit of" if given else "of the free memory, a limit of"
    needs = f"about {format_mib(chosen.peak)} of memory ({of} {format_mib(limit)})"
    if not tokens.windows:
        return needs
    wide = ", Hessians of wide layers in files" if chosen.wide_on_disk else ""
    return f"{needs}: {flight} in mid-block at once, activations between blocks {where}{wide}"


def size_of_windows(windows: Sequence[dict[str, Any]], held_out: int, hidden: int) -> Tokens:
    """Return the size of a calibration set, all windows being as long as the longest.

    For images or audio, tokens are estimated from the number of elements.
    """
    inputs = [(name, x) for window in windows for name, x in window.items()]
    ids = [x.shape[-1] for name, x in inputs if name.endswith("input_ids")]
    others = [x.numel() // hidden + 1 for _, x in inputs if x.is_floating_point()]
    return Tokens(len(windows), max([*ids, *others], default=1), held_out)


def decide_memory(
    plan: Plan, config: QuantConfig, tokens: Tokens, device: torch.device, dtype: torch.dtype,
    batch_size: int | None, limit: int | None, gpu_limit: int | None,
) -> tuple[MemoryPlan, str]:  # fmt: skip
    """Return a run's memory plan, and a line for the user that describes it.

    On a GPU the plan is for the GPU's memory. If no limit is given, it is estimated from the free memory; if no plan
    stays within this estimate, the smallest plan is used.

    Raises:
        InputError: no plan stays within a given limit.
    """
    on_gpu, profile = device.type == "cuda", profile_of(device)
    if on_gpu:
        given, most, base = gpu_limit, gpu_limit or int(DEFAULT_LIMIT * free_bytes(device)), 0
    else:
        base = warm_up()
        given, most = limit, limit or base + int(DEFAULT_LIMIT * available_bytes())
    where, files = ("GPU memory", False) if on_gpu else ("memory", CAN_OFFLOAD)
    try:
        chosen = find_memory_plan(plan, config, tokens, dtype, batch_size, most, base, where, files, profile)
    except InputError:
        if given:
            raise
        chosen = find_memory_plan(plan, config, tokens, dtype, batch_size, sys.maxsize, base, where, files, profile)
        in_flight, wide = batch_size or 1, files and has_wide_layers(plan)
        peak = estimate_peak(plan, config, tokens, dtype, in_flight, files, base, profile, wide_on_disk=wide)
        chosen = replace(chosen, in_flight=in_flight, on_disk=files, wide_on_disk=wide, peak=peak)
    if on_gpu and tokens.windows:
        copies = 2 * max(_stored_bytes(block, plan) for block in plan.blocks)  # see `prefetch.CopyAhead`
        if chosen.peak + copies <= most * (1 - MARGIN):
            chosen = replace(chosen, prefetches_to_gpu=True, peak=chosen.peak + copies)
    if not on_gpu:
        chosen = replace(chosen, returns_memory=chosen.peak > RETURN_ABOVE * most)
        if not chosen.returns_memory:
            chosen = replace(chosen, peak=chosen.peak + int(FRAGMENTATION * (chosen.peak - base)))
    return chosen, describe_memory_plan(chosen, tokens, most, given is not None)


def warm_up() -> int:
    """Compile the solver's loops; return the resident memory of the process afterwards."""
    W, unit = torch.ones(8, 8, dtype=torch.float32), torch.eye(8, dtype=torch.float32)
    factor = solver.Factor(unit, torch.arange(8), unit.clone(), W[0], 0.0, 0.0)
    grid = solver.IntegerGrid(4, sym=True)
    refine(W, solver.solve(W, factor, grid, 8, search=True), factor, grid, 1)
    return_freed_memory()
    return resident_bytes()
