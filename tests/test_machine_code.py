"""Compiled loops: what every loop relies on."""

from typing import Any

import pytest
import torch

from gptq.compute.machine_code import LONG, Arguments, Int, compile_loop, counting, larger, scratch, smaller
from gptq.compute.simd import element
from gptq.compute.threads import run_loop
from tests.conftest import threads


def _count(builder: Any, given: Arguments) -> None:
    """visits[i, j] += 1 for j in range(max(i - 3, 1), min(2 i // 3 * 2 + 1, 9), 2), through memory of its own."""
    visits, columns = given.array(LONG), given.integer()
    with scratch(builder, LONG, 1) as one, given.shares() as (start, stop):
        builder.store(Int(builder, 1).value, one)
        with counting(builder, start, stop) as i:
            low, high = larger(i - 3, Int(builder, 1)), smaller(i * 2 // 3 * 2 + 1, Int(builder, 9))
            with counting(builder, low, high, 2) as j:
                place = element(builder, visits, i * columns + j)
                builder.store(builder.add(builder.load(place), builder.load(one)), place)


@pytest.mark.parametrize("end", [0, 1, 7, 64])
def test_each_index_is_visited_once_on_any_number_of_threads(end: int) -> None:
    loop = compile_loop(f"count_{end}", _count)
    expected = torch.zeros(64, 9, dtype=torch.int64)
    for i in range(end):
        for j in range(max(i - 3, 1), min(2 * i // 3 * 2 + 1, 9), 2):
            expected[i, j] = 1
    for count in (1, 2, 5):
        visits = torch.zeros(64, 9, dtype=torch.int64)
        with threads(count):
            run_loop(loop, end, 4, visits, 9)
        assert torch.equal(visits, expected)


def test_arrays_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        run_loop(0, 1, 1, torch.zeros(4, 4).T[:2])
