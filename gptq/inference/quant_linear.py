"""QuantLinear, a linear layer that keeps its weight packed, and the step that prepares a model for inference."""

from typing import Any

import torch
from torch import Tensor, nn

from gptq import formats
from gptq.compute.allocator import return_freed_memory
from gptq.formats.scheme import Scheme
from gptq.inference import products
from gptq.inference.layout import Stored

TRIM_EVERY = 2**24  # bytes of stored words that were replaced, after which the heap's free pages are returned
_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7


class QuantLinear(nn.Module):
    """y = x W^T + bias, W (outputs, inputs) held as the stored tensors, its buffers under their names in the file.

    As it is made, a layer dequantizes its weight in every forward. `prepare` makes the layout that the kernels of its
    device read, which may take the place of the stored words: their buffer is None then. State, copies and pickles hold
    the stored tensors in any case. A prepared layer that is moved or loaded anew is prepared again.
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
        self.is_prepared = False
        self._product: products.Product | None = None
        self._operands: products.Operands | None = None

    def prepare(self) -> int:
        """Choose the product for the device of the stored tensors; returns how many bytes of these it has replaced."""
        self._restore()
        self.is_prepared = True
        stored = Stored(self.packed(), self.scheme, self.out_features, self.in_features)
        self._product = product = products.prepare(stored)
        self._operands = None if product is None else product.operands()
        if not (isinstance(product, products.CpuProduct) and product.layout.whole):
            return 0
        self._buffers["qweight"] = None
        return product.layout.words.nbytes

    def _restore(self) -> None:
        """Be as it was made: stored tensors alone."""
        self._buffers.update(self.packed())
        self.is_prepared, self._product, self._operands = False, None, None

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors, by their names in the file."""
        return {suffix: self._stored(suffix) for suffix in self._suffixes}

    def _stored(self, suffix: str) -> Tensor:
        held = self._buffers[suffix]
        if held is None and isinstance(self._product, products.CpuProduct):
            return self._product.layout.stored_words()
        if held is None:
            raise RuntimeError(f"this layer has lost its {suffix}")
        return held

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (outputs, inputs) in float32, exactly as quantization chose it, made on every access.

        A property, as models here and there look at the weight of a linear layer.
        """
        return formats.decode(self.packed(), self.scheme).weight()

    def forward(self, x: Tensor) -> Tensor:
        product, bias = self._product, self._buffers["bias"]  # an attribute lookup that finds None takes microseconds
        if product is None or x.dtype not in products.DTYPES or not x.numel() or self._has_to_be_seen(x):
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)
        if torch.compiler.is_compiling() and self._operands is not None:
            y: Tensor = torch.ops.gptq.multiply(x, *self._operands)
        else:
            y = product.multiply(x)
        return y if bias is None else y + bias

    def _has_to_be_seen(self, x: Tensor) -> bool:
        """Whether autograd or an exported graph has to see what is computed."""
        return (torch.is_grad_enabled() and x.requires_grad) or (torch.compiler.is_compiling() and _is_exporting())

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":  # .to(), .cuda(), ...
        was_prepared = self.is_prepared
        self._restore()
        super()._apply(fn, recurse)
        if was_prepared:
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_prepared = self.is_prepared
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)
        if was_prepared:
            self.prepare()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for suffix in self._suffixes:
            if self._buffers[suffix] is None:
                destination[prefix + suffix] = self._stored(suffix)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles
        stored = {**self._buffers, **self.packed()}
        return {**self.__dict__, "_buffers": stored, "_product": None, "_operands": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.is_prepared:
            self.prepare()

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.scheme.bits}, format={self.scheme.format}"


def prepare_for_inference(network: nn.Module) -> None:
    """Prepare all packed layers of a loaded model for the device on which they are.

    The heap keeps the pages of replaced words, in the end as many as the model takes. Returning them takes a
    millisecond, so it is done once for many layers.
    """
    replaced = 0
    for layer in network.modules():
        if isinstance(layer, QuantLinear):
            replaced += layer.prepare()
            if replaced >= TRIM_EVERY:
                return_freed_memory()
                replaced = 0
