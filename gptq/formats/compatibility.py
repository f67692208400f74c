"""Tell which inference engines can load a quantized file. Each rule names the place in an engine's source it is from.

Nothing here runs an engine. The rules were read from vLLM (September 2026), SGLang and GPTQModel 7.7;
scripts/check_vllm.py holds vLLM 0.32.0 against those for it. Where a rule is not known, the answer says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gptq import formats
from gptq.config import Format
from gptq.formats.expert_names import READ, explain_experts, has_experts
from gptq.formats.fp4 import Mxfp4, Nvfp4
from gptq.formats.fp8 import FloatQuantized, Fp8Blocks
from gptq.formats.gguf import Gguf, GgufIq4, GgufK
from gptq.formats.gptq import GPTQ_BITS, GptqV1, GptqV2
from gptq.formats.int_quantized import IntQuantized
from gptq.formats.mlx import Mlx
from gptq.formats.pack_quantized import PackQuantized, PackQuantizedA8
from gptq.formats.scheme import Layers, Scheme, normalized_scheme
from gptq.models.blocks import group_fused_siblings

# Tried: experts of some models come out with random weights.
FUSED_EXPERTS = "compressed-tensors looks for experts one by one in models that hold them fused"
MARLIN = ((4, True), (8, True))
Rule = Callable[[Layers], tuple[bool, str]]  # whether an engine takes the layers, and why


@dataclass(frozen=True)
class Engine:
    """Whether an engine takes a file, and the reason or the condition."""

    name: str
    takes: bool
    why: str


def engines(layers: Layers, model_type: str = "", is_variant: bool = False) -> list[Engine]:
    """Return for each engine whether it takes a file with these layers, all in one format.

    Args:
        model_type: the model's, as config.json gives it.
        is_variant: the file is not as this package writes the format (`packed_layers.is_variant`).
    """
    first, _ = next(iter(layers.values()))
    file_format = formats.FORMATS[first.format]
    alone = file_format.is_assembled or (file_format.stacks_experts and has_experts(layers))
    other = "" if alone else ", or `import gptq` and then transformers"
    own = Engine("gptq", True, f"`gptq.load`{other}")
    if is_variant:
        return [own, *(_judge_variant(name, first.format) for name in RULES[first.format])]
    return [own, *(_judge(name, rule, layers, model_type) for name, rule in RULES[first.format].items())]


def _judge(name: str, rule: Rule, layers: Layers, model_type: str) -> Engine:
    engine = Engine(name, *rule(layers))
    if not engine.takes:
        return engine
    if model_type and model_type not in COMPUTED.get(name, {model_type}):
        return Engine(name, False, f"it is not known to compute models of type {model_type!r} as transformers does")
    unread = explain_experts(name, layers, model_type) if name in READ else None  # other rules know of experts
    return engine if unread is None else Engine(name, False, unread)


def _judge_variant(name: str, chosen: Format) -> Engine:
    if name == "transformers":
        return Engine(name, True, "with `import gptq`")
    why = f"not known to take this variant of the format; `gptq convert --format {chosen}` writes the usual one"
    return Engine(name, False, why)


def _explain_uneven(layers: Layers) -> str | None:
    """Name the first layer whose last group is short; or whose words are not full, if that matters in its format."""
    for name, (scheme, inputs) in layers.items():
        if inputs % scheme.columns(inputs):
            return f"{name} has {inputs} inputs, which groups of {scheme.group_size} do not divide"
        if formats.FORMATS[scheme.format].needs_whole_words and inputs * scheme.bits % 32:
            return f"{name} has {inputs} inputs of {scheme.bits} bits, which do not fill whole words"
    return None


def _explain_siblings(layers: Layers) -> str | None:
    """Name the first siblings that are stored differently: vLLM makes one layer of them (utils/gptq_utils.py)."""
    for group in group_fused_siblings(layers):
        kinds = {normalized_scheme(*layers[name]) for name in group}
        if len(kinds) > 1:
            return f"{' and '.join(group)} are stored differently, and it fuses them"
    return None


def _schemes(layers: Layers) -> set[Scheme]:
    return {scheme for scheme, _ in layers.values()}


# --- GPTQ files -------------------------------------------------------------------------------------------------------


def _transformers_gptq(layers: Layers) -> tuple[bool, str]:  # transformers/quantizers/quantizer_gptq.py
    alike = len({normalized_scheme(*layer) for layer in layers.values()}) == 1  # optimum does not know `dynamic`
    alike &= not has_experts(layers)  # which it fuses
    other = "; or with optimum and gptqmodel" if alike and _explain_beyond_gptqmodel(layers) is None else ""
    return True, f"with `import gptq`{other}"


def _vllm_gptq(layers: Layers) -> tuple[bool, str]:
    uneven = _explain_uneven(layers) or _explain_siblings(layers)
    if uneven:
        return False, uneven
    schemes = _schemes(layers)
    other = [s for s in schemes if (s.bits, s.sym) not in MARLIN]
    if other:  # auto_gptq.py, TYPE_MAP
        kind = "symmetric" if other[0].sym else "asymmetric"
        return False, f"its GPTQ reader takes symmetric 4 and 8 bits, not {kind} {other[0].bits}; try pack-quantized"
    if not all(map(_has_offset_zeros, schemes)):
        return True, "from #26092 on; older releases read v2 as v1"
    return True, "its Marlin kernels take symmetric 4 and 8 bits"


def _sglang_gptq(layers: Layers) -> tuple[bool, str]:
    uneven = _explain_uneven(layers) or _explain_siblings(layers)
    if uneven:
        return False, uneven
    marlin = all((s.bits, s.sym) in MARLIN for s in _schemes(layers))
    return True, "in float16 or bfloat16 (Marlin)" if marlin else "in float16 only"


def _gptqmodel_gptq(layers: Layers) -> tuple[bool, str]:
    beyond = _explain_beyond_gptqmodel(layers)
    if beyond:
        return False, beyond
    if any(_has_offset_zeros(s) and not s.sym and not s.by_gptqmodel for s in _schemes(layers)):
        return False, "asymmetric v1 it takes from itself only (models/loader.py); convert to gptq_v2"
    return True, "any kernel that fits, its torch one always"


def _explain_beyond_gptqmodel(layers: Layers) -> str | None:
    """Name the first layer that no kernel of GPTQModel computes."""
    for name, (scheme, inputs) in layers.items():
        if scheme.bits not in GPTQ_BITS:
            return f"{name} has {scheme.bits} bits"
        if scheme.bits == 3 and inputs % 32:  # nn_modules/qlinear/__init__.py, dequantize_weight: words in threes
            return f"at 3 bits it wants multiples of 32 inputs, and {name} has {inputs}"
    return None


def _has_offset_zeros(scheme: Scheme) -> bool:
    """Whether the stored zero points are reduced by 1, as in GPTQ's version 1."""
    return bool(formats.FORMATS[scheme.format].zero_offset)


