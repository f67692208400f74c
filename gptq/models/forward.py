"""A forward pass that can be paused before chosen modules and resumed later.

GPTQ has to see what reaches each layer after the layers before it were quantized. Instead of running a block again for
every layer, the forward of each calibration window runs in a greenlet, a function call that can be left in the middle
and entered again. When all windows stand at a layer, all its inputs are known; the layer is quantized, its weight
replaced, and the forwards go on: one forward per window, whatever happens inside the model's code.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from gptq.errors import InputError

TOKENIZER_EXTRAS = ("token_type_ids", "mm_token_type_ids", "special_tokens_mask", "length")  # not every model's inputs


@dataclass(frozen=True)
class Pause:
    """The point at which a forward is paused: it is about to run `module` on these arguments."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)  # see `keep_arguments`; the forward's own


class _Greenlet(greenlet):
    """A greenlet with the arguments that its forward keeps."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(function)
        self.kept: dict[nn.Module, Tensor] = {}


class PausableForward:
    """One call of `function`, advanced from pause to pause."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.standing: Pause | None = None
        self.result: Any = None
        self._greenlet = _Greenlet(function)

    def advance(self, answer: Any = None) -> Pause | None:
        """Run to the next pause and return it; at the end, return None and set `result`.

        `answer` becomes the output of the module that the forward is paused at, if `pause_instead` paused it.
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
        """Abandon the forward at its pause, and free the activations that it holds."""
        if self._greenlet:
            self._greenlet.throw(GreenletExit)
        self.standing = None


def _pause(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    forward = greenlet.getcurrent()
    if not isinstance(forward, _Greenlet) or forward.parent is None:
        raise RuntimeError("a module that pauses was called outside a PausableForward")
    return forward.parent.switch(Pause(module, args, kwargs, forward.kept))


@contextmanager
def _called_before(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Inside, each call of one of `modules` calls hook(module, args, kwargs) first."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_arguments(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Inside, forwards that can be paused keep the first argument of each of `modules`, in `Pause.kept`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = greenlet.getcurrent()
        if isinstance(forward, _Greenlet):
            forward.kept[module] = get_argument(args, kwargs)

    return _called_before(modules, hook)


def pause_before(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Inside, forwards pause before each of `modules`, and run it when they are resumed."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _pause(module, args, kwargs)

    return _called_before(modules, hook)


@contextmanager
def pause_instead(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Callable[..., Any]]]:
    """Inside, forwards pause before each of `modules` and do not run it: the `answer` on resuming is its output.

    Yields the modules' original forward functions.
    """
    originals = {module: module.forward for module in modules}
    try:
        for module in originals:
            module.forward = _pausing_forward(module)
        yield originals
    finally:
        for module in originals:
            del module.forward  # uncovers the method of the class


def _pausing_forward(module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: _pause(module, args, kwargs)


def identify(x: Tensor) -> tuple[object, ...]:
    """Return a key for a tensor.

    Two tensors have the same key if they view the same memory, and it was not modified between the two calls. Layers
    whose inputs have the same key share a Hessian. The key does not keep the tensor alive.
    """
    memory = StorageWeakRef(x.untyped_storage())  # while this reference exists, no new storage compares equal to it
    return memory, x.storage_offset(), x.dtype, tuple(x.shape), x.stride(), x._version


def argument_at(pause: Pause, number: int = 0) -> Tensor:
    """Return argument `number` of the call at which a forward is paused; see `get_argument`."""
    return get_argument(pause.args, pause.kwargs, number)


def get_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int = 0) -> Tensor:
    """Return argument `number` of a call: positional arguments count first, then keyword arguments.

    Raises:
        TypeError: the argument is not a tensor.
    """
    x = [*args, *kwargs.values()][number]
    if not isinstance(x, Tensor):
        raise TypeError(f"a layer was called on {type(x).__name__}")
    return x


def input_at(pause: Pause | None) -> Tensor | None:
    """Return the first argument at a pause; None without a pause."""
    return argument_at(pause) if pause else None


def run_until(
    function: Callable[[], Any], linear: nn.Module, answers: Mapping[nn.Module, Any] | None = None
) -> Pause | None:
    """Run `function` until it pauses before `linear`, and abandon it; return the pause, or None without one.

    `answers` are the outputs of modules that the forward pauses at and does not run.
    """
    forward = PausableForward(function)
    pause = _advance_to(forward, linear, answers or {})
    forward.stop()
    return pause


def run_to_end(function: Callable[[], Any], answers: Mapping[nn.Module, Any] | None = None) -> Any:
    """Run `function` without stopping at its pauses; return its result. For `answers` see `run_until`."""
    forward = PausableForward(function)
    _advance_to(forward, None, answers or {})
    return forward.result


def _advance_to(forward: PausableForward, linear: nn.Module | None, answers: Mapping[nn.Module, Any]) -> Pause | None:
    pause = forward.advance()
    while pause and pause.module is not linear:
        pause = forward.advance(answers.get(pause.module))
    return pause


def check_tokens(windows: Tensor, network: PreTrainedModel, where: str = "") -> None:
    """Check that every token has an embedding; `where` names an array of tokens that no tokenizer made.

    Raises:
        InputError: a token has no embedding; the tokenizer probably belongs to another model.
    """
    try:
        embedding = network.get_input_embeddings()
    except NotImplementedError:  # of models with several
        return
    if not isinstance(embedding, nn.Embedding):
        return
    vocabulary = embedding.num_embeddings
    low, high = int(windows.min()), int(windows.max())
    if where and (low < 0 or high >= vocabulary):
        raise InputError(f"{where} holds the token {low if low < 0 else high}, but the model has {vocabulary}")
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"tokens run from {low} to {high}, but the model has {vocabulary}; is the tokenizer another model's?"
        )


def text_inputs(tokens: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the inputs for a window of text, (tokens,): an encoder reads the first half, its decoder the rest."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": tokens[None]}
    half = len(tokens) // 2
    return {"input_ids": tokens[None, :half], "decoder_input_ids": tokens[None, half:]}


def accepted_inputs(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the inputs without those that a tokenizer adds for other models.

    Raises:
        InputError: the forward does not take one of the other inputs.
    """
    known = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
    unknown = [name for name in inputs if name not in known and name not in TOKENIZER_EXTRAS]
    if unknown:
        raise InputError(f"{type(model).__name__} takes no {unknown[0]}; it takes {', '.join(known)}")
    return {name: x for name, x in inputs.items() if name in known}


