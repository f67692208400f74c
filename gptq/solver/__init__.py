"""The GPTQ solver, on tensors alone: grids, Hessian, solve, error propagation, coordinate descent."""

from gptq.solver.codes import Codes
from gptq.solver.grids.grid import Grid
from gptq.solver.grids.integer import IntegerGrid
from gptq.solver.solve import (
    Factor,
    NotPositiveDefiniteError,
    SolvedLayer,
    act_order,
    factorize,
    fit_groups,
    natural_order,
    round_to_nearest,
    solve,
)

__all__ = [
    "Codes", "Factor", "Grid", "IntegerGrid", "NotPositiveDefiniteError", "SolvedLayer", "act_order", "factorize",
    "fit_groups", "natural_order", "round_to_nearest", "solve",
]  # fmt: skip
