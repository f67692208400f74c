"""The GPTQ solver, on tensors alone: grid, Hessian, solve, error propagation, coordinate descent."""

from gptq.solver.codes import Codes
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
    "Codes", "Factor", "NotPositiveDefiniteError", "SolvedLayer", "act_order", "factorize", "fit_groups",
    "natural_order", "round_to_nearest", "solve",
]  # fmt: skip
