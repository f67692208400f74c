"""What a stored scale can be: a float of some dtype, a power of two, or a float8 times a number that a layer shares.

A scale is rounded to such a value when it is fitted, before any code is chosen with it, so that what a reader computes
from the file is the weight that was chosen. No scale is ever 0, because weights are divided by it.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
FLOAT8 = torch.float8_e4m3fn
FLOAT8_RANGE = 2.0**-9, 448.0  # smallest and largest number above 0


class Scales(Protocol):
    """The scales that a format can store."""

    @property
    def largest(self) -> float:
        """The largest scale."""

    @property
    def signed(self) -> bool:
        """Whether a scale may be negative."""

    def round(self, scale: Tensor) -> Tensor:
        """Return the nearest stored scale, in the dtype of `scale`. A scale of exactly 0 becomes 1 or the smallest.

        Raises:
            ValueError: a scale is too large.
        """

    def nearest(self, scale: Tensor) -> Tensor:
        """`round` for scales that are not too large; nothing is checked, so that nothing waits for a GPU."""

    def plain(self, largest: Tensor, top: float) -> Tensor:
        """Return the stored scales of a plain quantizer, which puts `largest` on about `top`, the largest value."""


@dataclass(frozen=True)
class FloatScales:
    """Floats of a dtype, of either sign."""

    dtype: torch.dtype = torch.float16
    reach: int = 1  # multiples of a scale up to this one have to fit the dtype

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max / self.reach

    @property
    def signed(self) -> bool:
        return True

    def round(self, scale: Tensor) -> Tensor:
        self.check(scale, "a scale")
        return self.nearest(scale)

    def nearest(self, scale: Tensor) -> Tensor:
        size = scale.abs().where(scale != 0, 1).clamp(min=SMALLEST[self.dtype]).to(self.dtype).to(scale.dtype)
        return size.where(scale >= 0, -size)

    def plain(self, largest: Tensor, top: float) -> Tensor:
        return self.round(largest / top)

    def round_offset(self, offset: Tensor) -> Tensor:
        """Round offsets, which may be 0; raises ValueError if one does not fit the dtype."""
        self.check(offset, "an offset")
        return self.nearest_offset(offset)

    def nearest_offset(self, offset: Tensor) -> Tensor:
        """`round_offset` for offsets that fit the dtype."""
        return offset.to(self.dtype).to(offset.dtype)

    def check(self, values: Tensor, what: str) -> None:
        largest = float(values.abs().max())
        if largest > self.largest:
            name = str(self.dtype).removeprefix("torch.")
            name += f" {self.reach} times" if self.reach > 1 else ""
            raise ValueError(f"{what} of {largest:.3g} does not fit {name}, the dtype of scales on disk")


@dataclass(frozen=True)
class PowersOfTwo:
    """2^(byte - 127), the e8m0 of the microscaling formats. Bytes 0 and 255 are not used: subnormal, and NaN."""

    @property
    def largest(self) -> float:
        return 2.0**127

    @property
    def signed(self) -> bool:
        return False

    def round(self, scale: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(scale.where(scale > 0, 2.0**-126).double())  # mantissa from 1/2 to 1
        up = (mantissa > 0.75).to(exponent.dtype)
        return torch.ldexp(torch.ones_like(mantissa), (exponent - 1 + up).clamp(-126, 127)).to(scale.dtype)

    def nearest(self, scale: Tensor) -> Tensor:
        return self.round(scale)

    def plain(self, largest: Tensor, top: float) -> Tensor:
        """Let a weight reach the middle between `top` and the next power of two: the rule of compressed-tensors."""
        octave = 2.0 ** math.ceil(math.log2(top))  # 8 for e2m1, where 7 / 8 of it is the middle
        mantissa, exponent = torch.frexp(largest.double().clamp(min=2.0**-120))
        up = (mantissa >= (top + octave) / 2 / octave).to(exponent.dtype)
        return torch.ldexp(torch.ones_like(mantissa) * 2 / octave, (exponent - 1 + up).clamp(-122, 127)).to(
            largest.dtype
        )


@dataclass(frozen=True)
class Float8Scales:
    """e4m3 numbers above 0, divided by a float32 that is the same for the whole layer (and those fused with it)."""

    divisor: float  # a float32, what NVFP4 calls the global scale

    @property
    def largest(self) -> float:
        return FLOAT8_RANGE[1] / self.divisor

    @property
    def signed(self) -> bool:
        return False

    def round(self, scale: Tensor) -> Tensor:
        """The quotient is computed in float32, as readers do."""
        return (self.stored(scale).float() / self.divisor).to(scale.dtype)

    def nearest(self, scale: Tensor) -> Tensor:
        return self.round(scale)

    def plain(self, largest: Tensor, top: float) -> Tensor:
        return self.round(largest / top)

    def stored(self, scale: Tensor) -> Tensor:
        """The e4m3 numbers of scales, which `round` has not changed or has."""
        return (scale * self.divisor).clamp(*FLOAT8_RANGE).to(FLOAT8)
