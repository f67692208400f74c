"""The packed layers of a checkpoint, whichever tool wrote it: found, checked against its configuration, and read."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.errors import InputError
from gptq.formats import codec
from gptq.formats.codec import Scheme
from gptq.formats.quantization_config import Quantization
from gptq.models.blocks import is_linear, shape
from gptq.models.tensor_names import Names


@dataclass(frozen=True)
class PackedLayer:
    """A quantized layer as the headers of its tensors describe it."""

    scheme: Scheme
    outputs: int
    inputs: int
    suffixes: tuple[str, ...]
    scale_dtype: torch.dtype
    nbytes: int


def packed_layers(source: Source, quantization: Quantization) -> dict[str, PackedLayer]:
    """Quantized layers by their stored names, whose tensors are all there and fit each other.

    Raises:
        InputError: names the tensor and what was expected.
    """
    marker = codec.MARKER[quantization.format]
    parts: dict[str, set[str]] = {}
    for name in source.tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix in codec.SUFFIXES:
            parts.setdefault(layer, set()).add(suffix)
    if not any(marker in suffixes for suffixes in parts.values()):
        raise InputError(f"{source.folder} says it is quantized but holds no packed weight (*.{marker})")
    found, schemes = {}, quantization.schemes(parts)
    for layer, suffixes in parts.items():
        scheme = schemes[layer]
        if scheme is None:
            name = f"{layer}.{min(suffixes)}"
            raise InputError(f"{source.folder} holds {name}, but its quantization_config says that is not quantized")
        if f"{layer}.weight" in source.tensors:
            raise InputError(f"{source.folder} holds both {layer}.weight and {layer}.{min(suffixes)}; one is too many")
        found[layer] = _checked_layer(source, layer, suffixes, scheme)
    return found


def _checked_layer(source: Source, layer: str, suffixes: set[str], scheme: Scheme) -> PackedLayer:
    infos = {suffix: source.tensors[f"{layer}.{suffix}"] for suffix in suffixes}
    needed = codec.layout(scheme, 32, 32)  # of any shape, for the names
    if infos.keys() != needed.keys():
        raise InputError(
            f"{layer} in {source.folder} has {', '.join(sorted(infos))}; as {scheme.format} with {scheme.bits} bits it "
            f"needs {', '.join(sorted(needed))}"
        )
    scales = "weight_scale" if scheme.format == "pack-quantized" else "scales"
    outputs, inputs = _stored_shape(source, layer, infos, scheme)
    for suffix, expected in codec.layout(scheme, outputs, inputs).items():
        name, info = f"{layer}.{suffix}", infos[suffix]
        if info.shape != expected.shape:
            raise InputError(
                f"{name} in {source.folder} has the shape {info.shape}, not {expected.shape} as {scheme.bits} bits in "
                f"groups of {scheme.columns(inputs)} need{_older_packing(info, outputs, inputs, scheme)}"
            )
        if info.dtype != expected.dtype and not (suffix == scales and info.dtype.is_floating_point):
            raise InputError(f"{name} in {source.folder} holds {info.dtype}, not {expected.dtype}")
    nbytes = sum(info.nbytes for info in infos.values())
    return PackedLayer(scheme, outputs, inputs, tuple(needed), infos[scales].dtype, nbytes)


def _stored_shape(source: Source, layer: str, infos: dict[str, TensorInfo], scheme: Scheme) -> tuple[int, int]:
    """(outputs, inputs), from the tensors that give them plainly."""
    if scheme.format != "pack-quantized":
        g_idx, scales = infos["g_idx"].shape, infos["scales"].shape
        if len(g_idx) != 1 or len(scales) != 2 or 0 in (*g_idx, *scales):
            shapes = f"g_idx {g_idx} and scales {scales}"
            raise InputError(f"{layer} in {source.folder} has {shapes}; they are one row of columns, and a matrix")
        return scales[1], g_idx[0]
    if infos["weight_shape"].shape != (2,) or infos["weight_shape"].dtype.is_floating_point:
        raise InputError(f"{layer}.weight_shape in {source.folder} is {infos['weight_shape']}, not two integers")
    outputs, inputs = source.read(f"{layer}.weight_shape").tolist()
    if outputs < 1 or inputs < 1:
        raise InputError(f"{layer}.weight_shape in {source.folder} says {outputs} x {inputs}")
    return outputs, inputs


def _older_packing(info: TensorInfo, outputs: int, inputs: int, scheme: Scheme) -> str:
    if scheme.format == "pack-quantized" and info.shape == (outputs, -(-inputs // (32 // scheme.bits))):
        return "; compressed-tensors before 0.18 padded words of this width, write the file again with a newer one"
    return ""


def read_packed(source: Source, name: str, layer: PackedLayer, with_codes: bool = True) -> dict[str, Tensor]:
    """The stored tensors of a quantized layer, without the large one if `with_codes` is false.

    Raises:
        InputError: g_idx points outside the groups, or zero points or g_idx are not what the configuration says.
    """
    scheme = layer.scheme
    wanted = (suffix for suffix in layer.suffixes if with_codes or suffix != codec.MARKER[scheme.format])
    packed = {suffix: source.read(f"{name}.{suffix}") for suffix in wanted}
    key = "weight_g_idx" if "weight_g_idx" in packed else "g_idx"
    if key in packed:
        g_idx, groups = packed[key], scheme.groups(layer.inputs)
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            raise InputError(
                f"{name}.{key} in {source.folder} runs from {low} to {high}, but there are {groups} groups"
            )
        if not scheme.scattered and not torch.equal(g_idx, codec.in_runs(scheme, layer.inputs)):
            raise InputError(
                f"{name}.{key} in {source.folder} is not made of runs of {scheme.columns(layer.inputs)} columns, "
                "though its quantization_config says desc_act false, so that readers would ignore it"
            )
    if scheme.sym and scheme.format != "pack-quantized":
        zero, middle = codec.decode_zeros(packed["qzeros"], scheme, layer.outputs), 2 ** (scheme.bits - 1)
        if bool((zero != middle).any()):
            found = int(zero[zero != middle][0])
            raise InputError(
                f"{name}.qzeros in {source.folder} holds the zero point {found}, though its quantization_config says "
                f"sym true, which is {middle} throughout"
            )
    return packed


def match_layers(
    network: PreTrainedModel, names: Names, source: Source, layers: dict[str, PackedLayer]
) -> dict[str, str]:
    """Stored names of packed layers by the names of the model's linear layers.

    Raises:
        InputError: a packed layer has no linear layer in the model, or one of another shape.
    """
    stored: dict[str, str] = {}
    for name, module in network.named_modules():
        own = names.find_packed(name) if is_linear(module) else None
        if own in layers:
            stored[name] = own
            found = layers[own].outputs, layers[own].inputs
            if shape(module) != found:
                raise InputError(f"{own} is packed for {found}, but config.json describes {shape(module)}")
    extra = layers.keys() - set(stored.values())
    if extra:
        name = f"{min(extra)}.{layers[min(extra)].suffixes[0]}"
        raise InputError(f"{source.folder} holds {name}, for which its config.json has no layer")
    return stored