# --- compressed-tensors files -----------------------------------------------------------------------------------------


def _transformers_packed(layers: Layers) -> tuple[bool, str]:
    schemes = _schemes(layers)
    theirs = _explain_beyond_compressed_tensors(layers)
    if theirs:
        return True, f"with `import gptq` alone: {theirs}"
    odd = {scheme.bits for scheme in schemes} - {1, 2, 4, 8}
    release = "0.18 (older ones pack these widths in another way)" if odd else "0.15"
    return True, f"with `import gptq`, or with compressed-tensors from {release}"


def _explain_beyond_compressed_tensors(layers: Layers) -> str | None:
    """Return why transformers with compressed-tensors does not read these layers."""
    schemes = _schemes(layers)
    if any(scheme.scattered for scheme in schemes):
        return "compressed-tensors has dropped act-order by groups (quantization/quant_args.py, actorder)"
    if has_experts(layers):
        return FUSED_EXPERTS
    uneven = _explain_uneven(layers)
    if uneven:  # compressed_tensors/quantization/lifecycle/forward_helpers.py, _process_group
        return f"compressed-tensors wants whole groups, and {uneven}"
    if not all(scheme.sym for scheme in schemes):  # tried, with llm-compressor's own files too
        return "transformers 5.23 with compressed-tensors fails on asymmetric files of every tool; 5.17 reads them"
    return None


def _vllm_packed(layers: Layers) -> tuple[bool, str]:
    uneven = _explain_uneven(layers) or _explain_siblings(layers)
    if uneven:
        return False, uneven
    schemes = _schemes(layers)
    wide = [s for s in schemes if not s.sym and s.bits not in (4, 8)]
    if wide:  # vLLM #46528 is reported to extend it
        return False, f"asymmetric {wide[0].bits} bits; of asymmetric weights it takes 4 and 8 bits"
    plain = all(s.bits in (4, 8) for s in schemes)
    return True, "as compressed-tensors" if plain else "as compressed-tensors, in releases with Humming kernels"


def _sglang_packed(layers: Layers) -> tuple[bool, str]:
    uneven = _explain_uneven(layers) or _explain_siblings(layers)
    if uneven:
        return False, uneven
    if all((s.bits, s.sym) in MARLIN for s in _schemes(layers)):
        return True, "its compressed-tensors reader, which its documentation calls minimally tested"
    return False, "of compressed-tensors files only symmetric 4 and 8 bits are known to be taken"


