"""Which instructions this CPU has that a kernel is chosen by."""

from functools import cache

import torch


def native_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or has_tiles()


def has_tiles() -> bool:
    """Whether the CPU has a unit for whole tiles of bfloat16 (AMX), which oneDNN uses."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@cache
def has_pairs() -> bool:
    """Whether loops on pairs of bfloat16 numbers can be compiled (`simd.dot_pairs`)."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and _compiles_for_this_cpu()


@cache
def has_shorts() -> bool:
    """Whether loops on pairs of 16-bit integers can be compiled (`simd.dot_shorts`)."""
    return bool(getattr(torch.cpu, "_is_avx2_supported", bool)()) and _compiles_for_this_cpu()


def _compiles_for_this_cpu() -> bool:
    """Whether numba has not been told to compile for another one, or for less than it has."""
    from numba import config  # takes a moment

    told = getattr(config, "CPU_NAME", None) or getattr(config, "CPU_FEATURES", None)
    return not told and bool(getattr(config, "ENABLE_AVX", True))
