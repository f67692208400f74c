"""Find and read the packed layers of a checkpoint from any tool, and check them against its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq import formats
from gptq.checkpoint.reader import Source, is_finite
from gptq.checkpoint.sources.decoded import FP8
from gptq.checkpoint.tensors import NUMBERED
from gptq.errors import InputError
from gptq.formats.format import PLAIN_KEY, SCALE_DTYPE
from gptq.formats.name_rules import Quantization
from gptq.formats.quantization_config import TRANSLATED, method_of
from gptq.formats.scheme import Scheme, contiguous_groups
from gptq.models.blocks import is_linear, shape_of
from gptq.models.check_tensors import check_tensors
from gptq.models.tensor_names import Names

SCALES_OF_CODES = ("weight_scale", "weight_scale_inv", "scale", "qscale_weight")  # beside a weight of FP8 codes


@dataclass(frozen=True)
class PackedLayer:
    """A quantized layer as the headers of its tensors describe it."""

    scheme: Scheme
    outputs: int
    inputs: int
    suffixes: tuple[str, ...]
    scale_dtype: torch.dtype
    nbytes: int

    @property
    def is_complete(self) -> bool:
        """Whether the layer has all tensors of the format, the optional ones too."""
        return set(self.suffixes) == formats.layout(self.scheme, self.outputs, self.inputs).keys()


def is_variant(quantization: Mapping[str, Any], layers: Mapping[str, PackedLayer]) -> bool:
    """Whether a checkpoint differs from what this package writes in the same format: in words, or in tensors."""
    return method_of(quantization) in TRANSLATED or not all(layer.is_complete for layer in layers.values())


def packed_layers(source: Source, quantization: Quantization) -> dict[str, PackedLayer]:
    """Return the quantized layers by their stored names, after checking that all tensors of each are there and fit.

    Raises:
        InputError: a tensor is missing or wrong; the message names the tensor and what was expected.
    """
    keys = frozenset().union(*(known.keys for known in formats.FORMATS.values()))
    parts: dict[str, set[str]] = {}
    for name in source.tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix in keys:
            parts.setdefault(layer, set()).add(suffix)
    schemes = quantization.schemes(parts)
    marked = {layer for layer, suffixes in parts.items() if _marker(schemes[layer], quantization) in suffixes}
    if not marked:
        expected = _marker(None, quantization)
        raise InputError(f"{source.folder} says it is quantized but holds no packed weight (*.{expected})")
    found = {}
    for layer, suffixes in parts.items():
        if layer not in marked and len(suffixes) == 1:  # a single name like *.scales means something else
            continue
        scheme = schemes[layer]
        if scheme is None:
            name = f"{layer}.{min(suffixes)}"
            raise InputError(f"{source.folder} holds {name}, but its quantization_config says that is not quantized")
        if f"{layer}.{PLAIN_KEY}" in source.tensors:
            if formats.FORMATS[scheme.format].codes_key != PLAIN_KEY:
                raise InputError(
                    f"{source.folder} holds both {layer}.weight and {layer}.{min(suffixes)}; one is too many"
                )
            suffixes.add(PLAIN_KEY)
        found[layer] = _check_layer(source, layer, suffixes, scheme)
    return found


def _marker(scheme: Scheme | None, quantization: Quantization) -> str:
    """Return the key by which a layer is known to be packed; without a scheme, in the format of most layers."""
    return formats.FORMATS[scheme.format if scheme else quantization.format].marker_key


def _check_layer(source: Source, layer: str, suffixes: set[str], scheme: Scheme) -> PackedLayer:
    file_format = formats.FORMATS[scheme.format]
    infos = {suffix: source.tensors[f"{layer}.{suffix}"] for suffix in suffixes}
    try:
        needed = file_format.layout(scheme, 32, 32)  # of any shape, for the names
    except ValueError as error:
        raise InputError(
            f"{layer} in {source.folder} is not stored as its quantization_config says: {error}"
        ) from error
    if not needed.keys() - file_format.optional_keys <= infos.keys() <= needed.keys():
        raise InputError(
            f"{layer} in {source.folder} has {', '.join(sorted(infos))}; as {scheme.format} with {scheme.bits} bits it "
            f"needs {', '.join(sorted(needed))}"
        )
    outputs, inputs = file_format.stored_shape(source, layer, scheme)
    stored = infos[file_format.scale_key].dtype if file_format.scale_key else SCALE_DTYPE
    scale_dtype = stored if stored.is_floating_point else SCALE_DTYPE
    for suffix, expected in file_format.layout(scheme, outputs, inputs, scale_dtype).items():
        if suffix not in infos:
            continue
        name, info = f"{layer}.{suffix}", infos[suffix]
        if info.shape != expected.shape:
            raise InputError(
                f"{name} in {source.folder} has the shape {info.shape}, not {expected.shape} as {scheme.bits} bits in "
                f"groups of {scheme.columns(inputs)} need{file_format.explain_shape(info, scheme, outputs, inputs)}"
            )
        if info.dtype != expected.dtype:
            raise InputError(f"{name} in {source.folder} holds {info.dtype}, not {expected.dtype}")
    nbytes = sum(info.nbytes for info in infos.values())
    return PackedLayer(scheme, outputs, inputs, tuple(key for key in needed if key in infos), scale_dtype, nbytes)


def read_packed(source: Source, name: str, layer: PackedLayer, with_codes: bool = True) -> dict[str, Tensor]:
    """Read the stored tensors of a quantized layer, without the codes (the largest) if `with_codes` is false.

    Raises:
        InputError: g_idx points outside the groups, zero points or g_idx are not what the configuration says, or values
            stand for no weight.
    """
    file_format = formats.FORMATS[layer.scheme.format]
    wanted = (suffix for suffix in layer.suffixes if with_codes or suffix != file_format.codes_key)
    packed = {suffix: source.read(f"{name}.{suffix}") for suffix in wanted}
    check_packed(packed, name, layer, source)
    return packed


def check_packed(packed: Mapping[str, Tensor], name: str, layer: PackedLayer, source: Source) -> None:
    """Check the values of a layer's stored tensors.

    Raises:
        InputError: g_idx points outside the groups, zero points or g_idx are not what the configuration says, or a
            scale is not finite.
    """
    file_format = formats.FORMATS[layer.scheme.format]
    if file_format.codes_key in packed and not file_format.scale_key:
        _check_blocks(packed, layer, f"{name}.{file_format.codes_key} in {source.folder}")
    if file_format.scale_key in packed and not is_finite(packed[file_format.scale_key]):
        raise InputError(f"{name}.{file_format.scale_key} in {source.folder} holds NaN or infinity")
    if file_format.g_idx_key in packed:
        where = f"{name}.{file_format.g_idx_key} in {source.folder}"
        _check_groups(packed[file_format.g_idx_key], layer, where)
    wrong = file_format.find_wrong_value(packed)
    if wrong:
        raise InputError(f"{name}.{wrong[0]} in {source.folder} holds {wrong[1]}")
    if layer.scheme.sym and file_format.zero_key in packed:
        zero = file_format.decode_zeros(packed, layer.scheme, layer.outputs)
        _check_symmetric(zero, layer.scheme, f"{name}.{file_format.zero_key} in {source.folder}")


def _check_blocks(packed: Mapping[str, Tensor], layer: PackedLayer, where: str) -> None:
    """Check codes that are stored in one tensor with their scales."""
    try:
        found = formats.decode(packed, layer.scheme)
    except ValueError as error:
        raise InputError(f"{where} is damaged: {error}") from error
    if any(not bool(torch.isfinite(part).all()) for part in (found.scale, found.offset) if part is not None):
        raise InputError(f"{where} holds a scale that is NaN or infinity")


def _check_groups(g_idx: Tensor, layer: PackedLayer, where: str) -> None:
    groups, low, high = layer.scheme.groups(layer.inputs), int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise InputError(f"{where} runs from {low} to {high}, but there are {groups} groups")
    if not layer.scheme.scattered and not torch.equal(g_idx, contiguous_groups(layer.scheme, layer.inputs)):
        raise InputError(
            f"{where} is not made of runs of {layer.scheme.columns(layer.inputs)} columns, "
            "though its quantization_config says desc_act false, so that readers would ignore it"
        )


def _check_symmetric(zero: Tensor, scheme: Scheme, where: str) -> None:
    middle = 2 ** (scheme.bits - 1)
    if bool((zero != middle).any()):
        found = int(zero[zero != middle][0])
        raise InputError(
            f"{where} holds the zero point {found}, though its quantization_config says sym true, which is {middle} "
            "throughout"
        )


def match_layers(
    network: PreTrainedModel, names: Names, source: Source, layers: dict[str, PackedLayer], has_new_head: bool = False
) -> dict[str, str]:
    """Map the names of a model's linear layers to the stored names of the packed layers that replace them.

    Args:
        has_new_head: the model need not have packed layers outside its blocks.
    Raises:
        InputError: the model has no linear layer for a packed layer, or a linear layer of another shape.
    """
    stored: dict[str, str] = {}
    for name, module in network.named_modules():
        own = names.find_packed(name) if is_linear(module) else None
        if own in layers:
            stored[name] = own
            found = layers[own].outputs, layers[own].inputs
            if shape_of(module) != found:
                raise InputError(f"{own} is packed for {found}, but config.json describes {shape_of(module)}")
    extra = layers.keys() - set(stored.values())
    if has_new_head:
        extra = {name for name in extra if NUMBERED.search(name)}
    if extra:
        name = f"{min(extra)}.{layers[min(extra)].suffixes[0]}"
        raise InputError(f"{source.folder} holds {name}, for which its config.json has no layer")
    return stored


@dataclass(frozen=True)
class PackedModel:
    """Where a checkpoint's packed layers go in a model, after all headers were checked."""

    layers: dict[str, PackedLayer]  # by stored name
    stored: dict[str, str]  # the model's linear layers that are packed -> stored name
    left_over: set[str]  # tensors that nothing in the model uses


