"""What tests share: seeded numbers, tiny random models of each architecture, and real data where it is at hand.

Real data is looked for in the folder that GPTQ_TEST_DATA names, by default `shared` beside the project.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the Hub's libraries are imported: tests never ask the network
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is: its kernels are tested without a GPU

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # the models are tiny: threads would wait for each other longer than they compute

DATA = Path(os.environ.get("GPTQ_TEST_DATA", Path(__file__).parents[2] / "shared"))
WIDTH, VOCAB = 64, 320

SMALL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
LLAMA_LIKE = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 96}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "head_dim": 16, "sliding_window": 16},
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 16},
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": WIDTH},
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64},
    "gemma2": {**LLAMA_LIKE, "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 16, "sliding_window": 16},
    "phi3": LLAMA_LIKE,
    "bloom": {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB},
    "gpt_neox": {**SMALL, "intermediate_size": 96},
    "falcon": SMALL,
}  # fmt: skip
MOE = {**LLAMA_LIKE, "intermediate_size": 96, "num_experts_per_tok": 2}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**MOE, "num_local_experts": 4},
    "qwen3_moe": {**MOE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "deepseek_v3": {
        **MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
}  # fmt: skip
MIXED: dict[str, dict[str, Any]] = {  # blocks that are not all attention and gated layers
    "mamba": {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, "vocab_size": VOCAB},
    "jamba": {
        **MOE, "num_experts": 4, "mamba_d_state": 8, "expert_layer_period": 2, "expert_layer_offset": 1,
        "attn_layer_period": 2, "attn_layer_offset": 1,
    },
    "rwkv": {"hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": VOCAB,
             "context_length": 64, "rescale_every": 1},
    "phimoe": {**MOE, "num_local_experts": 4},
    "llama4_text": {**MOE, "head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96},
    "olmo_hybrid": {  # its checkpoint holds one convolution as three
        **LLAMA_LIKE, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    },
    "longcat_flash": {  # its experts are stored one by one, but some of what the router chooses from are none
        **LLAMA_LIKE, "num_key_value_heads": 4, "num_layers": 1, "num_hidden_layers": 2, "n_routed_experts": 4,
        "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96, "head_dim": 8,
        "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
    "inkling2_text": {  # calls the weight of a layer by another name than one that ends in weight
        **MOE, "head_dim": 16, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32,
        "sliding_window": 16, "layer_types": ["hybrid_sliding", "hybrid"],
    },
    "nemotron_h": {
        **MOE, "head_dim": 16, "layers_block_type": ["mamba", "moe", "attention"], "num_hidden_layers": 3,
        "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "ssm_state_size": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1,
    },
}  # fmt: skip
BERT = {**SMALL, "intermediate_size": 96}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # with the class of their head
    "bert": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForSequenceClassification", {**BERT, "max_position_embeddings": 66, "num_labels": 3}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB,
         "decoder_start_token_id": 0},
    ),
    "vit": ("ViTForImageClassification", {**BERT, "image_size": 32, "patch_size": 8}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": VOCAB,
         "num_mel_bins": 16, "max_source_positions": 24, "max_target_positions": 32, "decoder_start_token_id": 1},
    ),
}  # fmt: skip


@pytest.fixture
def windows(rng: torch.Generator) -> torch.Tensor:
    """Six calibration windows of random tokens, (6, 32)."""
    return torch.randint(1, VOCAB, (6, 32), generator=rng)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture(scope="session")
def text() -> str:
    """Plain English that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:60_000]


@pytest.fixture(scope="session")
def tokenizer(text: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch and compiled loops work on so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_script(name: str) -> Any:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


MakeModel = Callable[..., Path]


def write_model(
    parent: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **options: Any,
) -> Path:
    """Write a tiny random model of an architecture; return its folder in `parent`. Options go to its configuration."""
    name, own = OTHERS.get(kind) or ("", ARCHITECTURES.get(kind) or EXPERTS.get(kind) or MIXED[kind])
    settings = {**own, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **options}
    config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config) if name else AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # as large as trained ones, so that layers matter; biases too
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
    folder = parent / f"{kind}-{len(list(parent.iterdir()))}"
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """Writes a tiny random model of an architecture and returns its folder; options go to its configuration."""
    return partial(write_model, tmp_path, tokenizer)


@pytest.fixture
def text_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "calibration.txt"
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def stories() -> Path:
    folder = DATA / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no real model at {folder}")
    return folder


@pytest.fixture
def novel_halves(tmp_path: Path) -> tuple[str, str]:
    """A novel's two halves as files: one calibrates, the other is measured."""
    novel = DATA / "data" / "wizard-of-oz.txt"
    if not novel.is_file():
        pytest.skip(f"no novel at {novel}")
    words = novel.read_text(encoding="utf-8")
    files = []
    for name, half in (("first.txt", words[: len(words) // 2]), ("second.txt", words[len(words) // 2 :])):
        (tmp_path / name).write_text(half, encoding="utf-8")
        files.append(str(tmp_path / name))
    return files[0], files[1]
