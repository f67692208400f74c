"""Find the layers that a model's forward reaches, and those whose weight it computes with without calling them."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.errors import InputError
from gptq.models.blocks import Block, group_fused_siblings, shape_of, takes_one_of
from gptq.models.experts import Experts
from gptq.models.trial_forward import Trial


def find_unreached_layers(
    network: PreTrainedModel, blocks: list[Block], inputs: Mapping[str, Tensor], trial: Trial
) -> set[str]:
    """Return the names of the blocks' layers that no input reaches.

    A layer of a block that is called counts as reached if a layer of the same name but for its numbers is called
    anywhere: which experts of a list are called depends on the weights. Where the trial failed, only those parts are
    left out that say that they take none of the inputs.

    Args:
        inputs: the model's inputs in one window.
        trial: a forward on them.
    Raises:
        InputError: no layer is reached.
    """
    if trial.failure:
        missed = {name for block in blocks if not takes_one_of(network, block.name, inputs) for name in block.linears}
    else:
        missed = set(_unreached(blocks, trial.called))
    if all(name in missed for block in blocks for name in block.linears):
        kind, wanted = type(network).__name__, getattr(network, "main_input_name", "other inputs")
        raise InputError(f"{kind} is called on {wanted}, so it needs arrays of them for calibration, not text")
    return missed


def _unreached(blocks: Iterable[Block], called: Collection[str]) -> Iterator[str]:
    kinds = {re.sub(r"\d+", "*", name) for name in called}
    for block in blocks:
        in_experts = {
            f"{block.name}.{path}.{inner}"
            for path, module in block.module.named_modules()
            if isinstance(module, Experts) and f"{block.name}.{path}" in called
            for inner, _ in module.named_modules()
        }
        for name in block.linears:
            alike = block.name in called and re.sub(r"\d+", "*", name) in kinds
            if not alike and name not in in_experts:
                yield name


def find_uncalled_layers(network: nn.Module, blocks: Iterable[Block], trial: Trial) -> list[str]:
    """Return the names of linear layers with whose weight the model computes outside the layer's own call.

    These are Mamba's `dt_proj` and some routers. What meets the weight there cannot be observed, so such a layer cannot
    be quantized. For each layer that the trial found, the result also has the layers of the same name in other modules
    of the same class, and the layers that engines fuse with these. The run stops with an error where the model uses any
    other unsolved weight directly (`UnsolvedWeight`).
    """
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    modules = dict(network.named_modules())
    attributes = {name: _class_and_attribute(name, modules) for name in linears}
    found = {attributes[name] for name in trial.direct & linears.keys()}
    uncalled = []
    for names in group_fused_siblings(linears):  # grouped by name only: RWKV's key and value have different inputs
        num_inputs = {shape_of(linears[name])[1] for name in names if attributes[name] in found}
        uncalled += [name for name in names if shape_of(linears[name])[1] in num_inputs]
    return uncalled


def _class_and_attribute(name: str, modules: Mapping[str, nn.Module]) -> tuple[type[nn.Module], str]:
    """Return the class of the module that contains a layer, and the layer's attribute name there."""
    parent, _, own = name.rpartition(".")
    return type(modules[parent]), own
