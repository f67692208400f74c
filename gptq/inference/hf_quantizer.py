"""The quantizer class registered with transformers for GPTQ checkpoints (see `hf_registration`)."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from gptq import formats
from gptq.checkpoint.reader import Source
from gptq.errors import InputError
from gptq.formats.packed_layers import match_layers, packed_layers
from gptq.formats.quantization_config import read_quantization
from gptq.inference.load import replace_linear
from gptq.inference.quant_linear import prepare_for_inference
from gptq.models.tensor_names import Names


class PackedQuantizer(HfQuantizer):
    """Replaces linear layers by QuantLinears on the meta device; transformers then fills them from the checkpoint."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Replace the model's quantized layers.

        Raises:
            InputError: the checkpoint does not hold what its configuration says, or no checkpoint file was given.
        """
        if not checkpoint_files:
            raise InputError("a GPTQ checkpoint is loaded from its files, which say what is packed; none were given")
        source = Source(Path(checkpoint_files[0]).parent)
        packed = packed_layers(source, read_quantization("config.json", self.quantization_config.to_dict()))
        for name, own in match_layers(model, Names(model, set(source.tensors)), source, packed).items():
            layer, linear = packed[own], model.get_submodule(name)
            layout = formats.layout(layer.scheme, layer.outputs, layer.inputs, layer.scale_dtype)
            empty = {suffix: torch.empty(i.shape, dtype=i.dtype, device="meta") for suffix, i in layout.items()}
            bias = linear._parameters.get("bias")
            if bias is None and f"{own}.bias" in source.tensors:
                bias = torch.nn.Parameter(torch.empty(layer.outputs, dtype=model.dtype, device="meta"))
            replace_linear(model, name, empty, None if bias is None else bias.data, layer.scheme)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        prepare_for_inference(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
