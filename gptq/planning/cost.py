"""How long a run will take: the arithmetic it has to do, counted, over what this machine was measured to do.

Floating-point operations, an addition and a multiplication each one; r x n is a layer, t the calibration tokens:

    forward        2 t r n for every stream
    H              t n^2, as it is symmetric; C 2 t n^2
    factor         n^3 / 3, once for the layers that share an input
    correction     2 r n^2 for W C and as much for two triangular solves, or with r > n 2 n^3 for C H^-1 and 2 r n^2,
                   r together for the layers that share an input
    solve          r n^2
    sweep          2 r n^2 for each

What grows with the weights alone (grids, the columns' inner loop, packing) is measured on a small layer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq import solver
from gptq.compute.matmul import exact_float32, product
from gptq.config import TUNE_WINDOWS, QuantConfig
from gptq.models.blocks import group_fused_siblings
from gptq.planning.memory import Tokens
from gptq.planning.plan import LayerPlan, Plan
from gptq.solver.coordinate_descent import refine

SAMPLE = (512, 1024)  # rows and columns of the small layer
UNCOUNTED = 2.0  # what a run takes above the counted work at the measured rates, as scripts/bench_memory.py found


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    forward: float  # floating-point operations in the forward's dtype
    solver: float  # in float32
    weight: float  # seconds for each weight, beside the products


@dataclass(frozen=True)
class Work:
    forward: float  # floating-point operations
    solver: float
    weights: int

    @property
    def total(self) -> float:
        return self.forward + self.solver

    def seconds(self, rates: Rates) -> float:
        products = self.forward / rates.forward + self.solver / rates.solver
        return UNCOUNTED * (products + self.weights * rates.weight)


def count(plan: Plan, config: QuantConfig, tokens: Tokens) -> Work:
    """The work of a whole run without repeated forwards; none but rounding where nothing is calibrated."""
    layers = list(plan.layers.values())
    weights = sum(p.outputs * p.inputs for p in layers)
    if config.method != "gptq":
        return Work(0.0, 0.0, weights)
    streams = config.streams
    everything = tokens.windows * tokens.per_window
    heads = [linear.name for linear in layers[-1:] if config.lm_head]
    step = min(TUNE_WINDOWS, tokens.windows - tokens.held_out) * tokens.per_window  # tokens that a step of tuning sees
    passes = streams * everything + 3 * (config.tune_steps or 0) * step  # going back is twice as much as forth
    forward = sum(2.0 * passes * p.outputs * p.inputs for p in layers if p.name not in heads)
    together = [
        [plan.layers[n] for n in names] for block in plan.blocks for names in group_fused_siblings(block.linears)
    ]
    inputs = sum(_of_input(g[0].inputs, sum(p.outputs for p in g), tokens.seen, streams) for g in together)
    return Work(forward, inputs + sum(_of_layer(p, config) for p in layers), weights)


def _of_input(n: int, rows: int, tokens: int, streams: int) -> float:
    factor = tokens * n**2 + n**3 / 3
    return factor if streams == 1 else factor + 2.0 * tokens * n**2 + 2.0 * (rows + min(rows, n)) * n**2


def _of_layer(layer: LayerPlan, config: QuantConfig) -> float:
    unit = float(layer.outputs * layer.inputs**2)
    return unit * (1 + 2 * (config.sweeps or 0))


def measure(config: QuantConfig, device: torch.device, dtype: torch.dtype, seconds: float = 8.0) -> Rates:
    """Rates of this machine, in about `seconds`."""
    with torch.no_grad(), exact_float32(device):
        solver_rate = product_rate(device, torch.float32, seconds / 4)
        forward_rate = solver_rate if dtype == torch.float32 else product_rate(device, dtype, seconds / 4)
        rows, columns = SAMPLE
        draw = torch.Generator().manual_seed(0)
        W = torch.randn(rows, columns, generator=draw).to(device)
        X = torch.randn(2 * columns, columns, generator=draw).to(device)
        factor = solver.factorize(X.T @ X / len(X), torch.arange(columns, device=device))
        best = float("inf")
        began = time.perf_counter()
        warm = False
        while not warm or time.perf_counter() - began < seconds / 4:
            start = time.perf_counter()
            solver.round_to_nearest(W, config.bits, min(config.group_size % 2**31, columns), config.sym)
            size = min(config.group_size % 2**31, columns)
            solved = solver.solve(W, factor, config.bits, size, config.sym, search=bool(config.search))
            if config.sweeps:
                solved = refine(W, solved, factor, config.bits, config.sweeps)
            float(solved.weight().sum())
            best, warm = min(best, time.perf_counter() - start), True
    products = rows * columns**2 * (1 + 2 * (config.sweeps or 0)) / solver_rate
    return Rates(forward_rate, solver_rate, max(best - products, 0.0) / W.numel())


def product_rate(
    device: torch.device, dtype: torch.dtype, seconds: float, multiply: Callable[[Tensor, Tensor], Tensor] = product
) -> float:
    """Floating-point operations per second of a matrix product, the best of those that fit into the time."""
    n = 1536 if device.type == "cpu" else 8192
    A, B = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        float(multiply(A, B)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
