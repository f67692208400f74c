"""The quantizer class registered with transformers for quantized checkpoints (see `hf_registration`)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from gptq import formats
from gptq.checkpoint.assembled import open_source
from gptq.checkpoint.reader import Source
from gptq.errors import InputError
from gptq.formats.packed_layers import PackedModel, check_packed, fit_packed
from gptq.formats.quantization_config import read_quantization
from gptq.inference.load import replace_linear, warn_of_unused
from gptq.inference.quant_linear import QuantLinear, dequantize_layers, prepare_for_inference
from gptq.models.assembled_names import file_conversions
from gptq.models.build import match_checkpoint
from gptq.models.experts import Experts
from gptq.models.kept_in_float32 import exempt_from_float32


class PackedQuantizer(HfQuantizer):
    """Replaces linear layers by QuantLinears on the meta device; transformers then fills them from the checkpoint.

    Headers and values pass the checks of `gptq.load`, and experts are taken apart as there.
    """

    requires_calibration = False
    _checkpoint: tuple[Source, PackedModel, list[Any]] | None = None  # while it is being loaded
    _conversions: list[Any]  # for loading its files; those in `_checkpoint` are for saving

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, device_map: Any = None, **_: Any
    ) -> None:
        """Replace the model's quantized layers.

        Raises:
            InputError: the checkpoint does not hold what its configuration says, or no checkpoint file was given; or
                layers that accelerate cannot offload are to be offloaded.
        """
        if not checkpoint_files:
            raise InputError("a packed checkpoint is loaded from its files, which say what is packed; none were given")
        with torch.device("cpu"):  # transformers builds models on the meta device
            self._replace_layers(model, open_source(Path(checkpoint_files[0]).parent))
        if _offloads(device_map):
            _refuse_offloading(model)

    def _replace_layers(self, model: PreTrainedModel, stored: Source) -> None:
        quantization = read_quantization(stored.folder / "config.json", self.quantization_config.to_dict())
        source, names, _ = match_checkpoint(stored, model)
        described, kinds = model.config.architectures or [], {kind.__name__ for kind in type(model).__mro__}
        has_new_head = bool(described) and kinds.isdisjoint(described)
        packed = fit_packed(model, names, source, quantization, has_new_head)
        warn_of_unused(source, packed)
        for name, own in packed.stored.items():
            layer, linear = packed.layers[own], model.get_submodule(name)
            layout = formats.layout(layer.scheme, layer.outputs, layer.inputs, layer.scale_dtype)
            held = {suffix: layout[suffix] for suffix in layer.suffixes}
            empty = {suffix: torch.empty(i.shape, dtype=i.dtype, device="meta") for suffix, i in held.items()}
            bias = linear._parameters.get("bias")
            if bias is None and f"{own}.bias" in source.tensors:
                bias = nn.Parameter(torch.empty(layer.outputs, dtype=model.dtype, device="meta"))
            replace_linear(model, name, empty, None if bias is None else bias.data, layer.scheme)
        for module in model.modules():
            if any(isinstance(child, Experts) for child in module.children()):
                vars(module)["_is_hf_initialized"] = True  # else Qwen3-Omni's code initializes tensors that are fused
        named = {f"{name}.{suffix}" for name, own in packed.stored.items() for suffix in packed.layers[own].suffixes}
        exempt_from_float32(model, named)
        self._checkpoint = source, packed, names.conversions()
        self._conversions = file_conversions(stored, names)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Replace transformers' table: the experts that it would fuse are separate. 5.20 gives no model, 5.23 does."""
        return weight_conversions if self._checkpoint is None else self._conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Check the values that were loaded, and prepare the layers.

        Raises:
            InputError: a tensor holds NaN or infinity, or what the configuration says it does not; or layers that
                accelerate cannot offload are to be offloaded.
        """
        if self._checkpoint is not None:
            source, packed, conversions = self._checkpoint
            if _offloads(getattr(model, "hf_device_map", None)):  # as transformers has chosen it, for "auto"
                _refuse_offloading(model)
            for name, own in packed.stored.items():
                layer = model.get_submodule(name)
                if isinstance(layer, QuantLinear) and not any(tensor.is_meta for tensor in layer.packed().values()):
                    check_packed(layer.packed(), own, packed.layers[own], source)
            biases = [(f"{n}.bias", m.bias) for n, m in model.named_modules() if isinstance(m, QuantLinear)]
            for name, parameter in [*model.named_parameters(), *((n, bias) for n, bias in biases if bias is not None)]:
                if not (parameter.is_meta or bool(torch.isfinite(parameter).all())):
                    raise InputError(f"{name} in {source.folder} holds NaN or infinity; the checkpoint is damaged")
            vars(model)["_weight_conversions"] = conversions  # `save_pretrained` writes the names of this checkpoint
            self._checkpoint = None
        prepare_for_inference(model)
        return model

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Leave the experts of Llama 4 to `match_checkpoint`."""

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace packed layers by dense ones, for `model.dequantize()`."""
        dequantize_layers(model, dtype or model.dtype)
        return model

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: gradients flow through packed layers, which stay as they are."""
        return True


def _offloads(device_map: Any) -> bool:
    """Whether a `device_map` keeps modules on disk, or in main memory beside a GPU, until a forward needs them."""
    places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
    return "disk" in places or ("cpu" in places and len(places) > 1)


def _refuse_offloading(model: nn.Module) -> None:
    """Raises InputError for a layer that stores a tensor called `weight`: accelerate would take it for its weight."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and "weight" in layer.packed():
            raise InputError(
                f"{name} is stored as {layer.scheme.format}, which accelerate cannot offload; leave the CPU and the "
                "disk out of the device_map, or take a file in 'gptq' or 'pack-quantized'"
            )
