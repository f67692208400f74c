"""ggml's block types: the integers in a row of blocks, and the row of blocks that holds given integers.

A tensor (rows, inputs) of such a type is stored as (rows, bytes of a row): a row is one block after another, each of 32
or 256 neighbouring inputs, and groups of 16 or 32 of these share a scale. With the d and m of a block in float16, the
integers S and M of a group, and a code n, the value of an input is (ggml/src/ggml-common.h, ggml-quants.c)

    Q4_0, Q5_0, Q8_0    d (n - offset)                 Q3_K, Q6_K          d (S - bias) (n - offset)
    Q4_1, Q5_1          d n + m                        Q2_K, Q4_K, Q5_K    d S n - m M
    IQ4_NL              d TABLE[n]

In float32 every product here is exact and a sum is rounded once, so the value does not depend on the order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
ROWS_AT_A_TIME = 2**22  # numbers that are dequantized at a time


@dataclass(frozen=True)
class Blocks:
    """The integers of rows of blocks. All fields but the codes are None where the type has no such field."""

    codes: Tensor  # (rows, inputs) uint8
    d: Tensor  # (rows, blocks) float16
    m: Tensor | None = None  # (rows, blocks) float16
    scales: Tensor | None = None  # (rows, groups) uint8; int8 for Q6_K
    mins: Tensor | None = None  # (rows, groups) uint8


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types: its number in a file, its sizes, and how its blocks are packed."""

    name: str
    number: int  # in a tensor's header
    inputs: int  # per block
    nbytes: int  # per block
    group: int  # inputs that share a scale
    bits: int  # of a code
    unpack_block: Callable[[Tensor], Blocks]  # (blocks, nbytes) -> Blocks with one block in a row
    pack_block: Callable[[Blocks], Tensor]  # the inverse
    offset: int = 0  # taken off a code
    bias: int = 0  # taken off a group's integer scale
    table: tuple[int, ...] | None = None  # the values that codes stand for

    def row_bytes(self, inputs: int) -> int:
        return inputs // self.inputs * self.nbytes

    def unpack(self, rows: Tensor) -> Blocks:
        """Return the integers in rows (rows, bytes of a row) uint8."""
        count = rows.shape[1] // self.nbytes
        found = self.unpack_block(rows.reshape(-1, self.nbytes))
        return _map(found, lambda part: part.reshape(len(rows), count * part.shape[1]))

    def pack(self, blocks: Blocks) -> Tensor:
        """Return the rows (rows, bytes of a row) uint8 that hold these integers."""
        rows, count = blocks.d.shape
        one = _map(blocks, lambda part: part.reshape(rows * count, part.shape[1] // count))
        packed: Tensor = self.pack_block(one).reshape(rows, count * self.nbytes)
        return packed

    def dequantize(self, rows: Tensor) -> Tensor:
        """Return the values of rows (rows, bytes of a row) uint8 as (rows, inputs) float32."""
        inputs = rows.shape[1] // self.nbytes * self.inputs
        W = torch.empty(len(rows), inputs, dtype=torch.float32)
        step = max(ROWS_AT_A_TIME // max(inputs, 1), 1)
        for start in range(0, len(rows), step):
            W[start : start + step] = self.values(self.unpack(rows[start : start + step]))
        return W

    def values(self, blocks: Blocks) -> Tensor:
        """Return the values (rows, inputs) float32 of integers."""
        codes = blocks.codes.float().unflatten(1, (-1, self.group))  # (rows, groups, group)
        if self.table is not None:
            codes = torch.tensor(self.table, dtype=torch.float32)[codes.long()]
        groups = self.inputs // self.group  # of a block
        scale = blocks.d.float().repeat_interleave(groups, 1)  # (rows, groups)
        if blocks.scales is not None:
            scale = scale * (blocks.scales.float() - self.bias)
        W = scale[..., None] * (codes - self.offset)
        if blocks.m is not None:
            low = blocks.m.float().repeat_interleave(groups, 1)
            W = W + low[..., None] if blocks.mins is None else W - (low * blocks.mins.float())[..., None]
        flat: Tensor = W.flatten(1)
        return flat


def _map(blocks: Blocks, change: Callable[[Tensor], Tensor]) -> Blocks:
    parts = (blocks.codes, blocks.d, blocks.m, blocks.scales, blocks.mins)
    return Blocks(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]


# --- pieces of blocks; every argument has one block in a row ----------------------------------------------------------


def _halves(raw: Tensor) -> Tensor:
    """Return float16 numbers (blocks, bytes / 2) from bytes."""
    return raw.contiguous().view(torch.float16)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _split(raw: Tensor, bits: int, span: int) -> Tensor:
    """Return the fields of bytes (blocks, bytes): field k of each byte of a run of `span` bytes follows field k - 1.

    So byte j of a run holds the codes j, j + span, j + 2 span, ... of the run; returns (blocks, bytes * 8 / bits).
    """
    runs = raw.unflatten(1, (-1, 1, span))  # (blocks, runs, 1, span)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device).view(1, 1, -1, 1)
    fields: Tensor = (runs >> shifts) & (2**bits - 1)  # (blocks, runs, fields, span)
    return fields.flatten(1)


def _join(codes: Tensor, bits: int, span: int) -> Tensor:
    """Undo `_split`."""
    fields = codes.unflatten(1, (-1, 8 // bits, span))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).view(1, 1, -1, 1)
    return _sum_bytes(fields << shifts, 2).flatten(1)


def _bits32(raw: Tensor) -> Tensor:
    """Return the 32 bits of four bytes, lowest first: (blocks, 32)."""
    bits: Tensor = (raw[..., None] >> torch.arange(8, dtype=torch.uint8, device=raw.device)) & 1
    return bits.flatten(1)


def _from_bits32(bits: Tensor) -> Tensor:
    return _sum_bytes(bits.unflatten(1, (4, 8)) << torch.arange(8, dtype=torch.uint8, device=bits.device), 2)


def _sum_bytes(parts: Tensor, dim: int) -> Tensor:
    """Add bytes that have no bit in common."""
    return parts.sum(dim, dtype=torch.int32).to(torch.uint8)


def _unpack_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8 scales and 8 minima of 6 bits that Q4_K and Q5_K keep in 12 bytes, (blocks, 8) each."""
    first, second, third = raw.split(4, 1)  # (blocks, 4) each
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], 1)
    mins = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], 1)
    return scales, mins


def _pack_scales(scales: Tensor, mins: Tensor) -> Tensor:
    low, high = scales.split(4, 1)
    low_min, high_min = mins.split(4, 1)
    third = (high & 15) | ((high_min & 15) << 4)
    return torch.cat([low | (high >> 4 << 6), low_min | (high_min >> 4 << 6), third], 1)


# --- one pair of functions for each layout ----------------------------------------------------------------------------


def _unpack_4(raw: Tensor) -> Blocks:  # d, 16 bytes of codes
    return Blocks(_split(raw[:, 2:], 4, 16), _halves(raw[:, :2]))


def _pack_4(blocks: Blocks) -> Tensor:
    return torch.cat([_bytes(blocks.d), _join(blocks.codes, 4, 16)], 1)


def _unpack_4_1(raw: Tensor) -> Blocks:  # d, m, 16 bytes of codes
    return Blocks(_split(raw[:, 4:], 4, 16), _halves(raw[:, :2]), _halves(raw[:, 2:4]))


def _pack_4_1(blocks: Blocks) -> Tensor:
    return torch.cat([_bytes(blocks.d), _bytes(_known(blocks.m)), _join(blocks.codes, 4, 16)], 1)


def _unpack_5(raw: Tensor) -> Blocks:  # d, 4 bytes of high bits, 16 bytes of low bits
    return Blocks(_split(raw[:, 6:], 4, 16) | (_bits32(raw[:, 2:6]) << 4), _halves(raw[:, :2]))


def _pack_5(blocks: Blocks) -> Tensor:
    high, low = _from_bits32(blocks.codes >> 4), _join(blocks.codes & 15, 4, 16)
    return torch.cat([_bytes(blocks.d), high, low], 1)


def _unpack_5_1(raw: Tensor) -> Blocks:  # d, m, then as Q5_0
    codes = _split(raw[:, 8:], 4, 16) | (_bits32(raw[:, 4:8]) << 4)
    return Blocks(codes, _halves(raw[:, :2]), _halves(raw[:, 2:4]))


def _pack_5_1(blocks: Blocks) -> Tensor:
    high, low = _from_bits32(blocks.codes >> 4), _join(blocks.codes & 15, 4, 16)
    return torch.cat([_bytes(blocks.d), _bytes(_known(blocks.m)), high, low], 1)


def _unpack_8(raw: Tensor) -> Blocks:  # d, 32 signed bytes; a code is the byte plus 128
    return Blocks(raw[:, 2:] ^ 128, _halves(raw[:, :2]))


def _pack_8(blocks: Blocks) -> Tensor:
    return torch.cat([_bytes(blocks.d), blocks.codes ^ 128], 1)


def _unpack_2_k(raw: Tensor) -> Blocks:  # 16 bytes of scale and minimum, 64 bytes of codes, d, m
    codes = _split(raw[:, 16:80], 2, 32)
    scales, mins = raw[:, :16] & 15, raw[:, :16] >> 4
    return Blocks(codes, _halves(raw[:, 80:82]), _halves(raw[:, 82:]), scales, mins)


def _pack_2_k(blocks: Blocks) -> Tensor:
    both = _known(blocks.scales) | (_known(blocks.mins) << 4)
    return torch.cat([both, _join(blocks.codes, 2, 32), _bytes(blocks.d), _bytes(_known(blocks.m))], 1)


def _unpack_3_k(raw: Tensor) -> Blocks:  # 32 bytes of high bits, 64 of low bits, 12 of scales, d
    codes = _split(raw[:, 32:96], 2, 32) | (_split(raw[:, :32], 1, 32) << 2)
    scales = _split(raw[:, 96:104], 4, 8) | (_split(raw[:, 104:108], 2, 4) << 4)
    return Blocks(codes, _halves(raw[:, 108:]), scales=scales)


def _pack_3_k(blocks: Blocks) -> Tensor:
    scales = _known(blocks.scales)
    low, high = _join(blocks.codes & 3, 2, 32), _join(blocks.codes >> 2, 1, 32)
    return torch.cat([high, low, _join(scales & 15, 4, 8), _join(scales >> 4, 2, 4), _bytes(blocks.d)], 1)


def _unpack_4_k(raw: Tensor) -> Blocks:  # d, m, 12 bytes of scales and minima, 128 bytes of codes
    return Blocks(_split(raw[:, 16:], 4, 32), _halves(raw[:, :2]), _halves(raw[:, 2:4]), *_unpack_scales(raw[:, 4:16]))


def _pack_4_k(blocks: Blocks) -> Tensor:
    scales = _pack_scales(_known(blocks.scales), _known(blocks.mins))
    return torch.cat([_bytes(blocks.d), _bytes(_known(blocks.m)), scales, _join(blocks.codes, 4, 32)], 1)


def _unpack_5_k(raw: Tensor) -> Blocks:  # as Q4_K, with 32 bytes of high bits before the low bits
    codes = _split(raw[:, 48:], 4, 32) | (_split(raw[:, 16:48], 1, 32) << 4)
    return Blocks(codes, _halves(raw[:, :2]), _halves(raw[:, 2:4]), *_unpack_scales(raw[:, 4:16]))


def _pack_5_k(blocks: Blocks) -> Tensor:
    scales = _pack_scales(_known(blocks.scales), _known(blocks.mins))
    high, low = _join(blocks.codes >> 4, 1, 32), _join(blocks.codes & 15, 4, 32)
    return torch.cat([_bytes(blocks.d), _bytes(_known(blocks.m)), scales, high, low], 1)


def _unpack_6_k(raw: Tensor) -> Blocks:  # 128 bytes of low bits, 64 of high bits, 16 signed scales, d
    codes = _split(raw[:, :128], 4, 64) | (_split(raw[:, 128:192], 2, 32) << 4)
    return Blocks(codes, _halves(raw[:, 208:]), scales=raw[:, 192:208].contiguous().view(torch.int8))


def _pack_6_k(blocks: Blocks) -> Tensor:
    low, high = _join(blocks.codes & 15, 4, 64), _join(blocks.codes >> 4, 2, 32)
    return torch.cat([low, high, _bytes(_known(blocks.scales)), _bytes(blocks.d)], 1)


def _known(part: Tensor | None) -> Tensor:
    """Return a part that the type has.

    Raises:
        TypeError: it is missing.
    """
    if part is None:
        raise TypeError("these blocks lack a part that the type has")
    return part


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 2, 32, 18, 32, 4, _unpack_4, _pack_4, offset=8),
        BlockType("Q4_1", 3, 32, 20, 32, 4, _unpack_4_1, _pack_4_1),
        BlockType("Q5_0", 6, 32, 22, 32, 5, _unpack_5, _pack_5, offset=16),
        BlockType("Q5_1", 7, 32, 24, 32, 5, _unpack_5_1, _pack_5_1),
        BlockType("Q8_0", 8, 32, 34, 32, 8, _unpack_8, _pack_8, offset=128),
        BlockType("Q2_K", 10, 256, 84, 16, 2, _unpack_2_k, _pack_2_k),
        BlockType("Q3_K", 11, 256, 110, 16, 3, _unpack_3_k, _pack_3_k, offset=4, bias=32),
        BlockType("Q4_K", 12, 256, 144, 32, 4, _unpack_4_k, _pack_4_k),
        BlockType("Q5_K", 13, 256, 176, 32, 5, _unpack_5_k, _pack_5_k),
        BlockType("Q6_K", 14, 256, 210, 16, 6, _unpack_6_k, _pack_6_k, offset=32),
        BlockType("IQ4_NL", 20, 32, 18, 32, 4, _unpack_4, _pack_4, table=IQ4_NL_VALUES),
    )
}
