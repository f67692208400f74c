"""Where a Hugging Face model's repeated blocks and their linear layers are, found from its structure.

This file and `names` are what knows how transformers models are built. A model is made without weights (`stream` has
them).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from gptq.errors import InputError
from gptq.models.experts import Experts, try_forward

LINEAR = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear layer whose weight is stored as (inputs, outputs)
PLAIN = [kind.forward for kind in LINEAR]
FUSED = (  # what engines make one layer of, and its name there (`packed_modules_mapping` in vLLM's models)
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)


@dataclass(frozen=True)
class Block:
    """One of the model's repeated blocks, or its output head, which is its own only layer.

    `linears` are its quantizable layers by their full name in the model, `index` its place among the blocks.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Module]
    index: int = 0

    def is_head(self) -> bool:
        return is_linear(self.module)

    def stops(self) -> dict[nn.Module, str]:
        """Where a forward is stopped, with names: the layers, but lists of experts as one."""
        experts = {m: f"{self.name}.{path}" for path, m in self.module.named_modules() if isinstance(m, Experts)}
        inside = {layer for m in experts for layer in m.modules()}
        alone = {m: name for name, m in self.linears.items() if m not in inside}
        found = alone | {
            m: name for m, name in experts.items() if not set(self.linears.values()).isdisjoint(m.modules())
        }
        return {module: found[module] for module in self.module.modules() if module in found}


def find_blocks(model: nn.Module, inputs: Collection[str] | None = None) -> tuple[list[Block], list[str]]:
    """The model's blocks, those of each outermost list of alike modules with linear layers; and notes.

    Lists inside a part of the model (an image encoder, say) that takes none of `inputs`, the names of what the model is
    called on, are left out, because nothing will reach them.

    Raises:
        InputError: the model has no repeated blocks with linear layers.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _repeats(module) and _linears(module, name)
    }
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outermost:
        raise InputError(f"{type(model).__name__} has no list of repeated blocks with linear layers to quantize")
    reached = {n: m for n, m in outermost.items() if inputs is None or _takes(model, n, inputs)}
    notes = [f"{n} stays as it is: the calibration has no inputs for it" for n in outermost if n not in reached]
    if not reached:
        kind, wanted = type(model).__name__, getattr(model, "main_input_name", "other inputs")
        raise InputError(f"{kind} is called on {wanted}, so it needs arrays of them for calibration, not text")
    blocks = [(f"{n}.{i}", child) for n, m in reached.items() for i, child in enumerate(m)]
    return [Block(name, m, _linears(m, name), index) for index, (name, m) in enumerate(blocks)], notes


def _takes(model: nn.Module, name: str, inputs: Collection[str]) -> bool:
    """Whether all models inside `model` and around the module called `name` take one of `inputs`.

    A decoder's input_ids are its whole model's decoder_input_ids.
    """
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    wanted = [m.main_input_name for m in around if isinstance(m, PreTrainedModel)]
    return all(any(given.endswith(want) for given in inputs) for want in wanted)


def _repeats(modules: nn.ModuleList) -> bool:
    """Whether these are blocks: alike, or such as transformers makes of several kinds, with attention and without."""
    alike = len({type(child) for child in modules}) == 1 and not is_linear(modules[0])
    return alike or (len(modules) > 0 and all(isinstance(child, GradientCheckpointingLayer) for child in modules))


def find_head(model: PreTrainedModel) -> Block:
    """The layer that turns hidden states into scores of tokens; raises InputError where the model has none."""
    head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), None)
    if name is None or not is_linear(head):
        raise InputError(f"{type(model).__name__} has no linear output head to quantize")
    return Block(name, head, {name: head})


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether x W^T + b is all that it computes: some routers are linear layers that go on from there."""
    return isinstance(module, LINEAR) and (type(module).forward in PLAIN or _computes_product(module))


def _computes_product(module: nn.Module) -> bool:
    """Whether a linear layer with a forward of its own gives x W^T + b for a small W; Falcon's does."""
    draw = torch.Generator().manual_seed(0)
    W, x = torch.randn(3, 4, generator=draw), torch.randn(2, 4, generator=draw)
    bias = None if module._parameters["bias"] is None else nn.Parameter(torch.randn(3, generator=draw))
    weight = nn.Parameter(W.T.contiguous() if is_transposed(module) else W)
    found = try_forward(module, {"weight": weight, "bias": bias}, x)
    return found is not None and torch.allclose(found, nn.functional.linear(x, W, bias), atol=1e-5)


def _linears(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    return {f"{prefix}.{n}": m for n, m in module.named_modules() if is_linear(m)}


def fused_siblings(layers: Iterable[str]) -> list[list[str]]:
    """The layers, those together that engines fuse into one: parts of one FUSED entry inside the same module."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in layers:
        parent, _, own = name.rpartition(".")
        fused = next((parts for _, parts in FUSED if own in parts), own)
        groups.setdefault((parent, fused), []).append(name)
    return list(groups.values())


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is stored as (inputs, outputs)."""
    return isinstance(linear, Conv1D)


def shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (columns, rows) if is_transposed(linear) else (rows, columns)
