"""Find a Hugging Face model's repeated blocks and their linear layers from its module structure.

No architecture is listed by name. The model needs no weights: its parameters may be on the meta device.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

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
LINEAR_FORWARDS = [kind.forward for kind in LINEAR]  # the forward of linear layers that do not override it
# Layers that inference engines fuse: the fused layer's name in vLLM (`packed_modules_mapping`), and its parts.
FUSED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)


@dataclass(frozen=True)
class Block:
    """One of the model's repeated blocks; or the output head, a block whose only layer is the module itself.

    `linears` are its quantizable layers by their full name in the model, `index` its position among the blocks.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Module]
    index: int = 0

    def is_head(self) -> bool:
        return is_linear(self.module)

    def expert_layers(self) -> set[str]:
        """Return the names of the layers that are inside experts."""
        inside = {layer for m in self.module.modules() if isinstance(m, Experts) for layer in m.modules()}
        return {name for name, linear in self.linears.items() if linear in inside}

    def pause_points(self) -> dict[nn.Module, str]:
        """Return the modules before which a forward pauses, with their names: each layer, and each list of experts."""
        experts = {m: f"{self.name}.{path}" for path, m in self.module.named_modules() if isinstance(m, Experts)}
        in_experts = {layer for m in experts for layer in m.modules()}
        others = {m: name for name, m in self.linears.items() if m not in in_experts}
        found = others | {
            m: name for m, name in experts.items() if not set(self.linears.values()).isdisjoint(m.modules())
        }
        return {module: found[module] for module in self.module.modules() if module in found}


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the model's blocks.

    Blocks are the elements of each outermost nn.ModuleList whose elements have the same type and contain linear layers.

    Raises:
        InputError: the model has no repeated blocks with linear layers.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and _repeats(module)
        and _linears(module, name)
        and not all(type(child) is nn.ModuleList for child in module)  # a list of lists of blocks, as Funnel's
    }
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outermost:
        where = f" of {config.name_or_path}" if (config := getattr(model, "config", None)) is not None else ""
        raise InputError(
            f"the {type(model).__name__}{where} has no list of repeated blocks with linear layers to quantize"
        )
    blocks = [(f"{n}.{i}", child) for n, m in outermost.items() for i, child in enumerate(m)]
    return [Block(name, m, _linears(m, name), index) for index, (name, m) in enumerate(blocks)]


def takes_one_of(model: nn.Module, name: str, inputs: Collection[str]) -> bool:
    """Whether every submodel of `model` that contains the module called `name` takes one of `inputs`.

    An argument matches one of `inputs` that ends with it: decoder_input_ids of the whole model is input_ids of its
    decoder.
    """
    parts = name.split(".")
    ancestors = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    expected = [m.main_input_name for m in ancestors if isinstance(m, PreTrainedModel)]
    return all(any(given.endswith(name) for given in inputs) for name in expected)


def _repeats(modules: nn.ModuleList) -> bool:
    """Whether the elements of a list are repeated blocks.

    Repeated blocks have the same type, or are all decoder layers of transformers: hybrid models alternate between layer
    types.
    """
    kinds = {type(child) for child in modules}
    alike = (
        len(kinds) == 1 and nn.ModuleList not in kinds and not is_linear(modules[0])
    )  # lists of lists are not called
    return alike or (len(modules) > 0 and all(isinstance(child, GradientCheckpointingLayer) for child in modules))


def find_gates(blocks: Iterable[Block]) -> list[str]:
    """Return the names of linear layers that no engine reads packed.

    These are layers with one output, such as a shared expert's gate, and routers: layers with as many outputs as there
    are experts in the same module; or in one around it, if the layer is alone in its module or that is called a router.
    """
    found = []
    for block in blocks:
        modules = {f"{block.name}.{path}".removesuffix("."): m for path, m in block.module.named_modules()}
        for name, linear in block.linears.items():
            parent = name.rpartition(".")[0]
            if not block.is_head() and (shape_of(linear)[0] == 1 or _is_router(linear, parent, modules)):
                found.append(name)
    return found


def _is_router(linear: nn.Module, parent: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer chooses experts; `modules` are the block's by name, `parent` is the one that the layer is in."""
    if parent.rpartition(".")[2] == "router":
        return True
    is_alone = parent in modules and sum(map(is_linear, modules[parent].children())) == 1
    around = [parent]
    while is_alone and around[-1].rpartition(".")[0] in modules:
        around.append(around[-1].rpartition(".")[0])
    inside = (child for name in around if name in modules for child in modules[name].children())
    return shape_of(linear)[0] in (len(child) for child in inside if isinstance(child, Experts))


def find_head(model: PreTrainedModel) -> Block:
    """Return the output head, which maps hidden states to logits.

    Raises:
        InputError: the model has no linear output head.
    """
    head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), None)
    if name is None or not is_linear(head):
        raise InputError(f"{type(model).__name__} has no linear output head to quantize")
    return Block(name, head, {name: head})


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module computes x W^T + b and nothing more; some routers subclass nn.Linear and apply a softmax too."""
    return isinstance(module, LINEAR) and (type(module).forward in LINEAR_FORWARDS or _computes_product(module))


def _computes_product(module: nn.Module) -> bool:
    """Whether a linear layer that overrides forward, as Falcon's does, gives x W^T + b for a small random W."""
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32}
    W, x = torch.randn(3, 4, **options), torch.randn(2, 4, **options)
    bias = None if module._parameters["bias"] is None else nn.Parameter(torch.randn(3, **options))
    weight = nn.Parameter(W.T.contiguous() if is_transposed(module) else W)
    found = try_forward(module, {"weight": weight, "bias": bias}, x)
    return found is not None and torch.allclose(found, nn.functional.linear(x, W, bias), atol=1e-5)


def _linears(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Return the linear layers of a module called `prefix`, by their full names."""
    return {f"{prefix}.{n}": m for n, m in module.named_modules() if is_linear(m)}


def group_fused_siblings(layers: Iterable[str]) -> list[list[str]]:
    """Group layers by name. Layers that engines fuse (see FUSED) form one group; every other layer forms its own."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in layers:
        parent, _, child = name.rpartition(".")
        fused = next((parts for _, parts in FUSED if child in parts), child)
        groups.setdefault((parent, fused), []).append(name)
    return list(groups.values())


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is stored as (inputs, outputs)."""
    return isinstance(linear, Conv1D)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (columns, rows) if is_transposed(linear) else (rows, columns)
