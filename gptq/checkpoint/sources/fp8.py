"""FP8 and int8 weights with floating-point scales: w = code * scale, or (code - zero point) * scale.

    P.weight            (outputs, inputs)  float8_e4m3fn, float8_e5m2 or int8
    P.weight_scale_inv  scales; DeepSeek-V3, Qwen3-FP8 and others, one per block of 128 x 128 (the last may be short)
    P.weight_scale      scales; compressed-tensors (`float-quantized`, `naive-quantized`, `int-quantized`,
                        `mxfp8-quantized`), FBGEMM and ModelOpt, one per tensor, row or block
    P.scale, P.qscale_weight                          the same in DeepSeek-V4's and Mistral Large 4's files

Experts in one tensor X (experts, ., .) have their scales in X_scale_inv or X_scale. Scales are float32, bfloat16,
float16, or bytes e for 2^(e - 127) (E8M0). Sources: transformers, integrations/finegrained_fp8.py and fbgemm_fp8.py;
DeepSeek-V3, inference/kernel.py (`weight_dequant`), for blocks at ragged edges; compressed-tensors,
compressors/naive_quantized.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.checkpoint.derived import Derived
from gptq.checkpoint.reader import Source
from gptq.checkpoint.sources.decoded import FP8, Declared, Kind, require_dtype, row_chunks
from gptq.compute.number_formats import E8M0, powers_of_two
from gptq.errors import InputError

SCALE_SUFFIXES = ("_scale_inv", "_scale")  # after the name of the weight
SIBLINGS = ("scale", "qscale_weight")  # in place of "weight"
SCALES = (torch.float32, torch.bfloat16, torch.float16, E8M0, torch.uint8)
BLOCK, MX_BLOCK = (128, 128), (1, 32)  # rows and columns that share a scale where the configuration does not say


@dataclass(frozen=True)
class Scaled(Derived):
    """Codes with one scale per block of rows and columns; `zero` names zero points in the scales' layout, or is ""."""

    scale: str
    zero: str
    block: tuple[int, int]

    def compute(self, stored: Source, rows: range) -> Iterator[tuple[range, Tensor]]:
        stacked = len(self.shape) > 2  # rows are experts then
        multiple = 1 if stacked or self.block[0] == self.shape[0] else self.block[0]
        for which in row_chunks(rows, self.shape, multiple):
            part = slice(which.start, which.stop)
            codes = stored.read(self.parts[0], rows=part).float()  # (rows, inputs)
            if self.zero:
                codes -= self._spread(stored, self.zero, which)
            yield which, codes.mul_(self._spread(stored, self.scale, which))

    def _spread(self, stored: Source, name: str, rows: range) -> Tensor:
        """Return the scales (or zero points) of these rows, one per weight or broadcastable to them, float32."""
        info = stored.tensors[name]
        if len(info.shape) < len(self.shape):  # per tensor or, in a vector, per row
            values = _to_float(stored.read(name))
            return (
                values if values.numel() == 1 else values[rows.start : rows.stop].view(-1, *[1] * (len(self.shape) - 1))
            )
        if len(self.shape) > 2:  # (experts, blocks of rows, blocks of columns)
            own = slice(0, 1) if info.shape[0] == 1 else slice(rows.start, rows.stop)
            values, lines = _to_float(stored.read(name, rows=own)), range(self.shape[-2])
        else:
            first, last = rows.start // self.block[0], (rows.stop - 1) // self.block[0]
            values = _to_float(stored.read(name, rows=slice(first, last + 1)))
            lines = range(rows.start - first * self.block[0], rows.stop - first * self.block[0])
        down = torch.arange(lines.start, lines.stop) // self.block[0]
        across = torch.arange(self.shape[-1]) // self.block[1]
        if values.shape[-1] == 1:
            return values[..., down, :]
        return values[..., down, :][..., across]


def _to_float(values: Tensor) -> Tensor:
    return powers_of_two(values) if values.dtype in (E8M0, torch.uint8) else values.float()


