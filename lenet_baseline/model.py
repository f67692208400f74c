"""The LeNet of the classic CIFAR-10 tutorial, and its float file.

    image 3x32x32 -> conv1 6@5x5 -> ReLU -> pool 2 -> conv2 16@5x5 -> ReLU -> pool 2
                  -> fc1 120 -> ReLU -> fc2 84 -> ReLU -> fc3 10 logits

`walk` is this drawing, once: the float, the simulated and the integer path differ only in what they do at a layer.
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
METADATA = "lenet_baseline"


def walk(x: Tensor, layer: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Lead images (n, 3, 32, 32) to logits (n, 10), doing `layer(name, x)` at each layer.

    ReLU and max-pooling are the same on floats and on integers. The logits keep their sign: a ReLU after fc3 would make
    all-negative logits equal, and class 0 of such images.
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
    if x.is_floating_point():
        return functional.max_pool2d(x, 2)
    n, c, h, w = x.shape  # torch's own counts positions in x's dtype, and int8 runs out of them
    return x.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5))


class LeNet(nn.Module):
    """The float model; `bias` says which layers have one. Its numbers are undefined until `initialize` or a file."""

    def __init__(self, bias: Bias = "all") -> None:
        super().__init__()
        self.bias = bias
        for name, (rows, columns, *kernel) in WEIGHT_SHAPES.items():
            biased = name in BIASED[bias]
            size = (columns, rows, kernel[0]) if kernel else (columns, rows)
            # nn's own first numbers would come out of the process's global generator
            self.add_module(name, nn.utils.skip_init(nn.Conv2d if kernel else nn.Linear, *size, bias=biased))

    def initialize(self, draw: torch.Generator) -> None:
        """Weights and biases uniform within 1 / sqrt(inputs), torch's own default, from a generator of ours."""
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
        return walk(images, self.layer)


def unfold(x: Tensor, weight: Tensor) -> Tensor:
    """A layer's input as the rows of a matrix, of any dtype.

    Args:
        x: (n, inputs), which stays as it is, or (n, c, h, w) before a convolution, which becomes its patches.
        weight: the layer's, (outputs, inputs) or (outputs, c, k, k).
    Returns:
        (n, inputs) or (n * h' * w', c * k * k), columns in the order of weight.flatten(1).
    """
    if weight.ndim == 2:
        return x
    height, width = weight.shape[2:]
    patches = x.unfold(2, height, 1).unfold(3, width, 1)  # (n, c, h', w', k, k)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1] * height * width)


# --- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def save(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path) -> None:
    """The same tensors and settings make the same bytes: safetensors shuffles metadata keys, so there is only one."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write(path, safetensors.torch.save(contiguous, {METADATA: json.dumps(dict(settings), sort_keys=True)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a safetensors file; no settings where it was written by something else.

    Raises:
        InputError: it is not there, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = (file.metadata() or {}).get(METADATA, "{}")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); delete it and run again") from error
    try:
        return tensors, dict(json.loads(settings))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: its settings are not readable ({error}); delete it and run again") from error


def require(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], path: Path
) -> None:
    """Raises InputError, naming the tensor, where names, shapes, dtypes differ, or a number is not finite."""
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
    """A float model.

    Raises:
        InputError: the file is missing, corrupt, or not of such a model; it names the tensor.
    """
    tensors, _ = read(path)
    biased = tuple(name for name in LAYERS if f"{name}.bias" in tensors)
    bias: Bias = next((kind for kind, names in BIASED.items() if names == biased), "all")
    model = LeNet(bias)
    require(tensors, {name: (tuple(t.shape), torch.float32) for name, t in model.state_dict().items()}, path)
    model.load_state_dict(tensors)
    return model
