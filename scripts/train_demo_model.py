"""Train the small Llama that ships with the package as `gptq demo`'s model.

    python scripts/train_demo_model.py --data DATA --out gptq/demo_model --tokens 6e6
    python scripts/train_demo_model.py --data DATA --out LARGER --tokens 3e6 --width 512 --blocks 8

DATA is a folder that `datasets` loads, with splits `train` and `validation` and a column `text`. The shipped
model saw 22 MB of public-domain and CC0 technical English (the Python and Ethereum improvement proposals).

Recipe: byte-level BPE of 4,096 tokens; Llama with 6 blocks, width 256, 8 query heads on 2 key-value heads,
MLP width 768, tied embeddings (5.57 M parameters); windows of 512 tokens, 8 per step; Muon (Jordan et al. 2024)
for the matrices of the blocks and AdamW for embeddings and norms; learning rates warm up over 2 % of the tokens
and fall linearly to zero over the last 60 %. A run that was stopped goes on from OUT/training_state.pt.
The losses of the shipped model are in `training.json` beside its weights; it saw 5.9 M tokens, drawn in another order,
with a schedule that followed the clock. The second command makes a larger model (26.2 M parameters).
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
NATIVE_BF16 = torch.cpu._is_avx512_bf16_supported()  # other CPUs only emulate products in bfloat16
SAVE_EVERY = 10  # steps between two states that a stopped run goes on from


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


def new_model(end_id: int, width: int, blocks: int) -> LlamaForCausalLM:
    """A Llama with initial weights from the seed."""
    torch.manual_seed(SEED)  # transformers draws initial weights from the global generator
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=end_id, eos_token_id=end_id, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def orthogonalize(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Drive the singular values of G (m, n) towards 1, by Newton-Schulz iteration with Muon's quintic polynomial."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X: torch.Tensor = G if G.shape[0] <= G.shape[1] else G.T
    X = (X / (torch.linalg.matrix_norm(X) + 1e-7)).to(torch.bfloat16 if NATIVE_BF16 else torch.float32)
    for _ in range(steps):
        A = X @ X.T  # (min(m, n), min(m, n))
        X = a * X + (b * A + c * A @ A) @ X
    return (X if G.shape[0] <= G.shape[1] else X.T).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates; torch.optim.Muon makes them in bfloat16 everywhere."""

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


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    average: float = math.nan  # of the training loss
    saved: float = 0.0  # fraction of the tokens at the last save


def save_state(file: Path, progress: Progress, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write what a stopped run needs to go on; a crash leaves the file before."""
    state = {
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
    }
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def open_state(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Set model and optimizers to what an earlier run has saved."""
    if not file.exists():
        return Progress()
    state = torch.load(file)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=6e6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    args = parser.parse_args()

    data = cast(DatasetDict, load_dataset(args.data))
    tokenizer = train_tokenizer(data["train"]["text"])
    train = tokenize(tokenizer, list(data["train"]["text"]))
    held_out = tokenize(tokenizer, list(data["validation"]["text"]))
    model = new_model(cast(int, tokenizer.eos_token_id), args.width, args.blocks)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    peak = [0.02, 3e-3]
    optimizers = [Muon(matrices, lr=peak[0]), torch.optim.AdamW(others, lr=peak[1], betas=(0.9, 0.95), weight_decay=0)]
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "training_state.pt"
    reached = open_state(state, model, optimizers)
    tokens_per_step = SEQ_LEN * WINDOWS_PER_STEP
    steps = math.ceil(args.tokens / tokens_per_step)
    bar = tqdm(total=steps, initial=reached.step, unit="step")
    while reached.step < steps:
        draw = torch.Generator().manual_seed(SEED + reached.step)
        offsets = torch.randint(len(train) - SEQ_LEN, (WINDOWS_PER_STEP,), generator=draw)
        batch = torch.stack([train[o : o + SEQ_LEN] for o in offsets.tolist()]).long()  # (windows, SEQ_LEN)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=NATIVE_BF16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in zip(optimizers, peak, strict=True):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(reached.step / steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        reached.step += 1
        reached.average = float(loss) if reached.step == 1 else 0.98 * reached.average + 0.02 * float(loss)
        bar.update()
        bar.set_postfix(loss=f"{reached.average:.3f}")
        if reached.step % SAVE_EVERY == 0:
            save_state(state, reached, model, optimizers)
        if reached.step / steps >= reached.saved + 0.05 or reached.step == steps:
            reached.saved = reached.step / steps
            record: dict[str, object] = {
                "steps": reached.step, "tokens": reached.step * tokens_per_step,
                "parameters": sum(p.numel() for p in model.parameters()), "training_loss": round(reached.average, 4),
                "validation_loss": round(validation_loss(model, held_out), 4), "text_tokens": len(train),
            }  # fmt: skip
            tqdm.write(json.dumps(record))
            save(model, tokenizer, args.out, record)
    bar.close()
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
