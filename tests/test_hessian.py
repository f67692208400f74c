"""H is the closed form, summed in float32, and does not depend on how the tokens arrive."""

from functools import partial

import pytest
import torch

from gptq import solver
from gptq.compute import matmul
from gptq.compute.matmul import exact_float32, onednn_linears, product
from gptq.solver import IntegerGrid
from gptq.solver import hessian as hessian_module
from gptq.solver.hessian import HeldOut, HessianAccumulator, mean_output_power
from tests.conftest import threads


def hessian(*parts: torch.Tensor) -> torch.Tensor:
    accumulator = HessianAccumulator(parts[0].shape[-1], torch.device("cpu"))
    for part in parts:
        accumulator.add(part)
    assert accumulator.num_tokens == sum(part.numel() // part.shape[-1] for part in parts)
    return accumulator.mean()


def test_closed_form_over_windows_of_different_shapes(rng: torch.Generator) -> None:
    X = torch.randn(50, 12, generator=rng)
    H = hessian(X[:10], X[10:30].view(2, 10, 12), X[30:])
    assert torch.allclose(H.double(), X.double().T @ X.double() / 50, atol=1e-6)
    assert torch.equal(H, H.T)


def test_bfloat16_inputs_are_exact(rng: torch.Generator) -> None:
    """Small integers times a power of two: every product and sum is a float32, so H has to be exact to the bit."""
    X = (torch.randint(-15, 16, (256, 8), generator=rng) * 2.0**-5).bfloat16()
    assert torch.equal(hessian(X).double(), X.double().T @ X.double() / 256)


def test_half_precision_does_not_overflow_the_sum() -> None:
    X = torch.full((1000, 2), 200.0, dtype=torch.float16)  # 200^2 * 1000 is far above float16's 65504
    assert torch.equal(hessian(X), torch.full((2, 2), 40000.0))


def test_no_tokens_is_zero_not_nan() -> None:
    assert torch.equal(HessianAccumulator(3, torch.device("cpu")).mean(), torch.zeros(3, 3))


def test_reduced_precision_modes_are_off_inside_and_come_back() -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this torch has one precision setting for all backends")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # the setting of old
        with torch.autocast("cpu", torch.bfloat16), exact_float32(torch.device("cpu")):
            assert (x @ x).dtype == torch.float32
            assert matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    own = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"  # the newer one
        with exact_float32(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = own


def exactly_summable(rng: torch.Generator, tokens: int, inputs: int) -> torch.Tensor:
    """Small integers times a power of two, in bfloat16: their products and sums are float32 numbers, in any order."""
    return (torch.randint(-15, 16, (tokens, inputs), generator=rng) * 2.0**-5).bfloat16()


def imitated_mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """What torch.mm does on a GPU, where factors of 16 bits may have a result of 32."""
    return (a.double() @ b.double()).to(out_dtype)


@pytest.mark.parametrize("way", ["pairs", "gpu", "floats"])
@pytest.mark.parametrize("tokens", [1, 33, 70])
def test_every_way_of_adding_up_is_the_exact_one(
    way: str, tokens: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, for the panels that are asked for and no others; what lies below the diagonal may stay."""
    if way == "pairs" and not hessian_module._has_bf16_kernel(torch.zeros(1, 320, dtype=torch.bfloat16)):
        pytest.skip("this CPU has no products of pairs of bfloat16 numbers")
    x, original = exactly_summable(rng, tokens, 320), exactly_summable(rng, tokens, 320)
    a, b, add = hessian_module._prepare_factors(original, x) if way == "pairs" else (original, x, None)
    if way == "gpu":
        monkeypatch.setattr(torch, "mm", imitated_mm)
        add = hessian_module._add_half_products
    elif way == "floats":
        a, b, add = a.float(), x.float(), partial(hessian_module._add_float_products, torch.bfloat16)
    exact, panels = original.double().T @ x.double(), [slice(0, 256), slice(256, 320)]
    for chosen in (panels, panels[1:]):
        sums = torch.zeros(320, 320)
        assert add is not None
        add(sums, a, b, chosen, False)
        first = chosen[0].start
        assert torch.equal(sums[first:].double(), exact[first:])
        assert not sums[:first].any()
        add(sums, a, b, chosen, True)
        assert torch.equal(sums[first:].triu(first).double(), 2 * exact[first:].triu(first))


def test_threads_change_no_bit(rng: torch.Generator) -> None:
    x = torch.randn(100, 320, generator=rng).bfloat16()
    alone = hessian(x)
    with threads(3):
        assert torch.equal(hessian(x), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [64, 40, 192])  # numbers of a token's drift: of inputs, or of fewer or more outputs
def test_drift_is_its_closed_form_wherever_it_begins(k: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    """C = mean d x^T; nothing where there is no d, and windows without one have none."""
    windows = [torch.randn(20, 64, generator=rng).to(dtype) for _ in range(4)]
    drifts = [None, None, torch.randn(20, k, generator=rng).to(dtype), None]
    accumulator, C = HessianAccumulator(64, torch.device("cpu")), torch.zeros(k, 64, dtype=torch.float64)
    for number, (x, drift) in enumerate(zip(windows, drifts, strict=True)):
        accumulator.add(x, drift)
        C += 0 if drift is None else drift.double().T @ x.double() / 80
        assert (accumulator.drift_mean() is None) == (number < 2)
    found = accumulator.drift_mean()
    assert found is not None
    assert torch.allclose(found.double(), C, atol=1e-6)
    H, taken = accumulator.take()
    assert taken is not None
    assert torch.allclose(taken, found, atol=1e-7)
    every = torch.cat(windows).double()
    assert torch.allclose(H.double(), every.T @ every / 80, atol=1e-6)


@pytest.fixture(params=["oneDNN", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies on a CPU, whichever this one prefers."""
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(matmul, "_prefers_onednn", lambda: request.param == "oneDNN")
    return str(request.param)


@pytest.mark.parametrize("shape", [(5, 7, 3), (128, 300, 64), (1, 1, 1), (0, 4, 4), (4, 0, 4)])
def test_products_are_float32_products_along_any_strides(
    shape: tuple[int, int, int], library: str, rng: torch.Generator
) -> None:
    rows, inner, columns = shape
    wide = torch.randn(rows + 3, inner + 3, generator=rng)
    B = torch.randn(inner + 3, columns + 3, generator=rng)
    pairs = [
        (wide[:rows, :inner], B[:inner, :columns]),
        (wide.T[:inner, :rows].T, B.T.contiguous().T[:inner, :columns]),
    ]
    for left, right in pairs:
        found = product(left, right)
        exact = left.double() @ right.double()
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), exact, atol=1e-5 * max(inner, 1) ** 0.5)
    assert product(wide.double(), wide.double().T).dtype == torch.float64


@pytest.mark.parametrize("way", ["pairs", "gpu", "floats"])
@pytest.mark.parametrize("inputs", [320, 70])
def test_powers_are_those_of_the_closed_form_to_three_digits(
    way: str, inputs: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tr(A H A^T) also where A's error is made up for by what H says, so that most of it cancels."""
    if way == "pairs" and not hessian_module._has_bf16_kernel(torch.zeros(1, inputs, dtype=torch.bfloat16)):
        pytest.skip("this CPU or this width has no products of pairs of bfloat16 numbers")
    monkeypatch.setattr(hessian_module, "_has_mixed_precision_mm", lambda _: way == "gpu")
    if way == "gpu":
        monkeypatch.setattr(torch, "mm", imitated_mm)
    elif way == "floats":
        monkeypatch.setattr(hessian_module, "_has_bf16_kernel", lambda _: False)
    x = torch.randn(500, inputs, generator=rng) + 5 * torch.randn(500, 1, generator=rng)  # one direction dominates
    H = x.T @ x / 500
    W = torch.randn(400, inputs, generator=rng)
    solved = solver.solve(W, solver.factorize(H, solver.act_order(H)), IntegerGrid(3, sym=True), inputs)
    off = W - solved.weight()
    for A in (W, off):
        exact = float(torch.trace(A.double() @ H.double() @ A.double().T))
        assert mean_output_power(A, H) == pytest.approx(exact, rel=1e-3 if way != "floats" else 1e-5)
    exact = float(torch.trace(W.double() @ H.double() @ H.double() @ off.double().T))
    size = float((W.double() @ H.double()).norm() * (off.double() @ H.double()).norm())
    assert hessian_module._gram_dot(W, off, H @ H) == pytest.approx(exact, abs=1e-3 * size)


@pytest.mark.parametrize("tokens", [20, 90])  # fewer and more than inputs: kept as rows, and as sums
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_held_out_measure_what_they_are_in(dtype: torch.dtype, tokens: int, rng: torch.Generator) -> None:
    held = HeldOut(64, torch.device("cpu"))
    windows, drifts = ([torch.randn(tokens, 64, generator=rng).to(dtype) for _ in range(2)] for _ in range(2))
    for x, drift in zip(windows, drifts, strict=True):
        held.add(x, drift)
    W, A = (torch.randn(48, 64, generator=rng).bfloat16().float() for _ in range(2))
    x, d = torch.cat(windows).double(), torch.cat(drifts).double()
    outputs = x @ A.double().T
    assert held.power(A) == pytest.approx(float(outputs.square().sum()) / len(x), rel=2e-2)
    drifted = d @ W.double().T
    size = float(drifted.norm() * outputs.norm()) / len(x)
    of_inputs = held.agreement(W, A, slice(None))
    assert of_inputs == pytest.approx(float((drifted * outputs).sum()) / len(x), abs=2e-2 * size)
    rows = slice(8, 56)
    of_outputs = held.agreement(None, A, rows)
    size = float(d[:, rows].norm() * outputs.norm()) / len(x)
    assert of_outputs == pytest.approx(float((d[:, rows] * outputs).sum()) / len(x), abs=2e-2 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_linears_compute_what_linears_do(dtype: torch.dtype, library: str, rng: torch.Generator) -> None:
    """With the weight of the moment, for every shape of input; gradients flow, and afterwards nothing is left."""
    layer = torch.nn.Linear(70, 48).to(dtype)
    layer.requires_grad_(False)
    inputs = [torch.randn(*shape, 70, generator=rng).to(dtype) for shape in ((3, 5), (15,), (1,), (0,), (5, 3))]
    wide = torch.randn(6, 140, generator=rng).to(dtype)[:, ::2]
    eps = torch.finfo(dtype).eps
    with torch.no_grad(), onednn_linears(layer):
        for _ in range(2):
            for x in [*inputs, wide]:
                exact = x.double() @ layer.weight.double().T + layer.bias.double()
                assert layer(x).shape == exact.shape
                size = x.double().abs() @ layer.weight.double().abs().T + layer.bias.double().abs()
                assert bool(((layer(x).double() - exact).abs() <= 4 * eps * size).all())
            layer.weight.copy_(torch.randn(48, 70, generator=rng))  # in place, and then another tensor
            layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
        with torch.enable_grad():
            x = inputs[0].requires_grad_()
            layer(x).sum().backward()
            assert x.grad is not None
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("library", ["oneDNN"], indirect=True)
def test_small_weights_are_kept_in_another_order_until_others_take_their_place(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reordered, nbytes = matmul._ReorderedWeights(), 4 * 32 * 32
    first, second, third = (torch.full((32, 32), float(i)) for i in range(3))
    monkeypatch.setattr(matmul, "KEPT_BYTES", 2 * nbytes)
    made = [reordered(first, 4), reordered(second, 4)]
    assert reordered(first, 4) is made[0]
    reordered(third, 4)  # in the place of the second, which was used least recently
    assert reordered(first, 4) is made[0]
    assert reordered(second, 4) is not made[1]
    assert reordered(second, 5) is not reordered(second, 4)  # the order is for a number of rows
    monkeypatch.setattr(matmul, "KEPT_BYTES", 1)
    assert reordered(third, 4) is reordered(third, 4)
    assert len(reordered._kept) == 1


@pytest.mark.parametrize("library", ["oneDNN"], indirect=True)
def test_a_weight_in_another_order_is_forgotten_with_the_weight(library: str) -> None:
    layer = torch.nn.Linear(32, 32)
    with torch.no_grad(), onednn_linears(layer):
        layer(torch.ones(4, 32))
        reordered = layer.forward.args[1]  # type: ignore[attr-defined]
        assert len(reordered._kept) == 1
        layer.weight = torch.nn.Parameter(torch.ones(32, 32))
        assert not reordered._kept
        assert torch.equal(layer(torch.ones(1, 32)), 32 + layer.bias[None])
