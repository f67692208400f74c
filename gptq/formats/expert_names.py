"""Tell which engines find experts that are stored one by one, for which models, and by which names.

An engine holds a layer's experts in one tensor and has a loader for each model that puts single matrices there. Each
entry was read in the engine's source. Whether the engine computes with such weights, `compatibility` says. Models whose
loader knows no single matrices are in `joined_experts`.
"""

import re
from collections.abc import Mapping

from gptq import formats
from gptq.formats.joined_experts import JOINED, explain_apart
from gptq.formats.scheme import Layers

GATED, MIXTRAL, UNGATED = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("up_proj", "down_proj")
EXPERT = re.compile(r"\.experts\.\d+\.(\w+)$")
READ: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # engine -> model_type -> names of an expert's matrices
    # vLLM 0.32.0: layers/fused_moe/routed_experts.py, load_weights and build_expert_params_mapping, with the names that
    # models/*.py give; DeepSeek and Llama 4 in load_weights of their own
    "vLLM": {
        **dict.fromkeys(
            (
                "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gemma4", "gemma4_text", "glm4_moe", "granitemoe",
                "jamba", "llama4", "llama4_text", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe",
                "qwen3_next", "qwen3_vl_moe",
            ),
            GATED,
        ),
        **dict.fromkeys(("lfm2_moe", "minimax_m2", "mixtral", "phimoe"), MIXTRAL),
        "nemotron_h": UNGATED,
    },
    # SGLang's main branch in the autumn of 2026: load_weights in srt/models/{gemma4_causal, mllama4, qwen2_moe,
    # qwen3_vl_moe, mixtral, granitemoe}.py
    "SGLang": {
        **dict.fromkeys(("gemma4", "gemma4_text", "llama4", "qwen2_moe", "qwen3_vl_moe"), GATED),
        **dict.fromkeys(("granitemoe", "mixtral"), MIXTRAL),
    },
    "GPTQModel": {},  # not looked up
}  # fmt: skip


def has_experts(layers: Layers) -> bool:
    """Whether some layers are experts stored one by one."""
    return any(EXPERT.search(name) for name in layers)


def explain_experts(engine: str, layers: Layers, model_type: str) -> str | None:
    """Return why an engine is not known to find a model's experts; None if it finds them, or there are none.

    Args:
        model_type: as config.json gives it.
    """
    named = {found[1] for found in map(EXPERT.search, layers) if found}
    if not named:
        return None
    rule = JOINED.get(model_type)
    if rule and rule.engine == engine:
        if all(formats.FORMATS[scheme.format].joins_experts for scheme, _ in layers.values()):
            return explain_apart(layers, rule)
        written = ", ".join(repr(name) for name, known in formats.FORMATS.items() if known.joins_experts)
        return f"of {model_type} it reads experts in the format {written} alone"
    known = READ.get(engine, {}).get(model_type)
    if known is None:
        return f"that it reads experts of {model_type or 'this model'} one by one was not found in its source"
    if not named <= {*known}:
        return f"of {model_type} it reads experts called {', '.join(known)}, not {', '.join(sorted(named))}"
    return None
