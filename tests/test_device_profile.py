"""What differs between a CPU and a GPU, tried on CPU tensors: the profile of a GPU, and how often the host waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptq import solver
from gptq.compute import device_profile
from gptq.compute.matmul import exact_float32
from gptq.compute.torch_state import same_gradients
from gptq.output.results import weight_histogram
from gptq.pipeline.tune import BlockToTune
from gptq.solver import Grid, IntegerGrid, inner_loops
from gptq.solver.coordinate_descent import refine
from gptq.solver.error_propagation import divide_by_hessian
from gptq.solver.grids.affine import AffineGrid
from gptq.solver.grids.table import IQ4_NL, TableGrid
from gptq.solver.hessian import HeldOut, HessianAccumulator, mean_output_power

CPU = torch.device("cpu")
SIZED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2", "aten::unique_dim"}
COPIES = {Tensor.tolist, Tensor.cpu, Tensor.numpy}  # to the host


class Waits(TorchDispatchMode):
    """Counts the operations for which a host waits until a GPU has computed: it reads their result, or its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, returns = func.name().partition(".")[0], [str(one.type) for one in func._schema.returns]
        masked = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.count += name in SIZED_BY_VALUES or masked or any(one in ("bool", "number", "int") for one in returns)
        return func(*args, **kwargs or {})


