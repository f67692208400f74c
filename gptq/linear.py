"""QuantLinear, a linear layer that keeps its weight packed, and `load`, which builds a model of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from gptq import formats
from gptq.blocks import Names, WeightStream, choose_device, choose_dtype, empty_model, read_config, shape
from gptq.checkpoint import Source, resolve
from gptq.errors import InputError


class QuantLinear(nn.Module):
    """y = x W^T + bias, W (outputs, inputs) held as GPTQ v1 tensors, which are its buffers under their file names."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(self, packed: dict[str, Tensor], bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.bits = bits
        for suffix in formats.SUFFIXES:
            self.register_buffer(suffix, packed[suffix])
        self.register_buffer("bias", bias)

    @property
    def in_features(self) -> int:
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    def weight(self) -> Tensor:
        """The dequantized weight (outputs, inputs) in float32, exactly as quantization chose it."""
        return formats.dequantize(self.qweight, self.qzeros, self.scales, self.g_idx, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A Hugging Face model in evaluation mode; quantized layers stay packed, any other checkpoint loads as it is.

    Args:
        model: folder or Hub id.
        device, dtype: as for `gptq.quantize`; dtype is that of activations and of what is not quantized.

    Raises:
        InputError: the folder is not a checkpoint that can be read; names the tensor or file.
    """
    folder = resolve(str(model), revision)
    hf_config = read_config(folder, trust_remote_code)
    where = choose_device(device)
    compute = choose_dtype(dtype, hf_config, where)
    quantization = getattr(hf_config, "quantization_config", None)
    source = Source(folder)
    if quantization is None:
        return _load_plain(folder, hf_config, where, compute, trust_remote_code)
    grid = read_quantization(folder, quantization)
    network = empty_model(hf_config, trust_remote_code)
    network.config.use_cache = True
    _fill(network, source, grid, where, compute)
    if (folder / "generation_config.json").is_file():
        try:
            network.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder / 'generation_config.json'} could not be used: {reason}") from error
    return network


def _load_plain(
    folder: Path, hf_config: PreTrainedConfig, where: torch.device, compute: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=hf_config,
            dtype=compute,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise InputError(f"{folder} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    network: PreTrainedModel = loaded[0]
    found: dict[str, set[Any]] = loaded[1]
    wanting = sorted(str(name) for name in [*found["missing_keys"], *found["mismatched_keys"]])
    if wanting:  # transformers would go on with random numbers
        raise InputError(f"{folder} lacks {wanting[0]}, or holds it in another shape than its config.json describes")
    network.to(where)  # type: ignore[arg-type]
    return network


def read_quantization(folder: Path, quantization: dict[str, Any]) -> tuple[int, int]:
    """Bits and group size of a `quantization_config`.

    Raises:
        InputError: it is not of a GPTQ v1 file with one width throughout, or lacks a value.
    """
    method, kind = (
        quantization.get("quant_method"),
        quantization.get("checkpoint_format") or quantization.get("format") or "gptq",
    )
    if (method, kind) != ("gptq", "gptq"):
        raise InputError(f"{folder} is quantized as {method!r}, format {kind!r}; what is read is 'gptq', format 'gptq'")
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    where = folder / "config.json"
    if type(bits) is not int or bits not in (2, 3, 4, 8) or quantization.get("dynamic"):
        raise InputError(f"{where} says bits {bits!r}; what is read is 2, 3, 4 or 8, the same in all layers")
    if not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
        raise InputError(f"{where} says group_size {group_size!r}; it is -1 or a number of columns")
    return bits, group_size


def packed_layers(source: Source, bits: int, group_size: int) -> list[str]:
    """Stored names of the quantized layers, whose tensors are all there and fit each other.

    Raises:
        InputError: names the tensor and what was expected.
    """
    layers = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    if not layers:
        raise InputError(f"{source.folder} says it is quantized but holds no packed weight (*.qweight)")
    for layer in layers:
        found = {suffix: source.tensors.get(f"{layer}.{suffix}") for suffix in formats.SUFFIXES}
        shapes = {suffix: info.shape for suffix, info in found.items() if info}
        if len(shapes) < len(found) or len(shapes["g_idx"]) != 1 or len(shapes["scales"]) != 2 or 0 in shapes["g_idx"]:
            raise InputError(
                f"{layer} in {source.folder} has {shapes}; it needs a matrix of scales and all of {found.keys()}"
            )
        inputs, outputs = shapes["g_idx"][0], shapes["scales"][1]
        columns = inputs if group_size == -1 else min(group_size, inputs)
        for suffix, expected in formats.layout(outputs, inputs, bits, columns).items():
            if shapes[suffix] != expected.shape:
                needed = f"not {expected.shape} as {bits} bits in groups of {columns} need"
                raise InputError(f"{layer}.{suffix} in {source.folder} has the shape {shapes[suffix]}, {needed}")
            dtype = source.tensors[f"{layer}.{suffix}"].dtype
            if dtype != expected.dtype and not (suffix == "scales" and dtype.is_floating_point):
                raise InputError(f"{layer}.{suffix} in {source.folder} holds {dtype}, not {expected.dtype}")
    return layers


def read_packed(source: Source, layer: str, suffixes: tuple[str, ...] = formats.SUFFIXES) -> dict[str, Tensor]:
    """The stored tensors of a quantized layer, g_idx among them.

    Raises:
        InputError: g_idx points outside the groups.
    """
    packed = {suffix: source.read(f"{layer}.{suffix}") for suffix in suffixes}
    groups = source.tensors[f"{layer}.scales"].shape[0]
    low, high = int(packed["g_idx"].min()), int(packed["g_idx"].max())
    if low < 0 or high >= groups:
        raise InputError(f"{layer}.g_idx in {source.folder} runs from {low} to {high}, but there are {groups} groups")
    return packed


def _fill(
    network: PreTrainedModel, source: Source, grid: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    """Give an empty model its tensors, packed layers taking the place of linear ones; what is tied is tied again."""
    bits, group_size = grid
    names = Names(network, set(source.tensors))
    waiting = set(packed_layers(source, bits, group_size))
    found = {name: names.find(f"{name}.qweight") for name, _ in network.named_modules()}
    layers = {name: stored.removesuffix(".qweight") for name, stored in found.items() if stored}
    if waiting - set(layers.values()):
        extra = min(waiting - set(layers.values()))
        raise InputError(f"{source.folder} holds {extra}.qweight, for which its config.json has no layer")
    linears = {name: network.get_submodule(name) for name in layers}
    WeightStream(source, names, device, dtype).fill(network, "", skip=linears.values())
    for name, linear in linears.items():
        packed = {suffix: tensor.to(device) for suffix, tensor in read_packed(source, layers[name]).items()}
        needed, stored_shape = shape(linear), (packed["scales"].shape[1], packed["g_idx"].shape[0])
        if needed != stored_shape:
            raise InputError(f"{layers[name]} is packed for {stored_shape}, but config.json describes {needed}")
        parent, _, child = name.rpartition(".")
        bias = linear._parameters.get("bias")
        setattr(network.get_submodule(parent), child, QuantLinear(packed, None if bias is None else bias.data, bits))
    network.tie_weights()
