"""What the windows held out tell of a layer's input: the rows themselves, or sums where rows are more than inputs.

What is asked of them is the power of an output, mean ||A x||^2, and how far two outputs agree, mean (W d).(A x) with
d = x~ - x. From t rows that takes 2 t n numbers, from H and C it takes 2 n^2.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptq.hessian import HessianAccumulator
from gptq.solver import output_power, row_chunks


class HeldOut(Protocol):
    """Inputs x that the solver has not seen, and where there are originals x~ what they drifted by, d = x~ - x."""

    def power(self, A: Tensor) -> float:
        """The mean of ||A x||^2, A (rows, inputs)."""

    def agreement(self, W: Tensor, A: Tensor) -> float | None:
        """The mean of (W d).(A x); None without originals."""


@dataclass(frozen=True)
class Rows:
    X: Tensor  # (tokens, inputs) float32
    D: Tensor | None  # (tokens, inputs), zero where a window had no original

    def power(self, A: Tensor) -> float:
        total = sum(float((self.X @ A[rows].T).square().sum(dtype=torch.float64)) for rows in row_chunks(len(A)))
        return total / len(self.X)

    def agreement(self, W: Tensor, A: Tensor) -> float | None:
        if self.D is None:
            return None
        total = 0.0
        for rows in row_chunks(len(A)):
            total += float(((self.D @ W[rows].T) * (self.X @ A[rows].T)).sum(dtype=torch.float64))
        return total / len(self.X)


@dataclass(frozen=True)
class Means:
    H: Tensor  # (inputs, inputs) mean of x x^T
    C: Tensor | None  # (inputs, inputs) mean of d x^T

    def power(self, A: Tensor) -> float:
        return output_power(A, self.H)

    def agreement(self, W: Tensor, A: Tensor) -> float | None:
        if self.C is None:
            return None
        total = 0.0
        for rows in row_chunks(len(A)):
            total += float(((W[rows] @ self.C) * A[rows]).sum(dtype=torch.float64))
        return total


class HeldOutAccumulator:
    """Keeps rows as they come, and goes over to sums when they are as many as the inputs."""

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self.num_tokens = 0
        self._inputs, self._device = num_inputs, device
        self._rows: list[tuple[Tensor, Tensor | None]] = []
        self._sums: HessianAccumulator | None = None

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add the input of one window as to a `HessianAccumulator`."""
        self.num_tokens += x.numel() // self._inputs
        x = x.reshape(-1, self._inputs)
        original = None if original is None or original.numel() != x.numel() else original.reshape(x.shape)
        if self._sums is not None:
            self._sums.add(x, original)
            return
        self._rows.append((x, original))
        if self.num_tokens >= self._inputs:
            self.sums()

    def sums(self) -> HessianAccumulator:
        """The same as sums, from now on."""
        if self._sums is None:
            self._sums = HessianAccumulator(self._inputs, self._device)
            for x, original in self._rows:
                self._sums.add(x, original)
            self._rows.clear()
        return self._sums

    def known(self) -> HeldOut | None:
        """What was gathered; None where no token came. This ends the gathering."""
        if not self.num_tokens:
            return None
        if self._sums is not None:
            return Means(*taken_means(self._sums))
        X = torch.cat([x.float() for x, _ in self._rows])
        D = torch.cat([(x if original is None else original).float() for x, original in self._rows]).sub_(X)
        return Rows(X, D if any(original is not None for _, original in self._rows) else None)


def taken_means(sums: HessianAccumulator) -> tuple[Tensor, Tensor | None]:
    """H and C as `mean` and `cross_mean` give them, in the memory of the sums, which are sums no more."""
    H, C = sums.sum, sums.cross_sum
    return H.div_(max(sums.num_tokens, 1)), None if C is None else C.div_(max(sums.num_tokens, 1))
