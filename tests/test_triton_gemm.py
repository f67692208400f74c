"""The Triton kernels of packed products, in Triton's interpreter on a CPU, against products in float64."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from gptq import formats, solver
from gptq.formats import Scheme
from gptq.inference.layout import Stored
from gptq.inference.products import TritonProduct
from gptq.inference.quant_linear import QuantLinear
from gptq.solver import Codes, IntegerGrid

pytest.importorskip("triton", reason="Triton is not installed")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest output


def random_layer(
    bits: int, outputs: int, inputs: int, columns: int, sym: bool, name: str, scattered: bool = False
) -> tuple[Stored, Tensor]:
    """A layer of random codes, and its weight in float64."""
    rng = torch.Generator().manual_seed(bits)
    groups = -(-inputs // columns)
    g_idx = (torch.arange(inputs) // columns).int()
    zero = torch.randint(1, 2**bits, (outputs, groups), generator=rng).to(torch.uint8)
    layer = Codes(
        codes=torch.randint(2**bits, (outputs, inputs), generator=rng).to(torch.uint8),
        scale=(torch.rand(outputs, groups, generator=rng) - 0.5).half(),
        zero=torch.full_like(zero, 2 ** (bits - 1)) if sym else zero,
        g_idx=g_idx[torch.randperm(inputs, generator=rng)] if scattered else g_idx,
    )
    spread = layer.g_idx.long()
    weight = layer.scale.double()[:, spread] * (layer.codes.double() - layer.zero.double()[:, spread])
    scheme = Scheme(bits, columns if columns < inputs else -1, sym, name, scattered)  # type: ignore[arg-type]
    return Stored(formats.encode(layer, scheme), scheme, outputs, inputs), weight


def check(stored: Stored, weight: Tensor, rows: int, dtype: torch.dtype) -> None:
    product = TritonProduct.of(stored)
    assert product is not None
    x = torch.randn(rows, stored.inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)
    exact = x.double() @ weight.T
    got = product.multiply(x[None])[0]
    assert got.dtype == dtype
    assert float((got.double() - exact).abs().max() / exact.abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_words_are_multiplied_as_they_are_stored(bits: int, sym: bool) -> None:
    stored, weight = random_layer(bits, 72, 80, 32, sym, "gptq_v2")  # a short last group, a part of a tile
    product = TritonProduct.of(stored)
    assert product is not None
    assert product.words is stored.packed["qweight"]
    check(stored, weight, 1, torch.float16)
    check(stored, weight, 65, torch.float32)


@pytest.mark.parametrize("rows", [1, 20])
def test_inputs_are_split_among_programs_and_rows_padded(rows: int) -> None:
    stored, weight = random_layer(4, 40, 512, 128, True, "gptq")
    check(stored, weight, rows, torch.float32)


@pytest.mark.parametrize(("bits", "sym"), [(3, True), (4, False), (5, True), (6, True), (7, False)])
def test_the_words_of_pack_quantized_are_replaced_by_their_transpose(bits: int, sym: bool) -> None:
    stored, weight = random_layer(bits, 64, 128, 128, sym, "pack-quantized")
    check(stored, weight, 2, torch.float32)
    product = TritonProduct.of(stored)
    assert product is not None
    assert product.replaces == "weight_packed"
    assert torch.equal(product.stored_words(), stored.packed["weight_packed"])


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_scattered_groups_are_sorted(name: str) -> None:
    stored, weight = random_layer(4, 64, 96, 32, False, name, scattered=True)
    check(stored, weight, 3, torch.float32)
    product = TritonProduct.of(stored)
    assert product is not None
    assert product.order is not None
    assert torch.equal(product.order, torch.argsort(stored.packed["g_idx"], stable=True))


@pytest.mark.parametrize("inputs", [40, 172])
def test_a_group_of_a_whole_row_may_have_any_number_of_inputs(inputs: int) -> None:
    for bits in (3, 4):
        stored, weight = random_layer(bits, 32, inputs, inputs, True, "pack-quantized")
        check(stored, weight, 1, torch.float32)


def test_many_rows_in_bfloat16_multiply_a_weight_that_is_rounded_once() -> None:
    """Few rows in bfloat16 cannot be tried: the interpreter multiplies the bit patterns."""
    stored, weight = random_layer(8, 64, 64, 32, False, "gptq_v2")
    check(stored, weight, 65, torch.bfloat16)


def test_groups_that_are_no_multiples_of_32_are_left_to_torch() -> None:
    stored, _ = random_layer(4, 32, 96, 24, True, "gptq")
    assert TritonProduct.of(stored) is None


def test_a_layer_gives_back_the_words_that_its_product_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, weight = random_layer(4, 32, 64, 32, True, "pack-quantized")
    monkeypatch.setattr("gptq.inference.products.prepare", TritonProduct.of)
    layer = QuantLinear(dict(stored.packed), None, stored.scheme, (32, 64))
    assert layer.prepare() == stored.packed["weight_packed"].nbytes
    assert layer._buffers["weight_packed"] is None
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        for key, tensor in one.state_dict().items():
            assert torch.equal(tensor, stored.packed[key])
    torch.testing.assert_close(layer.weight.double(), weight)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_solved_layer_multiplies_as_its_weight() -> None:
    solved = solver.round_to_nearest(torch.randn(48, 128), IntegerGrid(4, sym=False), 32)
    scheme = Scheme(4, 32, False, "gptq")
    check(Stored(formats.encode(solved, scheme), scheme, 48, 128), solved.weight().double(), 1, torch.float32)
