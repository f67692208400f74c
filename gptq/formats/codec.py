"""A layer's integers as the tensors that other engines read: GPTQ v1 and v2, and compressed-tensors' pack-quantized.

For a linear layer P with `out` outputs and `in` inputs in groups of g, GPTQ stores

    P.qweight  (ceil(in * bits / 32), out)            int32    codes, packed along the inputs
    P.qzeros   (ceil(in / g), ceil(out * bits / 32))  int32    zero (v2) or zero - 1 (v1), packed along the outputs
    P.scales   (ceil(in / g), out)                    float16
    P.g_idx    (in,)                                  int32    group of each input

and pack-quantized, with signed codes and zero points that carry an offset of 2^(bits - 1), hence the same bits:

    P.weight_packed      (out, ceil(in * bits / 32))  int32    codes, packed along the inputs
    P.weight_scale       (out, in / g)                float    in the model's dtype, or float16 as here
    P.weight_zero_point  (ceil(out * bits / 32), in / g)  int32    zero, packed along the outputs; asymmetric only
    P.weight_shape       (2,)                         int64    out, in
    P.weight_g_idx       (in,)                        int32    only with act-order by groups, no longer made

Packing is one dense bit stream (see `packing`); compressed-tensors before 0.18 padded the words of 3, 5, 6 and 7 bits
instead (its change #715). A layer whose inputs the group size does not divide has a short last group, and
one whose codes do not fill the last word has zero bits there.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format
from gptq.formats.packing import num_words, pack, unpack
from gptq.solver import grid

GPTQ_BITS = (2, 3, 4, 8)
MARKER = {"gptq": "qweight", "gptq_v2": "qweight", "pack-quantized": "weight_packed"}  # every packed layer has it
SUFFIXES = frozenset(
    {"qweight", "qzeros", "scales", "g_idx"}
    | {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}
)


@dataclass(frozen=True)
class Scheme:
    """How one layer's weight is stored."""

    bits: int
    group_size: int  # -1: one group per row
    sym: bool
    format: Format = "gptq"
    scattered: bool = False  # groups are not runs of columns, so that g_idx has to be used
    by_gptqmodel: bool = False  # v1 with GPTQModel's own way of taking 1 off, which keeps a zero point of 0

    def columns(self, inputs: int) -> int:
        """Columns per group of a layer with so many inputs."""
        return inputs if self.group_size == -1 else min(self.group_size, inputs)

    def groups(self, inputs: int) -> int:
        return -(-inputs // self.columns(inputs))


class Integers(Protocol):
    """A weight (rows, columns) as integers; `solver.SolvedLayer` is one."""

    @property
    def codes(self) -> Tensor: ...  # (rows, columns) uint8

    @property
    def scale(self) -> Tensor: ...  # (rows, groups) floating point

    @property
    def zero(self) -> Tensor: ...  # (rows, groups) uint8

    @property
    def g_idx(self) -> Tensor: ...  # (columns,) int32


@dataclass(frozen=True)
class Codes:
    """The integers of a stored layer, with the scales in the dtype they are stored in."""

    codes: Tensor  # (rows, columns) uint8
    scale: Tensor  # (rows, groups) floating point
    zero: Tensor  # (rows, groups) uint8
    g_idx: Tensor  # (columns,) int32

    def weight(self) -> Tensor:
        """The dequantized weight (rows, columns) in float32."""
        groups = self.g_idx.long()
        return grid.dequantize(self.codes.float(), self.scale.float()[:, groups], self.zero.float()[:, groups])


def layout(
    scheme: Scheme, num_outputs: int, num_inputs: int, scale_dtype: torch.dtype = grid.SCALE_DTYPE
) -> dict[str, TensorInfo]:
    """What is stored for a layer, before it is known."""
    groups, int32 = scheme.groups(num_inputs), torch.int32
    words_in, words_out = num_words(num_inputs, scheme.bits), num_words(num_outputs, scheme.bits)
    if scheme.format != "pack-quantized":
        return {
            "qweight": TensorInfo(int32, (words_in, num_outputs)),
            "qzeros": TensorInfo(int32, (groups, words_out)),
            "scales": TensorInfo(scale_dtype, (groups, num_outputs)),
            "g_idx": TensorInfo(int32, (num_inputs,)),
        }
    return {
        "weight_packed": TensorInfo(int32, (num_outputs, words_in)),
        "weight_scale": TensorInfo(scale_dtype, (num_outputs, groups)),
        "weight_shape": TensorInfo(torch.int64, (2,)),
        **({} if scheme.sym else {"weight_zero_point": TensorInfo(int32, (words_out, groups))}),
        **({"weight_g_idx": TensorInfo(int32, (num_inputs,))} if scheme.scattered else {}),
    }


def encode(
    layer: Integers, scheme: Scheme, scale_dtype: torch.dtype = grid.SCALE_DTYPE, allow_zero: bool = False
) -> dict[str, Tensor]:
    """The tensors of `layout` for a layer.

    Args:
        allow_zero: let v1 store zero points of 0 as fields of ones, to write again what a file held before.
    Raises:
        ValueError: a zero point is 0, which v1 stores as -1.
    """
    codes = pack(layer.codes.T, scheme.bits)  # (words, out)
    scale = layer.scale.to(scale_dtype)  # (out, groups)
    if scheme.format != "pack-quantized":
        qzeros = _encode_zeros(layer.zero, scheme, allow_zero)
        return {"qweight": codes, "qzeros": qzeros, "scales": scale.T.contiguous(), "g_idx": layer.g_idx}
    shape = torch.tensor(layer.codes.shape, dtype=torch.int64)
    packed = {"weight_packed": codes.T.contiguous(), "weight_scale": scale.contiguous(), "weight_shape": shape}
    if not scheme.sym:
        packed["weight_zero_point"] = pack(layer.zero, scheme.bits)  # (words, groups)
    if scheme.scattered:
        packed["weight_g_idx"] = layer.g_idx
    return packed


def _encode_zeros(zero: Tensor, scheme: Scheme, allow_zero: bool) -> Tensor:
    """qzeros (groups, words) of zero points (out, groups).

    GPTQModel (utils/model.py, convert_gptq_v2_to_v1_format_module) takes 1 off every field at 3 bits, and at the other
    widths off the whole word as one number: a zero point of 0 borrows from its neighbour, and so do unused fields.
    """
    if scheme.format == "gptq_v2":
        return pack(zero, scheme.bits).T.contiguous()
    if scheme.by_gptqmodel and scheme.bits != 3:
        return pack(zero, scheme.bits).T.contiguous() - _ones(scheme.bits)
    if not allow_zero and not int(zero.min()):
        raise ValueError("a zero point is 0, which GPTQ v1 stores as -1, about which its readers disagree")
    return pack((zero.int() - 1) & (2**scheme.bits - 1), scheme.bits).T.contiguous()


def _ones(bits: int) -> int:
    """A word of ones at the width of 2, 4 or 8 bits."""
    return sum(1 << i for i in range(0, 32, bits))


def decode(packed: dict[str, Tensor], scheme: Scheme) -> Codes:
    """The integers that a layer's stored tensors stand for; the inverse of `encode`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if scheme.format != "pack-quantized":
        scale, g_idx = packed["scales"].T, packed["g_idx"]
        codes = unpack(packed["qweight"], scheme.bits, g_idx.shape[0]).T
        return Codes(codes, scale, decode_zeros(packed["qzeros"], scheme, scale.shape[0]), g_idx)
    scale = packed["weight_scale"]
    outputs, inputs = (int(n) for n in packed["weight_shape"])
    codes = unpack(packed["weight_packed"].T, scheme.bits, inputs).T
    if scheme.sym:
        zero = torch.full(scale.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8, device=scale.device)
    else:
        zero = unpack(packed["weight_zero_point"], scheme.bits, outputs)
    return Codes(codes, scale, zero, decode_groups(packed, scheme, inputs))


def in_runs(scheme: Scheme, inputs: int) -> Tensor:
    """g_idx (inputs,) of groups that are runs of columns."""
    return torch.arange(inputs, dtype=torch.int32) // scheme.columns(inputs)


def decode_groups(packed: dict[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
    """The group of each input, (inputs,) int32."""
    if scheme.format != "pack-quantized":
        return packed["g_idx"]
    if scheme.scattered:
        return packed["weight_g_idx"]
    return in_runs(scheme, inputs).to(packed["weight_scale"].device)


def decode_zeros(qzeros: Tensor, scheme: Scheme, num_outputs: int) -> Tensor:
    """Zero points (out, groups) of qzeros (groups, words).

    A v1 field of all ones stands for -1 + 1 = 0, as readers that mask after adding take it.
    """
    whole_words = scheme.by_gptqmodel and scheme.bits != 3
    if whole_words:
        qzeros = qzeros + _ones(scheme.bits)  # wraps around like the subtraction did
    zero = unpack(qzeros.T, scheme.bits, num_outputs)  # (out, groups)
    return zero if scheme.format == "gptq_v2" or whole_words else (zero + 1) & (2**scheme.bits - 1)


def refusal(scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
    """Why a format cannot hold a layer of this shape so that its readers take it, or None.

    Args:
        transposed: the layer is transformers' Conv1D, not nn.Linear.
    """
    if scheme.format != "pack-quantized":
        return None if scheme.bits in GPTQ_BITS else f"GPTQ files hold 2, 3, 4 or 8 bits, not {scheme.bits}"
    if transposed:
        return "compressed-tensors reads nn.Linear, and this layer is a Conv1D"
    if scheme.scattered:
        return "compressed-tensors has no g_idx any more, which act-order with dynamic groups needs"
    if inputs % scheme.columns(inputs):
        return f"compressed-tensors needs whole groups, and {scheme.group_size} does not divide the {inputs} inputs"
    return None
