"""Small floating-point numbers: E2M1 (FP4), two per byte, and E8M0, the powers of two of the microscaling formats."""

import torch
from torch import Tensor

E8M0 = getattr(torch, "float8_e8m0fnu", None)  # powers of two, one byte each; from torch 2.7 on
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))  # values by code; bit 3 is the sign


def unpack_pairs(packed: Tensor) -> Tensor:
    """Unpack codes of 4 bits, two per byte with the first in the low half: (..., n) bytes -> (..., 2 n) uint8."""
    codes = packed.view(torch.uint8)
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def pack_pairs(codes: Tensor) -> Tensor:
    """The inverse of `unpack_pairs`: (..., 2 n) uint8 below 16 -> (..., n) uint8."""
    low, high = codes[..., 0::2], codes[..., 1::2]
    return torch.bitwise_or(low, high << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Unpack E2M1 numbers, two per byte with the first in the low half: (..., n) bytes -> (..., 2 n) float32."""
    values: Tensor = torch.tensor(E2M1, dtype=torch.float32, device=packed.device)[unpack_pairs(packed).int()]
    return values


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return 2^(e - 127), float32, of bytes e (E8M0 scales, in that dtype or as uint8); infinity for 255, their NaN."""
    e = exponents.view(torch.uint8).int()
    return torch.where(e == 0, 0x00400000, e << 23).view(torch.float32)  # 2^-127 is not a normal number


def exponents_of(powers: Tensor) -> Tensor:
    """The inverse of `powers_of_two` on powers of two, from 2^-127 to 2^127: uint8."""
    return (torch.frexp(powers).exponent + 126).to(torch.uint8)