def _gptqmodel_packed(layers: Layers) -> tuple[bool, str]:
    return False, "it reads GPTQ files; `gptq convert --format gptq` makes one"


def _vllm_packed_a8(layers: Layers) -> tuple[bool, str]:  # compressed_tensors/schemes/compressed_tensors_wNa8.py
    takes, why = _vllm_packed(layers)
    return takes, "as compressed-tensors, on GPUs with Humming kernels" if takes else why


def _sglang_packed_a8(layers: Layers) -> tuple[bool, str]:
    return False, "integers of fewer than 8 bits with int8 activations are not known to be taken"


def _transformers_int8(layers: Layers) -> tuple[bool, str]:
    if has_experts(layers):
        return True, f"with `import gptq` alone: {FUSED_EXPERTS}"
    return True, "with `import gptq`, or compressed-tensors, which divides a token's largest value by 127.5 and not 127"


def _vllm_int8(layers: Layers) -> tuple[bool, str]:  # compressed_tensors/schemes/compressed_tensors_w8a8_int8.py
    uneven = _explain_siblings(layers)
    return (False, uneven) if uneven else (True, "as compressed-tensors, with int8 products")


# --- MLX files --------------------------------------------------------------------------------------------------------


# Model types of which a small random model had the logits of `gptq.load` in mlx-lm 0.32.2, within 1e-4 of the largest:
# scripts/sweep_mlx.py; gemma3_text with six blocks, and qwen3_moe with `head_dim` in config.json, as their models have.
RAN_IN_MLX = frozenset((
    "cohere", "ernie4_5", "falcon_mamba", "gemma2", "gemma3_text", "glm4", "gpt_bigcode", "granite", "granitemoe",
    "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "laguna", "llama", "mamba", "mellum", "ministral3",
    "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
))  # fmt: skip
COMPUTED = {"MLX": RAN_IN_MLX}  # by engine, the types of models that it was seen to compute, where that is known


def _mlx(layers: Layers) -> tuple[bool, str]:
    return True, "mlx-lm reads it, and what builds on it"


def _transformers_mlx(layers: Layers) -> tuple[bool, str]:
    if has_experts(layers):  # models/assembled_names.py
        return (
            False,
            "it cannot take apart the experts that MLX stacks; use `gptq.load`, or `gptq convert --format gptq`",
        )
    return True, "with `import gptq`"


def _other_than_mlx(layers: Layers) -> tuple[bool, str]:
    return False, "it does not read MLX files; `gptq convert --format gptq` makes one that it does"


def _mlx_of_other_files(layers: Layers) -> tuple[bool, str]:
    return False, "mlx-lm reads MLX files; `gptq convert --format mlx` makes one"


# --- GGUF files -------------------------------------------------------------------------------------------------------


def _llama_cpp(layers: Layers) -> tuple[bool, str]:
    return True, "ran with llama.cpp 0.5.0, commit 0c1e570, in llama-cpp-python 0.3.36 on a CPU"


def _llama_cpp_of_other_files(layers: Layers) -> tuple[bool, str]:
    return False, "it reads GGUF files; `gptq convert --format gguf` makes one of symmetric layers"


def _by_llama_cpp(layers: Layers) -> tuple[bool, str]:
    return True, "takes model.gguf; by its documentation, it runs llama.cpp"


def _transformers_gguf(layers: Layers) -> tuple[bool, str]:
    return True, 'dequantized, with `gguf_file="model.gguf"` and the package gguf; ran with 5.23'


# --- FP8 and FP4 ------------------------------------------------------------------------------------------------------


def _transformers_floats(layers: Layers) -> tuple[bool, str]:
    if has_experts(layers):
        return True, f"with `import gptq` alone: {FUSED_EXPERTS}"
    return True, "with `import gptq`, or compressed-tensors, which dequantizes; ran with 5.23 and 0.20"


def _vllm_fp8_channels(layers: Layers) -> tuple[bool, str]:  # schemes/compressed_tensors_w8a16_fp8.py
    siblings = _explain_siblings(layers)
    return (False, siblings) if siblings else (True, "on GPUs, weights alone (W8A16); by its source, 0.32")


def _vllm_fp4(layers: Layers) -> tuple[bool, str]:  # schemes/compressed_tensors_w4a4_{nv,mx}fp4.py
    siblings = _explain_siblings(layers)
    return (False, siblings) if siblings else (True, "on GPUs, by its source, 0.32")


