"""Mixture of experts: split the fused parameters that transformers computes with into one module per expert.

transformers holds a layer's experts as three-dimensional parameters. Here each expert's matrix is a linear layer again,
so that it can be quantized separately. How the matrices lie in the parameters (`ExpertForm`), what is computed between
them, and where the router's weights come in, is not read off class names. All forms that fit the shapes are tried on
small random numbers, and the first with which separate experts give what the module's own forward gives is taken.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

FUSED_PARTS = {  # fused parameter: the matrices stacked in it, in order
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
TOKENS, EXPERTS = 16, 4  # of the trial on small numbers
TRIAL_SIZES = (12, 8)  # intermediate and hidden size of the trial


class StaysFusedError(ValueError):
    """A module's experts cannot be taken apart; the message says why."""


@dataclass(frozen=True)
class ExpertForm:
    """How the matrices of a layer's experts lie in the fused module's parameters, whose first dimension is the expert.

    `up` names the parameter that holds up_proj, and gate_proj too if `gated`; `down` the one that holds down_proj.
    """

    up: str
    down: str
    up_bias: str | None  # (experts, 2 intermediate), or (experts, intermediate) without a gate
    down_bias: str | None  # (experts, hidden)
    gated: bool
    transposed: bool  # a matrix is stored as (inputs, outputs)
    interleaved: bool  # outputs of gate and up alternate; otherwise all of one come first
    up_first: bool  # up comes before gate

    def places(self) -> dict[tuple[str, str], str]:
        """Return the fused parameter that holds each parameter of an expert, given by (linear layer, key)."""
        first = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        found = {(part, "weight"): self.up for part in first} | {("down_proj", "weight"): self.down}
        if self.up_bias and self.down_bias:
            found |= {(part, "bias"): self.up_bias for part in first} | {("down_proj", "bias"): self.down_bias}
        return found

    def take(self, part: str, key: str, whole: Tensor) -> Tensor:
        """Return a parameter of one expert as its linear layer holds it, from that expert's slice of `places`."""
        rows = whole.T if self.transposed and key == "weight" else whole  # outputs first
        if not self.gated or part == "down_proj":
            return rows
        second = (part == "up_proj") != self.up_first
        return rows[int(second) :: 2] if self.interleaved else rows.chunk(2)[second]


class Expert(nn.Module):
    """down(act(gate(x), up(x))) on x (tokens, hidden), or down(act(up(x))) without a gate."""

    gate_proj: nn.Linear | None
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(
        self, hidden: int, intermediate: int, act: Callable[..., Tensor], gated: bool, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias, device="meta") if gated else None
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias, device="meta")
        self.act = act

    def intermediate(self, x: Tensor) -> Tensor:
        """Return the input of down_proj, (tokens, intermediate)."""
        up = self.up_proj(x)
        inner: Tensor = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x), up)
        return inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.intermediate(x))
        return out


class Activation(nn.Module):
    """act(gate) * up."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.act(gate) * up
        return out


class OwnGate(nn.Module):
    """What the fused module's own `_apply_gate` makes of gate and up, which it takes as one tensor."""

    shell: Any

    def __init__(self, fused: nn.Module, form: ExpertForm) -> None:
        super().__init__()
        shell = copy.copy(fused)  # its attributes, such as limits, without its parameters
        vars(shell).update(_parameters={}, _forward_pre_hooks={}, _forward_hooks={})
        vars(self)["shell"] = shell  # not a submodule: transformers would look for its parameters
        self.interleaved, self.up_first = form.interleaved, form.up_first

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        pair = (up, gate) if self.up_first else (gate, up)
        both = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        out: Tensor = self.shell._apply_gate(both)
        return out

    def is_elementwise(self) -> bool:
        """Whether output i depends on gate i and up i alone, and in up i it is a straight line near zero.

        Otherwise the outputs are paired in another way, or gate and up are exchanged.
        """
        gate, up, other = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8
        try:
            out, back = self(gate, up), self(gate, other)
            middle, moved = self(gate, (up + other) / 2), self(torch.cat((other[:, :1], gate[:, 1:]), -1), up)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False
        straight = torch.allclose((out + back) / 2, middle, 1e-6, 1e-9)
        return out.shape == gate.shape and straight and bool((out != moved).any(0).equal(torch.arange(4) == 0))


