"""QuantLinear, a linear layer that keeps its weight packed, and `load`, which builds a model of them."""

import itertools
import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gptq import formats
from gptq.compute.allocator import return_freed_memory
from gptq.formats.scheme import Scheme
from gptq.inference import products
from gptq.inference.layout import Layout, Stored

logger = logging.getLogger(__name__)
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
        self._words: Layout | None = None  # that took the place of the stored words
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
        stored = Stored(self.packed(), self.scheme, self.out_features, self.in_features)
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
