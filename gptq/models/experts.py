"""Mixture of experts: split the fused parameters that transformers computes with into one module per expert.

transformers 5 holds a layer's experts as two three-dimensional parameters. Checkpoints, and the engines that read
them, have three matrices per expert. Here each matrix is a linear layer again, so that it can be quantized separately.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

FUSED_PARTS = {  # fused parameter: the matrices stacked in it, in order
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) on x (tokens, hidden), or down(act(up(x))) without a gate."""

    gate_proj: nn.Linear | None
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, hidden: int, intermediate: int, act: nn.Module, gated: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, device="meta") if gated else None
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, device="meta")
        self.act = act

    def intermediate(self, x: Tensor) -> Tensor:
        """Return the input of down_proj, (tokens, intermediate)."""
        up = self.up_proj(x)
        inner: Tensor = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        return inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.intermediate(x))
        return out


class Experts(nn.ModuleList):
    """The experts of one layer, with the call signature of the fused module in transformers."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (tokens, hidden).

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k) numbers of each token's experts.
            top_k_weights: (tokens, k).
        """
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, choice = torch.where(top_k_index == number)
            if len(token):
                y = expert(hidden_states[token]) * top_k_weights[token, choice, None]
                out.index_add_(0, token, y.to(out.dtype))
        return out


def unfuse_experts(fused: nn.Module) -> Experts | None:
    """Return separate experts on the meta device that compute what `fused` computes; None if that is not so.

    The parameters of `fused` must be gate_up_proj (experts, 2 intermediate, hidden) or up_proj (experts, intermediate,
    hidden), and down_proj (experts, hidden, intermediate). Both forwards must agree on small random inputs.
    """
    parameters = {name: tuple(p.shape) for name, p in fused.named_parameters()}
    first = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    if set(parameters) != {first, "down_proj"} or any(len(shape) != 3 for shape in parameters.values()):
        return None
    (count, rows, hidden), down, act = parameters[first], parameters["down_proj"], getattr(fused, "act_fn", None)
    if (rows, hidden) != (len(FUSED_PARTS[first]) * down[2], down[1]) or not isinstance(act, nn.Module):
        return None
    if not _computes_the_same(fused, first, count, act):
        return None
    return _single(first, count, hidden, down[2], act)


def _single(first: str, count: int, hidden: int, intermediate: int, act: nn.Module) -> Experts:
    return Experts(Expert(hidden, intermediate, act, gated="gate_proj" in FUSED_PARTS[first]) for _ in range(count))


def try_forward(module: nn.Module, parameters: dict[str, nn.Parameter | None], *arguments: Tensor) -> Tensor | None:
    """Return the output of a module's forward with its parameters replaced; None if that call fails."""
    small = copy.copy(module)
    object.__setattr__(small, "_parameters", parameters)
    if isinstance(config := getattr(small, "config", None), PreTrainedConfig):
        plain = copy.copy(config)
        plain._experts_implementation = "eager"  # a loop over experts, whatever kernel the model runs with
        object.__setattr__(small, "config", plain)
    with torch.no_grad():
        try:
            found = type(small).forward(small, *arguments)  # without the hooks
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None
    return found if isinstance(found, Tensor) else None


def _computes_the_same(fused: nn.Module, first: str, count: int, act: nn.Module) -> bool:
    """Whether `fused` and separate experts give the same output for small random weights and inputs."""
    draw = torch.Generator().manual_seed(0)
    hidden, intermediate, tokens, parts = 8, 12, 16, FUSED_PARTS[first]
    stacked = torch.randn(count, len(parts) * intermediate, hidden, generator=draw)
    down = torch.randn(count, hidden, intermediate, generator=draw)
    single = _single(first, count, hidden, intermediate, act)
    for expert, weights, out in zip(single, stacked, down, strict=True):
        own = {f"{part}.weight": weight for part, weight in zip(parts, weights.chunk(len(parts)), strict=True)}
        expert.load_state_dict({**own, "down_proj.weight": out}, strict=False, assign=True)
    k = min(2, count)
    routes = torch.rand(tokens, count, generator=draw).topk(k).indices
    arguments = torch.randn(tokens, hidden, generator=draw), routes, torch.rand(tokens, k, generator=draw)
    found = try_forward(fused, {first: nn.Parameter(stacked), "down_proj": nn.Parameter(down)}, *arguments)
    with torch.no_grad():
        return found is not None and torch.allclose(found, single(*arguments), rtol=1e-4, atol=1e-5)
