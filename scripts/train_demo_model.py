"""Train the small Llama that ships with the package as `gptq demo`'s model.

    python scripts/train_demo_model.py --data DATA --out gptq/demo_model --minutes 80

DATA is a folder that `datasets` loads, with splits `train` and `validation` and a column `text`. The shipped
model saw 22 MB of public-domain and CC0 technical English (the Python and Ethereum improvement proposals).

Recipe: byte-level BPE of 4,096 tokens; Llama with 6 blocks, width 256, 8 query heads on 2 key-value heads,
MLP width 768, tied embeddings (5.57 M parameters); windows of 512 tokens, 8 per step; Muon (Jordan et al. 2024)
for the matrices of the blocks and AdamW for embeddings and norms; learning rates warm up over 2 % of the time
and fall linearly to zero over the last 60 %. The schedule follows the clock, so any time budget ends well trained.
The losses of the shipped model are in `training.json` beside its weights.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from datasets import DatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, SEQ_LEN, WINDOWS_PER_STEP, SEED = 4096, 512, 8, 0
END = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Tokenize all texts and concatenate them, each followed by the end token."""
    ids: list[int] = []
    for row in cast(list[list[int]], tokenizer(texts, verbose=False)["input_ids"]):
        ids += [*row, cast(int, tokenizer.eos_token_id)]
    return torch.tensor(ids, dtype=torch.int32)  # (tokens,)


def new_model(end_id: int) -> LlamaForCausalLM:
    """A Llama with initial weights from the seed."""
    torch.manual_seed(SEED)  # transformers draws initial weights from the global generator
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=end_id, eos_token_id=end_id, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def orthogonalize(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Drive the singular values of G (m, n) towards 1, by Newton-Schulz iteration with Muon's quintic polynomial."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X: torch.Tensor = G if G.shape[0] <= G.shape[1] else G.T
    X = X / (torch.linalg.matrix_norm(X) + 1e-7)
    for _ in range(steps):
        A = X @ X.T  # (min(m, n), min(m, n))
        X = a * X + (b * A + c * A @ A) @ X
    return X if G.shape[0] <= G.shape[1] else X.T


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates in float32; torch.optim.Muon uses bfloat16, which many CPUs only emulate."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(velocity, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def learning_rate_factor(progress: float) -> float:
    return min(1.0, progress / 0.02, (1.0 - progress) / 0.6)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokens: torch.Tensor, windows: int = 64) -> float:
    """Mean loss over the first windows of the held-out tokens."""
    model.eval()
    batch = tokens[: windows * SEQ_LEN].view(-1, SEQ_LEN).long()  # (windows, SEQ_LEN)
    losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in batch]
    model.train()
    return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict[str, object]) -> None:
    """Save bfloat16 weights, tokenizer and training.json."""
    weights = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    copy = LlamaForCausalLM(model.config)
    copy.bfloat16()
    copy.load_state_dict(weights, strict=False)
    copy.tie_weights()
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80.0)
    args = parser.parse_args()

    data = cast(DatasetDict, load_dataset(args.data))
    tokenizer = train_tokenizer(data["train"]["text"])
    train = tokenize(tokenizer, list(data["train"]["text"]))
    held_out = tokenize(tokenizer, list(data["validation"]["text"]))
    model = new_model(cast(int, tokenizer.eos_token_id))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    peak = [0.02, 3e-3]
    optimizers = [Muon(matrices, lr=peak[0]), torch.optim.AdamW(others, lr=peak[1], betas=(0.9, 0.95), weight_decay=0)]
    draw = torch.Generator().manual_seed(SEED)
    native_bf16 = torch.cpu._is_avx512_bf16_supported()
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    start, step, progress, average, saved = time.monotonic(), 0, 0.0, float("nan"), 0.0
    while progress < 1.0:
        offsets = torch.randint(len(train) - SEQ_LEN, (WINDOWS_PER_STEP,), generator=draw)
        batch = torch.stack([train[o : o + SEQ_LEN] for o in offsets.tolist()]).long()  # (windows, SEQ_LEN)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=native_bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in zip(optimizers, peak, strict=True):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average = float(loss) if step == 1 else 0.98 * average + 0.02 * float(loss)
        progress = min(1.0, (time.monotonic() - start) / (60 * args.minutes))
        bar.update(100 * progress - bar.n)
        bar.set_postfix(step=step, loss=f"{average:.3f}")
        if progress >= saved + 0.05 or progress == 1.0:
            saved = progress
            record = {
                "steps": step, "tokens": step * SEQ_LEN * WINDOWS_PER_STEP,
                "minutes": round(progress * args.minutes, 1),
                "parameters": sum(p.numel() for p in model.parameters()), "training_loss": round(average, 4),
                "validation_loss": round(validation_loss(model, held_out), 4), "text_tokens": len(train),
            }  # fmt: skip
            tqdm.write(json.dumps(record))
            save(model, tokenizer, args.out, record)
    bar.close()


if __name__ == "__main__":
    main()
