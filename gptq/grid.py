"""The grid of a group: its scale and zero point, and the way from weights to integer codes and back.

    code = clamp(round(w / scale) + zero, 0, 2^bits - 1)          w ~ scale * (code - zero)

A scale is float16 on disk. It is rounded to float16 when it is fitted, before any code is chosen with it, so what a
reader computes from the file is the weight that was chosen. Zero points lie in [1, 2^bits - 1]: GPTQ v1 files store
zero - 1, and its readers disagree about what -1 means.
"""

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16
SMALLEST_SCALE = 2.0**-24  # float16's smallest subnormal; a scale of 0 would divide by zero


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
    if sym:
        scale = 2 * w.abs().amax(-1) / maxq
        zero = torch.full_like(scale, 2 ** (bits - 1))
        scale = _as_stored(scale)
    else:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        # With zero at its lowest, 1, the largest code stands for (maxq - 1) * scale, which has to reach `high`.
        scale = _as_stored(torch.maximum((high - low) / maxq, high / (maxq - 1)))
        zero = torch.round(-low / scale).clamp(1, maxq)
    return scale, zero


def _as_stored(scale: Tensor) -> Tensor:
    if float(scale.max()) > torch.finfo(SCALE_DTYPE).max:
        raise ValueError(f"a scale of {float(scale.max()):.3g} does not fit float16, the dtype of scales on disk")
    return scale.where(scale > 0, 1).clamp(min=SMALLEST_SCALE).to(SCALE_DTYPE).to(scale.dtype)


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of w, as floats; w, scale and zero broadcast. Ties round to even."""
    return (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights of codes. In float32 the product is exact: 11 significant bits times at most 9."""
    return scale * (codes - zero)


def fit_groups(W: Tensor, bits: int, group_size: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Min-max grids of all groups of W (rows, columns); scale and zero are (rows, groups). The last may be short."""
    grids = [fit(group, bits, sym) for group in W.split(group_size, dim=1)]
    return torch.stack([scale for scale, _ in grids], 1), torch.stack([zero for _, zero in grids], 1)
