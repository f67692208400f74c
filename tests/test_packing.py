"""Codes to words and back, against a bit string written out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq.formats.packing import num_words, pack, unpack
from tests.oracle import bit_stream


def test_words_are_those_of_the_format() -> None:
    nibbles = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]])
    assert pack(nibbles, 4).tolist() == [[0x87654321 - 2**32]]
    # 3 bits: code 10 begins at bit 30 of word 0 and ends in bit 0 of word 1.
    threes = torch.zeros(32, 1, dtype=torch.int32)
    threes[10] = 0b111
    assert pack(threes, 3).flatten().tolist() == [(0b11 << 30) - 2**32, 0b1, 0]


@given(st.integers(2, 8), st.integers(1, 100), st.integers(1, 4), st.integers(0, 2**32))
def test_packing_is_one_bit_stream_and_reversible(bits: int, count: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count, columns), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.T.tolist() == [bit_stream(column, bits) for column in codes.T.tolist()]
    assert torch.equal(unpack(words, bits, count), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_codes_do_not_leak_into_neighbours(bits: int) -> None:
    codes = torch.zeros(64, 2, dtype=torch.int64)
    codes[::2] = 2**bits - 1
    assert torch.equal(unpack(pack(codes, bits), bits, 64), codes.to(torch.uint8))


def test_codes_out_of_range_and_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack(torch.tensor([[16]]), 4)
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack(torch.tensor([[-1]]), 4)
    with pytest.raises(ValueError, match="which need 2"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), 4, 9)
    assert num_words(172, 4) == 22
