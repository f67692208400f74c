"""QuantLinear, a linear layer that keeps its weight packed, and the step that prepares a model for inference."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing

from gptq import formats
from gptq.compute.allocator import return_freed_memory
from gptq.formats.scheme import Scheme
from gptq.inference import products
from gptq.inference.dequantize_operator import dequantize, describe
from gptq.inference.layout import Stored

TRIM_EVERY = 2**24  # bytes of freed packed words, after which the heap's free pages are returned to the system
INT8_MAX = 127
NOT_PICKLED = frozenset((torch.uint32, torch.float8_e4m3fn))  # stored dtypes that Python's pickle of tensors lacks
SMALLEST = 1e-30  # a token of zeros has a scale too, and stays zero
_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7


class QuantLinear(nn.Module):
    """y = x W^T + bias with a packed W (outputs, inputs); buffers are the stored tensors under their names on disk.

    Until it is prepared, a layer dequantizes its weight in every forward. `prepare` converts the packed words to the
    layout that the kernels of its device read. If that layout replaces the words, their buffer is None; state dicts
    hold the stored tensors, and copies and pickles give them back. A prepared layer that is moved or loaded again is
    prepared again.
    """

    bias: Tensor | None

    def __init__(self, packed: dict[str, Tensor], bias: Tensor | None, scheme: Scheme, shape: tuple[int, int]) -> None:
        """`packed` are the stored tensors by their names on disk, `shape` is (outputs, inputs)."""
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = shape
        self._suffixes = tuple(packed)
        self._described = describe(scheme)
        self._buffers.update(packed)  # not by register_buffer, which refuses a buffer called like the property `weight`
        self.register_buffer("bias", bias)
        self.rounds_activations = formats.FORMATS[scheme.format].activation_bits is not None
        self.is_prepared = False
        self._product: products.Product | None = None
        self._operands: products.Operands | None = None

    def prepare(self) -> int:
        """Choose the kernel for the device of the stored tensors.

        Returns how many bytes of the stored tensors are replaced by the layout that the kernel reads.
        """
        self._restore()
        self.is_prepared = True
        stored = Stored(self.packed(), self.scheme, self.out_features, self.in_features)
        self._product = product = products.prepare(stored)
        self._operands = None if product is None else product.operands()
        replaced = None if product is None else product.replaces
        if replaced is None:
            return 0
        nbytes = self._stored(replaced).nbytes
        self._buffers[replaced] = None
        return nbytes

    def _restore(self) -> None:
        """Undo `prepare`: hold the stored tensors alone."""
        self._buffers.update(self.packed())
        self.is_prepared, self._product, self._operands = False, None, None

    def packed(self) -> dict[str, Tensor]:
        """Return the stored tensors, by their names on disk."""
        return {suffix: self._stored(suffix) for suffix in self._suffixes}

    def _stored(self, suffix: str) -> Tensor:
        held = self._buffers[suffix]
        if held is None and self._product is not None:
            return self._product.stored_words()
        if held is None:
            raise RuntimeError(f"this layer has lost its {suffix}")
        return held

    @property
    def weight(self) -> Tensor:
        """Return the dequantized weight (outputs, inputs) in float32, exact; it is computed on every access.

        The weight is a property because some models read it from a linear layer.
        """
        stored = self._buffers.get("weight")
        if stored is not None and any(tensor.is_meta for tensor in self.packed().values()):
            return stored  # transformers is filling the layer, one tensor after the other, and asks for it by its name
        return self._decoded()

    def _decoded(self) -> Tensor:
        """The dequantized weight (outputs, inputs) in float32."""
        if torch.compiler.is_compiling() and not _is_exporting():
            return dequantize(self.packed(), self._described, (self.out_features, self.in_features))
        return formats.decode_shaped(self.packed(), self.scheme, (self.out_features, self.in_features)).weight()

    def __getattr__(self, name: str) -> Any:
        """Return the stored tensor for a buffer that a kernel's layout replaces."""
        found: Any = super().__getattr__(name)
        return self._stored(name) if found is None and name in self.__dict__.get("_suffixes", ()) else found

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a dense layer that computes the same, with weights in `dtype`, by default float32."""
        bias = self._buffers["bias"]
        dense = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.to(dtype or torch.float32), requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.to(dense.weight.dtype), requires_grad=False)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):  # and not a torch.fx.Proxy
            self._require_input(x)
        if not self.rounds_activations:
            return self._multiply(x)
        rounded = round_to_int8(x)
        if torch.is_grad_enabled() and x.requires_grad:
            rounded = rounded.detach() + (x - x.detach())  # rounding has gradient 1
        return self._multiply(rounded).to(x.dtype)

    def _require_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise RuntimeError(f"a layer of {self.in_features} inputs was called on {x.dtype} {tuple(x.shape)}")

    def _multiply(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        product, bias = self._product, self._buffers["bias"]  # `self.bias` takes microseconds longer if it is None
        if product is None or x.dtype not in products.DTYPES or not x.numel() or self._needs_traceable_ops(x):
            return nn.functional.linear(x, self._decoded().to(x.dtype), None if bias is None else bias.to(x.dtype))
        if torch.compiler.is_compiling() and self._operands is not None:
            y: Tensor = torch.ops.gptq.multiply(x, *self._operands)
        else:
            y = product.multiply(x)
        return y if bias is None else y + bias

    def _needs_traceable_ops(self, x: Tensor) -> bool:
        """Whether autograd, torch.export or torch.jit has to trace this, which a custom kernel would hide."""
        if is_tracing():
            return True
        return (torch.is_grad_enabled() and x.requires_grad) or (torch.compiler.is_compiling() and _is_exporting())

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":  # .to(), .cuda(), ...
        was_prepared = self.is_prepared
        self._restore()
        stored = self.packed()
        super()._apply(fn, recurse)
        for suffix, tensor in stored.items():
            held = self._stored(suffix)
            if held.dtype != tensor.dtype:  # scales stay as stored; a cast would round them for good
                self._buffers[suffix] = tensor.to(held.device)
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
        """Return what the layer holds: a tensor made here is gone before another process has mapped its memory."""
        layout = self._product.layout if isinstance(self._product, products.CpuProduct) else None
        held = dict(self._buffers)
        if self._product is not None and self._product.replaces is not None and layout is None:
            held[self._product.replaces] = self._product.stored_words()
        odd = {name: tensor for name, tensor in held.items() if tensor is not None and tensor.dtype in NOT_PICKLED}
        as_bytes = {name: tensor.dtype for name, tensor in odd.items()}
        held.update({name: tensor.view(torch.uint8) for name, tensor in odd.items()})
        state = {**self.__dict__, "_buffers": held, "_product": None, "_operands": None}
        return {**state, "_as_bytes": as_bytes, "_layout": layout if layout and layout.whole else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layout, as_bytes, held = state.pop("_layout"), state.pop("_as_bytes"), state["_buffers"]
        held.update({name: held[name].view(dtype) for name, dtype in as_bytes.items()})
        if layout is not None:
            held["qweight"] = layout.stored_words()
        super().__setstate__(state)
        if self.is_prepared:
            self.prepare()

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.scheme.bits}, format={self.scheme.format}"


def round_to_int8(x: Tensor) -> Tensor:
    """Round each token of x (..., inputs) to multiples of a scale of its own, max |x| / 127; the result is float32.

    vLLM's kernels do the same and multiply the integers. compressed-tensors divides by 127.5 instead.
    """
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / INT8_MAX  # (..., 1)
    return torch.round(values / scale) * scale


def prepare_for_inference(network: nn.Module) -> None:
    """Prepare all packed layers of a loaded model for the device that they are on.

    The heap would keep the pages of the replaced words, which add up to the size of the model. Returning pages to the
    system takes a millisecond, so this is done once per TRIM_EVERY bytes.
    """
    replaced = 0
    for layer in network.modules():
        if isinstance(layer, QuantLinear):
            replaced += layer.prepare()
            if replaced >= TRIM_EVERY:
                return_freed_memory()
                replaced = 0


def dequantize_layers(network: nn.Module, dtype: torch.dtype) -> None:
    """Replace each packed layer of a model by a dense one with weights in `dtype`."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, QuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, QuantLinear.dequantize(layer, dtype))
