"""CPU features that decide which kernel runs."""

import torch


def has_native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or has_amx()


def has_amx() -> bool:
    """Whether the CPU has AMX, a matrix unit for tiles of bfloat16; oneDNN uses it."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def has_avx512_bf16() -> bool:
    """Whether the CPU has the instruction of `simd.dot_bfloat16_pairs`, of AVX-512 with bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def has_avx2() -> bool:
    """Whether the CPU has the instruction of `simd.dot_int16_pairs`, of AVX2."""
    return bool(getattr(torch.cpu, "_is_avx2_supported", bool)())
