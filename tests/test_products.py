"""Every kernel against the float64 product with the decoded weight, and what a layer that has run still is."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq import QuantConfig, formats, load, quantize
from gptq.compute.cpu_features import has_amx, has_avx2, has_avx512_bf16
from gptq.config import Format
from gptq.formats import Codes, Scheme
from gptq.inference import products
from gptq.inference.products import CpuProduct
from gptq.inference.quant_linear import QuantLinear
from tests.conftest import VOCAB, MakeModel, threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_layer(
    rng: torch.Generator, scheme: Scheme, outputs: int, inputs: int, bias: bool = False, dtype: torch.dtype = DTYPES[0]
) -> QuantLinear:
    bits, groups = scheme.bits, scheme.groups(inputs)
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=rng).to(torch.uint8)
    scale = (torch.randn(outputs, groups, generator=rng) * 0.1).half()
    zero = torch.full((outputs, groups), 2 ** (bits - 1))
    if not scheme.sym:
        zero = torch.randint(1, 2**bits, (outputs, groups), generator=rng)
    g_idx = formats.contiguous_groups(scheme, inputs)
    if scheme.scattered:
        g_idx = g_idx[torch.randperm(inputs, generator=rng)]
    packed = formats.encode(Codes(codes, scale, zero.to(torch.uint8), g_idx), scheme)
    offset = torch.randn(outputs, generator=rng).to(dtype) if bias else None
    return prepared(QuantLinear(packed, offset, scheme, (outputs, inputs)))


def prepared(layer: QuantLinear) -> QuantLinear:
    layer.prepare()
    return layer


def check(layer: QuantLinear, x: Tensor, y: Tensor) -> None:
    """Within the rounding of x's dtype: of each weight, of the sums, and of the result.

    Of few rows, a CPU that is quick at it takes numbers of 16 bits (15 for 3-bit weights), of units of 32.
    """
    W = layer.weight.double()
    exact, size = x.double() @ W.T, x.double().abs() @ W.abs().T
    if layer.bias is not None:
        exact, size = exact + layer.bias.double(), size + layer.bias.double().abs()
    eps = torch.finfo(x.dtype).eps
    # Codes are multiplied before their zero point is taken off; in float32 this costs up to 2^bits / |code - zero|.
    spread = x.double().abs().sum(-1, keepdim=True) * 2**layer.scheme.bits
    spread = spread * formats.decode(layer.packed(), layer.scheme).scale.double().abs().amax(-1)
    allowed = 1.5 * eps * size + 4 * torch.finfo(torch.float32).eps * spread
    product = layer._product
    if isinstance(product, CpuProduct) and len(x) <= products.FEW_INT16_ROWS and product.kind(x) == "int16":
        most = 16383 if layer.scheme.bits == 3 else 32767
        order = torch.arange(x.shape[1]) if product.layout.perm is None else product.layout.perm
        for unit in order.split(32):
            half_a_step = x[:, unit].double().abs().amax(1, keepdim=True) / most / 2
            allowed = allowed + 1.01 * half_a_step * W[:, unit].abs().sum(1)
    assert y.dtype == x.dtype
    assert bool(((y.double() - exact).abs() <= allowed).all())


def kind_of(layer: QuantLinear, x: Tensor) -> str | None:
    """The kernel that multiplies x; None where the weight is dequantized."""
    return layer._product.kind(x) if isinstance(layer._product, CpuProduct) else None


SHAPES = ((48, 128, 32), (272, 256, 128), (300, 160, 64), (7, 100, -1), (33, 96, -1))  # outputs, inputs, group size


CPUS = [  # what a CPU is quick at
    pytest.param(
        "bfloat16", marks=pytest.mark.skipif(not has_avx512_bf16(), reason="this CPU has no bfloat16 products")
    ),
    pytest.param("int16", marks=pytest.mark.skipif(not has_avx2(), reason="this CPU has no AVX2")),
    "float32",
]


@pytest.mark.slow
@pytest.mark.parametrize("quick_at", CPUS)
@pytest.mark.parametrize("rows", [1, 3, 9, 20])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_product_is_the_exact_one(
    bits: int, sym: bool, rows: int, quick_at: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_avx512_bf16", lambda: quick_at == "bfloat16")
    monkeypatch.setattr(products, "has_avx2", lambda: quick_at != "float32")
    used = set()
    kinds: tuple[Format, ...] = ("gptq", "gptq_v2", "pack-quantized")
    for outputs, inputs, group_size in SHAPES:
        for kind in kinds:
            scheme = Scheme(bits, group_size, sym, kind)
            if formats.refusal(scheme, outputs, inputs, transposed=False):
                continue
            for dtype in DTYPES:
                layer = random_layer(rng, scheme, outputs, inputs, kind == "gptq", dtype)
                x = torch.randn(rows, inputs, generator=rng).to(dtype)
                used.add(kind_of(layer, x))
                check(layer, x, layer(x))
    in_bfloat16 = quick_at == "bfloat16" and (rows <= products.FEW_ROWS or not has_amx())
    others = "int16" if quick_at == "int16" and bits in (2, 3, 4, 8) else "float32"
    assert used == {others, "bfloat16"} if in_bfloat16 else {others}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "columns", "kind"), [(8, -1, "int-quantized"), (4, 32, "pack-quantized-a8")])
def test_rounded_activations_are_products_of_integers(
    bits: int, columns: int, kind: Format, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """Per token and group, s_x s_w sum(x_i c_i) with integers of 8 bits, in float64."""
    layer = random_layer(rng, Scheme(bits, columns, True, kind), 96, 64, True, dtype)
    x = torch.randn(3, 5, 64, generator=rng).to(dtype)
    x[0, 0] = 0
    codes = formats.decode(layer.packed(), layer.scheme)
    largest = x.double().abs().amax(-1, keepdim=True)
    integers = torch.round(x.double() * 127 / largest.clamp(min=1e-20))  # (3, 5, 64)
    assert integers.abs().max() == 127
    sums = torch.einsum(
        "abgk,ogk->abog", integers.unflatten(-1, (codes.scale.shape[1], -1)),
        (codes.codes.double() - 2 ** (bits - 1)).unflatten(-1, (codes.scale.shape[1], -1)),
    )  # fmt: skip
    expected = (sums * codes.scale.double()).sum(-1) * largest / 127
    bias = layer.bias
    assert bias is not None
    expected += bias.double()
    # One integer more or less would change a sum by 0.02 or more. A kernel may round x to 16-bit integers once more.
    tolerance = 4e-4 if dtype == torch.float32 else 0.0
    rtol = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x).double(), expected, rtol=rtol, atol=max(tolerance, rtol))
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_may_lie_in_any_shape(bits: int, rng: torch.Generator) -> None:
    for scheme in (Scheme(bits, 64, True), Scheme(bits, -1, True, "pack-quantized")):
        for dtype in DTYPES:
            layer = random_layer(rng, scheme, 300, 256, True, dtype)
            for shape in ((256,), (1, 1, 256), (2, 1, 256), (2, 3, 7, 256)):
                x = torch.randn(shape, generator=rng).to(dtype)
                there = torch.stack([x, x], -1)[..., 0]  # its numbers are not side by side
                y = layer(there)
                assert not there.is_contiguous()
                assert y.shape == (*shape[:-1], 300)
                assert torch.equal(y.reshape(-1, 300), layer(x.reshape(-1, 256)))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_of_no_concern(default: torch.dtype, rng: torch.Generator) -> None:
    """Compiled loops are given addresses."""
    inputs = [torch.randn(rows, 256, generator=rng).to(dtype) for rows in (1, 3, 9, 20) for dtype in DTYPES]
    before = torch.get_default_dtype()
    for bits in (4, 5):
        layer = random_layer(rng, Scheme(bits, 64, True), 544, 256)
        expected = [layer(x) for x in inputs]
        try:
            torch.set_default_dtype(default)
            again = prepared(QuantLinear(layer.packed(), None, layer.scheme, (544, 256)))
            assert all(torch.equal(again(x), y) for x, y in zip(inputs, expected, strict=True))
        finally:
            torch.set_default_dtype(before)


@pytest.mark.skipif(not has_avx2() or has_avx512_bf16(), reason="this CPU multiplies bfloat16, or has no AVX2")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shorts_sum_without_rounding(bits: int, rng: torch.Generator) -> None:
    """x of integers below 2^15, scales of powers of two: every unit's sum is exact, whatever the other units hold."""
    layer = random_layer(rng, Scheme(bits, 32, True, "pack-quantized"), 96, 192)
    layer.get_buffer("weight_scale").copy_(2.0 ** -torch.randint(0, 3, (96, 6), generator=rng))
    layer.prepare()
    most = 16383 if bits == 3 else 32767
    x = torch.randint(-most, most + 1, (4, 192), generator=rng).float()
    x[:, ::32] = most  # the steps are 1
    x[1], x[2, 32:] = x[1] * 2.0**-120, 0  # too small, and one unit alone
    y, exact = layer(x).double(), x.double() @ layer.weight.double().T
    assert bool((y[1] == 0).all())
    assert bits == 8 or torch.equal(y[2], exact[2])  # sums of 28 bits do not all fit float32
    assert bool(((y - exact).abs() <= 2**-22 * (x.double().abs() @ layer.weight.double().abs().T))[[0, 2, 3]].all())
    for wrong in (float("inf"), float("nan")):
        x[3, 70] = wrong
        assert not bool(layer(x)[3].isfinite().any())
        assert torch.equal(layer(x)[:3].double(), y[:3])


