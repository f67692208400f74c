"""GPTQ's column-by-column solve as a pure function of tensors, on an LDL factorization of the Hessian.

With H = U D U^T, U unit upper triangular and D diagonal, the error of a layer separates by columns:

    tr((W - Q) H (W - Q)^T) = sum_k D_k || w'_k - Q_k ||^2,      w'_k = W_k + (W - Q)[:, :k] U[:k, k]

so column k is rounded at w'_k, which is known once the columns before it are chosen. These are the codes of Frantar et
al. 2023 (arXiv 2210.17323), Algorithm 1, which keeps W updated through the Cholesky factor of H^-1; this form needs
one factorization and no inverse, and hands over the exact error. Columns are solved in blocks (section 3.3): inside a
block each column updates the rest of the block, and one matrix product brings the errors of all earlier blocks.

A worked example, one row and a grid of integers: H = [[1, .5], [.5, 1]] is U = [[1, .5], [0, 1]], D = (.75, 1).
W = (0.4, 0.3): the first column rounds to 0 and leaves 0.4, so the second is rounded at 0.3 + 0.4 * 0.5 = 0.5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.compute.matmul import product
from gptq.solver import grid, inner_loops
from gptq.solver.codes import Codes

ROWS = 2048  # of one or several weights that are solved at a time: bounds the memory, and what a unit of work is
TINY = 1e-30  # instead of a layer's output power where that is zero


@dataclass(frozen=True)
class Factor:
    """A damped Hessian in solving order: H[perm][:, perm] + damp * mean(diag H) * I = U diag(D) U^T."""

    H: Tensor  # (n, n) undamped, in the order of the weight's columns
    perm: Tensor  # (n,) solving order: step k takes column perm[k]
    U: Tensor  # (n, n) unit upper triangular
    D: Tensor  # (n,)
    damp: float  # fraction of the mean diagonal that was added at last
    ridge: float  # the same as the number that was added


@dataclass(frozen=True)
class SolvedLayer(Codes):
    """The integers that were chosen for a weight (rows, columns), in the weight's own column order."""

    row_errors: Tensor  # (rows,) float64: (w - q) (H + ridge I) (w - q)^T of each row

    @property
    def error(self) -> float:
        """tr((W - Q) (H + ridge I) (W - Q)^T)."""
        return float(self.row_errors.sum())

    def take(self, rows: slice) -> "SolvedLayer":
        """Some of its rows."""
        return SolvedLayer(self.codes[rows], self.scale[rows], self.zero[rows], self.g_idx, self.row_errors[rows])

    @classmethod
    def stack(cls, parts: "list[SolvedLayer]") -> "SolvedLayer":
        """Rows of the same columns, one below the other."""
        codes, scale, zero = (torch.cat([getattr(part, key) for part in parts]) for key in ("codes", "scale", "zero"))
        return cls(codes, scale, zero, parts[0].g_idx, torch.cat([part.row_errors for part in parts]))


class NotPositiveDefiniteError(ArithmeticError):
    """No damping up to the whole mean diagonal made the Hessian factor."""


def natural_order(H: Tensor) -> Tensor:
    return torch.arange(H.shape[0], device=H.device)


def act_order(H: Tensor) -> Tensor:
    """Columns with the largest mean squared input first; equal ones in their own order."""
    return torch.argsort(H.diagonal(), descending=True, stable=True)


