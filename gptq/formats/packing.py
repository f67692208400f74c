"""Integer codes <-> int32 words: one dense little-endian bit stream down every column, code i at bit i * bits.

The unit is 32 codes: at any width they fill exactly `bits` words. A code may straddle two words. For 3 bits this is
GPTQ's layout of 32 codes in 3 words; for 2, 4 and 8 bits it is GPTQ's layout without straddling codes.
"""

import torch
from torch import Tensor


def num_words(num_codes: int, bits: int) -> int:
    """Return the number of int32 words that `num_codes` codes need; the last word may be partly empty."""
    return -(-num_codes * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along dim 0.

    Args:
        codes: (codes, columns) integers in [0, 2^bits - 1].
        bits: 2 to 8.
    Returns:
        (num_words(codes, bits), columns) int32; unused high bits of the last word are 0.
    Raises:
        ValueError: a code is out of range.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    count, columns = codes.shape
    units = -(-count // 32)
    padded = torch.zeros(units * 32, columns, dtype=torch.int32, device=codes.device)
    padded[:count] = codes
    padded = padded.view(units, 32, columns)
    words = torch.zeros(units, bits, columns, dtype=torch.int32, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= padded[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= padded[:, i] >> (32 - shift)
    return words.view(units * bits, columns)[: num_words(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """The inverse of `pack`: (num_words, columns) int32 -> (num_codes, columns) uint8.

    Raises:
        ValueError: the number of words is not the one that `num_codes` codes need.
    """
    if words.shape[0] != num_words(num_codes, bits):
        needed = num_words(num_codes, bits)
        raise ValueError(f"{words.shape[0]} words for {num_codes} codes of {bits} bits, which need {needed}")
    units, columns = -(-num_codes // 32), words.shape[1]
    padded = torch.zeros(units * bits, columns, dtype=torch.int32, device=words.device)
    padded[: words.shape[0]] = words
    padded = padded.view(units, bits, columns)
    first_bit = torch.arange(32, device=words.device) * bits
    word, shift = first_bit // 32, (first_bit % 32).int()[:, None]  # (32,), (32, 1)
    codes = padded[:, word] >> shift  # (units, 32, columns)
    if 32 % bits:
        inside = (32 - shift).clamp(max=bits)  # bits of a code in its first word; the rest begins the next
        # The right shift drags the sign bit along; keep only the bits that belong to the code.
        codes &= (1 << inside) - 1
        codes |= padded[:, (word + 1).clamp(max=bits - 1)] << inside
    codes &= 2**bits - 1
    return codes.to(torch.uint8).view(units * 32, columns)[:num_codes]
