"""Block-wise tuning: a block's scales, codes, norms and biases moved together towards the original output.

Layer by layer, each weight was solved for its own output. What counts is the block's, where the errors of its layers
meet. Here the whole block is one function of what may still change, and its distance from the original model's output
on the calibration windows is brought down by Adam: scales and small parameters directly, codes through an offset that
is rounded with a straight-through gradient (AutoRound, arXiv 2309.05516; EfficientQAT, arXiv 2407.11062).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gptq.config import TUNE_WINDOWS
from gptq.solver import grid
from gptq.solver.solve import SolvedLayer

RATE = 5e-3  # of scales and small parameters, relative to their size
CODE_TRAVEL = 1.0  # codes that an offset can move by in all: Adam's steps are about as long as their rate


@dataclass(frozen=True)
class Tuned:
    """What tuning made of a block; errors are mean squared differences from the original output over its power."""

    layers: dict[nn.Module, SolvedLayer]
    parameters: dict[tuple[nn.Module, str], Tensor]  # norms and biases, float32
    error_before: float
    error_after: float


def tune(
    block: nn.Module,
    forwards: Sequence[Callable[[], Any]],
    wanted: Sequence[Tensor],
    held_out: Sequence[int],
    layers: dict[nn.Module, SolvedLayer],
    weigh: Callable[[nn.Module, Tensor], Tensor],
    bits: dict[nn.Module, int],
    steps: int,
    seed: int,
    kept: Collection[tuple[nn.Module, str]] = (),
) -> Tuned:
    """Tune a block; nothing of it is changed where that does not bring it closer on the windows held out.

    Args:
        forwards: one call of the block per window, on what the quantized model hands it.
        wanted: what the original model's block gives for each window.
        held_out: windows to judge by and not to learn from; where there are none, all windows are judged by.
        layers: the block's quantized layers.
        weigh: turns a weight (outputs, inputs) into the tensor that a layer computes with.
        bits: of each layer.
        kept: parameters, by module and name in it, that stay as they are.
    """
    draw = torch.Generator().manual_seed(seed)
    found = {(m, n): p.detach() for m in block.modules() for n, p in m._parameters.items() if p is not None}
    small = {key: p for key, p in found.items() if _is_small(p) and key not in kept}
    scales = {linear: torch.zeros_like(s.scale, requires_grad=True) for linear, s in layers.items()}  # relative
    offsets = {linear: torch.zeros(s.codes.shape, device=s.codes.device, requires_grad=True)
               for linear, s in layers.items()}  # fmt: skip
    changes = {key: torch.zeros_like(p, dtype=torch.float32, requires_grad=True) for key, p in small.items()}
    sizes = {key: p.float().square().mean().sqrt() for key, p in small.items()}

    def soft() -> dict[tuple[nn.Module, str], Tensor]:
        weights = {
            (linear, "weight"): weigh(linear, _soft_weight(s, scales[linear], offsets[linear], bits[linear]))
            for linear, s in layers.items()
        }
        return weights | {key: (p + sizes[key] * changes[key]).to(p.dtype) for key, p in small.items()}

    power = sum(float(w.double().square().mean()) for w in wanted) / len(wanted)

    judges = held_out or range(len(forwards))
    learned = [i for i in range(len(forwards)) if i not in set(held_out)]

    def error(tensors: dict[tuple[nn.Module, str], Tensor]) -> float:
        with _substituted(tensors):
            total = sum(float(_distance(forwards[i], wanted[i])) for i in judges)
        return total / len(judges) / max(power, 1e-30)

    with torch.no_grad():
        before = error(soft())
    optimizer = torch.optim.Adam(
        [
            {"params": [*scales.values(), *changes.values()], "lr": RATE},
            {"params": list(offsets.values()), "lr": 2 * CODE_TRAVEL / max(steps, 1)},
        ],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with torch.enable_grad():
        for _ in range(steps):
            size = (min(TUNE_WINDOWS, len(learned)),)
            chosen = [learned[i] for i in torch.randint(len(learned), size, generator=draw)]
            tensors = soft()
            leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
            with _substituted(leaves):  # window by window, so that one window's activations are held at a time
                for i in chosen:
                    (_distance(forwards[i], wanted[i]) / (len(chosen) * max(power, 1e-30))).backward()
            reached = [key for key, leaf in leaves.items() if leaf.grad is not None]
            torch.autograd.backward([tensors[key] for key in reached], [leaves[key].grad for key in reached])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        hard = {linear: _harden(s, scales[linear], offsets[linear], bits[linear]) for linear, s in layers.items()}
        parameters = {key: (p + sizes[key] * changes[key]).to(p.dtype) for key, p in small.items()}
        after = error({(m, "weight"): weigh(m, s.weight()) for m, s in hard.items()} | parameters)
    if not after < before:
        return Tuned(layers, {}, before, before)
    return Tuned(hard, parameters, before, after)


def _is_small(parameter: Tensor) -> bool:
    return parameter.ndim == 1 and parameter.is_floating_point() and not parameter.is_meta


def _soft_weight(solved: SolvedLayer, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    groups = solved.g_idx.long()
    real = (solved.codes + offset).clamp(0, 2**bits - 1)
    codes = real + (real.round() - real).detach()
    return ((solved.scale * (1 + scale))[:, groups]) * (codes - solved.zero[:, groups].float())


def _harden(solved: SolvedLayer, scale: Tensor, offset: Tensor, bits: int) -> SolvedLayer:
    codes = (solved.codes + offset).clamp(0, 2**bits - 1).round().to(torch.uint8)
    return replace(solved, codes=codes, scale=grid.round_scale(solved.scale * (1 + scale)))


def _distance(forward: Callable[[], Any], wanted: Tensor) -> Tensor:
    return (first_tensor(forward()).float() - wanted.float()).square().mean()


def first_tensor(output: Any) -> Tensor:
    """A block's hidden states: its output, or the first of its outputs."""
    tensor = output if isinstance(output, Tensor) else output[0]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a block returned {type(tensor).__name__}")
    return tensor


@contextmanager
def _substituted(tensors: dict[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Inside, modules compute with these tensors instead of their parameters, and gradients reach them."""
    own = {key: key[0]._parameters.pop(key[1]) for key in tensors}
    try:
        for (module, name), tensor in tensors.items():
            module.__dict__[name] = tensor
        yield
    finally:
        for (module, name), parameter in own.items():
            del module.__dict__[name]
            module._parameters[name] = parameter
