"""Log-probabilities of token sequences in vLLM, on a CPU; run by check_vllm.py in vLLM's environment.

    python vllm_worker.py FOLDER DTYPE INPUT.safetensors RESULT.json

vLLM's kernels for a CPU are fewer than those for a GPU. For what they lack there are stand-ins below, which unpack a
layer's parameters as its format says, after vLLM has made, named, fused and filled them, and then multiply in float32.
RESULT.json holds the log-probabilities, and the names of the kernels and stand-ins that were used.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as packed_moe,
)
from vllm.platforms import PlatformEnum

OPENAI, LIMITS = SwigluOAIAndMul.forward_native, SimpleNamespace(alpha=1.702, limit=7.0)  # its defaults
used: dict[str, str] = {}  # by kind of layer: what multiplied


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes (..., count) of a dense little-endian bit stream, words (..., n) int32."""
    places = torch.arange(count * bits)
    streamed = (words.long()[..., places // 32] >> (places % 32)) & 1  # (..., count * bits)
    codes: Tensor = (streamed.unflatten(-1, (count, bits)) << torch.arange(bits)).sum(-1)
    return codes


def dequantize(words: Tensor, scale: Tensor, zero: Tensor | int, bits: int, inputs: int) -> Tensor:
    """Weights (..., outputs, inputs) float32 of words (..., outputs, n) and scale (..., outputs, groups)."""
    codes = unpack(words, bits, inputs).float().unflatten(-1, (scale.shape[-1], -1))
    zero = zero[..., None] if isinstance(zero, Tensor) else zero
    weights: Tensor = ((codes - zero) * scale.float()[..., None]).flatten(-2)
    return weights


class StandIn(MPLinearKernel):  # type: ignore[misc]
    """A linear layer at every width, symmetric or not."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        bits = self.config.weight_type.size_bits
        words = weight.data if weight.input_dim == 1 else weight.data.T  # (outputs, n)
        scales = scale.data if scale.output_dim == 0 else scale.data.T  # (outputs, groups)
        zero: Tensor | int = 2 ** (bits - 1)
        if self.config.zero_points:
            packed = getattr(layer, self.w_zp_name)
            columns = packed.data if packed.output_dim == 0 else packed.data.T  # (words of outputs, groups)
            zero = unpack(columns.T, bits, len(words)).T.float()
        layer.dense = dequantize(words, scales, zero, bits, self.config.partition_weight_shape[0])
        used[f"{type(layer).__name__} of {bits} bits"] = "stand-in"

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x.float(), layer.dense, None if bias is None else bias.float()).to(x.dtype)


def experts_after_loading(self: Any, layer: Any) -> None:
    """Dequantize the experts' parameters: compressed-tensors' have words along the rows, GPTQ's along the columns."""
    bits = self.num_bits if hasattr(self, "num_bits") else self.quant_config.quant_type.size_bits
    names = ("weight_packed", "weight_scale") if hasattr(layer, "w13_weight_packed") else ("qweight", "scales")
    for part in ("w13", "w2"):
        words, scale = (getattr(layer, f"{part}_{name}").data for name in names)
        if names[0] == "qweight":
            words, scale = words.mT, scale.mT
        setattr(layer, f"{part}_dense", dequantize(words, scale, 2 ** (bits - 1), bits, words.shape[-1] * 32 // bits))
    used[f"{type(layer).__name__} of {bits} bits"] = "stand-in"


def apply_experts(
    self: Any, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any
) -> Tensor:
    """Sum of each token's experts, down(act(gate(x), up(x))), in float32; gpt-oss's activation is vLLM's own."""
    out = torch.zeros_like(x, dtype=torch.float32)
    no_bias = [torch.zeros(())] * len(layer.w2_dense)
    first_bias, second_bias = (getattr(layer, name, no_bias) for name in ("w13_bias", "w2_bias"))
    for number in range(len(layer.w2_dense)):
        token, choice = torch.where(topk_ids == number)
        both = x[token].float() @ layer.w13_dense[number].T + first_bias[number].float()
        inner = OPENAI(LIMITS, both) if layer.activation is MoEActivation.SWIGLUOAI else _silu_and_multiply(both)
        y = inner @ layer.w2_dense[number].T + second_bias[number].float()
        out.index_add_(0, token, y * topk_weights[token, choice, None].float())
    return out.to(x.dtype)


def _silu_and_multiply(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def stand_in_for_experts() -> None:
    """Replace the kernels of quantized experts, and the choice among those that this CPU has not."""
    none = (int_wna16.WNA16MoEBackend.MARLIN, None)  # the backend whose checks are those of a GPU
    for module, method in ((packed_moe, "CompressedTensorsWNA16MoEMethod"), (auto_gptq, "AutoGPTQMoEMethod")):
        module.select_wna16_moe_backend = lambda *_, **__: none
        kind = getattr(module, method)
        kind.process_weights_after_loading, kind.apply = experts_after_loading, apply_experts
        kind.get_fused_moe_quant_config, kind.is_monolithic = (lambda self, layer: None), False


def note_kernels() -> None:
    """Record which kernels of vLLM's own are used, by kind of layer."""
    for kernels in (linear._POSSIBLE_KERNELS, linear._POSSIBLE_INT8_KERNELS):
        for kernel in kernels[PlatformEnum.CPU]:
            kernel.process_weights_after_loading = _noting(kernel)


def _noting(kernel: Any) -> Any:
    process = kernel.process_weights_after_loading

    def note(self: Any, layer: Any) -> None:
        process(self, layer)
        used[type(layer).__name__] = kernel.__name__

    return note


def main() -> None:
    folder, dtype, given, result = sys.argv[1:5]
    note_kernels()
    own = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        own.clear()
    own.append(StandIn)
    stand_in_for_experts()
    auto_gptq.verify_marlin_supported = lambda *_, **__: None  # asks for the device's capability, which a CPU has not
    ids = load_file(given)["input_ids"].tolist()
    engine = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=256, skip_tokenizer_init=True)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False)
    made = engine.generate([{"prompt_token_ids": row} for row in ids], wanted, use_tqdm=False)
    found = [[next(iter(at.values())).logprob for at in one.prompt_logprobs[1:]] for one in made]
    Path(result).write_text(json.dumps({"logprobs": found, "used": used}))


if __name__ == "__main__":
    main()
