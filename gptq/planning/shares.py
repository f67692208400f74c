"""What each of several processes does in a run, by arithmetic alone: memory, bytes over the network, time by stage.

t calibration tokens, s streams, R processes, a layer of r outputs and n inputs; an expert sees its share of the tokens.
Operations are those of `cost`. What R processes share, and what each of them does for itself:

    forward       2 s t r n                      / R, by windows; experts / R, by expert
    Hessian       t n^2, and the drift           / R, by panels; experts / R
    factorize     n^3 / 3                        by every process; experts / R
    correct       see `cost`                     / R, by tiles; C H^-1 by every process; experts / R
    solve         r n^2 (1 + 2 sweeps)           / the smaller of R and the number of tiles; experts / R

Received over the network by each process, where e is the bytes of an activation; what it already has is not counted:

    inputs        e s t n for each distinct input of layers; of experts once for all of them
    sums          4 n^2 for H, and as much for C or 4 r n for S, for each distinct input; of experts once
    codes         r n for each layer, not of experts
    outputs       e s t k n / R for experts, k of which take each token
    result        what is written, by the first process
"""

from dataclasses import dataclass, field

import torch

from gptq.compute.device_profile import GPU, SHARED_GPU
from gptq.config import QuantConfig
from gptq.models.blocks import group_fused_siblings
from gptq.models.experts import Experts
from gptq.planning import cost, memory
from gptq.planning.device_models import DeviceModel
from gptq.planning.layer_plan import LayerPlan, drifts_by_output
from gptq.planning.memory import Tokens
from gptq.planning.plan import Plan


@dataclass
class Shares:
    """The work of the busiest process: operations by stage, of these what is not shared, and bytes by kind."""

    operations: dict[str, float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)  # part of `operations` that every process does
    received: dict[str, float] = field(default_factory=dict)
    read: float = 0.0  # bytes of the source
    written: float = 0.0  # bytes, by the first process
    peak: int = 0  # bytes of memory

    def work(self, stage: str, operations: float, divided_by: int) -> None:
        self.operations[stage] = self.operations.get(stage, 0.0) + operations / divided_by

    def work_alone(self, stage: str, operations: float) -> None:
        """Count work that every process does for itself."""
        self.work(stage, operations, 1)
        self.alone[stage] = self.alone.get(stage, 0.0) + operations

    def receive(self, kind: str, nbytes: float) -> None:
        self.received[kind] = self.received.get(kind, 0.0) + nbytes

    def seconds(self, device: DeviceModel) -> dict[str, float]:
        """Return seconds by stage; stages do not overlap."""
        found = {
            stage: count / (device.forward if stage in ("forward", "Hessian") else device.solver)
            for stage, count in self.operations.items()
        }
        found["network"] = sum(self.received.values()) / device.network
        found["read"], found["write"] = self.read / device.disk, self.written / device.disk
        return found

    def standing_still(self, device: DeviceModel) -> float:
        """Return the seconds of work that every process does for itself, however many there are."""
        return sum(self.alone.values()) / device.solver + self.written / device.disk


def count_shares(plan: Plan, config: QuantConfig, tokens: Tokens, ranks: int, dtype: torch.dtype) -> Shares:
    """Count the work of the busiest of `ranks` processes, which work with `dtype`."""
    found, routed = Shares(), cost.routed_shares(plan)
    for block in plan.blocks:
        for names in group_fused_siblings(block.linears):
            group = [plan.layers[name] for name in names]
            if names[0] in routed:
                _count_expert(found, group, routed[names[0]], config, tokens, ranks)
            else:
                _count_layers(found, group, config, tokens, ranks, dtype)
            expert = ranks if names[0] in routed else 1
            found.read += config.streams * sum(map(plan.source_bytes, group)) / expert
        for experts in (module for module in block.module.modules() if isinstance(module, Experts)):
            _count_experts(found, experts, plan, config, tokens, ranks, dtype)
    found.written = float(plan.file_bytes)
    found.receive("result", plan.packed_bytes * (ranks - 1) / ranks)
    profile = SHARED_GPU if ranks > 1 else GPU
    own = Tokens(-(-tokens.windows // ranks), tokens.per_window, -(-tokens.held_out // ranks))
    found.peak = memory.estimate_peak(plan, config, own, dtype, own.windows, False, 0, profile, ranks)
    return found


def _count_layers(
    found: Shares, group: list[LayerPlan], config: QuantConfig, tokens: Tokens, ranks: int, dtype: torch.dtype
) -> None:
    """Count layers that share an input, and that all processes solve together."""
    n, rows, streams = group[0].inputs, sum(layer.outputs for layer in group), config.streams
    everything, others = tokens.windows * tokens.per_window, (ranks - 1) / ranks
    tiles = min(ranks, -(-rows // SHARED_GPU.tile_rows(rows)))
    found.work("forward", 2.0 * streams * everything * rows * n, ranks)
    found.work("Hessian", tokens.seen * _operations_per_token(group, streams), ranks)
    found.work_alone("factorize", n**3 / 3)
    if streams > 1:
        once = 2.0 * n**3 if rows > n and not drifts_by_output(group) else 0.0
        found.work("correct", cost.correction(group) - once, tiles)
        found.work_alone("correct", once)
    found.work("solve", float(rows * n**2) * (1 + 2 * (config.sweeps or 0)), tiles)
    found.receive("inputs", dtype.itemsize * streams * everything * n * others)
    drift = 0 if streams == 1 else n * (rows if drifts_by_output(group) else n)
    found.receive("sums", 4.0 * (n**2 + drift) * others)
    found.receive("codes", rows * n * others)


def _operations_per_token(fused: list[LayerPlan], streams: int) -> float:
    """Count the operations by which a token is added to H, and with two streams to the drift."""
    return float(fused[0].inputs ** 2) + (0.0 if streams == 1 else cost.drift_per_token(fused))


def _count_expert(
    found: Shares, group: list[LayerPlan], share: float, config: QuantConfig, tokens: Tokens, ranks: int
) -> None:
    """Count layers of one expert that share an input; `share` of all tokens reach them, and one process has them."""
    n, rows, streams = group[0].inputs, sum(layer.outputs for layer in group), config.streams
    everything = share * tokens.windows * tokens.per_window
    found.work("forward", 2.0 * streams * everything * rows * n, ranks)
    found.work("Hessian", share * tokens.seen * _operations_per_token(group, streams), ranks)
    found.work("factorize", n**3 / 3, ranks)
    if streams > 1:
        found.work("correct", cost.correction(group), ranks)
    found.work("solve", float(rows * n**2) * (1 + 2 * (config.sweeps or 0)), ranks)


def _count_experts(
    found: Shares, experts: Experts, plan: Plan, config: QuantConfig, tokens: Tokens, ranks: int, dtype: torch.dtype
) -> None:
    """Count what a list of experts has in common: the Hessian of all tokens, and tokens that go to experts and back."""
    n, streams = int(experts[0].up_proj.in_features), config.streams  # type: ignore[arg-type, union-attr]
    everything, others = tokens.windows * tokens.per_window, (ranks - 1) / ranks
    found.work("Hessian", tokens.seen * n**2 * (1.0 if streams == 1 else 3.0), ranks)
    found.receive("inputs", dtype.itemsize * streams * everything * n * others)
    found.receive("sums", 4.0 * streams * n**2 * others)
    k = cost.experts_per_token(plan.hf_config, len(experts))
    found.receive("outputs", dtype.itemsize * streams * everything * k * n * others / ranks)
