"""Let the attention of transformers' models run by `compute.attention` on a CPU.

The models look up the function for "sdpa" in a table. There it is replaced once by one that does what it did, unless
the thread is inside `attention_by_products`; so neither other threads nor the user's own code computes anything else.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptq.compute.attention import attend

SDPA = "sdpa"  # transformers' name of attention by torch.nn.functional.scaled_dot_product_attention
OTHERS = ("position_bias", "cache", "softcap")  # what the function may be given, and `attend` knows nothing of

_lock = threading.Lock()
_inside = threading.local()


@contextmanager
def attention_by_products() -> Iterator[None]:
    """Inside, this thread's models make attention of products where that is faster, up to rounding the same."""
    with _lock:
        if not isinstance(ALL_ATTENTION_FUNCTIONS[SDPA], _Sdpa):
            ALL_ATTENTION_FUNCTIONS[SDPA] = _Sdpa(_attention, ALL_ATTENTION_FUNCTIONS[SDPA])
    before = getattr(_inside, "is_on", False)
    _inside.is_on = True
    try:
        yield
    finally:
        _inside.is_on = before


class _Sdpa(partial[Any]):
    """The function that stands in the table, recognized by its type."""


def _attention(
    plain: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention as transformers' own function `plain` does, (batch, queries, heads, width of v)."""
    knows = attention_mask is None and not options.get("dropout") and all(options.get(name) is None for name in OTHERS)
    if getattr(_inside, "is_on", False) and knows:
        causal = options.get("is_causal")
        causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if causal is None else causal)
        found = attend(query, key, value, options.get("scaling"), causal)
        if found is not None:
            return found.transpose(1, 2).contiguous(), None
    both: tuple[Tensor, None] = plain(module, query, key, value, attention_mask, **options)
    return both
