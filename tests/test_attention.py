"""Attention by products computes what attention is, and its gradients; models use it where they are told to."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptq.compute import attention
from gptq.compute.attention import attend
from gptq.compute.cpu_features import has_native_bfloat16
from gptq.models.attention import SDPA, attention_by_products
from tests.conftest import MakeModel

NATIVE = [torch.float32, *([torch.bfloat16] if has_native_bfloat16() else [])]


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention by its definition."""
    S = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        S = S.masked_fill(torch.ones(S.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(S, -1) @ v


def drawn(
    queries: int, keys: int, heads: int, dtype: torch.dtype, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, and keys and values of `heads`."""
    shapes = [(2, 4, queries, 16), (2, heads, keys, 16), (2, heads, keys, 19)]
    q, k, v = (torch.randn(s, generator=rng).to(dtype).requires_grad_() for s in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "causal", "scale"),
    [
        (2, 2, 4, True, None),
        (200, 200, 4, True, None),  # no whole number of runs
        (600, 600, 4, True, 0.3),  # groups of heads
        (64, 150, 4, False, None),
        (130, 130, 2, True, None),  # two heads of queries to one of keys
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_outputs_and_gradients_are_those_of_the_definition(
    kept: bool, queries: int, keys: int, heads: int, causal: bool, scale: float | None, dtype: torch.dtype,
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "MOST_KEPT", 2**40 if kept else 0)
    monkeypatch.setattr(attention, "CACHED_SCORES", 2**16)
    given = drawn(queries, keys, heads, dtype, rng)
    found = attend(*given, scale, causal)
    assert found is not None
    weight = torch.randn(found.shape, generator=rng).to(dtype)
    found.backward(weight)

    double = [x.detach().double().requires_grad_() for x in given]
    k, v = (x.repeat_interleave(4 // heads, 1) for x in double[1:])
    wanted = exact(double[0], k, v, causal, scale)
    wanted.backward(weight.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for own, other in zip([found, *(x.grad for x in given)], [wanted, *(x.grad for x in double)], strict=True):
        assert own is not None
        assert other is not None
        assert own.dtype == dtype
        off, size = (own.double() - other).detach().norm(), other.detach().norm()
        assert float(off) <= tolerance * float(size) + 1e-6


def test_what_is_kept_and_what_is_computed_again_is_the_same(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = drawn(150, 150, 4, torch.float32, rng)
    gradients = []
    for most in (2**40, 0):
        monkeypatch.setattr(attention, "MOST_KEPT", most)
        found = attend(*given, None, True)
        assert found is not None
        found.square().sum().backward()
        gradients.append(torch.cat([x.grad.flatten() for x in given if x.grad is not None]))
        for x in given:
            x.grad = None
    assert torch.equal(*gradients)
    assert attention.kept_bytes(8, 150, 150, torch.float32) == 0
    monkeypatch.setattr(attention, "MOST_KEPT", 2**40)
    assert attention.kept_bytes(8, 150, 150, torch.float32) == 8 * 150 * 150 * 2


def test_what_it_does_not_know_it_leaves_alone(rng: torch.Generator) -> None:
    q, k, v = (x.detach() for x in drawn(9, 9, 4, torch.float32, rng))
    assert attend(q, k, v, None, True) is not None
    assert attend(q[:, :, :3], k, v, None, True) is None  # a causal run over keys of before
    assert attend(q.double(), k.double(), v.double(), None, True) is None
    assert attend(q.double(), k, v, None, True) is None
    assert attend(q[0], k[0], v[0], None, True) is None


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a model's attention was made of products."""
    calls: list[bool] = []
    own = attention.attend

    def watched(*args: Any) -> Tensor | None:
        found = own(*args)
        calls.append(found is not None)
        return found

    monkeypatch.setattr("gptq.models.attention.attend", watched)
    return calls


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "opt", "phi3"])
def test_models_compute_the_same_inside_and_outside_it_is_as_it_was(
    kind: str, make_model: MakeModel, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    network = AutoModelForCausalLM.from_pretrained(make_model(kind), dtype=torch.float32)
    ids = torch.randint(2, 300, (2, 14), generator=rng)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with torch.no_grad():
        plain, masked = network(input_ids=ids).logits, network(input_ids=ids, attention_mask=padded).logits
        assert calls == []
        with attention_by_products():
            torch.testing.assert_close(network(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
            assert calls == [True] * network.config.num_hidden_layers
            torch.testing.assert_close(network(input_ids=ids, attention_mask=padded).logits, masked)
            assert len(calls) == network.config.num_hidden_layers  # masks are the model's own business
        assert torch.equal(network(input_ids=ids).logits, plain)
        assert len(calls) == network.config.num_hidden_layers


def test_only_the_thread_inside_takes_part(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, given = counted(monkeypatch), drawn(9, 9, 4, torch.float32, rng)
    module, outside = nn.Identity(), []

    def run() -> None:
        outside.append(ALL_ATTENTION_FUNCTIONS[SDPA](module, *given, None)[0])

    with attention_by_products():
        with attention_by_products():
            pass
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert calls == []
        inside = ALL_ATTENTION_FUNCTIONS[SDPA](module, *given, None)[0]
    assert calls == [True]
    torch.testing.assert_close(inside, outside[0])
    run()
    assert torch.equal(*outside)
    with attention_by_products():  # dropout is torch's own
        ALL_ATTENTION_FUNCTIONS[SDPA](module, *given, None, dropout=0.5)
    assert calls == [True]
