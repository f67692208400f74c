"""A forward pass that pauses: it stops where the engine wants to look, and goes on when it is told to.

GPTQ has to see what reaches each layer after the layers before it were quantized. Instead of running a block again for
every layer, the forward of each calibration window runs in a greenlet, a function call that can be left in the middle
and entered again. When all windows stand at a layer, the engine has its whole input, quantizes it, swaps the weight
and lets them go on: one forward per window, whatever happens inside the model's code.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from gptq.errors import InputError


@dataclass(frozen=True)
class Pause:
    """Where a forward stands: it is about to run `module` on these arguments."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class PausableForward:
    """One call of `function`, advanced from pause to pause."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.standing: Pause | None = None
        self.result: Any = None
        self._greenlet = greenlet(function)

    def advance(self, answer: Any = None) -> Pause | None:
        """Go on to the next pause, or to the end; then None comes back and `result` is set.

        `answer` is what the module at which the forward stands returns, if it was entered by `pause_instead`.
        """
        self.standing = None
        if self._greenlet.dead:
            raise RuntimeError("this forward has ended")
        # A greenlet is false until it has started, and takes its function's arguments (none) at that first switch.
        reached = self._greenlet.switch(answer) if self._greenlet else self._greenlet.switch()
        if isinstance(reached, Pause):
            self.standing = reached
        else:
            self.result = reached
        return self.standing

    def stop(self) -> None:
        """Leave the forward where it stands for good and free what it holds."""
        if self._greenlet:
            self._greenlet.throw(GreenletExit)
        self.standing = None


def _pause(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    forward = greenlet.getcurrent()
    if forward.parent is None:
        raise RuntimeError("a module that pauses was called outside a PausableForward")
    return forward.parent.switch(Pause(module, args, kwargs))


@contextmanager
def pause_before(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, forwards stop before each of `modules` and then run it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _pause(module, args, kwargs)

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pause_instead(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Callable[..., Any]]]:
    """Inside, forwards stop before each of `modules`, and take the answer they are given for its output.

    Yields the modules' own forward functions.
    """
    originals = {module: module.forward for module in modules}
    try:
        for module in originals:
            module.forward = _pausing_forward(module)
        yield originals
    finally:
        for module in originals:
            del module.forward  # the class's own shows again


def _pausing_forward(module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: _pause(module, args, kwargs)


def identity(x: Tensor) -> tuple[object, ...]:
    """Equal for two tensors if they are the same numbers in memory, unchanged in between. It keeps neither alive.

    Layers that get such tensors share a Hessian.
    """
    memory = StorageWeakRef(x.untyped_storage())  # no other memory is equal to it as long as this is there
    return memory, x.storage_offset(), x.dtype, tuple(x.shape), x.stride(), x._version


def argument(pause: Pause, number: int = 0) -> Tensor:
    return first_of(pause.args, pause.kwargs, number)


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int = 0) -> Tensor:
    x = [*args, *kwargs.values()][number]
    if not isinstance(x, Tensor):
        raise TypeError(f"a layer was called on {type(x).__name__}")
    return x


def input_at(pause: Pause | None) -> Tensor | None:
    return argument(pause) if pause else None


def run_until(function: Callable[[], Any], linear: nn.Module) -> Pause | None:
    """Start a forward, and stop it for good where it reaches `linear`; returns the pause it has there."""
    forward = PausableForward(function)
    pause = forward.advance()
    while pause and pause.module is not linear:
        pause = forward.advance()
    forward.stop()
    return pause


def run_through(function: Callable[[], Any]) -> Any:
    forward = PausableForward(function)
    while forward.advance():
        pass
    return forward.result


def check_tokens(windows: Tensor, network: PreTrainedModel) -> None:
    """Raises InputError if a token has no embedding; then tokenizer and model do not belong together."""
    vocabulary = int(network.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"tokens run from {low} to {high}, but the model has {vocabulary}; is the tokenizer another model's?"
        )


def check_inputs(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Raises InputError for an argument that the model does not take."""
    known = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise InputError(f"{type(model).__name__} takes no {unknown[0]}; it takes {', '.join(known)}")


def to_device(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model is called on, on a device, numbers that are not whole in the forward's dtype."""
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def with_defaults(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward without a cache of keys and values, where it has one."""
    cached = "use_cache" in inspect.signature(model.forward).parameters
    return partial(run, model, use_cache=False) if cached else partial(run, model)


def run(model: PreTrainedModel, **inputs: Any) -> Any:
    """The model's forward.

    Raises:
        InputError: it fails, on what config.json or the inputs say and no shape could show (heads that do not divide
            the width, tokens without an embedding).
    """
    try:
        return model(**inputs)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any type, depending on the model's code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"a forward pass of {type(model).__name__} failed ({reason}); do its config.json and the inputs fit it?"
        ) from error