def _find(stored: Source, declared: Declared) -> Mapping[str, Derived]:
    found: dict[str, Derived] = {}
    alone: list[str] = []
    for name, info in stored.tensors.items():
        if info.dtype not in (*FP8, torch.int8) or len(info.shape) < 2:
            continue
        scale = _name_of_scale(stored, name)
        if scale is None:
            is_scale = name.endswith(SCALE_SUFFIXES)  # of NVFP4, whose scales are FP8
            alone += [name] if info.dtype in FP8 and not is_scale else []
        elif not (info.dtype == torch.int8 and stored.tensors[scale].dtype == E8M0):  # that is MXFP4, see `mxfp4`
            found[name] = _check(stored, name, scale, declared.blocks)
    _refuse_lonely_scales(stored, found)
    if found and alone:
        raise InputError(
            f"{alone[0]} in {stored.file_of(alone[0])} holds {stored.tensors[alone[0]].dtype}, but its scales "
            f"({alone[0]}_scale_inv or {alone[0]}_scale) are missing"
        )
    return found


def _name_of_scale(stored: Source, weight: str) -> str | None:
    stem = weight.removesuffix("weight") if weight.endswith(".weight") else None
    names = [weight + suffix for suffix in SCALE_SUFFIXES] + [stem + name for name in SIBLINGS if stem is not None]
    return next((name for name in names if name in stored.tensors), None)


def _refuse_lonely_scales(stored: Source, found: Mapping[str, Derived]) -> None:
    """Check that every `weight_scale_inv` belongs to a weight that is stored as FP8.

    Raises:
        InputError: the weight is missing, or stored in another dtype.
    """
    for name in stored.tensors:
        weight = name.removesuffix("_scale_inv")
        if weight != name and weight not in found:
            held = f"holds {stored.tensors[weight].dtype}" if weight in stored.tensors else "is missing"
            raise InputError(f"{name} in {stored.file_of(name)} is the scale of FP8 codes, but {weight} {held}")


def _check(stored: Source, weight: str, scale: str, blocks: tuple[tuple[int, int], ...]) -> Scaled:
    """Return the weight with the block that the shape of its scales tells.

    Raises:
        InputError: no block has scales of that shape, or scales or zero points have a wrong dtype.
    """
    require_dtype(stored, scale, SCALES)
    shape, found = stored.tensors[weight].shape, stored.tensors[scale].shape
    block = _find_block(shape, found, (*blocks, BLOCK, *_mx_blocks(stored, scale)))
    if block is None:
        rows, columns = blocks[0] if blocks else BLOCK
        expected = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
        raise InputError(
            f"{scale} in {stored.file_of(scale)} has the shape {found}; {weight} {shape} needs {expected} in blocks of "
            f"{rows} x {columns}, or one scale per tensor or row"
        )
    zero = weight.removesuffix("weight") + "weight_zero_point"
    parts: tuple[str, ...] = (weight, scale)
    if zero not in stored.tensors:
        return Scaled(parts, shape, scale, "", block)
    if stored.tensors[zero].shape != found or stored.tensors[zero].dtype != torch.int8:
        raise InputError(f"{zero} in {stored.file_of(zero)} is {stored.tensors[zero]}, not {found} of torch.int8")
    return Scaled((*parts, zero), shape, scale, zero, block)


def _mx_blocks(stored: Source, scale: str) -> list[tuple[int, int]]:
    return [MX_BLOCK] if stored.tensors[scale].dtype in (E8M0, torch.uint8) else []


def _find_block(
    shape: tuple[int, ...], scales: tuple[int, ...], blocks: tuple[tuple[int, int], ...]
) -> tuple[int, int] | None:
    """Return the rows and columns per scale; None if scales of this shape do not fit a weight of that shape."""
    whole = (shape[-2], shape[-1])
    if scales in ((), (1,), (shape[0],)):  # per tensor; per row; per expert of a stack
        return whole
    if len(scales) != len(shape) or any(s not in (1, w) for s, w in zip(scales[:-2], shape[:-2], strict=True)):
        return None
    for rows, columns in blocks:
        if scales[-2:] == (-(-shape[-2] // rows), -(-shape[-1] // columns)):
            return rows, columns
    if all(s in (1, w) for s, w in zip(scales, shape, strict=True)):  # per row, per column, per expert
        return (whole[0] if scales[-2] == 1 else 1), (whole[1] if scales[-1] == 1 else 1)
    return None


KIND = Kind("FP8 or int8 codes with scales", _find)
