"""The LeNet of the classic CIFAR-10 tutorial, and its float file.

    image 3x32x32 -> conv1 6@5x5 -> ReLU -> pool 2 -> conv2 16@5x5 -> ReLU -> pool 2
                  -> fc1 120 -> ReLU -> fc2 84 -> ReLU -> fc3 10 logits

`run_layers` implements this structure once; the float, simulated and integer paths pass it different layer functions.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from gptq.errors import InputError

Bias = Literal["none", "fc3", "all"]

LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
WEIGHT_SHAPES = {
    "conv1": (6, 3, 5, 5),
    "conv2": (16, 6, 5, 5),
    "fc1": (120, 400),
    "fc2": (84, 120),
    "fc3": (10, 84),
}
BIASED: dict[Bias, tuple[str, ...]] = {"none": (), "fc3": ("fc3",), "all": LAYERS}
IMAGE = (3, 32, 32)
METADATA_KEY = "lenet_baseline"


def run_layers(x: Tensor, layer: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Run images (n, 3, 32, 32) to logits (n, 10), calling `layer(name, x)` for each layer.

    ReLU and max-pooling are the same for floats and integers. There is no ReLU after fc3: it would map negative logits
    to equal zeros, so an image with only negative logits would always get class 0.
    """
    for name in LAYERS:
        x = layer(name, x)
        if name != "fc3":
            x = torch.relu(x)
        if name.startswith("conv"):
            x = _max_pool(x)
        if name == "conv2":
            x = x.flatten(1)  # (n, 400)
    return x


def _max_pool(x: Tensor) -> Tensor:
    """2x2 max-pooling for floats and integers."""
    if x.is_floating_point():
        return functional.max_pool2d(x, 2)
    n, c, h, w = x.shape  # torch's max_pool2d overflows on int8: it stores indices in x's dtype
    return x.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5))


class LeNet(nn.Module):
    """The float model; `bias` says which layers have a bias. Parameters are undefined until `initialize` or `load`."""

    def __init__(self, bias: Bias = "all") -> None:
        super().__init__()
        self.bias = bias
        for name, (rows, columns, *kernel) in WEIGHT_SHAPES.items():
            biased = name in BIASED[bias]
            size = (columns, rows, kernel[0]) if kernel else (columns, rows)
            # skip torch's initialization, which draws from the process's global generator
            self.add_module(name, nn.utils.skip_init(nn.Conv2d if kernel else nn.Linear, *size, bias=biased))

    def initialize(self, draw: torch.Generator) -> None:
        """Draw weights and biases uniformly within 1 / sqrt(inputs), torch's default, from the given generator."""
        for name in LAYERS:
            bound = self.weight(name)[0].numel() ** -0.5
            for parameter in self.get_submodule(name).parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=draw)

    def weight(self, name: str) -> Tensor:
        """(outputs, inputs) or (outputs, inputs, 5, 5), detached."""
        return self.get_parameter(f"{name}.weight").detach()

    def layer_bias(self, name: str) -> Tensor | None:
        """(outputs,), detached, or None."""
        return self.get_parameter(f"{name}.bias").detach() if name in BIASED[self.bias] else None

    def layer(self, name: str, x: Tensor) -> Tensor:
        output: Tensor = self.get_submodule(name)(x)
        return output

    def forward(self, images: Tensor) -> Tensor:
        return run_layers(images, self.layer)


def unfold(x: Tensor, weight: Tensor) -> Tensor:
    """Unfold a layer's input to the rows of a matrix; any dtype.

    Args:
        x: (n, inputs), returned as it is, or the input (n, c, h, w) of a convolution, which is cut into patches.
        weight: the layer's weight, (outputs, inputs) or (outputs, c, k, k).
    Returns:
        (n, inputs) or (n * h' * w', c * k * k), columns in the order of weight.flatten(1).
    """
    if weight.ndim == 2:
        return x
    height, width = weight.shape[2:]
    patches = x.unfold(2, height, 1).unfold(3, width, 1)  # (n, c, h', w', k, k)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1] * height * width)


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that it never exists incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def save(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path) -> None:
    """Write tensors and settings as safetensors, reproducibly.

    All settings go into one metadata entry as JSON, because safetensors writes several entries in random order.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(
        path, safetensors.torch.save(contiguous, {METADATA_KEY: json.dumps(dict(settings), sort_keys=True)})
    )


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and settings of a safetensors file; settings are empty if another program wrote it.

    Raises:
        InputError: the file is missing or not a safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = (file.metadata() or {}).get(METADATA_KEY, "{}")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); delete it and run again") from error
    try:
        return tensors, dict(json.loads(settings))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: its settings are not readable ({error}); delete it and run again") from error


def require_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], path: Path
) -> None:
    """Raises InputError, naming the tensor, if names, shapes or dtypes differ or a number is not finite."""
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))[0]
        what = "has no tensor" if odd in expected else "has a tensor too many,"
        raise InputError(f"{path} {what} {odd!r}; it is not such a LeNet: delete it and run again")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise InputError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {name} holds a number that is not finite; delete the file and run again")


def load(path: Path) -> LeNet:
    """Load a float model.

    Raises:
        InputError: the file is missing, corrupt, or not a float LeNet; the message names the tensor.
    """
    tensors, _ = read(path)
    biased = tuple(name for name in LAYERS if f"{name}.bias" in tensors)
    bias: Bias = next((kind for kind, names in BIASED.items() if names == biased), "all")
    model = LeNet(bias)
    require_tensors(tensors, {name: (tuple(t.shape), torch.float32) for name, t in model.state_dict().items()}, path)
    model.load_state_dict(tensors)
    return model