class Copies(TorchFunctionMode):
    """Counts the copies to the host that no operation stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in COPIES
        return func(*args, **kwargs or {})


def waits(work: Callable[[], object]) -> int:
    with Waits() as counted, Copies() as copied:
        work()
    return int(counted.count + copied.count)


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, CPU tensors are worked on with the profile of a GPU."""
    with monkeypatch.context() as patch:
        patch.setitem(device_profile.PROFILES, "cpu", device_profile.PROFILES["cuda"])
        yield


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors are worked on as on a GPU, with whole-tensor operations in place of the kernels."""

    def best_grids(w: Tensor, importance: Tensor, scales: Tensor, shifts: Tensor, grid: Grid) -> Tensor:
        groups = zip(w, importance, scales.unbind(1), shifts.unbind(1), strict=True)
        return torch.stack([inner_loops.best_grid_reference(*group, grid) for group in groups])

    monkeypatch.setattr(inner_loops, "choose_columns", inner_loops.choose_columns_reference)
    monkeypatch.setattr(inner_loops, "best_grids", best_grids)
    with as_on_a_gpu(monkeypatch):
        yield


def add_all(sums: HessianAccumulator | HeldOut, pairs: list[tuple[Tensor, Tensor]]) -> None:
    for pair in pairs:
        sums.add(*pair)


def factor_of(columns: int, rng: torch.Generator) -> solver.Factor:
    X = torch.randn(2 * columns, columns, generator=rng)
    H = X.T @ X / len(X)
    return solver.factorize(H, solver.act_order(H))


def test_a_wait_is_counted() -> None:
    x = torch.ones(3)
    for wait in (lambda: float(x.sum()), lambda: torch.equal(x, x), lambda: x[x > 0], x.tolist, lambda: bool(x[0])):
        assert waits(wait) == 1
    assert waits(lambda: (x[1:] + 1)[torch.tensor([0])].sum()) == 0


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("grid", [IntegerGrid(4, sym=False), AffineGrid(4), TableGrid(4, IQ4_NL)])
def test_the_host_waits_no_longer_for_more_columns_or_sweeps(grid: Grid, rng: torch.Generator) -> None:
    counts = []
    for columns, sweeps in ((64, 1), (64, 3), (192, 1)):
        W, factor = torch.randn(5, columns, generator=rng), factor_of(columns, rng)
        solved: list[solver.SolvedLayer] = []
        work = [
            waits(lambda: solved.append(solver.solve(W, factor, grid, 32, search=True, block_size=16))),  # noqa: B023
            waits(lambda: refine(W, solved[0], factor, grid, sweeps)),  # noqa: B023
            waits(lambda: solver.round_to_nearest(W, grid, 32)),  # noqa: B023
        ]
        counts.append(work)
    assert counts[0] == counts[1] == counts[2]
    assert max(counts[0]) <= 12


@pytest.mark.usefixtures("on_gpu")
def test_the_host_waits_for_no_window(rng: torch.Generator) -> None:
    pairs = [(torch.randn(20, 16, generator=rng), torch.randn(20, 16, generator=rng)) for _ in range(6)]
    sums, A = HessianAccumulator(16, CPU), torch.randn(3, 16, generator=rng)
    assert waits(lambda: add_all(sums, pairs)) == 0
    assert waits(sums.take) == 1  # whether there was a drift
    counts = []
    for windows in (1, 6):
        held_out = HeldOut(1000, CPU)
        assert waits(lambda: add_all(held_out, pairs[:windows])) == 0  # noqa: B023
        counts.append((waits(lambda: held_out.power(A)), waits(lambda: held_out.agreement(A, A, slice(None)))))  # noqa: B023
    assert counts == [(1, 1), (1, 1)]
    assert waits(lambda: mean_output_power(torch.randn(5, 5000), torch.eye(5000))) == 1  # three panels
    targets = [pair[0] for pair in pairs]
    forwards = [partial(torch.clone, x) for x, _ in pairs]
    block = BlockToTune(torch.nn.Identity(), forwards, targets, [0, 1, 2], {}, {}, lambda _, weight: weight)
    assert waits(lambda: block.error({})) == 2  # the error, and the mean square that divides it


@pytest.mark.usefixtures("on_gpu")
def test_the_inputs_of_both_streams_are_told_apart_after_all_windows(rng: torch.Generator) -> None:
    x, drift = (torch.randn(9, 16, generator=rng) for _ in range(2))
    same, different = HessianAccumulator(16, CPU), HessianAccumulator(16, CPU)
    for sums in (same, different):
        sums.add(x, torch.zeros_like(x))
    different.add(x, drift)
    assert same.take()[1] is None
    H, C = different.take()
    torch.testing.assert_close(H, x.T @ x / 9)
    torch.testing.assert_close(C, drift.T @ x / 18)


def test_the_profiles_of_a_cpu_and_of_a_gpu_compute_the_same(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding; with tiles of a GPU that hold everything, and with those that several processes share."""
    X, drift = (torch.randn(3000, 600, generator=rng) for _ in range(2))
    W, factor = torch.randn(1100, 600, generator=rng), factor_of(600, rng)
    H = factor.H.double()[factor.perm][:, factor.perm] + factor.ridge * torch.eye(600, dtype=torch.float64)
    exact = torch.linalg.solve(H, W.double()[:, factor.perm].T).T[:, torch.argsort(factor.perm)]

    def results() -> list[Tensor]:
        sums = HessianAccumulator(600, CPU)
        sums.add(X, drift)
        nearest = solver.round_to_nearest(W[:, :590], IntegerGrid(4, sym=True), 64)
        counts = weight_histogram(W)["weight_histogram"]
        H, C = sums.take()
        assert C is not None
        found = [H, C, nearest.codes, nearest.row_errors, nearest.weight(), torch.tensor(counts)]
        return [*found, torch.tensor(mean_output_power(W, H)), divide_by_hessian(W.clone(), factor)]

    plain = results()
    for profile in device_profile.PROFILES["cuda"]:
        monkeypatch.setitem(device_profile.PROFILES, "cpu", (profile, profile))
        for got, expected in zip(results(), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain[-1].double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products_are_exact_and_tf32_can_be_asked_for_whatever_the_process_has_set(setting: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        allowed = torch.backends.cuda.matmul.allow_tf32
        with exact_float32(CPU):
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_on_a_gpu_are_computed_deterministically() -> None:
    with same_gradients(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    with same_gradients(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
