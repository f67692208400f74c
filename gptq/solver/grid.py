"""The grid of a group: fit its scale and zero point, quantize weights to integer codes, and dequantize them.

    code = clamp(round(w / scale) + zero, 0, 2^bits - 1)          w ~ scale * (code - zero)

A scale is float16 on disk. It is rounded to float16 when it is fitted, before any code is chosen with it, so what a
reader computes from the file is the weight that was chosen. Zero points lie in [1, 2^bits - 1]: GPTQ v1 files store
zero - 1, and its readers disagree about what -1 means.

A symmetric grid has one more point on one side of zero than on the other. A negative scale turns it over, so that the
side with more points can be the one with the larger weights; readers multiply by the scale, whatever its sign.
"""

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16
SMALLEST_SCALE = 2.0**-24  # float16's smallest subnormal; a scale of 0 would divide by zero
SHRINK_FACTORS = torch.linspace(1, 0.3, 36).tolist()  # widths that the grid search tries, relative to the min-max grid


def fit(w: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """The smallest min-max grid over the columns of each row.

    Args:
        w: (..., columns) float weights of one group.
    Returns:
        scale and zero, both (...) in w's dtype; scale holds float16 values, zero integers. All-zero rows get scale 1.
    Raises:
        ValueError: a scale exceeds float16.
    """
    maxq = 2**bits - 1
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if sym:
        scale = round_scale(2 * torch.maximum(-low, high) / maxq)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        # With the lowest zero point, 1, the largest code dequantizes to (maxq - 1) * scale, which must reach `high`.
        scale = round_scale(torch.maximum((high - low) / maxq, high / (maxq - 1)))
        zero = torch.round(-low / scale).clamp(1, maxq)
    return scale, zero


def round_scale(scale: Tensor) -> Tensor:
    """Round scales to float16 and keep their sign and dtype; no result is 0. A scale of exactly 0 becomes 1.

    Raises:
        ValueError: a scale exceeds float16.
    """
    largest = float(scale.abs().max())
    if largest > torch.finfo(SCALE_DTYPE).max:
        raise ValueError(f"a scale of {largest:.3g} does not fit float16, the dtype of scales on disk")
    size = scale.abs().where(scale != 0, 1).clamp(min=SMALLEST_SCALE).to(SCALE_DTYPE).to(scale.dtype)
    return size.where(scale >= 0, -size)


def candidates(w: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Candidate grids for the columns of each row: the min-max grid and narrower ones, down to 0.3 of it.

    Symmetric grids are tried with both signs of the scale. Asymmetric grids shrink both ends by the same factor, with
    the zero point rounded down and rounded up.

    Args:
        w: (..., columns).
    Returns:
        scale and zero, both (candidates, ...); scale holds float16 values.
    Raises:
        ValueError: a scale exceeds float16.
    """
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)  # (...)
    shrink = torch.tensor(SHRINK_FACTORS, dtype=w.dtype, device=w.device).view(-1, *[1] * low.ndim)  # (shrinks, ...)
    if sym:
        below = 2 ** (bits - 1)  # grid points on the longer side; the other side has one less
        upright = torch.maximum(-low / below, high / (below - 1))
        turned = torch.maximum(high / below, -low / (below - 1))
        scale = round_scale(torch.cat([shrink * upright, -shrink * turned]))
        return scale, torch.full_like(scale, below)
    widest, _ = fit(w, bits, sym=False)
    scale = round_scale(shrink * widest)
    zero = -low * shrink / scale  # (shrinks, ...)
    both = torch.cat([zero.floor(), zero.ceil()]).clamp(1, 2**bits - 1)
    return torch.cat([scale, scale]), both


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of w, as floats; w, scale and zero broadcast. Ties round to even."""
    return (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights of codes. In float32 the product is exact: 11 significant bits times at most 9."""
    return scale * (codes - zero)
