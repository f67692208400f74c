"""Estimate how long a run takes: count its floating-point operations, and divide by rates measured on this machine.

An addition and a multiplication count as one operation each. A layer's weight is r x n; there are t calibration tokens.

    forward        2 t r n per stream
    H              t n^2, because it is symmetric
    drift          2 t n^2 for C; 2 t r n for W d and as much for S (see `solver.error_propagation`)
    factor         n^3 / 3, once per group of layers that share an input
    correction     2 r n^2 for two triangular solves, and 2 r n^2 for W C; if r > n, 2 n^3 for C H^-1 and 2 r n^2;
                   r is the sum over the layers that share an input
    solve          r n^2
    sweep          2 r n^2 per sweep

Work proportional to the number of weights (grids, the solver's inner loop, packing) is timed on a small layer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gptq import solver
from gptq.compute.device_profile import profile_of
from gptq.compute.matmul import exact_float32, product
from gptq.config import TUNE_WINDOWS, QuantConfig
from gptq.models.blocks import group_fused_siblings
from gptq.models.experts import Experts
from gptq.planning.layer_plan import LayerPlan, drifts_by_output
from gptq.planning.memory import Tokens
from gptq.planning.plan import Plan
from gptq.solver.coordinate_descent import refine

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
OVERHEAD_FACTOR = 2.0  # ratio of real to counted time, measured by scripts/bench_memory.py


@dataclass(frozen=True)
class Rates:
    """Measured speed of a machine."""

    forward: float  # floating-point operations per second in the forward's dtype
    solver: float  # floating-point operations per second in float32
    weight: float  # seconds per weight, in addition to matrix products


@dataclass(frozen=True)
class Work:
    """The counted work of a run."""

    forward: float  # floating-point operations of forward passes
    solver: float  # floating-point operations of the solver
    weights: int  # number of weights

    @property
    def total(self) -> float:
        return self.forward + self.solver

    def seconds(self, rates: Rates) -> float:
        products = self.forward / rates.forward + self.solver / rates.solver
        return OVERHEAD_FACTOR * (products + self.weights * rates.weight)


def count_work(plan: Plan, config: QuantConfig, tokens: Tokens) -> Work:
    """Count the work of a run, without repeated forwards; with method "rtn" there are no matrix products."""
    layers = list(plan.layers.values())
    weights = sum(p.outputs * p.inputs for p in layers)
    if config.method != "gptq":
        return Work(0.0, 0.0, weights)
    streams = config.streams
    everything = tokens.windows * tokens.per_window
    heads = [linear.name for linear in layers[-1:] if config.lm_head]
    routed = routed_shares(plan)
    step = min(TUNE_WINDOWS, tokens.windows - tokens.held_out) * tokens.per_window  # tokens per tuning step
    passes = streams * everything + 3 * (config.tune_steps or 0) * step  # a backward pass costs two forwards
    forward = sum(2.0 * passes * routed.get(p.name, 1.0) * p.outputs * p.inputs for p in layers if p.name not in heads)
    together = [
        [plan.layers[n] for n in names] for block in plan.blocks for names in group_fused_siblings(block.linears)
    ]
    inputs = sum(
        _operations_per_input(group, routed.get(group[0].name, 1.0) * tokens.seen, streams) for group in together
    )
    return Work(forward, inputs + sum(_operations_per_layer(p, config) for p in layers), weights)


def routed_shares(plan: Plan) -> dict[str, float]:
    """Return the share of the tokens that reach each layer of an expert, if a router sends as many to each."""
    found: dict[str, float] = {}
    for block in plan.blocks:
        layers = block.expert_layers()
        for experts in (m for m in block.module.modules() if layers and isinstance(m, Experts)):
            inside, share = set(experts.modules()), experts_per_token(plan.hf_config, len(experts)) / len(experts)
            found |= {name: share for name in layers if block.linears[name] in inside}
    return found


def experts_per_token(config: PreTrainedConfig, count: int) -> int:
    """Return how many of `count` experts a token takes, by the names that models have for it; all if none is known."""
    text = config.get_text_config()
    known = (getattr(text, name, None) for name in EXPERTS_PER_TOKEN)
    return min(next((k for k in known if isinstance(k, int) and k > 0), count), count)


def _operations_per_input(fused: Sequence[LayerPlan], tokens: float, streams: int) -> float:
    """Count the operations for H, its factor, the drift and the corrections of layers that share an input."""
    n = fused[0].inputs
    factor = tokens * n**2 + n**3 / 3
    return factor if streams == 1 else factor + tokens * drift_per_token(fused) + correction(fused)


def drift_per_token(fused: Sequence[LayerPlan]) -> float:
    """Count the operations by which a token's drift is added to C or S."""
    n = fused[0].inputs
    return 4.0 * fused[0].outputs * n if drifts_by_output(fused) else 2.0 * n**2


def correction(fused: Sequence[LayerPlan]) -> float:
    """Count the operations for correcting the weights of layers that share an input."""
    n, rows = fused[0].inputs, sum(layer.outputs for layer in fused)
    return 2.0 * (rows if drifts_by_output(fused) else rows + min(rows, n)) * n**2


def _operations_per_layer(layer: LayerPlan, config: QuantConfig) -> float:
    """Count the operations of a layer's solve and sweeps."""
    unit = float(layer.outputs * layer.inputs**2)
    return unit * (1 + 2 * (config.sweeps or 0))


def measure_rates(config: QuantConfig, device: torch.device, dtype: torch.dtype, seconds: float = 8.0) -> Rates:
    """Measure this machine's rates, in about `seconds`."""
    with torch.no_grad(), exact_float32(device):
        solver_rate = measure_product_rate(device, torch.float32, seconds / 4)
        forward_rate = solver_rate if dtype == torch.float32 else measure_product_rate(device, dtype, seconds / 4)
        rows, columns = profile_of(device).sample_shape
        grid = solver.IntegerGrid(config.bits, config.sym)
        draw = torch.Generator().manual_seed(0)
        W = torch.randn(rows, columns, generator=draw, dtype=torch.float32).to(device)
        X = torch.randn(2 * columns, columns, generator=draw, dtype=torch.float32).to(device)
        factor = solver.factorize(X.T @ X / len(X), torch.arange(columns, device=device))
        size = min(config.group_size % 2**31, columns)

        def quantize_sample() -> None:
            solver.round_to_nearest(W, grid, size)
            solved = solver.solve(W, factor, grid, size, search=bool(config.search))
            if config.sweeps:
                solved = refine(W, solved, factor, grid, config.sweeps)
            float(solved.weight().sum())  # waits for the device

        best = _best_time(quantize_sample, seconds / 4)
    products = rows * columns**2 * (1 + 2 * (config.sweeps or 0)) / solver_rate
    return Rates(forward_rate, solver_rate, max(best - products, 0.0) / W.numel())


def measure_product_rate(
    device: torch.device, dtype: torch.dtype, seconds: float, multiply: Callable[[Tensor, Tensor], Tensor] = product
) -> float:
    """Return floating-point operations per second of a matrix product: the best of all repetitions within `seconds`."""
    n = 1536 if device.type == "cpu" else 8192
    A, B = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / _best_time(lambda: float(multiply(A, B)[0, 0]), seconds)  # reading a number waits for the device


def _best_time(work: Callable[[], object], seconds: float) -> float:
    """Return the least time that `work` takes, repeated for `seconds`. A first time is not counted: it compiles."""
    work()
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
