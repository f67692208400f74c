"""Make a checkpoint of Kimi K2's shape that holds headers alone, for `gptq plan`: a trillion parameters on no disk.

    python scripts/make_trillion.py FOLDER [--blocks 61] [--experts 384]
    gptq plan FOLDER --ranks 64 --device-model h200

Weights are FP8 with a scale for each 128 x 128 block, as the original has them. The shards are sparse files of their
full size; reading from them gives zeros. Shape: 61 blocks of which the first is dense, hidden size 7168, 384 experts of
intermediate size 2048 of which a token takes 8, one shared expert, latent attention, 163,840 tokens.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import DeepseekV3Config

from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.writer import ShardWriter

SHARD_BYTES = 17_000_000_000
SCALE_BLOCK = 128
NOPE, ROPE, VALUE, Q_RANK, KV_RANK, HEADS = 128, 64, 128, 1536, 512, 64


def config_of(blocks: int, experts: int) -> DeepseekV3Config:
    return DeepseekV3Config(
        hidden_size=7168, num_hidden_layers=blocks, n_routed_experts=experts, num_experts_per_tok=8,
        moe_intermediate_size=2048, intermediate_size=18432, first_k_dense_replace=1, n_shared_experts=1, n_group=1,
        topk_group=1, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=Q_RANK, kv_lora_rank=KV_RANK,
        qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE, vocab_size=163_840, tie_word_embeddings=False,
        max_position_embeddings=131_072, dtype="bfloat16", architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip


def layers_of(config: DeepseekV3Config, block: int) -> dict[str, tuple[int, int]]:
    """Names of a block's linear layers, and their (outputs, inputs)."""
    hidden = config.hidden_size
    found = {
        "self_attn.q_a_proj": (Q_RANK, hidden),
        "self_attn.q_b_proj": (HEADS * (NOPE + ROPE), Q_RANK),
        "self_attn.kv_a_proj_with_mqa": (KV_RANK + ROPE, hidden),
        "self_attn.kv_b_proj": (HEADS * (NOPE + VALUE), KV_RANK),
        "self_attn.o_proj": (hidden, HEADS * VALUE),
    }
    mlps = {"mlp": config.intermediate_size}
    if block >= (config.first_k_dense_replace or 0):
        mlps = {f"mlp.experts.{number}": config.moe_intermediate_size for number in range(config.n_routed_experts)}
        mlps["mlp.shared_experts"] = config.moe_intermediate_size
    for name, size in mlps.items():
        found |= {f"{name}.gate_proj": (size, hidden), f"{name}.up_proj": (size, hidden)}
        found[f"{name}.down_proj"] = (hidden, size)
    return found


def tensors_of(config: DeepseekV3Config) -> dict[str, TensorInfo]:
    hidden, wide = config.hidden_size, torch.bfloat16
    found = {"model.embed_tokens.weight": TensorInfo(wide, (config.vocab_size, hidden))}
    for number in range(config.num_hidden_layers):
        block = f"model.layers.{number}"
        for name, (rows, columns) in layers_of(config, number).items():
            scales = tuple(-(-size // SCALE_BLOCK) for size in (rows, columns))
            found[f"{block}.{name}.weight"] = TensorInfo(torch.float8_e4m3fn, (rows, columns))
            found[f"{block}.{name}.weight_scale_inv"] = TensorInfo(torch.float32, scales)
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        norms |= {"self_attn.q_a_layernorm": Q_RANK, "self_attn.kv_a_layernorm": KV_RANK}
        found |= {f"{block}.{name}.weight": TensorInfo(wide, (size,)) for name, size in norms.items()}
        if number >= (config.first_k_dense_replace or 0):
            found[f"{block}.mlp.gate.weight"] = TensorInfo(wide, (config.n_routed_experts, hidden))
            found[f"{block}.mlp.gate.e_score_correction_bias"] = TensorInfo(torch.float32, (config.n_routed_experts,))
    found["model.norm.weight"] = TensorInfo(wide, (hidden,))
    found["lm_head.weight"] = TensorInfo(wide, (config.vocab_size, hidden))
    return found


def make(folder: Path, blocks: int = 61, experts: int = 384) -> None:
    """Write config.json and the headers."""
    folder.mkdir(parents=True)
    config = config_of(blocks, experts)
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [SCALE_BLOCK, SCALE_BLOCK],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    ShardWriter(folder, tensors_of(config), SHARD_BYTES).abandon()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=61, help="default: %(default)s")
    parser.add_argument("--experts", type=int, default=384, help="default: %(default)s")
    args = parser.parse_args()
    make(args.folder, args.blocks, args.experts)


if __name__ == "__main__":
    main()