@pytest.mark.skipif(not has_avx512_bf16(), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("bits", range(2, 9))
def test_pairs_sum_without_rounding(bits: int, rows: int, rng: torch.Generator) -> None:
    """x of small integers and scales of powers of two: every sum is a float32, so the product is exact to the bit."""
    layer = random_layer(rng, Scheme(bits, 64, False, "pack-quantized"), 96, 192)
    layer.get_buffer("weight_scale").copy_(2.0 ** -torch.randint(0, 3, (96, 3), generator=rng))
    layer.prepare()
    x = torch.randint(-4, 5, (rows, 192), generator=rng).bfloat16()
    assert torch.equal(layer(x), (x.double() @ layer.weight.double().T).bfloat16())
    assert kind_of(layer, x) == "bfloat16"


@pytest.mark.parametrize("rows", [2, 6, 20])
def test_groups_that_are_not_runs(rows: int, rng: torch.Generator) -> None:
    layer = random_layer(rng, Scheme(4, 32, False, "gptq_v2", scattered=True), 40, 112)
    paired = torch.randn(rows, 112, generator=rng).bfloat16()
    check(layer, paired, layer(paired))
    x = torch.randn(rows, 112, generator=rng)
    check(layer, x, layer(x))
    assert isinstance(layer._product, CpuProduct)
    uneven = layer.get_buffer("g_idx")
    uneven[uneven == 1] = 0  # groups of 64, 0, 32 and 16
    layer = prepared(QuantLinear(layer.packed(), None, layer.scheme, (40, 112)))
    check(layer, x, layer(x))
    assert layer._product is None  # unpacked instead


@pytest.mark.parametrize("group_size", [8, 24, 100])
def test_groups_that_are_not_whole_units_are_unpacked(group_size: int, rng: torch.Generator) -> None:
    layer = random_layer(rng, Scheme(3, group_size, False), 24, 192)
    x = torch.randn(2, 192, generator=rng)
    assert kind_of(layer, x) is None
    assert torch.equal(layer(x), x @ layer.weight.T)


def test_many_rows_are_multiplied_by_tiles(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "DECODED", 1)
    layer = random_layer(rng, Scheme(4, 64, True), 600, 128)
    x = torch.randn(2, 10, 128, generator=rng)
    check(layer, x.view(20, 128), layer(x).view(20, 600))


def test_threads_share_the_outputs(rng: torch.Generator) -> None:
    layer = random_layer(rng, Scheme(3, 64, True), 1072, 128)
    for rows, dtype in itertools.product((1, 7, 40), (torch.float32, torch.bfloat16)):
        x = torch.randn(rows, 128, generator=rng).to(dtype)
        alone = layer(x)
        with threads(3):
            assert torch.equal(layer(x), alone)


@pytest.mark.parametrize("outputs", [32, 256, 544])
@pytest.mark.parametrize("bits", range(2, 9))
def test_words_that_moved_come_back_as_they_were(bits: int, outputs: int, rng: torch.Generator) -> None:
    """A layout's words are there instead of the stored ones, and hold the same."""
    layer = random_layer(rng, Scheme(bits, 32, True), outputs, 96)
    before = layer.packed()["qweight"]
    assert layer._buffers["qweight"] is None
    assert isinstance(layer._product, CpuProduct)
    words = layer._product.layout.words
    assert not torch.equal(words, before.flatten())
    assert words.nbytes == before.nbytes
    layer.to("meta")  # what is moved is the stored tensors
    layer = random_layer(torch.Generator().manual_seed(0), Scheme(bits, 32, True), outputs, 96)
    again = QuantLinear(layer.packed(), None, layer.scheme, (outputs, 96))
    again.prepare()
    assert torch.equal(again.packed()["qweight"], layer.packed()["qweight"])


def test_what_has_run_is_what_was_stored(rng: torch.Generator) -> None:
    layer = random_layer(rng, Scheme(4, 32, True), 32, 64, bias=True, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 64, generator=rng).bfloat16()
    y = layer(x)
    assert layer._product is not None
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    twin = copy.deepcopy(layer)
    assert twin.is_prepared
    assert twin._product is not layer._product
    assert torch.equal(twin(x), y)
    other = random_layer(rng, Scheme(4, 32, True), 32, 64, bias=True, dtype=torch.bfloat16)
    other(x)
    layer.load_state_dict(other.state_dict())  # in place: the layout has to be made anew
    assert torch.equal(layer(x), other(x))
    assert layer.to("meta")._product is None


@pytest.mark.parametrize("x", [torch.zeros(2, 63), torch.zeros(2, 65), torch.zeros(2, 64, dtype=torch.int64)])
def test_inputs_that_do_not_fit_are_refused_as_a_linear_layer_does(x: Tensor, rng: torch.Generator) -> None:
    layer = random_layer(rng, Scheme(4, 32, True), 64, 64)
    with pytest.raises(RuntimeError):
        torch.nn.Linear(64, 64)(x)
    with pytest.raises(RuntimeError, match="a layer of 64 inputs was called on"):
        layer(x)


def test_gradients_flow_through_a_packed_layer(rng: torch.Generator) -> None:
    layer = random_layer(rng, Scheme(4, 32, True), 32, 64)
    x = torch.randn(2, 64, generator=rng, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_unpacked_weights(bits: int, dtype: str, make_model: MakeModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "rtn", "bits": bits, "group_size": 32}
    quantize(make_model("llama"), tmp_path / "out", QuantConfig.from_dict(options))
    network: Any = load(tmp_path / "out", dtype=dtype)
    exact: Any = load(tmp_path / "out", dtype="float32")
    eps = torch.finfo(getattr(torch, dtype)).eps
    for name, module in list(exact.named_modules()):
        if isinstance(module, QuantLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.weight
            exact.set_submodule(name, plain)
    for tokens in (3, 16, 20):
        ids = torch.randint(1, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, reference = network(ids).logits, exact(ids).logits
        rounding = (
            max(eps, 2**-16) if tokens <= products.FEW_INT16_ROWS and has_avx2() and not has_avx512_bf16() else eps
        )
        assert (ours - reference).norm() <= 32 * rounding * reference.norm()  # some twenty products after each other


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_scales_that_are_no_float16_numbers(bits: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    layer = random_layer(rng, Scheme(bits, 32, True, "pack-quantized"), 48, 64)
    layer.weight_scale = layer.packed()["weight_scale"].float() * 1e-9
    layer.prepare()
    for rows in (1, 40):
        x = torch.randn(rows, 64, generator=rng).to(dtype)
        check(layer, x, layer(x))
        assert float(layer(x).abs().max()) > 0


def test_a_compiled_model_calls_the_kernels() -> None:
    """Unpacked, a layer would round its weight to bfloat16; by its kernel it gives what it gives when not compiled."""
    rng = torch.Generator().manual_seed(0)
    scheme = Scheme(4, 32, False, "gptq")
    layers = [random_layer(rng, scheme, 64, 64, bias=True, dtype=torch.bfloat16) for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    other = torch.nn.Sequential(copy.deepcopy(layers[0]), layers[1])
    other.load_state_dict({name: 2 * t if name == "0.bias" else t for name, t in model.state_dict().items()})
    for rows in (1, 40):
        x = torch.randn(rows, 64, generator=rng).bfloat16()
        for one in (model, other):
            compiled: Any = torch.compile(one, fullgraph=True, backend="aot_eager", dynamic=False)
            with torch.no_grad():
                assert torch.equal(compiled(x), one(x))
    assert not torch.equal(model(x), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_operator_is_what_compilers_are_told_of_it(dtype: torch.dtype) -> None:
    """Strides too, which compiled code relies on, where a layout is wider than the layer."""
    rng = torch.Generator().manual_seed(0)
    layer = random_layer(rng, Scheme(4, 32, False, "gptq"), 40, 64)
    for rows in (1, 3, 40):
        x = torch.randn(2, rows, 64, generator=rng).to(dtype)
        assert layer._operands is not None
        torch.library.opcheck(torch.ops.gptq.multiply.default, (x, *layer._operands))
        assert torch.equal(torch.ops.gptq.multiply(x, *layer._operands), layer(x))


@pytest.mark.slow
def test_what_leaves_the_process_or_wants_gradients_is_unpacked() -> None:
    rng = torch.Generator().manual_seed(0)
    layer = random_layer(rng, Scheme(4, 32, False, "gptq"), 64, 64).eval()
    x = torch.randn(3, 64, generator=rng)
    exported = torch.export.export(layer, (x,))
    assert not any("gptq" in str(node.target) for node in exported.graph.nodes)
    check(layer, x, exported.module()(x))
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))