def factorize(H: Tensor, perm: Tensor, damp_percent: float = 0.01) -> Factor:
    """LDL of the damped Hessian, through one Cholesky factorization of the matrix turned end for end.

    Damping starts at damp_percent of the mean diagonal and grows tenfold until the matrix factors. An input that is
    always zero keeps a diagonal of the ridge alone, is coupled to nothing and so rounds to nearest. A Hessian that is
    all zero has no scale to damp by and becomes the identity.

    Args:
        H: (n, n) symmetric.
        perm: (n,) permutation of the columns.
    Raises:
        NotPositiveDefiniteError: H is far from positive semi-definite, which no sum of x x^T is, or not finite.
    """
    mean_diagonal = float(H.diagonal().mean())
    backwards = perm.flip(0)
    damp, info = damp_percent, torch.empty((), dtype=torch.int32, device=H.device)
    while True:
        L = H[backwards[:, None], backwards].mT  # (n, n) symmetric; its columns are contiguous, as LAPACK wants them
        ridge = damp * mean_diagonal if mean_diagonal > 0 else 1.0
        L.diagonal().add_(ridge)
        torch.linalg.cholesky_ex(L, out=(L, info))  # in place, as is all that follows
        if int(info) == 0 and bool(torch.isfinite(L.diagonal()).all()):
            break
        if damp >= 1:
            raise NotPositiveDefiniteError(f"not positive definite with {damp:.0%} of its mean diagonal added")
        damp = min(10 * damp, 1.0)
    _reverse(L.mT.view(-1))  # turned end for end in both dimensions, L is upper triangular, and H = L L^T
    d = L.diagonal().clone()
    return Factor(H, perm, L.div_(d), d.square(), damp, ridge)