def fit_packed(
    network: PreTrainedModel,
    names: Names,
    source: Source,
    quantization: Quantization | None,
    has_new_head: bool = False,
) -> PackedModel:
    """Find the layers of a model that a checkpoint holds packed; check that it has every tensor, of the right shape.

    Without a quantization, no layer is packed. A model that `has_new_head` is of another class than the checkpoint's:
    of what is outside the base model, one may have what the other lacks.

    Raises:
        InputError: the checkpoint contradicts its configuration, or does not hold this model.
    """
    layers = packed_layers(source, quantization) if quantization else {}
    stored = match_layers(network, names, source, layers, has_new_head)
    left_over = {*check_tensors(network, names, source.tensors, stored, has_new_head)}
    left_over -= {f"{name}.{suffix}" for name in stored.values() for suffix in (*layers[name].suffixes, "bias")}
    if layers:
        _refuse_codes(source, left_over, layers)
    return PackedModel(layers, stored, left_over)


def _refuse_codes(source: Source, left_over: set[str], layers: Mapping[str, PackedLayer]) -> None:
    """Raises InputError for a weight of FP8 codes that no format reads: its scales are among the tensors left over."""
    for name in sorted(left_over):
        layer, _, key = name.rpartition(".")
        weight = f"{layer}.{PLAIN_KEY}"
        is_known = layer in layers  # a head that the model does not have
        if key in SCALES_OF_CODES and not is_known and weight in source.tensors and source.tensors[weight].dtype in FP8:
            raise InputError(
                f"{weight} in {source.folder} holds FP8 codes beside packed layers, and its quantization_config does "
                "not say so; `gptq quantize` reads such a checkpoint"
            )
