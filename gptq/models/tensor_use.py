"""Account for every tensor of a checkpoint: the forward computes with it, it is packed, or a note names it."""

import re
from collections.abc import Collection, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.models.blocks import Block
from gptq.models.experts import Experts
from gptq.models.tensor_names import Names
from gptq.models.trial_forward import Trial

MOST_KINDS = 20  # of tensors that notes name; the last note counts the others


def find_used_tensors(network: PreTrainedModel, names: Names, blocks: list[Block], trial: Trial) -> set[str]:
    """Return the checkpoint's names of the tensors that the trial's forward computed with.

    Tensors of experts count as used where their module was called. So does a tensor of a block that is called like one
    that was used in this block, but for numbers: which modules of a list run depends on the weights.
    """
    used = {*trial.used, *_of_called_experts(network, trial)}
    in_blocks = {f"{block.name}.": block.name for block in blocks}
    kinds = {kind for name in used if (kind := _kind_in_block(name, in_blocks))}
    held = (name for name, _ in _stored_tensors(network))
    return {
        stored
        for name in held
        if name in used or _kind_in_block(name, in_blocks) in kinds
        for stored in names.find_all(name)
    }


def _of_called_experts(network: nn.Module, trial: Trial) -> Iterator[str]:
    for path, module in network.named_modules():
        if isinstance(module, Experts) and path in trial.called:
            yield from (f"{path}.{name}" for name, _ in module.named_parameters())


def _stored_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters and the buffers that are read from a checkpoint, with all their names."""
    yield from network.named_parameters(remove_duplicate=False)
    for path, module in network.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield f"{path}.{key}".removeprefix("."), buffer


def _kind_in_block(name: str, in_blocks: dict[str, str]) -> tuple[str, str] | None:
    """Return a tensor's block, and its name there with * for numbers; None for a tensor outside the blocks."""
    for number in re.finditer(r"(?<=\.)\d+\.", name):
        block = in_blocks.get(name[: number.end()])
        if block:
            return block, re.sub(r"\d+", "*", name[number.end() :])
    return None


def notes_on_unused(unknown: Collection[str], unused: Collection[str], stored: Collection[str]) -> Iterator[str]:
    """Yield notes for the user on the tensors of a checkpoint that no forward reads, one on each kind.

    Args:
        unknown: the tensors that the model does not have.
        unused: those that it has and does not compute with.
        stored: all tensors of the checkpoint.
    """
    for chosen, reason in (
        (unknown, "not in the model that config.json describes"),
        (unused, "the forward of the calibration inputs does not compute with it"),
    ):
        yield from _limited([f"{kind}: {reason}; copied" for kind in describe_kinds(chosen, stored)])


def _limited(notes: list[str]) -> Iterator[str]:
    yield from notes[:MOST_KINDS]
    if notes[MOST_KINDS:]:
        yield f"and {len(notes) - MOST_KINDS} further kinds of tensors like the last one"


def describe_kinds(chosen: Collection[str], stored: Collection[str]) -> list[str]:
    """Name tensors briefly: a module for all it holds if all of that is chosen, and * for numbers of several."""
    others = {prefix for name in {*stored} - {*chosen} for prefix in _prefixes(name)}
    held: dict[str, list[str]] = {}  # by the outermost module that holds nothing else
    for name in chosen:
        held.setdefault(next((top for top in _prefixes(name) if top not in others), name), []).append(name)
    kinds: dict[str, list[tuple[str, int]]] = {}  # by a name with * for numbers
    for top, names in held.items():
        label = top if len(names) > 1 else names[0]
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", label), []).append((label, len(names)))
    found = []
    for kind, alike in kinds.items():
        count, label = sum(number for _, number in alike), alike[0][0] if len(alike) == 1 else kind
        found.append(f"{label} ({count} tensors)" if count > 1 else label)
    return found


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules that hold a tensor, from the outermost on, and the tensor's own name."""
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))
