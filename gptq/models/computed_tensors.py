"""Tensors that no checkpoint holds because transformers computes them, such as Marian's sinusoids of positions."""

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def compute_tensors(model: PreTrainedModel, missing: Iterable[str]) -> dict[str, Tensor]:
    """Return the value of each missing parameter that transformers computes when it loads the model, in float32.

    These are parameters that the model's class allows a checkpoint to lack, and that its initialization sets to the
    same numbers every time. Other missing parameters, which it would draw at random, are left out.
    """
    lists = (getattr(model, f"_keys_to_ignore_on_{action}", None) for action in ("save", "load_missing"))
    patterns = [pattern for names in lists for pattern in names or ()]
    values = {name: _compute(model, name) for name in missing if any(re.search(p, name) for p in patterns)}
    return {name: value for name, value in values.items() if value is not None}


def _compute(model: PreTrainedModel, name: str) -> Tensor | None:
    """Return what initializing the parameter called `name` gives; None if it does not give the same numbers twice."""
    path, _, key = name.rpartition(".")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        first, second = (_initialize(model, model.get_submodule(path), key) for _ in range(2))
    return first if torch.equal(first, second) else None  # never equal where numbers were left as they were, NaN


def _initialize(model: PreTrainedModel, module: nn.Module, key: str) -> Tensor:
    """Initialize a copy of `module` alone, in float32 and filled with NaN before; return one of its parameters."""
    alone = copy.copy(module)
    own = {k: p.shape for k, p in module._parameters.items() if p is not None}
    empty = {k: nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32)) for k, shape in own.items()}
    object.__setattr__(alone, "_parameters", dict.fromkeys(module._parameters) | empty)
    model._init_weights(alone)
    return empty[key].detach()
