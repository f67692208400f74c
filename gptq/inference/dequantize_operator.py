"""Dequantizing as one operator of compiled models, for layers whose format has no kernel: FP8, FP4, real offsets.

A compiler would take the steps of `formats.decode` apart, some thirty for a layer, and compile each.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from gptq import formats
from gptq.formats.scheme import Scheme


def describe(scheme: Scheme) -> str:
    """Return a scheme as text, which an operator can take."""
    return json.dumps(asdict(scheme))


def dequantize(packed: Mapping[str, Tensor], scheme: str, shape: tuple[int, int]) -> Tensor:
    """Return the weight (outputs, inputs) in float32 of stored tensors, as one node of a compiler's graph.

    Args:
        packed: the stored tensors by their names on disk.
        scheme: what `describe` gives.
        shape: (outputs, inputs).
    """
    found: Tensor = torch.ops.gptq.dequantize(list(packed.values()), list(packed), scheme, list(shape))
    return found


def _compute(tensors: list[Tensor], names: list[str], scheme: str, shape: list[int]) -> Tensor:
    packed, (outputs, inputs) = dict(zip(names, tensors, strict=True)), shape
    return formats.decode_shaped(packed, Scheme(**json.loads(scheme)), (outputs, inputs)).weight()


def _announce(tensors: list[Tensor], names: list[str], scheme: str, shape: list[int]) -> Tensor:
    return tensors[0].new_empty(shape, dtype=torch.float32)


_operators = torch.library.Library("gptq", "FRAGMENT")
_operators.define("dequantize(Tensor[] tensors, str[] names, str scheme, int[] shape) -> Tensor")
_operators.impl("dequantize", _compute, "CPU")
_operators.impl("dequantize", _compute, "CUDA")
_operators.impl("dequantize", _announce, "Meta")
