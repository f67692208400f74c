"""A Triton kernel for x W^T on packed words, for GPUs: each program unpacks a tile of codes and multiplies it at once.

The kernel reads the tensors of GPTQ files as stored, at any number of bits and with any g_idx. Importing this module
imports triton, which comes with CUDA builds of torch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_OUT, BLOCK_IN = 32, 64  # outputs and inputs in a tile of the weight


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, scale_ptr, zero_ptr, g_idx_ptr, y_ptr, rows, inputs, outputs, num_words,
    BITS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of y: ROWS rows by OUT outputs.

    y[row, out] = sum_k x[row, k] * scale[g_idx[k], out] * (code[k, out] - zero[g_idx[k], out])
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    out_there = out < outputs
    total = tl.zeros((ROWS, OUT), dtype=tl.float32)
    for start in range(0, inputs, IN):
        k = start + tl.arange(0, IN)
        k_there = k < inputs
        there = k_there[:, None] & out_there[None, :]
        word, shift = k * BITS // 32, k * BITS % 32
        at = word.to(tl.int64)[:, None] * outputs + out[None, :]
        code = tl.load(words_ptr + at, mask=there, other=0).to(tl.uint32, bitcast=True)
        code = code >> shift.to(tl.uint32)[:, None]
        if 32 % BITS != 0:  # a code may straddle two words
            straddles = (shift + BITS > 32) & (word + 1 < num_words)
            rest = tl.load(words_ptr + at + outputs, mask=there & straddles[:, None], other=0)
            left = tl.where(straddles, 32 - shift, 0).to(tl.uint32)
            code = code | (rest.to(tl.uint32, bitcast=True) << left[:, None])
        code = code & (2**BITS - 1)
        group = tl.load(g_idx_ptr + k, mask=k_there, other=0)
        at = group.to(tl.int64)[:, None] * outputs + out[None, :]
        scale = tl.load(scale_ptr + at, mask=there, other=0).to(tl.float32)
        zero = tl.load(zero_ptr + at, mask=there, other=0).to(tl.float32)
        weight = scale * (code.to(tl.float32) - zero)  # (IN, OUT)
        x_there = (row < rows)[:, None] & k_there[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * inputs + k[None, :], mask=x_there, other=0)
        total += tl.dot(x.to(tl.float32), weight, input_precision="ieee")
    there = (row < rows)[:, None] & out_there[None, :]
    y_at = y_ptr + row.to(tl.int64)[:, None] * outputs + out[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=there)


def multiply(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor, bits: int) -> Tensor:
    """x W^T with float32 accumulation, (rows, outputs) in x's dtype.

    Args:
        x: (rows, inputs).
        words: (words, outputs) int32, codes packed along the inputs.
        scale: (groups, outputs) floating point.
        zero: (groups, outputs) uint8.
        g_idx: (inputs,) int32.
        bits: 2 to 8.
    """
    x, words, scale, zero = (tensor.contiguous() for tensor in (x, words, scale, zero))
    (rows, inputs), outputs = x.shape, words.shape[1]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    block_rows = 16 if rows <= 16 else 64
    launch: Any = _multiply[(triton.cdiv(rows, block_rows), triton.cdiv(outputs, BLOCK_OUT))]
    launch(
        x, words, scale, zero, g_idx, y, rows, inputs, outputs, len(words),
        BITS=bits, ROWS=block_rows, OUT=BLOCK_OUT, IN=BLOCK_IN,
    )  # fmt: skip
    return y
