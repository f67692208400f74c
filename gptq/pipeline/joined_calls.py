"""One call of a block for several windows, where the block takes them together.

A product of a few hundred rows leaves most of a processor idle, so that short windows are worth running together. What
a block is called on besides hidden states, such as masks and rotary angles, is the model's own; it is joined where that
is safe, and the caller compares the joined call with the single ones before it relies on it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def join_calls(calls: Sequence[partial[Any]]) -> partial[Any] | None:
    """Return one call on the arguments of several, joined along the first dimension; None where they cannot be.

    A tensor of one dimension has none for windows, so that it must be the same in all calls.
    """
    if len(calls) == 1:
        return calls[0]
    try:
        args, kwargs = _join([call.args for call in calls]), _join([call.keywords for call in calls])
    except UnlikeError:
        return None
    return partial(calls[0].func, *args, **kwargs)


class UnlikeError(Exception):
    """Values that no single call can stand for."""


def _join(values: list[Any]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise UnlikeError
    if isinstance(first, Tensor):
        return _join_tensors(values)
    if isinstance(first, tuple | list):
        if any(len(value) != len(first) for value in values):
            raise UnlikeError
        return type(first)([_join([*items]) for items in zip(*values, strict=True)])
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise UnlikeError
        return {key: _join([value[key] for value in values]) for key in first}
    if any(value is not first and value != first for value in values):
        raise UnlikeError
    return first


def _join_tensors(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    if any(x.shape != first.shape or x.dtype != first.dtype for x in tensors):
        raise UnlikeError
    if all(x is first for x in tensors):
        return first
    if first.ndim > 1:
        if first.shape[0] != 1:
            raise UnlikeError
        return torch.cat(tensors)  # (windows, ...)
    if any(not torch.equal(x, first) for x in tensors):  # positions, and the like
        raise UnlikeError
    return first
