"""Load a model from a folder or the Hub, with its quantized layers packed."""

import logging
import math
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from gptq.checkpoint.assembled import open_source
from gptq.checkpoint.companions import refuse_adapter
from gptq.checkpoint.derived import DerivedSource
from gptq.checkpoint.hub import resolve
from gptq.checkpoint.reader import Source
from gptq.compute.torch_state import BUILDING, fresh_torch_state
from gptq.errors import InputError
from gptq.formats.name_rules import Quantization
from gptq.formats.original import open_original
from gptq.formats.packed_layers import PackedModel, fit_packed, read_packed
from gptq.formats.quantization_config import quantization_of, read_quantization
from gptq.formats.scheme import Scheme
from gptq.inference.quant_linear import QuantLinear, prepare_for_inference
from gptq.models.blocks import shape_of
from gptq.models.build import OpenModel, build_empty_model, find_model_class, open_model
from gptq.models.hf_config import choose_device, choose_dtype, read_config
from gptq.models.tensor_names import Names
from gptq.models.tensor_use import MOST_KINDS, describe_kinds
from gptq.models.weights import WeightStream

logger = logging.getLogger(__name__)


@fresh_torch_state()
def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """Load a Hugging Face model in evaluation mode; quantized layers stay packed in memory.

    A plain checkpoint is loaded by transformers. One that is quantized in another way than the file formats (FP8, MXFP4
    ...) is loaded decoded.

    Args:
        model: folder or Hub id.
        device, dtype: as for `gptq.quantize`; dtype is the dtype of activations and of unquantized layers.
        allow_pickle: as for `gptq.quantize`.

    Raises:
        InputError: the checkpoint cannot be read; the message names the tensor or file.
    """
    folder = resolve(str(model), revision, allow_pickle)
    refuse_adapter(folder)
    hf_config = read_config(folder, trust_remote_code)
    where = choose_device(device)
    compute = choose_dtype(dtype, hf_config, where)
    quantization = quantization_of(folder)
    stored_as, source = _choose_reader(folder, quantization)
    if stored_as is None and not isinstance(source, DerivedSource):
        return _load_plain(source, hf_config, where, compute, trust_remote_code)
    opened = open_model(source, trust_remote_code, compute)
    network = opened.network
    _fill(opened, stored_as, where, compute)
    prepare_for_inference(network)
    if (folder / "generation_config.json").is_file():
        try:
            network.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # any type, depending on what the file holds
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder / 'generation_config.json'} could not be used: {reason}") from error
    return network


def _choose_reader(folder: Path, quantization: dict[str, Any] | None) -> tuple[Quantization | None, Source]:
    """Return how layers are packed, or None if no layer stays packed; and the checkpoint.

    Raises:
        InputError: the checkpoint is quantized in a way that is not known.
    """
    if quantization is not None:
        with suppress(InputError):  # if nothing else reads it either, the same error is raised again below
            return read_quantization(folder / "config.json", quantization), open_source(folder)
    return None, open_original(folder)


def _load_plain(
    source: Source, hf_config: PreTrainedConfig, where: torch.device, compute: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Load an unquantized checkpoint with transformers.

    Raises:
        InputError: the folder does not hold every tensor that config.json describes.
    """
    folder = source.folder
    held = sum(math.prod(info.shape) for info in source.tensors.values())
    network: PreTrainedModel = build_empty_model(hf_config, trust_remote_code, source)
    tied: dict[str, str] = getattr(network, "all_tied_weights_keys", None) or {}
    wanted = sum(parameter.numel() for name, parameter in network.named_parameters() if name not in tied)
    if wanted > 2 * held:  # transformers would allocate all of it before it reports what is missing
        raise InputError(f"{folder} holds {held:,} numbers, but config.json describes a model of {wanted:,}")
    try:
        with BUILDING:
            loaded: Any = find_model_class(hf_config, trust_remote_code).from_pretrained(
                folder,
                config=hf_config,
                dtype=compute,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any type, depending on what the files hold
        raise InputError(f"{folder} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    network = loaded[0]
    found: dict[str, set[Any]] = loaded[1]
    if lacking := sorted(map(str, found["missing_keys"])):  # transformers would continue with random weights
        raise InputError(f"{folder} lacks {lacking[0]}, which the model that its config.json describes needs")
    for name, stored, described in sorted(found["mismatched_keys"]):
        shapes = f"the shape {tuple(stored)}, but its config.json describes a model where it is {tuple(described)}"
        raise InputError(f"{name} in {folder} has {shapes}")
    network.to(where)  # type: ignore[arg-type]
    return network


def _fill(opened: OpenModel, quantization: Quantization | None, device: torch.device, dtype: torch.dtype) -> None:
    """Read a model's tensors, replacing quantized linear layers by packed ones; then tie weights again."""
    network, source, names = opened.network, opened.source, opened.names
    packed_model = fit_packed(network, names, source, quantization)
    layers, stored = packed_model.layers, packed_model.stored
    warn_of_unused(source, packed_model)
    linears = {name: network.get_submodule(name) for name in stored}
    weights = WeightStream(source, names, device, dtype)
    weights.fill(network, "", skip=linears.values())
    for name, linear in linears.items():
        layer, own = layers[stored[name]], stored[name]
        packed = {suffix: tensor.to(device) for suffix, tensor in read_packed(source, own, layer).items()}
        bias = linear._parameters.get("bias")
        if bias is None and f"{own}.bias" in source.tensors:  # early GPTQ tools gave every layer a bias
            read = source.read(f"{own}.bias").to(device, weights.dtype_of(f"{name}.bias"))
            bias = nn.Parameter(read, requires_grad=False)
        replace_linear(network, name, packed, None if bias is None else bias.data, layer.scheme)
    tie_weights(network, names, {f"{name}.weight" for name in linears})
    vars(network)["_weight_conversions"] = names.conversions()  # `save_pretrained` writes the names of this checkpoint


def warn_of_unused(source: Source, packed: PackedModel) -> None:
    if packed.left_over:
        some = ", ".join(describe_kinds(sorted(packed.left_over), source.tensors)[:MOST_KINDS])
        logger.warning("%s holds %s, which the model does not use", source.folder, some)


def tie_weights(network: PreTrainedModel, names: Names, packed: Collection[str]) -> None:
    """Tie weights as from_pretrained does: not where the checkpoint holds both, or where one of them is packed."""
    tied = {
        target: source
        for target, source in network.all_tied_weights_keys.items()
        if {target, source}.isdisjoint(packed)
    }
    network.all_tied_weights_keys = tied
    missing = {name for pair in tied.items() for name in pair if names.find_own(name) is None}
    network.tie_weights(missing_keys=missing, recompute_mapping=False)


def replace_linear(
    network: nn.Module, name: str, packed: dict[str, Tensor], bias: Tensor | None, scheme: Scheme
) -> None:
    """Replace the linear layer called `name` by a QuantLinear."""
    parent, _, child = name.rpartition(".")
    shape = shape_of(network.get_submodule(name))
    setattr(network.get_submodule(parent), child, QuantLinear(packed, bias, scheme, shape))
