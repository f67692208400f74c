"""Tensors that a model keeps in float32 while the rest of it computes in fewer bits.

transformers' classes list them by parts of their names: `_keep_in_fp32_modules_strict` for bfloat16 and float16 (the
biases by which a mixture of experts corrects its router, for example), `_keep_in_fp32_modules` for float16 alone. A
model's own lists include those of the models inside it. Besides, from_pretrained keeps what a module makes in float32
by itself, whatever the default is.

Source: transformers 5.23, modeling_utils.py, `_get_dtype_plan`, and core_model_loading.py, `build_glob_alternation` and
`convert_and_load_state_dict_in_model`.
"""

import re
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.models.hf_config import all_configs

FEW_BITS = (torch.float16, torch.bfloat16)


def dtype_rule(model: PreTrainedModel) -> Callable[[str, torch.dtype], torch.dtype]:
    """Return the rule that gives a tensor's dtype, from its name in the model and the dtype to read the model in."""
    strict = _any_of(getattr(model, "_keep_in_fp32_modules_strict", None))
    usual = _any_of(getattr(model, "_keep_in_fp32_modules", None))
    made = _made_in_float32(model)

    def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
        is_kept = dtype in FEW_BITS and (name in made or strict.search(name))
        return torch.float32 if is_kept or (dtype == torch.float16 and usual.search(name)) else dtype

    return dtype_of


def exempt_from_float32(model: PreTrainedModel, names: set[str]) -> None:
    """Have from_pretrained read some tensors of a model as they are stored, though its class keeps them in float32.

    Without it, transformers casts the scales of a packed layer like a weight.
    """
    others = [name for name, _ in _tensors(model) if name not in names]
    for listed in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept = _any_of(getattr(model, listed, None))
        if any(map(kept.search, names)):
            vars(model)[listed] = {re.escape(name) for name in others if kept.search(name)}


def _any_of(parts: list[str] | set[str] | None) -> re.Pattern[str]:
    """Return an expression that is found in names with one of these parts; * stands for anything."""
    listed = [part.replace("*", ".*") for part in sorted(parts or ())]
    return re.compile("|".join(listed) if listed else r"(?!)")


def _made_in_float32(model: PreTrainedModel) -> set[str]:
    """Return the tensors that are float32 in a model that was built in fewer bits; none if parts were built in more."""
    built = {config.dtype for config in all_configs(model.config)} - {None}  # each a torch.dtype, or its name
    built = {getattr(torch, dtype, None) if isinstance(dtype, str) else dtype for dtype in built}
    if len(built) != 1 or built.isdisjoint(FEW_BITS):
        return set()
    return {name for name, tensor in _tensors(model) if tensor.dtype == torch.float32}


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())
