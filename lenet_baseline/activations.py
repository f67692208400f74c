"""What flows through the float model: inputs and outputs of its five layers over training images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lenet_baseline.model import LeNet, walk


@dataclass(frozen=True)
class Activations:
    """By layer, over n images. Outputs stand before ReLU; the input of conv1 is the image."""

    inputs: dict[str, Tensor]  # (n, ...) float32
    outputs: dict[str, Tensor]  # (n, ...) float32


@torch.no_grad()
def record(model: LeNet, images: Tensor) -> Activations:
    """Run images (n, 3, 32, 32) through the model once and keep everything, about 55 kB an image."""
    recorded = Activations({}, {})

    def layer(name: str, x: Tensor) -> Tensor:
        recorded.inputs[name] = x
        recorded.outputs[name] = model.layer(name, x)
        return recorded.outputs[name]

    walk(images, layer)
    return recorded
