"""Train the float model, or take the one that an earlier run left, and measure accuracy."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lenet_baseline.data import Data, Images, normalize
from lenet_baseline.model import Bias, LeNet, load, save

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
TEST_BATCH = 1000


def train(data: Data, bias: Bias, seed: int, epochs: int) -> LeNet:
    """AdamW with one cycle of the learning rate; the seed decides first weights, order and flips."""
    draw = torch.Generator().manual_seed(seed)
    model = LeNet(bias)
    model.initialize(draw)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    batches = -(-len(data.train) // data.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    with tqdm(total=epochs * batches, desc=f"training, seed {seed}", unit="batch", file=sys.stderr) as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(data.train), generator=draw).split(data.batch_size):
                images = normalize(data.train.pixels[chosen])  # (b, 3, 32, 32)
                if data.flips:
                    mirrored = torch.rand(len(images), generator=draw) < 0.5
                    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
                loss = functional.cross_entropy(model(images), data.train.labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.requires_grad_(False)


def model_path(out: Path, data: Data, bias: Bias, seed: int, epochs: int) -> Path:
    """Named by everything that decides the weights, so another recipe never takes an old model for its own."""
    return out / "models" / f"float-{data.fingerprint}-bias-{bias}-epochs{epochs}-seed{seed}.safetensors"


def train_or_reuse(out: Path, data: Data, bias: Bias, seed: int, epochs: int) -> tuple[LeNet, Path]:
    """The model of OUT/models, trained first where it is not there yet.

    Raises:
        InputError: the file that is there is no such model.
    """
    path = model_path(out, data, bias, seed, epochs)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after
        model = train(data, bias, seed, epochs)
        save(model.state_dict(), {"data": data.name, "bias": bias, "epochs": epochs, "seed": seed}, path)
    return load(path).requires_grad_(False), path


@torch.no_grad()
def logits(forward: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """(n, 10)"""
    return torch.cat([forward(normalize(pixels)) for pixels in images.pixels.split(TEST_BATCH)])


def accuracy(scores: Tensor, images: Images) -> float:
    """The share of images whose largest logit is their label's; of equal logits the first class counts."""
    return float((scores.argmax(1) == images.labels).double().mean())
