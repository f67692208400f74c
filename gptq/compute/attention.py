"""Attention on a CPU by matrix products, for training: two to three times as fast as torch's fused kernel.

Queries are taken in runs; a causal run meets only the keys up to its end. For a run of rows

    S = Q K^T scale,   P = softmax(S),   O = P V,
    dV += P^T dO,   dS = P (dO V^T - dO . O) scale,   dQ = dS K,   dK += dS^T Q.

P is kept for the backward pass while it is small, and computed again otherwise; that gives the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gptq.compute.cpu_features import has_native_bfloat16

MOST_KEPT = 2**26  # bytes of P that a call keeps for its backward pass
LEAST_RUN, MOST_RUN = 64, 128  # queries in a run; short windows take short ones, and skip more keys


@contextmanager
def attention_by_products(device: torch.device) -> Iterator[None]:
    """Inside, attention without a mask, or with a causal one, is made of products on a CPU; all other is torch's."""
    if device.type != "cpu":
        yield
        return
    with _Products():
        yield


def kept_bytes(heads: int, queries: int, keys: int, dtype: torch.dtype) -> int:
    """Return about how many bytes causal attention keeps for its backward pass, beside its inputs and output."""
    every = heads * queries * keys * dtype.itemsize // 2
    return every if every <= MOST_KEPT else 0


class _Products(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            found = _attend(*args, **kwargs)
            if found is not None:
                return found
        return function(*args, **kwargs)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    """Return attention of q (batch, heads, queries, width), k and v (batch, heads, keys, .); None: torch does."""
    if attn_mask is not None or dropout_p or query.ndim != 4 or not _is_fast(query, key, value):
        return None
    if is_causal and query.shape[2] != key.shape[2]:
        return None
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3]:
        return None
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # (batch heads, tokens, width)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = _Attention.apply(q, k, v, factor, is_causal)
    return found.reshape(*query.shape[:3], value.shape[3])


def _is_fast(*tensors: Tensor) -> bool:
    """Whether the CPU multiplies matrices of the tensors' dtype itself."""
    dtypes = {x.dtype for x in tensors}
    native = {torch.float32} | ({torch.bfloat16} if has_native_bfloat16() else set())
    return len(dtypes) == 1 and dtypes <= native and all(x.device.type == "cpu" for x in tensors)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head of x (batch, heads, tokens, width) for the heads of queries that share it."""
    batch, own, tokens, width = x.shape
    return x[:, :, None].expand(batch, own, heads // own, tokens, width).reshape(batch, heads, tokens, width)


def _runs(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield runs of queries, and the keys that each attends to."""
    size = max(LEAST_RUN, min(MOST_RUN, queries // 8))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield slice(start, stop), slice(0, stop if causal else keys)


def _probabilities(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Return P (batch, run, keys) of a run of queries; the last keys are its own if it is causal."""
    S = torch.bmm(q, k.mT).mul_(scale)
    if causal:
        run = q.shape[1]
        S[:, :, -run:] += torch.full((run, run), -torch.inf, dtype=S.dtype).triu_(1)
    return torch.softmax(S, -1)


class _Attention(torch.autograd.Function):
    """Attention of q (batch, queries, width), k (batch, keys, width) and v (batch, keys, width of v)."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        found = q.new_empty(*q.shape[:2], v.shape[2])
        keeps = q.shape[0] * q.shape[1] * k.shape[1] * q.itemsize // (1 + causal) <= MOST_KEPT
        every = []
        for rows, columns in _runs(q.shape[1], k.shape[1], causal):
            P = _probabilities(q[:, rows], k[:, columns], scale, causal)
            torch.bmm(P, v[:, columns], out=found[:, rows])
            every += [P] if keeps else []
        ctx.save_for_backward(q, k, v, found, *every)
        ctx.scale, ctx.causal = scale, causal  # type: ignore[attr-defined]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, found, *every = ctx.saved_tensors
        gradient = gradient.contiguous()
        inner = (gradient * found).sum(-1, keepdim=True)  # (batch, queries, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, (rows, columns) in enumerate(_runs(q.shape[1], k.shape[1], ctx.causal)):
            P = every[number] if every else _probabilities(q[:, rows], k[:, columns], ctx.scale, ctx.causal)
            own = gradient[:, rows]
            dv[:, columns].baddbmm_(P.mT, own)
            dS = torch.bmm(own, v[:, columns].mT).sub_(inner[:, rows]).mul_(P).mul_(ctx.scale)
            torch.bmm(dS, k[:, columns], out=dq[:, rows])
            dk[:, columns].baddbmm_(dS.mT, q[:, rows])
        return dq, dk, dv, None, None
