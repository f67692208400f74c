"""Attention by products computes what attention is, and its gradients, and leaves to torch what it does not know."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gptq.compute import attention
from gptq.compute.attention import attention_by_products
from gptq.compute.cpu_features import has_native_bfloat16

CPU = torch.device("cpu")
NATIVE = [torch.float32, *([torch.bfloat16] if has_native_bfloat16() else [])]


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention by its definition."""
    S = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        S = S.masked_fill(torch.ones(S.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(S, -1) @ v


def drawn(
    shape: tuple[int, int, int, int], keys: int, heads: int, dtype: torch.dtype, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, _, width = shape
    shapes = [shape, (batch, heads, keys, width), (batch, heads, keys, width + 3)]
    q, k, v = (torch.randn(s, generator=rng).to(dtype).requires_grad_() for s in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "options"),
    [
        (2, 2, 4, {"is_causal": True}),
        (200, 200, 4, {"is_causal": True}),  # no whole number of runs
        (1100, 1100, 4, {"is_causal": True, "scale": 0.3}),
        (64, 150, 4, {}),
        (130, 130, 2, {"is_causal": True, "enable_gqa": True}),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_outputs_and_gradients_are_those_of_the_definition(
    kept: bool, queries: int, keys: int, heads: int, options: dict[str, Any], dtype: torch.dtype, rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "MOST_KEPT", 2**40 if kept else 0)
    given = drawn((2, 4, queries, 16), keys, heads, dtype, rng)
    with attention_by_products(CPU):
        found = scaled_dot_product_attention(*given, **options)
    weight = torch.randn(found.shape, generator=rng).to(dtype)
    found.backward(weight)
    assert "_Attention" in str(found.grad_fn.next_functions[0][0])  # type: ignore[union-attr]

    double = [x.detach().double().requires_grad_() for x in given]
    k, v = (x.repeat_interleave(4 // heads, 1) for x in double[1:])
    wanted = exact(double[0], k, v, options.get("is_causal", False), options.get("scale"))
    wanted.backward(weight.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for own, other in zip([found, *(x.grad for x in given)], [wanted, *(x.grad for x in double)], strict=True):
        assert own is not None
        assert other is not None
        assert own.dtype == dtype
        off, size = (own.double() - other).detach().norm(), other.detach().norm()
        assert float(off) <= tolerance * float(size) + 1e-6


def test_what_is_kept_and_what_is_computed_again_is_the_same(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = drawn((1, 2, 150, 8), 150, 2, torch.float32, rng)
    gradients = []
    for most in (2**40, 0):
        monkeypatch.setattr(attention, "MOST_KEPT", most)
        with attention_by_products(CPU):
            scaled_dot_product_attention(*given, is_causal=True).square().sum().backward()
        gradients.append(torch.cat([x.grad.flatten() for x in given if x.grad is not None]))
        for x in given:
            x.grad = None
    assert torch.equal(*gradients)
    assert attention.kept_bytes(2, 150, 150, torch.float32) == 0
    monkeypatch.setattr(attention, "MOST_KEPT", 2**40)
    assert attention.kept_bytes(2, 150, 150, torch.float32) == 2 * 150 * 150 * 2


@pytest.mark.parametrize("other", ["mask", "float64", "float16", "three dimensions", "causal over longer keys"])
def test_the_rest_is_torchs(other: str, rng: torch.Generator) -> None:
    q, k, v = (x.detach() for x in drawn((1, 2, 5, 8), 5, 2, torch.float32, rng))
    options: dict[str, Any] = {"is_causal": other != "mask"}
    if other == "mask":
        options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).tril()
    elif other == "three dimensions":
        q, k, v = q[0], k[0], v[0]
    elif other == "causal over longer keys":
        q = q[:, :, :3]
    else:
        q, k, v = (x.to(getattr(torch, other)) for x in (q, k, v))
    plain = scaled_dot_product_attention(q, k, v, **options)
    with attention_by_products(CPU):
        assert torch.equal(scaled_dot_product_attention(q, k, v, **options), plain)


def test_outside_and_on_a_gpu_nothing_changes(rng: torch.Generator) -> None:
    given = drawn((1, 2, 5, 8), 5, 2, torch.float32, rng)
    with attention_by_products(torch.device("cuda")):
        inside = scaled_dot_product_attention(*given, is_causal=True)
    with attention_by_products(CPU):
        pass
    for found in (inside, scaled_dot_product_attention(*given, is_causal=True)):
        assert "_Attention" not in str(found.grad_fn.next_functions)  # type: ignore[union-attr]
