"""Triton kernels for x W^T on packed words, for GPUs.

With few rows, a program unpacks a piece of W and multiplies it at once, on tensor cores: code - zero is exact in
bfloat16 and float16, and the scale multiplies a group's sum in float32. The inputs are split among programs, because a
row alone would not occupy a GPU; their sums are added in a fixed order. With more rows, unpacking anew for each of them
would take longest: W is dequantized once, in x's dtype, and torch multiplies it.

The words are those of GPTQ files, (words, outputs), 32 codes in `bits` words; groups are runs of `columns` inputs, the
last may be shorter. Importing this module imports triton, which comes with CUDA builds of torch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq.compute.device_profile import current_device

FEW_ROWS = 64  # up to this many rows, unpacking W for the product beats dequantizing it
PROGRAMS = 512  # programs that the inputs are split for; fixed, so that sums do not depend on the GPU
FEW_OUTPUTS = 64  # outputs of a program that multiplies
TILE_OUTPUTS = 128  # outputs of a program that dequantizes
LARGEST_CHUNK = 128  # inputs that are unpacked at a time


@triton.jit  # type: ignore[untyped-decorator]
def _codes(words_ptr, first, out, num_words, outputs, BITS: tl.constexpr, CHUNK: tl.constexpr, OUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes (CHUNK, OUT) int32 of the inputs from `first` on, a multiple of 32; every word is loaded once."""
    there = (out < outputs)[None, :]
    if 32 % BITS == 0:
        PER: tl.constexpr = 32 // BITS  # codes in a word
        word = first // PER + tl.arange(0, CHUNK // PER)
        at = words_ptr + word.to(tl.int64)[:, None] * outputs + out[None, :]
        held = tl.load(at, mask=(word < num_words)[:, None] & there, other=0)
        code = (held[:, None, :] >> (tl.arange(0, PER) * BITS)[None, :, None]) & (2**BITS - 1)
    else:
        unit = first // 32 + tl.arange(0, CHUNK // 32)  # of 32 codes, in BITS words
        bit = tl.arange(0, 32) * BITS
        begins, shift = bit // 32, (bit % 32)[None, :, None]
        low = tl.zeros((CHUNK // 32, 32, OUT), dtype=tl.int32)
        high = tl.zeros((CHUNK // 32, 32, OUT), dtype=tl.int32)
        for j in tl.static_range(BITS):
            word = unit * BITS + j
            at = words_ptr + word.to(tl.int64)[:, None] * outputs + out[None, :]
            held = tl.load(at, mask=(word < num_words)[:, None] & there, other=0)[:, None, :]
            low = tl.where((begins == j)[None, :, None], held, low)
            high = tl.where((begins + 1 == j)[None, :, None], held, high)
        straddles = shift + BITS > 32
        left = tl.where(straddles, 32 - shift, 0)
        low = (low >> shift) & ((1 << tl.where(straddles, 32 - shift, BITS)) - 1)  # drops the sign that >> drags along
        code = (low | tl.where(straddles, high << left, 0)) & (2**BITS - 1)
    return tl.reshape(code, (CHUNK, OUT))


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_few(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, rows, inputs, outputs, num_words, chunks_each, chunks_of_group,
    BITS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """y (splits, rows, outputs): program (i, j, s) sums `chunks_each` chunks of inputs for ROWS rows, OUT outputs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    split = tl.program_id(2)
    row_there, out_there = row < rows, out < outputs
    lines = x_ptr + row.to(tl.int64)[:, None] * inputs
    total = tl.zeros((ROWS, OUT), dtype=tl.float32)
    for step in range(chunks_each):
        chunk = split * chunks_each + step
        k = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(lines + k[None, :], mask=row_there[:, None] & (k < inputs)[None, :], other=0.0)
        code = _codes(words_ptr, chunk * CHUNK, out, num_words, outputs, BITS, CHUNK, OUT)
        at = (chunk // chunks_of_group).to(tl.int64) * outputs + out
        there = out < tl.where(chunk * CHUNK < inputs, outputs, 0)
        zero = tl.load(zero_ptr + at, mask=there, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32)
        steps = (code - zero[None, :]).to(x.dtype)
        total += tl.dot(x, steps, input_precision="ieee") * scale[None, :]
    at = (split.to(tl.int64) * rows + row)[:, None] * outputs + out[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=row_there[:, None] & out_there[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def]
    words_ptr, scale_ptr, zero_ptr, weight_ptr, inputs, outputs, num_words, chunks_of_group,
    BITS: tl.constexpr, CHUNK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """W^T (inputs, outputs): program (i, j) writes CHUNK inputs of OUT outputs."""
    chunk = tl.program_id(0)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    there = out < outputs
    code = _codes(words_ptr, chunk * CHUNK, out, num_words, outputs, BITS, CHUNK, OUT)
    at = (chunk // chunks_of_group).to(tl.int64) * outputs + out
    zero = tl.load(zero_ptr + at, mask=there, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32)
    weight = (code - zero[None, :]).to(tl.float32) * scale[None, :]
    k = chunk * CHUNK + tl.arange(0, CHUNK)
    to = weight_ptr + k.to(tl.int64)[:, None] * outputs + out[None, :]
    tl.store(to, weight.to(weight_ptr.dtype.element_ty), mask=(k < inputs)[:, None] & there[None, :])


def multiply(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int) -> Tensor:
    """x W^T, (rows, outputs) in x's dtype; sums are float32.

    Args:
        x: (rows, inputs) contiguous.
        words: (words, outputs) int32, codes packed along the inputs.
        scale: (groups, outputs) floating point.
        zero: (groups, outputs) uint8.
        bits: 2 to 8.
        columns: inputs in a group; see `chunk_of`.
    """
    if len(x) > FEW_ROWS:
        return x @ dequantize(words, scale, zero, x.shape[1], bits, columns, x.dtype)
    (rows, inputs), outputs = x.shape, words.shape[1]
    block_rows = 16 if rows <= 16 else 32 if rows <= 32 else 64
    chunk = min(chunk_of(columns, inputs), 64 if block_rows == 64 else LARGEST_CHUNK)  # more would spill registers
    tiles = triton.cdiv(outputs, FEW_OUTPUTS)
    chunks = triton.cdiv(inputs, chunk)
    each = triton.cdiv(chunks, max(min(chunks, PROGRAMS // tiles), 1))
    splits = triton.cdiv(chunks, each)
    sums = torch.empty(splits, rows, outputs, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    with current_device(x):
        launch: Any = _multiply_few[(1, tiles, splits)]
        launch(
            x, words, scale, zero, sums, rows, inputs, outputs, len(words), each, triton.cdiv(columns, chunk),
            BITS=bits, CHUNK=chunk, ROWS=block_rows, OUT=FEW_OUTPUTS,
        )  # fmt: skip
    return sums.sum(0).to(x.dtype) if splits > 1 else sums[0]


def dequantize(
    words: Tensor, scale: Tensor, zero: Tensor, inputs: int, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """W^T (inputs, outputs) in `dtype`; arguments as in `multiply`."""
    outputs, chunk = words.shape[1], chunk_of(columns, inputs)
    weight = torch.empty(inputs, outputs, dtype=dtype, device=words.device)
    with current_device(words):
        launch: Any = _dequantize[(triton.cdiv(inputs, chunk), triton.cdiv(outputs, TILE_OUTPUTS))]
        launch(
            words, scale, zero, weight, inputs, outputs, len(words), triton.cdiv(columns, chunk),
            BITS=bits, CHUNK=chunk, OUT=TILE_OUTPUTS,
        )  # fmt: skip
    return weight


def chunk_of(columns: int, inputs: int) -> int:
    """Return how many inputs are unpacked at a time: they are of one group, and begin with a whole word.

    Raises:
        ValueError: groups are not multiples of 32 inputs, which no kernel takes.
    """
    if columns >= inputs:  # one group
        return LARGEST_CHUNK if inputs > 64 else 32 * triton.next_power_of_2(triton.cdiv(inputs, 32))
    if columns % 32:
        raise ValueError(f"groups of {columns} inputs are no multiples of 32")
    return min(columns & -columns, LARGEST_CHUNK)
