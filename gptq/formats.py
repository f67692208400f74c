"""GPTQ v1 on disk: a solved layer as the tensors and the configuration that other engines read.

For a linear layer P with `out` outputs and `in` inputs in groups of g:

    P.qweight  (ceil(in * bits / 32), out)            int32    codes, packed along the inputs
    P.qzeros   (ceil(in / g), ceil(out * bits / 32))  int32    zero - 1, packed along the outputs
    P.scales   (ceil(in / g), out)                    float16
    P.g_idx    (in,)                                  int32    group of each input

A layer whose inputs the group size does not divide has a short last group, and one whose codes do not fill the last
word has zero bits there; both read back here and in GPTQModel 7.7, while vLLM and SGLang want whole groups and words.
"""

from typing import Any

import torch
from torch import Tensor

from gptq import grid
from gptq.checkpoint import TensorInfo
from gptq.config import QuantConfig
from gptq.packing import num_words, pack, unpack
from gptq.solver import SolvedLayer
from gptq.version import __version__

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def layout(num_outputs: int, num_inputs: int, bits: int, group_size: int) -> dict[str, TensorInfo]:
    """What is stored for a layer, before it is known."""
    groups = -(-num_inputs // group_size)
    return {
        "qweight": TensorInfo(torch.int32, (num_words(num_inputs, bits), num_outputs)),
        "qzeros": TensorInfo(torch.int32, (groups, num_words(num_outputs, bits))),
        "scales": TensorInfo(grid.SCALE_DTYPE, (groups, num_outputs)),
        "g_idx": TensorInfo(torch.int32, (num_inputs,)),
    }


def encode(layer: SolvedLayer, bits: int) -> dict[str, Tensor]:
    """The tensors of `layout` for a solved layer."""
    return {
        "qweight": pack(layer.codes.T, bits),  # (words, out)
        "qzeros": pack(layer.zero.int() - 1, bits).T.contiguous(),  # (groups, words)
        "scales": layer.scale.T.to(grid.SCALE_DTYPE).contiguous(),  # (groups, out)
        "g_idx": layer.g_idx,
    }


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensor:
    """The weight (out, in) in float32 that a layer's stored tensors stand for."""
    num_inputs, num_outputs = g_idx.shape[0], scales.shape[1]
    codes = unpack(qweight, bits, num_inputs)  # (in, out)
    zero = unpack(qzeros.T, bits, num_outputs).T.float() + 1  # (groups, out)
    groups = g_idx.long()
    return grid.dequantize(codes.float(), scales.float()[groups], zero[groups]).T


def quantization_config(config: QuantConfig, nontrivial_g_idx: bool) -> dict[str, Any]:
    """The `quantization_config` of config.json, also written as quantize_config.json.

    `desc_act` says what readers take it for: that groups are not runs of columns, so that g_idx has to be used.
    """
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        "desc_act": nontrivial_g_idx,
        "lm_head": False,
        "true_sequential": True,
        "static_groups": config.static_groups,
        "damp_percent": config.damp_percent,
        "meta": {"quantizer": [f"gptq:{__version__}"], "method": config.method, "act_order": config.desc_act},
    }
