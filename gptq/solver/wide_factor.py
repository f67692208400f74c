"""LDL factorization of a wide matrix by panels of columns, of which a few are in memory at a time.

With A = U D U^T, U unit upper triangular, J a panel of columns and K the panels behind it,

    U_JJ D_J U_JJ^T = A_JJ - sum_K U_JK D_K U_JK^T
    U_IJ D_J U_JJ^T = A_IJ - sum_K U_IK D_K U_JK^T,     I the rows above J

so that the panels follow from the last to the first, and each is written once (a left-looking factorization; Golub and
Van Loan, Matrix Computations, section 4.2, in reversed order). Most of the work is matrix products.
"""

import torch
from torch import Tensor

from gptq.compute.matmul import product
from gptq.compute.matrices import Matrices, release
from gptq.solver.codes import row_chunks

PANEL_COLUMNS = 512
PANELS_IN_MEMORY = 6  # at the same time: A_J twice while it is permuted, U_K in three layouts, a product


def factor_by_panels(H: Tensor, perm: Tensor, ridge: float, matrices: Matrices) -> tuple[Tensor, Tensor] | None:
    """Return U (n, n) and D (n,) with H[perm][:, perm] + ridge I = U diag(D) U^T.

    Args:
        H: (n, n) symmetric.
        perm: (n,) permutation of the columns.
    Returns:
        None if the damped matrix is not positive definite, or not finite.
    """
    n = len(H)
    Ut = matrices.zeros(n, n, H.device, H.dtype)  # (n, n): a row is a column of U, so that a panel is contiguous
    D = H.new_empty(n)
    panels = row_chunks(n, PANEL_COLUMNS)
    for number, J in reversed([*enumerate(panels)]):
        S = H[perm[J]][:, perm[: J.stop]]  # (panel, stop), the panel's rows of A up to its last column
        release(H)
        S[:, J].diagonal().add_(ridge)
        for K in panels[number + 1 :]:
            S -= product((D[K, None] * Ut[K, J]).T, Ut[K, : J.stop])
            release(Ut)
        L, info = torch.linalg.cholesky_ex(S[:, J].flip(0, 1))
        R = L.flip(0, 1)  # (panel, panel) upper triangular, A_JJ - sum_K = R R^T
        d = R.diagonal()
        if int(info) or not bool(torch.isfinite(d).all()):
            return None
        D[J] = d.square()
        above = torch.linalg.solve_triangular(R, S[:, : J.start], upper=True)  # D_J^(1/2) U_IJ^T
        Ut[J, : J.start] = above.div_(d[:, None])
        Ut[J, J] = (R / d).T
        release(Ut)
    return Ut.T, D
