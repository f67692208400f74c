"""Asymmetric calibration: correct a layer's weight for the quantization error that earlier layers leave in its input.

The layers before it are quantized, so a layer sees x where the original saw x~ = x + d. Its outputs should be W x~, and
the weight that comes closest to them on x is

    W* = W + share * W C H^-1,     C = mean d x^T,     share = 1,

because ||W x~ - Q x||^2 = ||(W* - Q) x||^2 + a term independent of Q. The method is plain GPTQ on W*. GPTAQ
(arXiv 2504.02692) and Qronos (arXiv 2505.11695) reach about the same Q by changing the solve; QEP (arXiv 2504.09629)
fixes the share at 1/2. C is a mean over few tokens, and a full share would fit its noise; so the share is chosen to
minimize the error on held-out windows, which enter neither C nor H.

What a block adds up, the residual stream, has drifted too: r where the original has r~. A layer whose outputs are added
to r can make up for that: the sum should be W x~ + r~, so its outputs should be W x + t (as in LoaQ, arXiv 2509.06297),

    W* = W + share * S H^-1,       S = mean t x^T,     t = W d + (r~ - r).

S has a row for each output and C for each input, so a layer with fewer outputs than inputs also uses S, with r~ = r.
d is called the drift of a layer's inputs, t of its outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gptq.compute.device_profile import profile_of
from gptq.compute.matmul import product
from gptq.compute.matrices import is_wide, release
from gptq.solver.codes import row_chunks
from gptq.solver.solve import Factor

PANEL_ROWS = 1024  # of a wide C that are multiplied at a time


def input_drift(x: Tensor, original: Tensor | None, compare: bool = True) -> Tensor | None:
    """Return d = x~ - x, in the dtype and shape of x (..., inputs); None without x~.

    An x~ of another shape than x is ignored, because it belongs to other tokens: in the original model the router may
    have sent other tokens to an expert. `compare` says whether to look for an x~ that equals x, and return None.
    """
    if original is None or original.shape != x.shape or (compare and torch.equal(original, x)):
        return None
    return original - x


def output_drift(W: Tensor, drift: Tensor | None, added: Tensor | None) -> Tensor | None:
    """Return t = W d + (r~ - r), (..., outputs); None if nothing has drifted.

    Args:
        W: (outputs, inputs).
        drift: d (..., inputs), or None for zeros.
        added: r~ - r (..., outputs), or None for zeros.
    """
    if drift is None:
        return added
    found = drift @ W.to(drift.dtype).T
    return found if added is None else found.add_(added)


def full_correction(W: Tensor, C: Tensor, factor: Factor) -> Tensor:
    """Return W C H^-1 (rows, columns), with the damped Hessian H: the correction of W for a share of 1.

    If W has more rows than columns, it is cheaper to compute C H^-1 once by `divide_by_hessian`.

    Args:
        W: (rows, columns).
        C: (columns, columns), the mean of d x^T, d = x~ - x (see the module).
    """
    return divide_by_hessian(product_by_panels(W, C), factor)


def product_by_panels(W: Tensor, C: Tensor) -> Tensor:
    """Return W C for W (rows, n) and C (n, n), of which a panel of rows is read at a time if it is wide."""
    if not is_wide(C):
        return product(W, C)
    found = torch.zeros_like(W)
    for panel in row_chunks(len(C), PANEL_ROWS):
        found += product(W[:, panel], C[panel])
        release(C)
    return found


def divide_by_hessian(A: Tensor, factor: Factor) -> Tensor:
    """Replace A (rows, columns) by A H^-1 in place, with the damped Hessian H, by two triangular solves.

    H = U D U^T, so A H^-1 = (U^-T D^-1 U^-1 A^T)^T. On a CPU solve by blocks: most of the work is matrix products.
    Inverting the triangular blocks on the diagonal loses no accuracy at a few hundred columns.
    """
    profile, back = profile_of(A.device), torch.argsort(factor.perm)
    divide = _solver_of_all_columns(factor) if profile.triangle_columns is None else _solver_by_blocks(factor)
    for rows in row_chunks(len(A), profile.correction_rows):
        Y = A[rows].T[factor.perm]  # (columns, rows) in solving order
        A[rows] = divide(Y)[back].T
        release(A)
    return A


def _solver_of_all_columns(factor: Factor) -> Callable[[Tensor], Tensor]:
    """Return the function that replaces Y (columns, rows), in solving order, by H^-1 Y; two solves with all of U."""

    def divide(Y: Tensor) -> Tensor:
        Y = torch.linalg.solve_triangular(factor.U, Y, upper=True, unitriangular=True)
        Y.div_(factor.D[:, None])
        solved: Tensor = torch.linalg.solve_triangular(factor.U.T, Y, upper=False, unitriangular=True)
        return solved

    return divide


def _solver_by_blocks(factor: Factor) -> Callable[[Tensor], Tensor]:
    """`_solver_of_all_columns`, by products with the inverses of blocks on the diagonal of U."""
    U, n, most = factor.U, len(factor.U), profile_of(factor.U.device).triangle_columns or len(factor.U)
    wide, blocks = is_wide(U), [slice(start, min(start + most, n)) for start in range(0, n, most)]
    one = torch.eye(min(most, n), dtype=U.dtype, device=U.device)
    inverses = []  # inverses of the diagonal blocks of U, (block, block)
    for block in blocks:
        size = block.stop - block.start
        identity = one[:size, :size]
        inverses.append(torch.linalg.solve_triangular(U[block, block], identity, upper=True, unitriangular=True))
        release(U)

    def divide(Y: Tensor) -> Tensor:
        for block, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
            if block.stop < n and not wide:
                Y[block] -= product(U[block, block.stop :], Y[block.stop :])
            Y[block] = product(inverse, Y[block])
            if block.start and wide:  # the same sums in another order: columns of U are contiguous, and rows are not
                Y[: block.start] -= product(U[: block.start, block], Y[block])
                release(U)
        Y.div_(factor.D[:, None])
        for block, inverse in zip(blocks, inverses, strict=True):
            if block.start:
                Y[block] -= product(U[: block.start, block].T, Y[: block.start])
            Y[block] = product(inverse.T, Y[block])
            release(U)
        return Y

    return divide


def best_correction_share(power: float, agreement: float) -> float:
    """Return the share in [0, 1] of a correction that minimizes the mean of ||W d - share correction x||^2.

    Args:
        power: mean of ||correction x||^2 over held-out tokens; x is the input in the quantized model.
        agreement: mean of (W d) . (correction x) over these tokens; x + d is the input in the original model.
    """
    return min(max(agreement / power, 0.0), 1.0) if power > 0 else 0.0
