"""Activations for the backward pass: kept as long as they fit, computed again by the blocks whose do not.

Either way a gradient is the same, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class Activations:
    """What blocks keep of one forward pass."""

    def __init__(self, most: int) -> None:
        """Args:
        most: bytes after which a block keeps its inputs alone.
        """  # fmt: skip
        self._most = most
        self._kept: dict[int, int] = {}  # bytes of what is kept, by address

    def run_first(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the forward of the first block, before which nothing is kept."""
        self._kept.clear()
        return self.run(forward, *args, **kwargs)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a block's forward; it is called again in the backward pass if too much is kept by now."""
        if sum(self._kept.values()) >= self._most:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        with saved_tensors_hooks(self._count, _same):
            return forward(*args, **kwargs)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def bounded_activations(blocks: Sequence[nn.Module], most: int) -> Iterator[None]:
    """Inside, the blocks keep about `most` bytes for the backward pass, and compute the rest again there."""
    activations = Activations(most)
    own = [block.forward for block in blocks]
    try:
        for number, (block, forward) in enumerate(zip(blocks, own, strict=True)):
            block.forward = partial(activations.run if number else activations.run_first, forward)
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the method of the class
