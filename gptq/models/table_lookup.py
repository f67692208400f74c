"""Look names up in transformers' conversion table."""

import re
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming

from gptq.models.experts import FUSED_PARTS

# Keys of which a packed layer has at least one.
PACKED_MARKERS = ("qweight", "weight_packed", "weight_ggml", "scales", "weight_scale", "weight_scale_inv")
PACKED = re.compile(  # suffixes of a packed layer's tensors beside or instead of `weight`
    r"(?<=\.)(qweight|qzeros|scales|biases|g_idx|"
    r"weight_(?:packed|ggml|(?:global_)?scale|scale_inv|zero_point|shape|g_idx))$"
)
STACKING = {"MergeModulelist", "Concatenate", "Force16BytesAlignment"}  # conversions that fuse separate experts


def name_in_model(name: str, table: list[Any]) -> tuple[str, tuple[str, str, int] | None]:
    """Return the name in the model of a stored tensor, and how the table assembles it into a whole tensor.

    A matrix of one expert is named as in `models.experts`. The second value is the name of the whole tensor, the
    pattern that matched, and the number of the table's entry; None if the stored tensor is not a part of another.
    If the table makes several tensors of the stored one, the name is that of the first of these.
    """
    part = None
    suffix = PACKED.search(name)
    key = renamed(PACKED.sub("weight", name), table)
    for number, converter in enumerate(table):
        fused, pattern = converter.rename_source_key(key) if isinstance(converter, WeightConverter) else (key, None)
        if pattern is not None:
            single = _name_of_expert_matrix(key, fused, str(pattern), converter)
            if not suffix and (len(converter.target_patterns) == 1 or divides(converter)):
                part = fused, str(pattern), number
            key = single or key
            break
    return key.removesuffix("weight") + suffix[0] if suffix else key, part


def divides(converter: Any) -> bool:
    """Whether a conversion makes several tensors of one."""
    return len(converter.source_patterns) == 1 and len(converter.target_patterns) > 1


def renamed(name: str, table: list[Any]) -> str:
    """Return a stored name after all of the table's renamings."""
    for renaming in table:
        if isinstance(renaming, WeightRenaming):
            name, _ = renaming.rename_source_key(name)
    return name


def _name_of_expert_matrix(key: str, fused: str, pattern: str, converter: Any) -> str | None:
    """Return the name in `models.experts` of a matrix that is part of `fused`; None if it is not an expert's."""
    experts, _, parameter = fused.rpartition(".")
    parts = FUSED_PARTS.get(parameter, ())
    plain = pattern.replace("\\", "")  # some patterns escape their first dot
    number = re.search(re.escape(plain).replace(r"\*", r"(\d+)"), key)
    stacked = {type(operation).__name__ for operation in converter.operations} <= STACKING
    if not number or not stacked or len(parts) != len(converter.source_patterns):
        return None
    return f"{experts}.{number[1]}.{parts[converter.source_patterns.index(pattern)]}.weight"


def find_expert_name(fused: str, part: str, table: list[Any]) -> str | None:
    """Return how transformers' table names a matrix of one expert that it stacks to `fused`, with * for the number."""
    parts = FUSED_PARTS.get(fused.rpartition(".")[2], ())
    for converter in table if part in parts else []:
        if not isinstance(converter, WeightConverter) or len(converter._original_source_patterns) != len(parts):
            continue
        sources = converter._original_source_patterns
        if {type(operation).__name__ for operation in converter.operations} <= STACKING:
            key, pattern = converter.reverse_transform().rename_source_key(fused)
            if pattern is not None:
                first, wanted = (sources[i].replace("\\", "") for i in (0, parts.index(part)))
                key = key.replace("\\", "").replace(first, wanted)
                for renaming in reversed(table):
                    if isinstance(renaming, WeightRenaming) and type(renaming).__name__ != "PrefixChange":
                        key, _ = renaming.reverse_transform().rename_source_key(key)
                return key
    return None
