"""What llama.cpp calls a model, its sizes and its tensors, by the model types of transformers.

The rules are those of llama.cpp's own converter (conversion/*.py, ggml commit 0c1e570, version 0.5.0) and of the graphs
that it builds (src/models/*.cpp). What a graph has built in, such as the activation function, is checked against the
model's configuration, because the file could not say otherwise.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope")
EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)$")  # module of an expert: list, number, matrix


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs the models of one model type."""

    name: str  # general.architecture
    activation: str = "silu"  # the one that its graph has
    interleaves: bool = False  # rotates neighbouring dimensions, so that rows of q and k are in another order
    norm_shift: float = 0.0  # added to the weight of each norm: the model multiplies by 1 + weight
    head_dim_key: bool = True  # the size of a head is in the file where config.json has it
    own: Callable[[Any], Iterator[tuple[str, Any]]] = lambda config: iter(())  # further keys, from config.json
    check: Callable[[Any], str | None] = lambda config: None  # why llama.cpp would compute something else


def _gemma_2(config: Any) -> Iterator[tuple[str, Any]]:
    yield "attn_logit_softcapping", config.attn_logit_softcapping
    yield "final_logit_softcapping", config.final_logit_softcapping
    yield "attention.sliding_window", config.sliding_window


def _gemma_3(config: Any) -> Iterator[tuple[str, Any]]:
    yield "attention.sliding_window", config.sliding_window
    if config.final_logit_softcapping:
        yield "final_logit_softcapping", config.final_logit_softcapping


def _granite(config: Any) -> Iterator[tuple[str, Any]]:
    yield "attention.scale", config.attention_multiplier
    yield "embedding_scale", config.embedding_multiplier
    yield "residual_scale", config.residual_multiplier
    yield "logit_scale", config.logits_scaling


def _phi_3(config: Any) -> Iterator[tuple[str, Any]]:
    rope = config.rope_parameters
    window, longest = config.sliding_window or 0, config.max_position_embeddings
    original = getattr(config, "original_max_position_embeddings", None) or longest
    yield "attention.sliding_window", window
    yield "rope.scaling.original_context_length", rope.get("original_max_position_embeddings", original)
    if rope.get("rope_type") == "longrope":
        before = rope.get("original_max_position_embeddings", original)
        scale = longest / before
        yield "rope.scaling.attn_factor", math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0


def _experts(config: Any) -> Iterator[tuple[str, Any]]:
    yield "expert_feed_forward_length", config.moe_intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if shared:
        yield "expert_shared_feed_forward_length", shared


def _check_attention_scale(config: Any) -> str | None:
    scales = (config.head_dim, config.hidden_size / config.num_attention_heads)
    if config.query_pre_attn_scalar in scales:
        return None
    return f"llama.cpp scales attention by {scales[0]}, not by query_pre_attn_scalar, {config.query_pre_attn_scalar}"


def _check_layer_types(period: int) -> Callable[[Any], str | None]:
    """Return a check that every `period`-th layer attends to everything and the others to a window."""

    def check(config: Any) -> str | None:
        types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(config.num_hidden_layers)]
        if list(config.layer_types) != types:
            return f"in llama.cpp every {period}th layer attends to everything, the others to a window"
        return _check_attention_scale(config)

    return check


def _check_router(normalizes: bool) -> Callable[[Any], str | None]:
    """Return a check that every layer has experts, and that their weights add up to one, or do not."""

    def check(config: Any) -> str | None:
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            return "llama.cpp has experts in every layer of such a model"
        if bool(config.norm_topk_prob) != normalizes:
            return f"llama.cpp runs such models with norm_topk_prob {str(normalizes).lower()}"
        return None

    return check


LLAMA = Architecture("llama", interleaves=True)
GELU = "gelu_pytorch_tanh"
ARCHITECTURES: dict[str, Architecture] = {  # by the model_type of transformers
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "granite": Architecture("granite", interleaves=True, head_dim_key=False, own=_granite),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe", own=_experts, check=_check_router(normalizes=False)),
    "qwen3_moe": Architecture("qwen3moe", own=_experts, check=_check_router(normalizes=True)),
    "gemma": Architecture("gemma", GELU, norm_shift=1.0),
    "gemma2": Architecture("gemma2", GELU, norm_shift=1.0, own=_gemma_2, check=_check_layer_types(2)),
    "gemma3_text": Architecture("gemma3", GELU, norm_shift=1.0, own=_gemma_3, check=_check_layer_types(6)),
    "phi3": Architecture("phi3", own=_phi_3),
    "olmo2": Architecture("olmo2"),
}