def _reverse(values: Tensor) -> None:
    """Turn a contiguous tensor (n,) end for end in place."""
    half = len(values) // 2
    for start in range(0, half, 2**20):
        stop = min(start + 2**20, half)
        front, back = values[start:stop], values[len(values) - stop : len(values) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def solve(
    W: Tensor,
    factor: Factor,
    bits: int,
    group_size: int,
    sym: bool,
    static_groups: bool = True,
    search: bool = False,
    block_size: int = 128,
) -> SolvedLayer:
    """Choose the codes of W one column at a time, each where the errors before it are best made up for.

    Args:
        W: (rows, columns) float32 or float64; the solve runs in this dtype.
        factor: of the layer's input Hessian, in the same dtype.
        group_size: columns per scale and zero point; the last group may be shorter.
        static_groups: fit grids to W; otherwise to the compensated weights when a group's first column is reached,
            and groups are runs of columns in solving order.
        search: take of many grids the one that errs least, columns weighted by the diagonal of H; otherwise the
            smallest that clips nothing.
        block_size: columns per lazy update; changes the speed, not the codes.
    Raises:
        ValueError: a scale does not fit its stored dtype.
    """
    rows, columns = W.shape
    perm, U = factor.perm, factor.U
    Wt = W.T.contiguous()  # (columns, rows): a column of W is one contiguous line
    position = torch.arange(columns, device=W.device)
    group_of = (perm if static_groups else position) // group_size  # (columns,) of the k-th solved column
    importance = factor.H.diagonal() + factor.ridge if search else None  # (columns,)
    if static_groups:
        scale, zero = _fit(Wt, bits, group_size, sym, importance)  # (groups, rows)
    else:
        shape = (-(-columns // group_size), rows)
        scale, zero = (torch.empty(shape, dtype=W.dtype, device=W.device) for _ in range(2))
    Wt = Wt[perm]  # in solving order
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=W.device)
    E = torch.zeros_like(Wt)  # (columns, rows) W - Q of the columns solved so far
    errors = torch.zeros(rows, dtype=torch.float64, device=W.device)
    groups = group_of.tolist()
    for start, stop in _column_blocks(columns, block_size, columns if static_groups else group_size):
        if not static_groups and start % group_size == 0:
            group = slice(start, min(start + group_size, columns))
            weighting = None if importance is None else importance[perm[group]]
            reached = _compensated(Wt, E, U, group)
            scale[groups[start]], zero[groups[start]] = _fit(reached, bits, len(reached), sym, weighting)
        base = Wt[start:stop]
        if start:  # (block, rows) w' as far as earlier blocks go
            base = base + product(U[:start, start:stop].T, E[:start])
        codes[start:stop], Q, reached = inner_loops.choose_columns(
            base, Wt[start:stop], -U[start:stop, start:stop], scale, zero, groups[start:stop], bits
        )
        E[start:stop] = Wt[start:stop] - Q
        residual = reached.sub_(Q).square_()  # (block, rows) (w'_k - Q_k)^2
        errors += residual.mul_(factor.D[start:stop, None]).sum(0, dtype=torch.float64)
    inverse = torch.argsort(perm)
    return SolvedLayer(
        codes=codes[inverse].T.contiguous(),
        scale=scale.T.float().contiguous(),
        zero=zero.T.to(torch.uint8).contiguous(),
        g_idx=group_of[inverse].to(torch.int32),
        row_errors=errors,
    )


def fit_groups(
    W: Tensor, bits: int, group_size: int, sym: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Grids of all groups of W (rows, columns); scale and zero are (rows, groups). The last may be short.

    Args:
        importance: (columns,) weights of the squared errors that a searched grid makes smallest; None for the
            smallest grid that clips nothing.
    """
    scale, zero = _fit(W.T.contiguous(), bits, group_size, sym, importance)
    return scale.T.contiguous(), zero.T.contiguous()


def _fit(Wt: Tensor, bits: int, group_size: int, sym: bool, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for contiguous columns, (columns, rows); scale and zero are (groups, rows)."""
    columns, rows = Wt.shape
    whole = columns // group_size * group_size
    found = []
    for start, stop, size in ((0, whole, group_size), (whole, columns, columns - whole)):
        if stop > start:
            w = Wt[start:stop].view(-1, size, rows)  # (groups, columns of a group, rows)
            found.append(
                _fit_alike(w, bits, sym, None if importance is None else importance[start:stop].view(-1, size))
            )
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _fit_alike(w: Tensor, bits: int, sym: bool, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero (groups, rows) of groups (groups, columns of a group, rows) of the same size."""
    if importance is None:
        return grid.fit(w.mT, bits, sym)
    scales, zeros = grid.candidates(w.mT, bits, sym)  # (candidates, groups, rows)
    best = inner_loops.best_grids(w, importance, scales, zeros, bits)[None]
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def _compensated(Wt: Tensor, E: Tensor, U: Tensor, group: slice) -> Tensor:
    """What Algorithm 1 has made of a group's columns when its first one is reached, (group, rows).

    Those are the weights that best make up for E while all columns from here on are free, so each also answers to its
    neighbours' moving: W_g + P with P = E U[:start, g] would hold them still; the way out is P U[g, g]^-1.
    """
    P = product(U[: group.start, group].T, E[: group.start])  # (group, rows)
    free: Tensor = torch.linalg.solve_triangular(U[group, group].T, P, upper=False, unitriangular=True)
    return Wt[group] + free


def _column_blocks(columns: int, block_size: int, span: int) -> list[tuple[int, int]]:
    """Blocks of at most block_size columns, none of which crosses a multiple of span."""
    return [
        (start, min(start + block_size, begin + span, columns))
        for begin in range(0, columns, span)
        for start in range(begin, min(begin + span, columns), block_size)
    ]


def round_to_nearest(W: Tensor, bits: int, group_size: int, sym: bool) -> SolvedLayer:
    """Every weight to the nearest point of its group's grid, each by itself; `error` is ||W - Q||^2 (H = I)."""
    scale, zero = fit_groups(W, bits, group_size, sym)  # (rows, groups)
    g_idx = torch.arange(W.shape[1], device=W.device) // group_size
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    errors = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    for group, w in enumerate(W.split(group_size, dim=1)):
        s, z = scale[:, group, None], zero[:, group, None]
        rounded = grid.quantize(w, s, z, bits)
        codes[:, group * group_size : group * group_size + w.shape[1]] = rounded
        errors += (w - grid.dequantize(rounded, s, z)).square().sum(1, dtype=torch.float64)
    return SolvedLayer(codes, scale.float(), zero.to(torch.uint8), g_idx.to(torch.int32), errors)