def _vllm_mxfp4(layers: Layers) -> tuple[bool, str]:
    takes, why = _vllm_fp4(layers)
    return takes, f"{why}; from compute capability 10.0 on it rounds activations to MXFP4 too" if takes else why


def _vllm_fp8_blocks(layers: Layers) -> tuple[bool, str]:  # quantization/fp8.py; utils/fp8_utils.py checks the shapes
    siblings = _explain_siblings(layers)
    if siblings:
        return False, siblings
    return True, "on GPUs, by its source, 0.32; fused layers need multiples of 128 outputs"


def _transformers_fp8(layers: Layers) -> tuple[bool, str]:  # quantizers/quantizer_finegrained_fp8.py
    return True, "with `import gptq`; without it on GPUs that multiply FP8, by its source, 5.23"


def _gptqmodel_floats(layers: Layers) -> tuple[bool, str]:
    return False, "it reads GPTQ files, which hold integers"


def _mlx_floats(layers: Layers) -> tuple[bool, str]:
    return False, "mlx-lm reads MLX files, which hold integers here; quantize the original with `--format mlx`"


def _llama_cpp_floats(layers: Layers) -> tuple[bool, str]:
    return False, "it reads GGUF files; quantize the original with `--format gguf`"


def _sglang_unknown(layers: Layers) -> tuple[bool, str]:
    return False, "not known"


GPTQ_RULES: dict[str, Rule] = {
    "transformers": _transformers_gptq, "vLLM": _vllm_gptq, "SGLang": _sglang_gptq, "GPTQModel": _gptqmodel_gptq,
    "MLX": _mlx_of_other_files, "llama.cpp": _llama_cpp_of_other_files,
}  # fmt: skip
GGUF_RULES: dict[str, Rule] = {
    "llama.cpp": _llama_cpp, "Ollama": _by_llama_cpp, "LM Studio": _by_llama_cpp, "transformers": _transformers_gguf,
}  # fmt: skip
RULES: dict[Format, dict[str, Rule]] = {
    GptqV1.name: GPTQ_RULES,
    GptqV2.name: GPTQ_RULES,
    Gguf.name: GGUF_RULES,
    GgufK.name: GGUF_RULES,
    GgufIq4.name: GGUF_RULES,
    PackQuantized.name: {
        "transformers": _transformers_packed, "vLLM": _vllm_packed, "SGLang": _sglang_packed,
        "GPTQModel": _gptqmodel_packed, "MLX": _mlx_of_other_files, "llama.cpp": _llama_cpp_of_other_files,
    },
    PackQuantizedA8.name: {
        "transformers": _transformers_packed, "vLLM": _vllm_packed_a8, "SGLang": _sglang_packed_a8,
        "GPTQModel": _gptqmodel_packed, "MLX": _mlx_of_other_files, "llama.cpp": _llama_cpp_of_other_files,
    },
    IntQuantized.name: {
        "transformers": _transformers_int8, "vLLM": _vllm_int8, "SGLang": _vllm_int8, "GPTQModel": _gptqmodel_packed,
        "MLX": _mlx_of_other_files, "llama.cpp": _llama_cpp_of_other_files,
    },
    Mlx.name: {
        "transformers": _transformers_mlx, "vLLM": _other_than_mlx, "SGLang": _other_than_mlx,
        "GPTQModel": _other_than_mlx, "MLX": _mlx, "llama.cpp": _llama_cpp_of_other_files,
    },
    FloatQuantized.name: {
        "transformers": _transformers_floats, "vLLM": _vllm_fp8_channels, "SGLang": _sglang_unknown,
        "GPTQModel": _gptqmodel_floats, "MLX": _mlx_floats, "llama.cpp": _llama_cpp_floats,
    },
    Fp8Blocks.name: {
        "transformers": _transformers_fp8, "vLLM": _vllm_fp8_blocks, "SGLang": _sglang_unknown,
        "GPTQModel": _gptqmodel_floats, "MLX": _mlx_floats, "llama.cpp": _llama_cpp_floats,
    },
    Nvfp4.name: {
        "transformers": _transformers_floats, "vLLM": _vllm_fp4, "SGLang": _sglang_unknown,
        "GPTQModel": _gptqmodel_floats, "MLX": _mlx_floats, "llama.cpp": _llama_cpp_floats,
    },
    Mxfp4.name: {
        "transformers": _transformers_floats, "vLLM": _vllm_mxfp4, "SGLang": _sglang_unknown,
        "GPTQModel": _gptqmodel_floats, "MLX": _mlx_floats, "llama.cpp": _llama_cpp_floats,
    },
}  # fmt: skip