def to_device(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Move a model's inputs to a device, and convert floating-point ones to the forward's dtype.

    Tensors that were made in inference mode are copied, because nothing counts how often they are changed.
    """
    own = {name: x.clone() if x.is_inference() else x for name, x in inputs.items()}
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in own.items()}


def forward_without_cache(model: PreTrainedModel) -> Callable[..., Any]:
    """Turn off the caches of a model and of all its parts, such as a text model inside; return its forward.

    A cache would reach the blocks as an argument, and keep what an earlier run of the same block has put into it.
    """
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config.use_cache = False
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    return partial(run_forward, model, use_cache=False) if has_cache else partial(run_forward, model)


def leave_out_rescaling(model: PreTrainedModel) -> None:
    """Let RWKV not halve its hidden states every few blocks, nor divide weights in place to match.

    Weights that are read later would not be divided. Without both, the final norm gives the same.
    """
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0


def without_caches(arguments: Any) -> Any:
    """Return a call's arguments with None for each cache, which some models make although they are told not to."""
    if isinstance(arguments, Cache):
        return None
    if isinstance(arguments, tuple) and type(arguments) is tuple:
        return tuple(map(without_caches, arguments))
    return {k: without_caches(v) for k, v in arguments.items()} if type(arguments) is dict else arguments


def run_forward(model: PreTrainedModel, **inputs: Any) -> Any:
    """Return the output of the model's forward.

    Raises:
        InputError: the forward fails. config.json and the inputs can disagree in ways that no check of shapes finds,
        such as a
            number of heads that does not divide the hidden size.
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
