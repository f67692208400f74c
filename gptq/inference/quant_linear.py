"""QuantLinear, a linear layer that keeps its weight packed, and `load`, which builds a model of them."""

import itertools
import logging
import math
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from gptq import formats
from gptq.checkpoint.reader import Source, resolve
from gptq.compute.allocator import return_freed_memory
from gptq.errors import InputError
from gptq.formats.codec import Scheme
from gptq.formats.packed_layers import PackedLayer, packed_layers, read_packed
from gptq.formats.quantization_config import Quantization, quantization_of, read_quantization
from gptq.inference import products
from gptq.models.blocks import (
    choose_device,
    choose_dtype,
    empty_model,
    is_linear,
    model_class,
    read_config,
    shape,
    take_experts_apart,
)
from gptq.models.tensor_names import Names, check_tensors
from gptq.models.weights import WeightStream

logger = logging.getLogger(__name__)
ADAPTER = "adapter_config.json"
LEFT_BEHIND = 2**24  # bytes of freed words, from which on the heap gives its room back
_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7


class QuantLinear(nn.Module):
    """y = x W^T + bias, W (outputs, inputs) held as the stored tensors, its buffers under their names in the file.

    `products` chooses the kernel. A layout that it made lies beside the buffers until the layer is moved or loaded
    anew; it is no part of the state, of copies or of pickles. Where it holds the stored words in another order they are
    not there twice: their buffer is None, and the state is put together when it is asked for.
    """

    bias: Tensor | None

    def __init__(self, packed: dict[str, Tensor], bias: Tensor | None, scheme: Scheme, shape: tuple[int, int]) -> None:
        """`shape` is that of W."""
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = shape
        self._suffixes = tuple(packed)
        for suffix, tensor in packed.items():
            self.register_buffer(suffix, tensor)
        self.register_buffer("bias", bias)
        self._words: products.Layout | None = None  # that took the place of the stored words
        self._number = _number(self)
        self._forget_layouts()

    def _forget_layouts(self) -> None:
        self._buffers.update(self.packed())
        self._made: dict[str, products.Product | None] = {}  # kernels with their layouts, by name
        self._chosen: dict[tuple[Any, ...], products.Product | None] = {}  # by what `products.choose` looks at
        self._words = None

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors, by their names in the file."""
        return {suffix: self._stored(suffix) for suffix in self._suffixes}

    def _stored(self, suffix: str) -> Tensor:
        held = self._buffers[suffix]
        if held is None:
            if self._words is None:
                raise RuntimeError(f"this layer has lost its {suffix}")
            return self._words.stored_words()
        return held

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (outputs, inputs) in float32, exactly as quantization chose it, made on every access.

        A property, as models here and there look at the weight of a linear layer.
        """
        return formats.decode(self.packed(), self.scheme).weight()

    def forward(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling()
        if traced and not (_is_exporting() or self._wants_gradient(x)):
            found: Tensor = torch.ops.gptq.multiply(x, self._number, self.out_features)
            return found
        product = None if traced else self._product(x)
        if product is None:
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        y, bias = product.multiply(x), self._buffers["bias"]  # looking up an attribute that is None takes microseconds
        return y if bias is None else y + bias

    def _product(self, x: Tensor) -> products.Product | None:
        """The kernel for this input; None to unpack, as where autograd has to see what is computed."""
        if self._wants_gradient(x):
            return None
        kind = x.dtype, x.device, min(x.numel() // self.in_features, products.FEW_ROWS + 1)
        if kind not in self._chosen:
            self._chosen[kind] = self._choose(*kind)
        return self._chosen[kind]

    def _wants_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and x.requires_grad

    def _choose(self, dtype: torch.dtype, device: torch.device, rows: int) -> products.Product | None:
        stored = products.Stored(self.packed(), self.scheme, self.out_features, self.in_features)
        name = products.choose(stored, dtype, rows) if device == stored.device else None
        if name is not None and name not in self._made:
            self._made[name] = made = products.make(name, stored)
            if isinstance(made, products.Lanes | products.Pairs) and made.layout.whole and self._words is None:
                self._words, self._buffers["qweight"] = made.layout, None
                del stored  # the last to hold the words
                _gave_way(made.layout.words.nbytes)
        return None if name is None else self._made[name]

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":  # .to(), .cuda(), ...
        self._forget_layouts()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_layouts()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for suffix in self._suffixes:
            if self._buffers[suffix] is None:
                destination[prefix + suffix] = self._stored(suffix)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles
        return {
            **self.__dict__,
            "_buffers": {**self._buffers, **self.packed()},
            "_made": {},
            "_chosen": {},
            "_words": None,
            "_number": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = _number(self)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.scheme.bits}, format={self.scheme.format}"


_layers: "weakref.WeakValueDictionary[int, QuantLinear]" = weakref.WeakValueDictionary()  # all there are, by number
_numbers = itertools.count()
_left_behind = 0  # bytes that layouts have freed since the heap gave its room back


def _number(layer: QuantLinear) -> int:
    number = next(_numbers)
    _layers[number] = layer
    return number


def _gave_way(size: int) -> None:
    """To count `size` bytes of stored words of which another layout took the place.

    The heap keeps the room that small layers leave, at last as much as the model takes. Looking for it costs a
    millisecond, so it is done once for many layers.
    """
    global _left_behind
    _left_behind += size
    if _left_behind >= LEFT_BEHIND:
        _left_behind = 0
        return_freed_memory()


def _multiply(x: Tensor, layer: int, outputs: int) -> Tensor:
    """A layer's output as one operator of a compiled model, for kernels are nothing that a compiler could look into.

    Contiguous, as compiled code is told, where some kernels leave out the end of each row.
    """
    return _layers[layer].forward(x).contiguous()


def _shape_of_product(x: Tensor, layer: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


_operators = torch.library.Library("gptq", "FRAGMENT")  # others may have operators of that name
_operators.define("multiply(Tensor x, int layer, int outputs) -> Tensor")
_operators.impl("multiply", _multiply, "CompositeExplicitAutograd")
_operators.impl("multiply", _shape_of_product, "Meta")


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
    quantization = quantization_of(folder)
    source = Source(folder)
    if quantization is None:
        return _load_plain(source, hf_config, where, compute, trust_remote_code)
    stored_as = read_quantization(folder / "config.json", quantization)
    network = empty_model(hf_config, trust_remote_code, source)
    network.config.use_cache = True
    _fill(network, source, stored_as, where, compute)
    if (folder / "generation_config.json").is_file():
        try:
            network.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # any type, depending on what the file holds
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder / 'generation_config.json'} could not be used: {reason}") from error
    return network


def _load_plain(
    source: Source, hf_config: PreTrainedConfig, where: torch.device, compute: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    folder = source.folder
    if (folder / ADAPTER).is_file():  # transformers would load what it names, from wherever that is
        raise InputError(f"{folder} holds an adapter ({ADAPTER}); merge it into its model and save that")
    held = sum(math.prod(info.shape) for info in source.tensors.values())
    network: PreTrainedModel = empty_model(hf_config, trust_remote_code, source)
    tied: dict[str, str] = getattr(network, "all_tied_weights_keys", None) or {}
    wanted = sum(parameter.numel() for name, parameter in network.named_parameters() if name not in tied)
    if wanted > 2 * held:  # transformers would make the rest up, in memory, before it says what is missing
        raise InputError(f"{folder} holds {held:,} numbers, but config.json describes a model of {wanted:,}")
    try:
        loaded: Any = model_class(hf_config, trust_remote_code).from_pretrained(
            folder,
            config=hf_config,
            dtype=compute,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any type, depending on what the files hold
        raise InputError(f"{folder} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    network = loaded[0]
    found: dict[str, set[Any]] = loaded[1]
    wanting = sorted(str(name) for name in [*found["missing_keys"], *found["mismatched_keys"]])
    if wanting:  # transformers would go on with random numbers
        raise InputError(f"{folder} lacks {wanting[0]}, or holds it in another shape than its config.json describes")
    network.to(where)  # type: ignore[arg-type]
    return network


def _fill(
    network: PreTrainedModel, source: Source, quantization: Quantization, device: torch.device, dtype: torch.dtype
) -> None:
    """Give an empty model its tensors, packed layers taking the place of linear ones; what is tied is tied again."""
    names = Names(network, set(source.tensors))
    take_experts_apart(network, names)
    layers = packed_layers(source, quantization)
    stored = match_layers(network, names, source, layers)
    left_over = {*check_tensors(network, names, source.tensors, stored)}
    left_over -= {f"{name}.{suffix}" for name, layer in layers.items() for suffix in (*layer.suffixes, "bias")}
    if left_over:
        logger.warning("%s holds %s, which the model does not use", source.folder, ", ".join(sorted(left_over)[:3]))
    linears = {name: network.get_submodule(name) for name in stored}
    WeightStream(source, names, device, dtype).fill(network, "", skip=linears.values())
    for name, linear in linears.items():
        layer, own = layers[stored[name]], stored[name]
        packed = {suffix: tensor.to(device) for suffix, tensor in read_packed(source, own, layer).items()}
        bias = linear._parameters.get("bias")
        if bias is None and f"{own}.bias" in source.tensors:  # early GPTQ tools gave every layer one
            bias = nn.Parameter(source.read(f"{own}.bias").to(device, dtype), requires_grad=False)
        replace_linear(network, name, packed, None if bias is None else bias.data, layer.scheme)
    network.tie_weights()


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


def replace_linear(
    network: nn.Module, name: str, packed: dict[str, Tensor], bias: Tensor | None, scheme: Scheme
) -> None:
    """Put a QuantLinear in the place of the linear layer called `name`."""
    parent, _, child = name.rpartition(".")
    shape_of = shape(network.get_submodule(name))
    setattr(network.get_submodule(parent), child, QuantLinear(packed, bias, scheme, shape_of))
