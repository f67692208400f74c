"""Slow, literal, independent versions of what the package computes; float64, one column (or one code) at a time.

Nothing here calls the package: the grid, the updates and the bit layout are written out again from their definitions.
"""

import torch
from torch import Tensor


def damped(H: Tensor, damp_percent: float) -> Tensor:
    return H + damp_percent * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def nearest_code(w: float, scale: float, zero: float, bits: int) -> int:
    largest: int = 2**bits - 1
    return min(max(round(w / scale) + round(zero), 0), largest)  # Python rounds halves to even, like torch


def gptq_by_inverse(W: Tensor, H: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Optimal brain quantization in fixed column order: the inverse of the remaining H, formed anew for each column.

    W (rows, n), H (n, n) damped, scale and zero (rows, n). Returns codes and the compensated weight that each column
    had when it was rounded.
    """
    W = W.clone()
    codes, reached = torch.zeros_like(W), torch.zeros_like(W)
    rows, n = W.shape
    for j in range(n):
        inverse = torch.linalg.inv(H[j:, j:])
        reached[:, j] = W[:, j]
        for r in range(rows):
            code = nearest_code(float(W[r, j]), float(scale[r, j]), float(zero[r, j]), bits)
            codes[r, j] = code
            error = (W[r, j] - scale[r, j] * (code - zero[r, j])) / inverse[0, 0]
            W[r, j:] -= error * inverse[0]
    return codes, reached


def gptq_by_downdating(W: Tensor, H: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The same with one inverse, downdated after each column as in OBQ: H^-1 <- H^-1 - h h^T / h_jj."""
    W, inverse = W.clone(), torch.linalg.inv(H)
    codes = torch.zeros_like(W)
    for j in range(W.shape[1]):
        for r in range(W.shape[0]):
            code = nearest_code(float(W[r, j]), float(scale[r, j]), float(zero[r, j]), bits)
            codes[r, j] = code
            error = (W[r, j] - scale[r, j] * (code - zero[r, j])) / inverse[j, j]
            W[r, j + 1 :] -= error * inverse[j, j + 1 :]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def gptq_by_cholesky(W: Tensor, H: Tensor, scale: Tensor, zero: Tensor, bits: int, block: int) -> Tensor:
    """The paper's Algorithm 1: upper Cholesky factor R of H^-1, blocks of columns, then all the rest."""
    W = W.clone()
    R = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    codes = torch.zeros_like(W)
    n = W.shape[1]
    for begin in range(0, n, block):
        end = min(begin + block, n)
        errors = torch.zeros(W.shape[0], end - begin, dtype=W.dtype)
        for j in range(begin, end):
            codes[:, j] = (torch.round(W[:, j] / scale[:, j]) + zero[:, j]).clamp(0, 2**bits - 1)
            errors[:, j - begin] = (W[:, j] - scale[:, j] * (codes[:, j] - zero[:, j])) / R[j, j]
            W[:, j:end] -= torch.outer(errors[:, j - begin], R[j, j:end])
        W[:, end:] -= errors @ R[begin:end, end:]
    return codes


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """Codes as one little-endian bit string, cut into signed 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    unsigned = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(words)]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


def dequantized(file: dict[str, Tensor], layer: str, bits: int) -> Tensor:
    """The weight (out, in) of a GPTQ v1 layer, read bit by bit as the format says; float64."""
    qweight, qzeros, scales, g_idx = (file[f"{layer}.{s}"] for s in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = len(g_idx), scales.shape[1]
    W = torch.zeros(outputs, inputs, dtype=torch.float64)
    zeros = []
    for words in qzeros.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        zeros.append([((stream >> (bits * o)) & (2**bits - 1)) + 1 for o in range(outputs)])
    columns = qweight.T.tolist()
    scale = scales.double().tolist()
    groups = g_idx.tolist()
    for o in range(outputs):
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(columns[o]))
        for i in range(inputs):
            code = (stream >> (bits * i)) & (2**bits - 1)
            W[o, i] = scale[groups[i]][o] * (code - zeros[groups[i]][o])
    return W


def unpacked_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes (rows, count) of rows of words, bit by bit; float64."""
    streams = [sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row)) for row in words.tolist()]
    codes = [[(stream >> (bits * i)) & (2**bits - 1) for i in range(count)] for stream in streams]
    return torch.tensor(codes, dtype=torch.float64)
