"""Cholesky factorization in place, by blocks on CPUs."""

import torch
from torch import Tensor

from gptq.compute.device_profile import profile_of
from gptq.compute.matmul import product
from gptq.solver.codes import row_chunks


def cholesky_upper(A: Tensor) -> bool:
    """Replace A by R, upper triangular with positive diagonal and R^T R = A; return whether A is positive definite.

    If it is not, or not finite, A is left half factorized. On CPUs rows are taken a block J at a time, K being those
    below it:

        R_JJ^T R_JJ = A_JJ,     R_JK = R_JJ^-T A_JK,     A_KK -= R_JK^T R_JK

    (right-looking; Golub and Van Loan, Matrix Computations, section 4.2). Nearly all the work is matrix products, which
    `product` makes faster than LAPACK's factorization: at 4,096 columns it takes half of the time.

    Args:
        A: (n, n) symmetric, contiguous.
    """
    most = profile_of(A.device).triangle_columns
    if most is None:
        return _by_library(A)
    for J in row_chunks(len(A), most):
        R, info = torch.linalg.cholesky_ex(A[J, J], upper=True)
        if int(info) or not bool(torch.isfinite(R.diagonal()).all()):
            return False
        A[J, J] = R
        if J.stop < len(A):
            _take_from_rest(A, J, R, most)
    A.triu_()
    return True


def _by_library(A: Tensor) -> bool:
    L, info = A.mT, torch.empty((), dtype=torch.int32, device=A.device)  # column-major, as LAPACK expects it
    torch.linalg.cholesky_ex(L, out=(L, info))
    return not int(info) and bool(torch.isfinite(L.diagonal()).all())


def _take_from_rest(A: Tensor, J: slice, R: Tensor, most: int) -> None:
    """Compute R_JK and subtract R_JK^T R_JK from the upper triangle of A_KK, `most` rows at a time."""
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    below = product(A[J, J.stop :].mT, inverse)  # R_JK^T (rows below, block)
    A[J, J.stop :] = below.mT
    for rows in row_chunks(len(below), most):
        rest = slice(J.stop + rows.start, None)
        A[J.stop + rows.start : J.stop + rows.stop, rest] -= product(below[rows], below[rows.start :].mT)
