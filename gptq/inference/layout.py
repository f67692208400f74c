"""The memory layout of packed weights that the compiled loops read, and its conversion from stored tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq import formats
from gptq.formats.packing import pack
from gptq.formats.scheme import Scheme


@dataclass(frozen=True)
class Stored:
    """A layer's stored tensors, their scheme and the layer's shape."""

    packed: dict[str, Tensor]
    scheme: Scheme
    outputs: int
    inputs: int

    @property
    def device(self) -> torch.device:
        return next(iter(self.packed.values())).device

    @property
    def columns(self) -> int:
        return self.scheme.columns(self.inputs)

    def codes(self) -> formats.Codes:
        return formats.decode_shaped(self.packed, self.scheme, (self.outputs, self.inputs))


@dataclass(frozen=True)
class Layout:
    """A weight's words, scales and zeros, rearranged so that the compiled loops read them sequentially.

    Outputs are split into strips of simd.TILE outputs; the last strip may be narrower. The numbers of a strip are
    contiguous:

        words           strip, unit of 32 inputs, vector of LANES outputs, word of the unit (`bits` words), output
        scale, zero     strip, group, output

    Reading a strip out of the stored words instead, a piece of every line, reaches two thirds of the memory bandwidth.
    """

    words: Tensor  # int32, flat
    scale: Tensor  # flat, float16 viewed as int16; float32 if a scale is not exact in float16
    zero: Tensor  # uint8, flat
    perm: Tensor | None  # (inputs,) order of inputs that makes groups contiguous; None: they are already
    inputs: int  # padded to a multiple of 32
    bits: int
    columns: int  # inputs in a group
    outputs: int  # without padding
    padded_outputs: int  # a multiple of simd.WIDE
    whole: bool  # the words are a permutation of the stored `qweight`, from which `qweight` can be restored

    @classmethod
    def of(cls, stored: Stored) -> "Layout | None":
        """Make the layout of a layer; None if no order of the inputs makes its groups contiguous and equally long."""
        from gptq.compute import simd

        scheme, inputs, outputs = stored.scheme, stored.inputs, stored.outputs
        perm = None
        if scheme.scattered:
            perm = order_of_groups(stored)
            if perm is None:
                return None
        padded_outputs, padded_inputs = round_up(outputs, simd.WIDE), round_up(inputs, 32)
        whole = (
            perm is None
            and formats.FORMATS[scheme.format].inputs_first
            and (padded_outputs, padded_inputs) == (outputs, inputs)
        )
        if whole:
            words = stored.packed["qweight"]  # (units * bits, outputs)
            scale = stored.packed["scales"]
            zero = formats.decode_zeros(stored.packed, scheme, outputs).T
        else:
            integers = stored.codes()
            codes = integers.codes if perm is None else integers.codes[:, perm]
            padding = (0, padded_inputs - inputs, 0, padded_outputs - outputs)
            padded = torch.nn.functional.pad(codes, padding)  # (padded_outputs, padded_inputs)
            words = pack(padded.T, scheme.bits)
            scale, zero = integers.scale.T, integers.zero.T
        missing = (0, padded_outputs - outputs)  # pads scale and zero to (groups, padded_outputs)
        scale, zero = (torch.nn.functional.pad(t, missing) for t in (_as_float16_bits(scale), zero))
        columns = padded_inputs if stored.columns == inputs else stored.columns
        words, scale, zero = _to_strips(words, scheme.bits), _to_strips(scale, 1), _to_strips(zero, 1)
        return cls(words, scale, zero, perm, padded_inputs, scheme.bits, columns, outputs, padded_outputs, whole)

    @property
    def groups(self) -> int:
        return self.scale.numel() // self.padded_outputs

    @property
    def has_half_scales(self) -> bool:
        return self.scale.dtype == torch.int16

    def arrange(self, x: Tensor) -> Tensor:
        """x (..., inputs) permuted to the order of the words, padded with zeros, contiguous."""
        if self.perm is not None:
            x = x[..., self.perm]
        missing = self.inputs - x.shape[-1]
        return (torch.nn.functional.pad(x, (0, missing)) if missing else x).contiguous()

    def drop_padding(self, y: Tensor) -> Tensor:
        """Remove the padding from y (..., padded outputs): (..., outputs)."""
        return y if self.padded_outputs == self.outputs else y[..., : self.outputs]

    def stored_words(self) -> Tensor:
        """The stored `qweight` (units * bits, outputs), restored from the words; only if the layout is `whole`."""
        from gptq.compute import simd

        found = self.words.new_empty(self.inputs // 32, self.bits, self.padded_outputs)
        for low in range(0, self.padded_outputs, simd.TILE):
            strip = found[..., low : low + simd.TILE].unflatten(-1, (-1, simd.LANES)).transpose(1, 2)
            begin = low * len(found) * self.bits
            strip.copy_(self.words[begin : begin + strip.numel()].view(strip.shape))
        return found.flatten(0, 1)


def order_of_groups(stored: Stored) -> Tensor | None:
    """Return the order (inputs,) of a layer's inputs that makes its groups runs of equal length but the last

    None if there is no such order.
    """
    g_idx = formats.decode_groups(stored.packed, stored.scheme, stored.inputs)
    order = torch.argsort(g_idx, stable=True)
    runs = formats.contiguous_groups(stored.scheme, stored.inputs).to(g_idx.device)
    return order if torch.equal(g_idx[order], runs) else None


def _as_float16_bits(scale: Tensor) -> Tensor:
    """Return scales in the dtype of `Layout.scale`."""
    halves = scale.to(torch.float16)
    return halves.view(torch.int16) if torch.equal(halves.float(), scale.float()) else scale.float()


def _to_strips(lines: Tensor, size: int) -> Tensor:
    """Return stored lines in the order of `Layout`: strip by strip of outputs, flat.

    Args:
        lines: (units * size, outputs), `size` lines for each unit.
    """
    from gptq.compute import simd

    strips = lines.unflatten(0, (-1, size)).split(simd.TILE, dim=-1)  # (units, size, outputs of a strip) each
    return torch.cat([strip.unflatten(-1, (-1, simd.LANES)).transpose(1, 2).flatten() for strip in strips])


def round_up(number: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `number`."""
    return -(-number // unit) * unit
