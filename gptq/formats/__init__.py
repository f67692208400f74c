"""The same integers in each engine's words."""

from gptq.formats.codec import (
    GPTQ_BITS,
    MARKER,
    SUFFIXES,
    Codes,
    Scheme,
    decode,
    decode_groups,
    decode_zeros,
    encode,
    in_runs,
    layout,
    refusal,
)

__all__ = [
    "GPTQ_BITS", "MARKER", "SUFFIXES", "Codes", "Scheme", "decode", "decode_groups", "decode_zeros", "encode",
    "in_runs", "layout", "refusal",
]  # fmt: skip
