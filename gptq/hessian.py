"""The input Hessian of a linear layer, H = X^T X / N over N calibration tokens.

The paper's H is 2 X X^T with tokens as columns (section 3.1); a positive factor changes no code, so the mean over
tokens is used: tr((W - Q) H (W - Q)^T) is then the mean squared output error of a token, summed over outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class HessianAccumulator:
    """Sums x^T x of one layer input in float32, in the order in which windows arrive.

    A product of two bfloat16 (or float16) numbers is exact in float32, so only the sums round. Where the original
    model's input x~ is given beside x, (x~ - x)^T x is summed as well.
    """

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self.sum = torch.zeros(num_inputs, num_inputs, dtype=torch.float32, device=device)
        self.cross_sum: Tensor | None = None
        self.num_tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add the input of one window, (..., num_inputs); every leading dimension counts tokens.

        An `original` of another shape (an expert that other tokens reached, say) tells nothing of the drift of these.
        """
        drift = None
        if original is not None and original.shape == x.shape:
            drift = (original.float() - x.float()).reshape(-1, x.shape[-1])  # (tokens, num_inputs)
        x = x.reshape(-1, x.shape[-1]).float()  # (tokens, num_inputs)
        self.sum.addmm_(x.T, x)
        if drift is not None:
            self.cross_sum = torch.zeros_like(self.sum) if self.cross_sum is None else self.cross_sum
            self.cross_sum.addmm_(drift.T, x)
        self.num_tokens += x.shape[0]

    def mean(self) -> Tensor:
        """H, (num_inputs, num_inputs) float32; zero where no token came."""
        return self.sum / max(self.num_tokens, 1)

    def cross_mean(self) -> Tensor | None:
        """C, the mean of (x~ - x) x^T, (num_inputs, num_inputs) float32; None where no original was given."""
        return None if self.cross_sum is None else self.cross_sum / max(self.num_tokens, 1)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices are float32 products, whatever the process has set.

    TF32, bfloat16 modes and autocast round factors to 11 or 8 bits, which neither H nor the solve survives unharmed.
    """
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9 there was one setting for all
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        products: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
        settings = [product.fp32_precision for product in products]
        for product in products:
            product.fp32_precision = "ieee"
        try:
            yield
        finally:
            for product, setting in zip(products, settings, strict=True):
                product.fp32_precision = setting
