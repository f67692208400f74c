"""Record the activations of the float model: inputs and outputs of its five layers over training images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lenet_baseline.model import LeNet, run_layers


@dataclass(frozen=True)
class Activations:
    """Inputs and outputs by layer, over n images. Outputs are before ReLU; the input of conv1 is the image."""

    inputs: dict[str, Tensor]  # (n, ...) float32
    outputs: dict[str, Tensor]  # (n, ...) float32


@torch.no_grad()
def record_activations(model: LeNet, images: Tensor) -> Activations:
    """Run images (n, 3, 32, 32) through the model and keep all activations, about 55 kB per image."""
    recorded = Activations({}, {})

    def layer(name: str, x: Tensor) -> Tensor:
        recorded.inputs[name] = x
        recorded.outputs[name] = model.layer(name, x)
        return recorded.outputs[name]

    run_layers(images, layer)
    return recorded
