"""Attention on a CPU by matrix products: up to three times as fast as torch's fused kernel.

Heads are taken in groups and queries in runs, so that the scores of a step stay in the cache; a causal run meets only
the keys up to its end. For the queries of a run

    S = Q K^T scale,   P = softmax(S),   O = P V,
    dV += P^T dO,   dS = P (dO V^T - dO . O) scale,   dQ = dS K,   dK += dS^T Q.

S, the softmax and dO V^T are float32, and factors of products have the inputs' dtype, as in the fused kernel. P is kept
for the backward pass while it is small, and computed again otherwise; that gives the same numbers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptq.compute.cpu_features import has_native_bfloat16
from gptq.compute.matmul import allow_bfloat16_matmul

MOST_KEPT = 2**26  # bytes of P that a call keeps for its backward pass
LEAST_QUERIES, MOST_QUERIES = 32, 128  # in a run, which is a quarter of the queries in between
CACHED_SCORES = 2**19  # scores of a step


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor | None:
    """Return softmax(q k^T scale) v, (batch, heads, queries, width of v); None where torch's own way is faster.

    Args:
        query: (batch, heads, queries, width).
        key: (batch, heads or a divisor of it, keys, width); each head serves as many consecutive heads of queries.
        value: (batch, heads as the key's, keys, width of v).
        scale: None for 1 / sqrt(width).
        causal: query i attends to the keys up to i; there are as many of both.
    """
    shapes = query.shape, key.shape, value.shape
    if not _is_fast(query, key, value) or any(len(shape) != 4 for shape in shapes):
        return None
    if causal and query.shape[2] != key.shape[2]:
        return None
    key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # (batch heads, tokens, width)
    found: Tensor = _Attention.apply(q, k, v, query.shape[-1] ** -0.5 if scale is None else scale, causal)
    return found.view(*query.shape[:3], value.shape[3])


def kept_bytes(heads: int, queries: int, keys: int, dtype: torch.dtype) -> int:
    """Return about how many bytes causal attention keeps for its backward pass, beside its inputs and output."""
    every = heads * queries * keys * dtype.itemsize // 2
    return every if every <= MOST_KEPT else 0


def _is_fast(*tensors: Tensor) -> bool:
    """Whether the CPU itself multiplies matrices of the tensors' dtype."""
    native = (torch.float32, torch.bfloat16) if has_native_bfloat16() else (torch.float32,)
    return all(x.device.type == "cpu" and x.dtype == tensors[0].dtype for x in tensors) and tensors[0].dtype in native


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head of x (batch, heads, tokens, width) for the heads of queries that it serves."""
    batch, own, tokens, width = x.shape
    if own == heads:
        return x
    return x[:, :, None].expand(batch, own, heads // own, tokens, width).reshape(batch, heads, tokens, width)


def _steps(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield heads, queries and keys of each step, for q (heads, queries, width) and k (heads, keys, width)."""
    heads, queries, keys = *q.shape[:2], k.shape[1]
    run = min(max(LEAST_QUERIES, queries // 4), MOST_QUERIES)
    for start in range(0, queries, run):
        stop = min(start + run, queries)
        reached = stop if causal else keys
        together = max(1, CACHED_SCORES // ((stop - start) * reached))
        for first in range(0, heads, together):
            yield slice(first, first + together), slice(start, stop), slice(0, reached)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the products a b (heads, ., .) of matrices in float32, exact but for its sums."""
    with allow_bfloat16_matmul(a.dtype, a.device):
        return torch.bmm(a.float(), b.float())


def _probabilities(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Return P (heads, queries, keys) of a step, in float32; in causal attention its queries are the last keys."""
    S = _product(q, k.mT).mul_(scale)
    if causal:
        run = q.shape[1]
        S[:, :, -run:] += S.new_full((run, run), -torch.inf).triu_(1)
    return torch.softmax(S, -1)


class _Attention(torch.autograd.Function):
    """Attention of q (heads, queries, width), k (heads, keys, width) and v (heads, keys, width of v)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        found = q.new_empty(*q.shape[:2], v.shape[2])
        keeps = kept_bytes(len(q), q.shape[1], k.shape[1] * (2 - causal), q.dtype) and any(ctx.needs_input_grad)
        every = []
        for heads, rows, columns in _steps(q, k, causal):
            P = _probabilities(q[heads, rows], k[heads, columns], scale, causal).to(q.dtype)
            torch.bmm(P, v[heads, columns], out=found[heads, rows])
            every += [P] if keeps else []
        ctx.save_for_backward(q, k, v, found, *every)
        ctx.scale, ctx.causal = scale, causal
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, found, *every = ctx.saved_tensors
        gradient = gradient.contiguous()
        inner = (gradient.float() * found).sum(-1, keepdim=True)  # (heads, queries, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, (heads, rows, columns) in enumerate(_steps(q, k, ctx.causal)):
            own, k_own, q_own = gradient[heads, rows], k[heads, columns], q[heads, rows]
            P = every[number] if every else _probabilities(q_own, k_own, ctx.scale, ctx.causal).to(q.dtype)
            dv[heads, columns].baddbmm_(P.mT, own)
            dS = _product(own, v[heads, columns].mT).sub_(inner[heads, rows]).mul_(P).mul_(ctx.scale).to(q.dtype)
            torch.bmm(dS, k_own, out=dq[heads, rows])
            dk[heads, columns].baddbmm_(dS.mT, q_own)
        return dq, dk, dv, None, None
