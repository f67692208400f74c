"""Check that a checkpoint has every tensor of a model."""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.checkpoint.tensors import TensorInfo
from gptq.errors import InputError
from gptq.models.stored_forms import ExpertSlice, SplitTensor
from gptq.models.tensor_names import Names


def check_tensors(
    network: PreTrainedModel,
    names: Names,
    tensors: dict[str, TensorInfo],
    packed: Collection[str] = (),
    has_new_head: bool = False,
) -> list[str]:
    """Check that a checkpoint's headers announce every tensor that a model needs; return the tensors left over.

    Args:
        packed: names of the model's layers whose weight is stored packed and so not checked.
        has_new_head: the checkpoint need not have what is outside the base model inside this one.
    Raises:
        InputError: a tensor is missing, has another shape, or is not of a floating-point dtype.
    """
    used: set[str | None] = set()
    without = {f"{name}.weight" for name in packed}
    without |= names.computed.keys()
    if has_new_head and network.base_model is not network:
        outside = (n for n, _ in network.named_parameters() if not n.startswith(f"{network.base_model_prefix}."))
        without |= {name for name in outside if not names.find_all(name)}
    needed = [(name, tensor) for name, tensor in network.named_parameters() if name not in without]
    for name, tensor in [*needed, *((n, b) for n, b in network.named_buffers() if names.find(n))]:
        split, part = names.find_split(name), names.find_slice(name)
        own = names.find_all(name) or [names.require(name)]
        if part is not None and used.issuperset(own):
            continue  # another expert's slice of the same tensor
        used |= {*own}
        shape = _assembled_shape(split, tensors) if split else tensors[own[0]].shape
        expected = tuple(tensor.shape)
        if part is not None:
            shape, expected = _fused_shape(part, tensors), part.fused.shape
        if shape != expected:
            raise InputError(
                f"{own[0]} has the shape {shape}, but config.json describes a model where it is {expected}"
            )
        for stored in own:
            dtype = tensors[stored].dtype
            if tensor.is_floating_point() and not dtype.is_floating_point:
                raise InputError(f"{stored} holds {dtype}, not floating-point weights; is the checkpoint quantized?")
    used |= {names.find(name) for name in getattr(network, "all_tied_weights_keys", None) or {}}
    return [name for name in tensors if name not in used]


def _assembled_shape(split: SplitTensor, tensors: dict[str, TensorInfo]) -> tuple[int, ...]:
    """Return the shape of a tensor assembled from its parts, on the meta device.

    Raises:
        InputError: transformers cannot assemble the tensor.
    """
    try:
        return tuple(split.assemble(lambda stored: torch.empty(tensors[stored].shape, device="meta")).shape)
    except Exception as error:  # any type, depending on the operation
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{split.parts[0][1]} and its like do not make up a {split.name}: {reason}") from error


def _fused_shape(part: ExpertSlice, tensors: dict[str, TensorInfo]) -> tuple[int, ...]:
    """Return the shape, as in the model, of a tensor of all experts.

    Raises:
        InputError: its parts do not hold as many experts, or transformers cannot assemble one expert of them.
    """
    fused = part.fused
    if fused.split is None:
        return tensors[fused.stored].shape
    counts = {tensors[stored].shape[:1] for stored in fused.stored_names}
    try:
        one = tuple(fused.read_expert(0, partial(_empty_slice, tensors)).shape)
    except Exception as error:  # any type, depending on the operation
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{fused.stored} and its like do not make up a {fused.name}: {reason}") from error
    return (*(counts.pop() if len(counts) == 1 else ()), *one)


def _empty_slice(tensors: dict[str, TensorInfo], stored: str, number: int) -> Tensor:
    return torch.empty(tensors[stored].shape, device="meta")[number]
