"""Quantize a tiny random model of every causal language model architecture in transformers, and compare its logits.

    python scripts/sweep_architectures.py
    python scripts/sweep_architectures.py mamba qwen3_moe

Each model is built from a configuration with small sizes, saved, quantized to 8 bits, verified, loaded and run. The
script prints a line for each, and counts the outcomes:

    fine      logits differ from the original's by less than a tenth
    differs   logits differ by more (possibly because a random router was close to a tie)
    refused   with an error message of ours, which is printed
    failed    with any other exception
    unbuilt   transformers cannot build or run it with these sizes, or the model is still too large; not counted
"""

import argparse
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gptq import InputError, QuantConfig, load, quantize
from gptq.output import verify

LARGEST = 30_000_000  # parameters of the largest model that is tried
TOKENS = 200  # token ids in inputs are below this
# Small sizes, and the configuration fields that get them.
WIDTHS = {64: "hidden_size n_embd d_model embedding_size word_embed_proj_dim lru_width"}
INNER = {128: "intermediate_size n_inner d_ff ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"}
BLOCKS = {2: "num_hidden_layers n_layer num_layers decoder_layers encoder_layers"}
HEADS = {
    4: "num_attention_heads n_head num_heads decoder_attention_heads encoder_attention_heads mamba_n_heads "
    "mamba_num_heads linear_num_value_heads",
    2: "num_key_value_heads linear_num_key_heads",
    16: "head_dim v_head_dim linear_key_head_dim linear_value_head_dim kv_lora_rank state_size mamba_d_state "
    "hidden_size_per_layer_input",
    32: "mamba_d_head mamba_head_dim q_lora_rank",
    8: "qk_rope_head_dim qk_nope_head_dim",
}
EXPERTS = {
    4: "num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_experts_per_tok moe_k expert_layer_period attn_layer_period full_attention_interval",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    1: "n_shared_experts n_group topk_group first_k_dense_replace attn_layer_offset expert_layer_offset n_groups",
}
TEXT = {
    256: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions",
    32: "sliding_window",
    16: "attention_window",
    0: "pad_token_id",
    1: "bos_token_id",
    2: "eos_token_id",
}
SMALL = {
    name: value
    for table in (WIDTHS, INNER, BLOCKS, HEADS, EXPERTS, TEXT)
    for value, names in table.items()
    for name in names.split()
}


def small_config(kind: str) -> PreTrainedConfig:
    """The architecture's configuration with small sizes, also in its nested configurations."""
    plain = CONFIG_MAPPING[kind]()
    options = small_options(plain)
    for name in getattr(plain, "sub_configs", None) or ():
        inner = getattr(plain, name, None)
        if isinstance(inner, PreTrainedConfig):
            options[name] = small_options(inner)
    return AutoConfig.for_model(kind, **options)


def small_options(config: PreTrainedConfig) -> dict[str, Any]:
    """The small sizes for those fields that the configuration has."""
    given = config.to_dict()
    known = {*given, *getattr(type(config), "attribute_map", {})}
    options: dict[str, Any] = {name: value for name, value in SMALL.items() if name in known}
    if isinstance(kinds := given.get("layer_types"), list):
        options["layer_types"] = ([*dict.fromkeys(kinds)] * 2)[:2]
    if "qk_rope_head_dim" in options:  # multi-head latent attention: every head has its own keys
        options |= {"num_key_value_heads": SMALL["num_attention_heads"], "head_dim": options["qk_rope_head_dim"]}
    return options


def small_model(kind: str) -> PreTrainedModel:
    """Build a random model; raises ValueError if it is too large or its logits are not finite."""
    config = small_config(kind)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:,.0f} M parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # transformers leaves some uninitialized
        if not bool(torch.isfinite(parameter).all()) or float(parameter.abs().max()) > 1e3 or not bool(parameter.any()):
            parameter.data.normal_(0, 0.02)
    if not bool(torch.isfinite(logits(model)).all()):
        raise ValueError("its logits are not finite")
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a fixed random window."""
    ids = torch.randint(3, TOKENS, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def outcome(kind: str, folder: Path) -> tuple[str, str]:
    """Try one architecture; return its outcome and a description."""
    try:
        model = small_model(kind)
        model.save_pretrained(folder / "model")
    except Exception as error:  # of any type: the architecture is not tested
        return "unbuilt", f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    windows = torch.randint(3, TOKENS, (8, 24), generator=torch.Generator().manual_seed(0))
    try:
        result = quantize(folder / "model", folder / "out", QuantConfig(bits=8, group_size=16), calibration=windows)
        problems = verify.verify(folder / "out").problems
        if problems:
            return "failed", problems[0]
        expected, found = logits(model), logits(load(folder / "out", dtype="float32"))
    except InputError as error:
        return "refused", str(error)
    except Exception as error:  # of any type: a bug of ours
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    off = float((found - expected).norm() / expected.norm())
    stay = any("fused tensors" in note for note in result.notes)
    return (
        "fine" if off < 0.1 else "differs",
        f"{len(result.layers)} layers, logits off by {off:.1%}{', fused experts stay' if stay else ''}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all if none is given")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are tiny
    counts: Counter[str] = Counter()
    for kind in args.kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with tempfile.TemporaryDirectory() as folder:
            became, words = outcome(kind, Path(folder))
        counts[became] += 1
        print(f"{kind:26} {became:8} {words}", flush=True)
    built = sum(counts.values()) - counts["unbuilt"]
    print(", ".join(f"{count} {became}" for became, count in counts.most_common()), f"({built} built)")


if __name__ == "__main__":
    main()