def explain_unknown(config: PreTrainedConfig) -> str | None:
    """Return why llama.cpp would not run the model as its configuration says, as far as is known here; or None."""
    kind = ARCHITECTURES.get(config.model_type)
    if kind is None:
        known = ", ".join(ARCHITECTURES)
        return f"it is not known how llama.cpp stores model_type {config.model_type!r}; known are {known}"
    found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if found != kind.activation:
        return f"llama.cpp runs {kind.name} models with {kind.activation}, and config.json says {found}"
    rope = _rope_of(config)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        return f"llama.cpp has no rope_type {rope['rope_type']!r} for such a model"
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("rope_type") == "yarn" and (scales[0] != scales[1] or rope.get("truncate") is False):
        return "llama.cpp has no mscale and no truncate for yarn in such a model"
    try:
        reason = kind.check(config)
        keys = [*list_keys(config), *extra_tensors(config).items()]
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        return f"its config.json does not say what llama.cpp needs ({type(error).__name__}: {error})"
    bad = next((f"{key} {value}" for key, value in keys if not _is_sound(value)), None)
    return reason or (bad and f"its config.json says {bad}")


def _is_sound(value: Any) -> bool:
    """Whether a value can be stored: a text, a finite number, or an integer of 32 bits."""
    if isinstance(value, int):
        return 0 <= value < 2**32
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, str | Tensor)


def list_keys(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys that describe a model's sizes, without the architecture's name in front, and their values."""
    kind = ARCHITECTURES[config.model_type]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    yield "block_count", config.num_hidden_layers
    yield "context_length", config.max_position_embeddings
    yield "embedding_length", config.hidden_size
    yield "feed_forward_length", config.intermediate_size
    yield "attention.head_count", heads
    yield "attention.head_count_kv", getattr(config, "num_key_value_heads", None) or heads
    yield "attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    yield "vocab_size", config.vocab_size
    if head_dim and kind.head_dim_key:
        yield "attention.key_length", head_dim
        yield "attention.value_length", head_dim
    rope = _rope_of(config)
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    yield "rope.dimension_count", int(share * (head_dim or config.hidden_size // heads))
    yield from _list_rope_keys(rope, getattr(config, "rope_parameters", None) or {})
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        yield "expert_count", experts
        yield "expert_used_count", config.num_experts_per_tok
    yield from kind.own(config)


def _rope_of(config: Any) -> Mapping[str, Any]:
    """Return the rotation of layers that attend to everything."""
    rope = getattr(config, "rope_parameters", None) or {}
    found: Mapping[str, Any] = rope.get("full_attention", rope)
    return found


def _list_rope_keys(rope: Mapping[str, Any], everywhere: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if rope.get("rope_theta") is not None:
        yield "rope.freq_base", float(rope["rope_theta"])
    local = (everywhere.get("sliding_attention") or {}).get("rope_theta")
    if local is not None:
        yield "rope.freq_base_swa", float(local)
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        yield "rope.scaling.original_context_length", rope["original_max_position_embeddings"]
        names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        for own, name in names.items():
            if rope.get(own) is not None:
                yield f"rope.scaling.{name}", float(rope[own])
    if kind == "longrope":
        yield "rope.scaling.type", kind


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Return the tensors of a file that the checkpoint has as numbers in config.json, by their names in the file."""
    rope = _rope_of(config)
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama_3_factors(config, rope)}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{n}.weight": torch.tensor(rope[f"{n}_factor"], dtype=torch.float32)
            for n in ("long", "short")
        }
    return {}


def _llama_3_factors(config: Any, rope: Mapping[str, Any]) -> Tensor:
    """Return by what each pair of dimensions turns slower, (head size / 2,); transformers' modeling_rope_utils.py."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turns = rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    wavelength = 2 * math.pi * turns
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    kept = smooth.clamp(0, 1)
    factors: Tensor = 1 / ((1 - kept) / factor + kept)
    return factors


def heads_of(layer: str, config: Any) -> int | None:
    """Return how many heads' rows are interleaved in a layer of the checkpoint; None if its rows stay in order."""
    if not ARCHITECTURES[config.model_type].interleaves:
        return None
    if layer.endswith("q_proj"):
        return int(config.num_attention_heads)
    if layer.endswith("k_proj"):
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return None
