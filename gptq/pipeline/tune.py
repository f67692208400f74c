"""Block-wise tuning: move a block's scales, codes, norms and biases together towards the original block's output.

The solver minimizes each layer's own output error. What counts is the output of the block, where the errors of its
layers combine. Here the block is one function of everything that may still change, and Adam minimizes its distance from
the original model's output on the calibration windows. Scales and small parameters are optimized directly, codes as
`soft_codes` relaxes them.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq.compute.distributed import ALONE, Ranks
from gptq.compute.torch_state import same_gradients
from gptq.config import TUNE_TOKENS, TUNE_WINDOWS
from gptq.models.attention import attention_by_products
from gptq.pipeline.joined_calls import join_calls
from gptq.pipeline.soft_codes import first_logits, round_layer, soft_weight
from gptq.solver import Grid
from gptq.solver.solve import SolvedLayer

RATE = 5e-3  # learning rate of scales and small parameters, relative to their size
CODE_RATE = 0.1  # learning rate of the logits of codes
TEMPERATURES = (1.0, 0.05)  # of the softmax, first and last; it falls geometrically
SMALLEST_POWER = 1e-30  # divisor in place of a mean square of 0
SMALLEST_TOKEN = 1e-3  # least mean square of a token's output that weighs it, relative to that of all tokens
JOINED_DIFFERENCE = 1e-3  # largest relative root mean square by which windows may differ that are run together
FUSED_ADAM = ("cpu", "cuda")  # devices on which torch updates a variable in one pass

ParameterKey = tuple[nn.Module, str]  # a module, and the name of one of its parameters


@dataclass(frozen=True)
class BlockToTune:
    """A solved block, and what tuning needs to run and judge it."""

    module: nn.Module
    forwards: Sequence[partial[Any]]  # by window: a call of the block on the quantized model's activations
    targets: Sequence[Tensor]  # by window: the original model's output of the block
    held_out: Sequence[int]  # windows that only measure the error; if empty, all windows measure it
    layers: dict[nn.Module, SolvedLayer]  # the quantized layers
    grids: dict[nn.Module, Grid]  # that each quantized layer was solved on
    to_layout: Callable[[nn.Module, Tensor], Tensor]  # turns a layer's weight (outputs, inputs) into its parameter
    kept: Collection[ParameterKey] = ()  # parameters that must not change
    ranks: Ranks = ALONE  # the processes that tune it together; each has all of the above

    @cached_property
    def power(self) -> float:
        """Mean square of the original output, at least SMALLEST_POWER."""
        total = torch.zeros((), dtype=torch.float64, device=self.targets[0].device)
        for target in self.targets:
            total += target.double().square().mean()
        return max(float(total) / len(self.targets), SMALLEST_POWER)

    @property
    def learned(self) -> list[int]:
        """Windows that are learned from."""
        return [i for i in range(len(self.forwards)) if i not in set(self.held_out)]

    @cached_property
    def together(self) -> int:
        """How many windows are run together: 1, or as many as have TUNE_TOKENS tokens, if that gives the same.

        It follows from the windows and the model alone, so that neither a device nor a limit of memory decides bytes.
        """
        tokens = max(target.shape[:-1].numel() for target in self.targets)
        several = range(min(TUNE_WINDOWS, TUNE_TOKENS // tokens, len(self.forwards)))
        joined = join_calls([self.forwards[i] for i in several]) if len(several) > 1 else None
        if joined is None or any(self.targets[i].shape[0] != 1 for i in several):
            return 1
        try:
            found = hidden_states(joined())  # (windows, tokens, features)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # memory may not decide
        except Exception:  # of any type: the block's own code does not take several windows
            return 1
        alone = torch.cat([hidden_states(self.forwards[i]()) for i in several])
        if found.shape != alone.shape:
            return 1
        difference = (found.float() - alone.float()).square().mean()
        return len(several) if float(difference) <= JOINED_DIFFERENCE**2 * self.power else 1

    def pieces(self, windows: Sequence[int]) -> Iterator[tuple[partial[Any], list[int]]]:
        """Yield calls, each of one of these windows or of several that are run together, and their windows.

        A piece is the work of one process. Its result does not depend on the number of processes.
        """
        size = self.together
        for start in range(0, len(windows), size):
            part = [*windows[start : start + size]]
            call = join_calls([self.forwards[i] for i in part])
            yield from [(call, part)] if call else ((self.forwards[i], [i]) for i in part)

    def distance(self, call: partial[Any], windows: Sequence[int]) -> Tensor:
        """Return the sum over a piece's windows of the mean squared difference from the original output.

        A token's difference is divided by the root mean square of its output, relative to that of all tokens: half way
        between the output's error and the relative one, which later norm layers make of it.
        """
        wanted = torch.cat([self.targets[i] for i in windows]).float()  # (windows, tokens, features)
        sizes = (wanted.square().mean(-1) / self.power).clamp_(min=SMALLEST_TOKEN).sqrt_()  # (windows, tokens)
        squares = (hidden_states(call()).float() - wanted).square().mean(-1)
        return (squares / sizes).mean() * len(windows)

    def error(self, tensors: dict[ParameterKey, Tensor]) -> float:
        """Return the mean `distance` relative to `power`, with these parameters, on the held-out windows."""
        judges = self.held_out or range(len(self.forwards))
        pieces = enumerate(self.pieces(judges))
        with substituted(tensors):
            found = [self.distance(*piece) if self.ranks.owns(number) else None for number, piece in pieces]
        own = {number: distance for number, distance in enumerate(found) if distance is not None}
        total = torch.zeros((), dtype=torch.float64, device=self.targets[0].device)
        for distance in self.ranks.gather_pieces(own, len(found)):
            total += distance
        return float(total) / len(judges) / self.power


@dataclass(frozen=True)
class Tuned:
    """A tuned block; errors are those of `BlockToTune.error`."""

    layers: dict[nn.Module, SolvedLayer]
    parameters: dict[ParameterKey, Tensor]  # norms and biases, in the dtype of the forward
    error_before: float
    error_after: float


def tune(block: BlockToTune, steps: int, seed: int) -> Tuned:
    """Tune a block with Adam; return it unchanged unless its error on the held-out windows decreases."""
    variables, device = _Variables(block), block.targets[0].device
    with torch.no_grad():
        before = block.error(variables.hard_parameters(variables.round_layers()))
    with same_gradients(device), attention_by_products():
        _optimize(block, variables, steps, seed)
    with torch.no_grad():
        layers = variables.round_layers()
        after = block.error(variables.hard_parameters(layers))
    if not after < before:
        return Tuned(block.layers, {}, before, before)
    return Tuned(layers, variables.small_parameters(), before, after)


class _Variables:
    """What Adam changes: relative changes of scales and small parameters, which start at 0, and logits of codes."""

    def __init__(self, block: BlockToTune) -> None:
        self._block = block
        layers = block.layers.items()
        found = {(m, n): p.detach() for m in block.module.modules() for n, p in m._parameters.items() if p is not None}
        self._small = {key: p for key, p in found.items() if is_small(p) and key not in block.kept}
        self._sizes = {key: p.float().square().mean().sqrt() for key, p in self._small.items()}
        self.scales = {
            linear: torch.zeros_like(s.scale, requires_grad=block.grids[linear].tunes_scales) for linear, s in layers
        }
        self.logits = {linear: first_logits(s, block.grids[linear]).requires_grad_() for linear, s in layers}
        self.changes = {
            key: torch.zeros_like(p, dtype=torch.float32, requires_grad=True) for key, p in self._small.items()
        }

    def small_parameters(self) -> dict[ParameterKey, Tensor]:
        """Return norms and biases with their changes applied."""
        return {key: (p + self._sizes[key] * self.changes[key]).to(p.dtype) for key, p in self._small.items()}

    def soft_parameters(self, temperature: float, noise: torch.Generator) -> dict[ParameterKey, Tensor]:
        """Return all parameters as differentiable functions of the variables, with noise that each layer draws anew."""
        seeds = torch.randint(2**62, (len(self._block.layers),), generator=noise).tolist()
        weights = {
            linear: soft_weight(
                solved, self.scales[linear], self.logits[linear], temperature, self._block.grids[linear], seed
            )
            for (linear, solved), seed in zip(self._block.layers.items(), seeds, strict=True)
        }
        return self._as_parameters(weights) | self.small_parameters()

    def hard_parameters(self, layers: dict[nn.Module, SolvedLayer]) -> dict[ParameterKey, Tensor]:
        """Return all parameters with the weights of `layers`, a result of `round_layers`."""
        return self._as_parameters({linear: s.weight() for linear, s in layers.items()}) | self.small_parameters()

    def _as_parameters(self, weights: dict[nn.Module, Tensor]) -> dict[ParameterKey, Tensor]:
        return {(linear, "weight"): self._block.to_layout(linear, W) for linear, W in weights.items()}

    def round_layers(self) -> dict[nn.Module, SolvedLayer]:
        """Return the layers with each code the most probable of three, and scales in their stored dtype."""
        return {
            linear: round_layer(s, self.scales[linear], self.logits[linear], self._block.grids[linear])
            for linear, s in self._block.layers.items()
        }


def _optimize(block: BlockToTune, variables: _Variables, steps: int, seed: int) -> None:
    """Take `steps` steps of Adam, each on TUNE_WINDOWS windows; rates fall linearly to 0."""
    optimizer = torch.optim.Adam(
        [
            {"params": [*filter(_is_free, variables.scales.values()), *variables.changes.values()], "lr": RATE},
            {"params": list(variables.logits.values()), "lr": CODE_RATE},
        ],
        betas=(0.9, 0.95),
        fused=block.targets[0].device.type in FUSED_ADAM,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    first, last = TEMPERATURES
    noise = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for step, chosen in zip(range(steps), _draw(block.learned, seed), strict=False):
            temperature = first * (last / first) ** (step / steps)
            _backpropagate(block, variables.soft_parameters(temperature, noise), chosen)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def _draw(windows: list[int], seed: int) -> Iterator[list[int]]:
    """Yield TUNE_WINDOWS windows at a time, without end: all of them in a random order, then in another one."""
    generator = torch.Generator().manual_seed(seed)
    size = min(TUNE_WINDOWS, len(windows))
    left: list[int] = []
    while True:
        if len(left) < size:
            left = [windows[i] for i in torch.randperm(len(windows), generator=generator)]
        yield left[:size]
        left = left[size:]


def _backpropagate(block: BlockToTune, tensors: dict[ParameterKey, Tensor], windows: list[int]) -> None:
    """Add the gradient of the mean error over `windows` to the variables that `tensors` are functions of.

    Pieces are run against detached copies, so that no more activations are held than of one piece. Gradients of pieces
    are added in order, whichever process computes them.
    """
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
    sums: dict[ParameterKey, Tensor] = {}
    pieces, ranks = [*block.pieces(windows)], block.ranks
    with substituted(leaves):
        for start in range(0, len(pieces), ranks.size):  # of each turn a process has one piece at most
            turn = range(start, min(start + ranks.size, len(pieces)))
            for number in filter(ranks.owns, turn):
                (block.distance(*pieces[number]) / (len(windows) * block.power)).backward()
            if ranks.size > 1:
                _add_gradients(sums, leaves, turn, ranks)
    if ranks.size == 1:
        sums = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    torch.autograd.backward([tensors[key] for key in sums], [*sums.values()])


def _add_gradients(
    sums: dict[ParameterKey, Tensor], leaves: dict[ParameterKey, Tensor], turn: range, ranks: Ranks
) -> None:
    """Add the gradients of a turn's pieces to `sums` in order; clear those of this process."""
    own = {key: leaf.grad for key, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    for number in turn:
        for key in leaves:
            found = ranks.broadcast_piece(own[key] if ranks.owns(number) else None, number)
            if found is not None:
                sums[key] = sums[key].add_(found) if key in sums else found


def _is_free(variable: Tensor) -> bool:
    return variable.requires_grad


def is_small(parameter: Tensor) -> bool:
    """Whether a parameter is a norm's weight or a bias."""
    return parameter.ndim == 1 and parameter.is_floating_point() and not parameter.is_meta


def hidden_states(output: Any) -> Tensor:
    """Return a block's hidden states: its output, or the first of its outputs.

    Raises:
        TypeError: the block returned something else.
    """
    tensor = output if isinstance(output, Tensor) else output[0]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a block returned {type(tensor).__name__}")
    return tensor


@contextmanager
def substituted(tensors: dict[ParameterKey, Tensor]) -> Iterator[None]:
    """Inside, modules compute with these tensors instead of their parameters, and gradients reach the tensors."""
    own = {key: key[0]._parameters.pop(key[1]) for key in tensors}
    try:
        for (module, name), tensor in tensors.items():
            module.__dict__[name] = tensor
        yield
    finally:
        for (module, name), parameter in own.items():
            del module.__dict__[name]
            module._parameters[name] = parameter
