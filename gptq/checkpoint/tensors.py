"""A tensor as a safetensors header describes it: dtype, shape, bytes, checksum."""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq.compute.background import to_host

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMBERED = re.compile(r"(^|\.)\d+\.")  # found in names of tensors and layers of blocks
# In the order in which safetensors lays out a file: wide types first, so that every tensor is aligned.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),  # from torch 2.7 on
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a safetensors header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{DTYPE_CODES[self.dtype]} {'x'.join(map(str, self.shape)) or 'scalar'}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as safetensors stores them: row-major, little-endian."""
    flat = to_host(tensor.detach().contiguous()).reshape(-1)
    if flat.numel() == 1:  # whose stride may be anything
        flat = flat.clone(memory_format=torch.contiguous_format)
    flat = flat.view(torch.uint8)
    return flat.numpy().data


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def sha256_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
