"""Train the float model, or reuse the file of an earlier run, and measure accuracy."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lenet_baseline.data import Data, Images, normalize
from lenet_baseline.model import Bias, LeNet, load, save

LEARNING_RATE = 3e-3  # peak of the one-cycle schedule
WEIGHT_DECAY = 1e-2
TEST_BATCH_IMAGES = 1000  # images per forward when accuracy is measured


def train(data: Data, bias: Bias, seed: int, epochs: int) -> LeNet:
    """Train with AdamW and a one-cycle learning rate; the seed decides initial weights, order and flips."""
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
                    mirrored = torch.rand(len(images), generator=draw, dtype=torch.float32) < 0.5
                    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
                loss = functional.cross_entropy(model(images), data.train.labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.requires_grad_(False)


def model_path(out: Path, data: Data, bias: Bias, seed: int, epochs: int) -> Path:
    """The model's file; its name has all that decides the weights, so that other settings never reuse an old model."""
    return out / "models" / f"float-{data.fingerprint}-bias-{bias}-epochs{epochs}-seed{seed}.safetensors"


def train_or_reuse(out: Path, data: Data, bias: Bias, seed: int, epochs: int) -> tuple[LeNet, Path]:
    """Load the model from OUT/models; train it first if the file does not exist.

    Raises:
        InputError: the file does not hold a float LeNet.
    """
    path = model_path(out, data, bias, seed, epochs)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)  # fail before the training, not after it
        model = train(data, bias, seed, epochs)
        save(model.state_dict(), {"data": data.name, "bias": bias, "epochs": epochs, "seed": seed}, path)
    return load(path).requires_grad_(False), path


@torch.no_grad()
def logits(forward: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """Run a forward over all images in batches: (n, 10)."""
    return torch.cat([forward(normalize(pixels)) for pixels in images.pixels.split(TEST_BATCH_IMAGES)])


def accuracy(scores: Tensor, images: Images) -> float:
    """The fraction of images whose largest logit belongs to their label; among equal logits the first class counts."""
    return float((scores.argmax(1) == images.labels).double().mean())
