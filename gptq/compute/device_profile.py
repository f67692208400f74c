"""What suits a device: how much work one step takes, and whether the host may look at numbers in between.

A CPU wants tiles that fit its caches and its memory. On a GPU every step is a launch, and a number that the host reads
stops the queue of launches; so tiles are as large as memory allows, and numbers stay where they are. The code asks
`profile_of` instead of asking for the kind of device.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILES = 8  # tiles of a layer, unless they would be too small or too large


@dataclass(frozen=True)
class DeviceProfile:
    """Sizes of tiles, and what the host does meanwhile. Results differ by rounding between profiles."""

    solve_rows: int  # most rows that are solved at a time, from one or several weights; bounds the memory
    least_rows: int  # rows of the smallest tile; processes share out the tiles of a layer
    hessian_rows: int  # rows of H per matrix product, from the diagonal to the right; a multiple of simd.WIDE
    hessian_tokens: int  # tokens per pass over H; fewer tokens cost more passes, more tokens cost memory
    correction_rows: int  # rows that are divided by H at a time; bounds the memory
    triangle_columns: int | None  # columns of the diagonal blocks of U that are inverted; None solves with U as it is
    copied_rows: int  # rows of a layer that are copied at a time, to dequantize or count them; bounds the memory
    nearest_groups: int  # groups of a row that are rounded to nearest at a time
    compares_windows: bool  # whether both streams' inputs of a window are compared at once, or after all windows
    sample_shape: tuple[int, int]  # rows and columns of the layer that is timed to estimate a run
    score_bytes: int  # bytes that tuning holds for an attention score; 0 where `compute.attention` decides
    packing_threads: int  # threads that pack, hash and write a block while the next one is solved; 0: nobody does

    def tile_rows(self, rows: int) -> int:
        """Return how many of `rows` rows are solved at a time: about TILES tiles, whoever shares them."""
        return min(self.solve_rows, self.least_rows * max(1, -(-rows // (TILES * self.least_rows))))


CPU = DeviceProfile(
    solve_rows=2048, least_rows=512, hessian_rows=256, hessian_tokens=1024, correction_rows=1024, triangle_columns=256,
    copied_rows=512, nearest_groups=1, compares_windows=True, sample_shape=(512, 1024), score_bytes=0,
    packing_threads=0,
)  # fmt: skip
GPU = DeviceProfile(
    solve_rows=2**15, least_rows=2**15, hessian_rows=2048, hessian_tokens=8192, correction_rows=2**15,
    triangle_columns=None, copied_rows=2**13, nearest_groups=2**10, compares_windows=False, sample_shape=(4096, 4096),
    score_bytes=12, packing_threads=2,
)  # fmt: skip
# Tiles for several processes to share; they pack together, and none while another waits for it.
SHARED_GPU = replace(GPU, solve_rows=2048, least_rows=256, hessian_rows=512, packing_threads=0)
PROFILES = {"cpu": (CPU, CPU), "cuda": (GPU, SHARED_GPU)}  # for one process, and for several


def profile_of(device: torch.device, processes: int = 1) -> DeviceProfile:
    """Return the profile of a device for a run of one or several processes."""
    alone, shared = PROFILES.get(device.type, PROFILES["cpu"])
    return alone if processes == 1 else shared


def current_device(x: Tensor) -> AbstractContextManager[object]:
    """Inside, the GPU that holds x is the current one, on which Triton launches, whichever GPU its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
