"""CPU features that decide which kernel runs."""

from functools import cache

import torch


def has_native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or has_amx()


def has_amx() -> bool:
    """Whether the CPU has AMX, a matrix unit for tiles of bfloat16; oneDNN uses it."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@cache
def has_avx512_bf16() -> bool:
    """Whether numba can compile `simd.dot_bfloat16_pairs`, which needs AVX-512 with bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and _numba_targets_this_cpu()


@cache
def has_avx2() -> bool:
    """Whether numba can compile `simd.dot_int16_pairs`, which needs AVX2."""
    return bool(getattr(torch.cpu, "_is_avx2_supported", bool)()) and _numba_targets_this_cpu()


def _numba_targets_this_cpu() -> bool:
    """Whether numba compiles for this CPU with all its features: its environment variables can name another target."""
    from numba import config  # slow to import

    override = getattr(config, "CPU_NAME", None) or getattr(config, "CPU_FEATURES", None)
    return not override and bool(getattr(config, "ENABLE_AVX", True))
