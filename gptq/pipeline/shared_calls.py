"""Give every process the calls of all windows: block tuning draws windows at random, whoever ran their forwards."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq.errors import InputError
from gptq.pipeline.run import Run


def share_calls(
    calls: Sequence[partial[Any]], targets: Sequence[Tensor], run: Run
) -> tuple[list[partial[Any]], list[Tensor]]:
    """Return the calls of all windows in order, and their targets, on every process.

    Args:
        calls, targets: of the windows of this process, whose calls all have the same function.
    Raises:
        InputError: another process has ended, or an argument cannot be sent.
    """
    if run.ranks.size == 1:
        return [*calls], [*targets]
    own = [(call.args, call.keywords, target) for call, target in zip(calls, targets, strict=True)]
    found = [run.offload.put(window) for window in _gather(own, run)]
    return [partial(calls[0].func, *args, **kwargs) for args, kwargs, _ in found], [target for _, _, target in found]


def _gather(own: Sequence[Any], run: Run) -> Iterator[Any]:
    """Yield the windows of all processes in order.

    A tensor that several windows have in common, as in a run of one process, is one tensor for all of them again:
    calls are joined by what they have in common.
    """
    ranks, packer = run.ranks, _Packer()
    packed = [packer.pack(window) for window in own]
    mine = json.dumps([packed, [len(windows) for windows in packer.windows_of]])
    common: list[Tensor] = []
    for owner, text in enumerate(ranks.gather_texts(mine)):
        windows, users = json.loads(text)
        tensors = []
        for number, several in enumerate(users):
            x = packer.tensors[number] if owner == ranks.rank else None
            received = ranks.broadcast(x if x is None else x.to(ranks.device), owner)
            found = received if x is None else x
            tensors.append(_as_before(found, common) if found is not None and several > 1 else found)
        for window in windows:
            yield _unpack(window, tensors)


def _as_before(x: Tensor, common: list[Tensor]) -> Tensor:
    """Return the tensor of `common` that equals x; if there is none, x, which joins them."""
    for known in common:
        if known.dtype == x.dtype and known.shape == x.shape and torch.equal(known, x):
            return known
    common.append(x)
    return x


class _Packer:
    """Turns windows, which are nested containers, into JSON with numbers in the place of tensors."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.windows_of: list[set[int]] = []  # numbers of the windows that have each tensor
        self._numbers: dict[int, int] = {}  # of tensors, by id
        self._window = -1

    def pack(self, window: Any) -> Any:
        """Raises InputError if a window holds a value that is none of those that are usual in a call of a block."""
        self._window += 1
        return self._pack(window)

    def _pack(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            number = self._numbers.setdefault(id(value), len(self.tensors))
            if number == len(self.tensors):
                self.tensors.append(value)
                self.windows_of.append(set())
            self.windows_of[number].add(self._window)
            return ["tensor", number]
        if type(value) in (tuple, list):
            return [type(value).__name__, *map(self._pack, value)]
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return ["dict", {key: self._pack(item) for key, item in value.items()}]
        raise InputError(
            f"a block of this model gets a {type(value).__name__}, which cannot be sent to other processes; start one "
            "process, or choose another --effort than 'best'"
        )


def _unpack(value: Any, tensors: Sequence[Tensor | None]) -> Any:
    """Undo `_Packer.pack`."""
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind == "tensor":
        return tensors[items[0]]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in items[0].items()}
    found = [_unpack(item, tensors) for item in items]
    return tuple(found) if kind == "tuple" else found