class Experts(nn.ModuleList):
    """The experts of one layer, with the call signature of the fused module: (hidden_states, indices, weights).

    hidden_states are (tokens, hidden), indices (tokens, k) numbers of each token's experts, weights (tokens, k) the
    router's. Each output is multiplied by its weight.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (tokens, hidden)."""
        call = hidden_states, top_k_index, top_k_weights
        return self.combine((self.run_one(number, *call) for number in range(len(self))), *call)

    def rows_of(self, number: int, *arguments: Tensor) -> Tensor:
        """Return the rows of the output that an expert adds to, (rows,)."""
        return torch.where(arguments[1] == number)[0]

    def run_one(self, number: int, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """Return `rows_of` an expert, and what it adds to these rows, (rows, hidden) in the dtype of the output."""
        x, routes, weights = arguments
        token, choice = torch.where(routes == number)
        if not len(token):
            return token, x[token]
        return token, self._expert_output(self[number], x[token], weights[token, choice, None]).to(x.dtype)

    def combine(self, parts: Iterable[tuple[Tensor, Tensor]], *arguments: Tensor) -> Tensor:
        """Return the output of a call, from what `run_one` returns for each expert in order."""
        out = torch.zeros_like(arguments[0])
        for rows, added in parts:
            if len(rows):
                out.index_add_(0, rows, added)
        return out

    def pack_call(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a call's arguments in the form in which they are sent to another process."""
        x, routes, weights = arguments
        return x, routes, weights

    def unpack_call(self, *packed: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments of the call that `pack_call` has packed."""
        return packed

    def _expert_output(self, expert: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = expert(x) * weights
        return out

    def routing(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """Return, of the arguments of a call: what the experts compute with, (n, hidden), and the experts of each row.

        The latter are numbers, (n, k); a number may be that of no expert.
        """
        x, routes = arguments[:2]
        return x, routes

    def original_inputs(self, x: Tensor, *original: Tensor) -> Tensor:
        """Return the rows of the original model's call that belong to `x`, the first of the call's arguments."""
        return original[0]


class InputWeighingExperts(Experts):
    """Experts whose input, not output, is multiplied by the router's weights."""

    def _expert_output(self, expert: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = expert((x * weights).to(x.dtype))
        return out

    def routing(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        x, routes, weights = arguments
        return self._weighed(x, weights), routes.reshape(-1, 1)

    def original_inputs(self, x: Tensor, *original: Tensor) -> Tensor:
        return self._weighed(original[0], original[2])

    @staticmethod
    def _weighed(x: Tensor, weights: Tensor) -> Tensor:
        """Return a row for each choice of each token, (tokens * k, hidden)."""
        return (x[:, None] * weights[..., None]).to(x.dtype).flatten(0, 1)


class DenseExperts(Experts):
    """Experts that are called on (experts * tokens, hidden): all tokens for the first expert, then for the second.

    The caller has multiplied the rows by the router's weights, so that a row of zeros is one that its expert is not
    chosen for. Experts map zeros to zeros.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return self.combine((self.run_one(number, hidden_states) for number in range(len(self))), hidden_states)

    def rows_of(self, number: int, *arguments: Tensor) -> Tensor:
        rows = arguments[0].reshape(-1, arguments[0].shape[-1])
        tokens = len(rows) // len(self)
        return torch.where(rows[number * tokens : (number + 1) * tokens].any(-1))[0] + number * tokens

    def run_one(self, number: int, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        x = arguments[0].reshape(-1, arguments[0].shape[-1])
        rows = self.rows_of(number, *arguments)
        return rows, self[number](x[rows]).to(x.dtype) if len(rows) else x[rows]

    def combine(self, parts: Iterable[tuple[Tensor, Tensor]], *arguments: Tensor) -> Tensor:
        out = torch.zeros_like(arguments[0].reshape(-1, arguments[0].shape[-1]))
        for rows, computed in parts:
            out[rows] = computed
        return out.reshape(arguments[0].shape)

    def pack_call(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that are not zero, their numbers, and the shape of all."""
        x = arguments[0].reshape(-1, arguments[0].shape[-1])
        (chosen,) = torch.where(x.any(-1))
        return x[chosen], chosen, torch.tensor(arguments[0].shape, dtype=torch.int64, device=x.device)

    def unpack_call(self, *packed: Tensor) -> tuple[Tensor, ...]:
        rows, chosen, shape = packed
        x = rows.new_zeros(int(shape[:-1].prod()), rows.shape[-1])
        x[chosen] = rows
        return (x.reshape(shape.tolist()),)

    def routing(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        rows = arguments[0].reshape(-1, arguments[0].shape[-1])
        numbers = torch.arange(len(self), device=rows.device).repeat_interleave(len(rows) // len(self))
        chosen = rows.any(-1)
        return rows[chosen], numbers[chosen, None]

    def original_inputs(self, x: Tensor, *original: Tensor) -> Tensor:
        """Return the original rows; where the original model chooses another expert, the rows themselves."""
        rows, other = (t.reshape(-1, t.shape[-1]) for t in (x, original[0]))
        chosen = rows.any(-1)
        rows, other = rows[chosen], other[chosen]
        return torch.where(other.any(-1, keepdim=True), other, rows)


@dataclass(frozen=True)
class _Sizes:
    count: int
    hidden: int
    intermediate: int

    def for_trial(self) -> "_Sizes":
        """Return small sizes that are equal, or twice each other, where these are."""
        intermediate, hidden = TRIAL_SIZES
        for factor in (1, 2):
            if self.hidden == factor * self.intermediate:
                hidden = factor * intermediate
            elif factor * self.hidden == self.intermediate:
                intermediate = factor * hidden
        return _Sizes(self.count, hidden, intermediate)


def unfuse_experts(fused: nn.Module) -> tuple[Experts, ExpertForm]:
    """Return separate experts on the meta device that compute what `fused` computes, and how `fused` holds them.

    Raises:
        StaysFusedError: no form of experts computes the same as `fused` on small random numbers.
    """
    tried = False
    for form, sizes in _forms_of(fused):
        for make, act in _ways_to_compute(fused, form):
            tried = True
            if _computes_the_same(fused, form, sizes.for_trial(), make, act):
                return _separate(form, sizes, make, act), form
    raise StaysFusedError(
        "it computes something else than separate experts in any form that fits its shapes"
        if tried
        else "its parameters are not the matrices and biases of experts"
    )


def _forms_of(fused: nn.Module) -> Iterator[tuple[ExpertForm, _Sizes]]:
    """Yield the forms in which a module's parameters can hold experts, going by their shapes."""
    shapes = {name: tuple(p.shape) for name, p in fused.named_parameters()}
    matrices = [name for name, shape in shapes.items() if len(shape) == 3]
    biases = [name for name in shapes if name not in matrices]
    if len(matrices) != 2 or len(biases) not in (0, 2) or len({shape[0] for shape in shapes.values()}) != 1:
        return
    for (up, down), transposed in ((names, t) for names in permutations(matrices) for t in (False, True)):
        count = shapes[up][0]
        outputs, hidden = shapes[up][1:][:: -1 if transposed else 1]
        back, intermediate = shapes[down][1:][:: -1 if transposed else 1]
        if back != hidden or outputs not in (intermediate, 2 * intermediate):
            continue
        gated, sizes = outputs != intermediate, _Sizes(count, hidden, intermediate)
        for own in permutations(biases) if biases else [(None, None)]:
            wanted = {own[0]: (count, outputs), own[1]: (count, hidden)}
            if all(name is None or shapes[name] == wanted[name] for name in own):
                for interleaved, up_first in product((False, True), repeat=2) if gated else ((False, False),):
                    yield ExpertForm(up, down, own[0], own[1], gated, transposed, interleaved, up_first), sizes


def _ways_to_compute(fused: nn.Module, form: ExpertForm) -> Iterator[tuple[type[Experts], Any]]:
    """Yield what may be computed between up_proj and down_proj, with each place for the router's weights."""
    plain: list[Any] = [module for module in fused.children() if not any(True for _ in module.parameters())]
    plain += [value for key, value in vars(fused).items() if callable(value) and not key.startswith("_")]
    acts: list[Any] = [Activation(act) for act in plain] if form.gated else plain
    if form.gated and callable(getattr(fused, "_apply_gate", None)):
        own = OwnGate(fused, form)
        acts += [own] if own.is_elementwise() else []
    arguments = inspect.signature(fused.forward).parameters.values()
    dense = len(arguments) == 1 and not any(one.kind is one.VAR_POSITIONAL for one in arguments)
    for act in acts:
        yield from ((make, act) for make in ((DenseExperts,) if dense else (Experts, InputWeighingExperts)))


def _separate(form: ExpertForm, sizes: _Sizes, make: type[Experts], act: Any) -> Experts:
    bias = form.up_bias is not None
    return make(Expert(sizes.hidden, sizes.intermediate, act, form.gated, bias) for _ in range(sizes.count))


def try_forward(module: nn.Module, parameters: Mapping[str, nn.Parameter | None], *arguments: Tensor) -> Tensor | None:
    """Return the output of a module's forward with its parameters replaced; None if that call fails."""
    small = copy.copy(module)
    object.__setattr__(small, "_parameters", dict(parameters))
    if isinstance(config := getattr(small, "config", None), PreTrainedConfig):
        plain = copy.copy(config)
        plain._experts_implementation = "eager"  # a loop over experts, whatever kernel the model runs with
        object.__setattr__(small, "config", plain)
    with torch.no_grad():
        try:
            found = type(small).forward(small, *arguments)  # without the hooks
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError):
            return None
    return found if isinstance(found, Tensor) else None


def _computes_the_same(fused: nn.Module, form: ExpertForm, sizes: _Sizes, make: type[Experts], act: Any) -> bool:
    """Whether `fused` and separate experts give the same output for small random weights and inputs."""
    draw = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": draw, "dtype": torch.float64}
    stacked = {name: torch.randn(shape, **options) for name, shape in _shapes_for_trial(form, sizes).items()}
    shown = sizes.count if make is DenseExperts else min(EXPERTS, sizes.count)  # others get no token
    single = _separate(form, replace(sizes, count=shown), make, act)
    for number, expert in enumerate(single):
        own = {f"{part}.{key}": form.take(part, key, stacked[n][number]) for (part, key), n in form.places().items()}
        expert.load_state_dict(own, strict=False, assign=True)
    k = min(2, shown)
    routes = torch.rand(TOKENS, shown, **options).topk(k).indices
    weights = torch.rand(TOKENS, k, **options)
    x = torch.randn(TOKENS, sizes.hidden, **options) * torch.logspace(-1, 3, TOKENS, dtype=torch.float32)[:, None]
    arguments: tuple[Tensor, ...] = x, routes, weights
    if make is DenseExperts:
        chosen = torch.zeros(sizes.count, TOKENS, dtype=x.dtype)
        arguments = ((chosen.T.scatter(1, routes, weights).T[..., None] * x).flatten(0, 1),)
    parameters = {name: nn.Parameter(tensor) for name, tensor in stacked.items()}
    found = try_forward(_with_sizes(fused, form, sizes), parameters, *arguments)
    expected = try_forward(single, {}, *arguments)
    if found is None or expected is None or found.shape != expected.shape:
        return False
    return bool(((found - expected).abs().amax(-1) <= 1e-5 * expected.abs().amax(-1)).all())


def _shapes_for_trial(form: ExpertForm, sizes: _Sizes) -> dict[str, tuple[int, ...]]:
    outputs = sizes.intermediate * (2 if form.gated else 1)
    turn = -1 if form.transposed else 1
    shapes: dict[str, tuple[int, ...]] = {
        form.up: (sizes.count, *(outputs, sizes.hidden)[::turn]),
        form.down: (sizes.count, *(sizes.hidden, sizes.intermediate)[::turn]),
    }
    if form.up_bias and form.down_bias:
        shapes |= {form.up_bias: (sizes.count, outputs), form.down_bias: (sizes.count, sizes.hidden)}
    return shapes


def _with_sizes(fused: nn.Module, form: ExpertForm, sizes: _Sizes) -> nn.Module:
    """Return a copy of a module whose attributes say small sizes where they say its own."""
    shape = fused.get_parameter(form.up).shape[1:]
    outputs, hidden = (int(n) for n in (shape[::-1] if form.transposed else shape))
    own = outputs // (2 if form.gated else 1)
    smaller = {2 * own: 2 * sizes.intermediate, own: sizes.intermediate, hidden: sizes.hidden}
    small = copy.copy(fused)
    attributes: dict[str, Any] = vars(fused)
    changed = {
        key: smaller[value]
        for key, value in attributes.items()
        if type(value) is int and value in smaller and "experts" not in key
    }
    vars(small).update(changed)
    return small
