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

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from gptq.compute.device_profile import profile_of
from gptq.compute.matmul import product
from gptq.compute.matrices import IN_MEMORY, Matrices, diagonal_of, is_wide, release
from gptq.solver import inner_loops
from gptq.solver.cholesky import cholesky_upper
from gptq.solver.codes import Codes, row_chunks
from gptq.solver.grids.grid import Form, Grid, Groups, fit
from gptq.solver.wide_factor import factor_by_panels

OF_ALL_ROWS = ("g_idx", "table")  # fields of a solved layer that do not belong to single rows
SMALLEST_POWER = 1e-30  # lower bound of a layer's output power, so that a relative error never divides by zero
PERMUTED_ROWS = 256  # rows of H that are brought into the order of the solve at a time


@dataclass(frozen=True)
class Factor:
    """A damped Hessian in solving order: H[perm][:, perm] + damp * mean(diag H) * I = U diag(D) U^T."""

    H: Tensor  # (n, n) undamped, in the order of the weight's columns
    perm: Tensor  # (n,) solving order: step k takes column perm[k]
    U: Tensor  # (n, n) unit upper triangular
    D: Tensor  # (n,)
    damp: float  # final damping as a fraction of the mean diagonal
    ridge: float  # the number that was added to the diagonal: damp * mean diagonal


@dataclass(frozen=True)
class SolvedLayer(Codes):
    """The integers that were chosen for a weight (rows, columns), in the weight's own column order."""

    row_errors: Tensor  # (rows,) float64: (w - q) (H + ridge I) (w - q)^T of each row

    @property
    def error(self) -> float:
        """tr((W - Q) (H + ridge I) (W - Q)^T)."""
        return float(self.row_errors.sum())

    def take(self, rows: slice) -> "SolvedLayer":
        """A slice of the rows."""
        return SolvedLayer(**{name: x if name in OF_ALL_ROWS else x[rows] for name, x in self.tensors().items()})

    @classmethod
    def stack(cls, parts: "list[SolvedLayer]") -> "SolvedLayer":
        """Concatenate layers by rows; they must have the same grid, columns and groups."""
        every = [part.tensors() for part in parts]
        return cls(**{n: x if n in OF_ALL_ROWS else torch.cat([one[n] for one in every]) for n, x in every[0].items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        return {one.name: x for one in fields(self) if (x := getattr(self, one.name)) is not None}


class NotPositiveDefiniteError(ArithmeticError):
    """The Hessian has no Cholesky factor, even with damping equal to its whole mean diagonal."""


def natural_order(H: Tensor) -> Tensor:
    return torch.arange(H.shape[0], device=H.device)


def act_order(H: Tensor) -> Tensor:
    """Columns by decreasing mean squared input; the sort is stable."""
    return torch.argsort(diagonal_of(H), descending=True, stable=True)


def factorize(H: Tensor, perm: Tensor, damp_percent: float = 0.01, matrices: Matrices = IN_MEMORY) -> Factor:
    """LDL factorization of the damped Hessian, by one Cholesky factorization of the matrix in reversed order.

    A wide one is factorized by panels (see `wide_factor`), whether it lives in memory or in a file.

    Damping starts at damp_percent of the mean diagonal and grows tenfold until the factorization succeeds. An input
    that is always zero has only the ridge on its diagonal and no coupling, so its column rounds to nearest. An all-zero
    Hessian is replaced by the identity, because it has no mean diagonal to scale the damping.

    Args:
        H: (n, n) symmetric.
        perm: (n,) permutation of the columns.
        matrices: makes the factor.
    Raises:
        NotPositiveDefiniteError: H is not finite, or far from positive semi-definite; a sum of x x^T never is.
    """
    mean_diagonal, damp = float(diagonal_of(H).mean()), damp_percent
    while True:
        ridge = damp * mean_diagonal if mean_diagonal > 0 else 1.0
        found = factor_by_panels(H, perm, ridge, matrices) if is_wide(H) else _factor_whole(H, perm, ridge)
        if found is not None:
            return Factor(H, perm, *found, damp, ridge)
        if damp >= 1:
            raise NotPositiveDefiniteError(f"not positive definite with {damp:.0%} of its mean diagonal added")
        damp = min(10 * damp, 1.0)


def _factor_whole(H: Tensor, perm: Tensor, ridge: float) -> tuple[Tensor, Tensor] | None:
    """Return U (n, n) and D (n,) as `factor_by_panels` does; all steps are in place."""
    backwards = perm.flip(0)
    R = torch.empty_like(H, memory_format=torch.contiguous_format)  # (n, n) symmetric
    for rows in row_chunks(len(H), PERMUTED_ROWS):  # an index of both at once is up to ten times as slow
        R[rows] = H.index_select(0, backwards[rows]).index_select(1, backwards)
    R.diagonal().add_(ridge)
    if not cholesky_upper(R):
        return None
    _reverse(R.view(-1))  # reversed in both dimensions, R^T is upper triangular and H[perm][:, perm] = R^T R
    d = R.diagonal().clone()
    return R.mT.div_(d), d.square()


def _reverse(values: Tensor) -> None:
    """Reverse a contiguous tensor (n,) in place."""
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
    grid: Grid,
    group_size: int,
    static_groups: bool = True,
    search: bool = False,
    block_size: int = 128,
) -> SolvedLayer:
    """Choose the codes of W one column at a time; each column compensates the errors of the columns before it.

    Args:
        W: (rows, columns) float32 or float64; the solve runs in this dtype.
        factor: of the layer's input Hessian, in the same dtype.
        grid: the points that weights are rounded to.
        group_size: columns per scale; the last group may be shorter.
        static_groups: fit the grids to W before the solve. Otherwise groups are runs of columns in solving order, and
            each grid is fitted to the compensated weights when the solve reaches the group's first column.
        search: of many candidate grids, take the one with the least squared error, columns weighted by the diagonal of
            H; otherwise the smallest grid that clips nothing.
        block_size: columns per lazy update; changes the speed, not the codes.
    Raises:
        ValueError: a scale does not fit its stored dtype; or groups are dynamic, and the grid fits a row's groups
            together.
    """
    if not (static_groups or grid.independent):
        raise ValueError("the groups of this grid are fitted together, and dynamic groups one by one")
    rows, columns = W.shape
    perm, U = factor.perm, factor.U
    Wt = W.T.contiguous()  # (columns, rows): a column of W is one contiguous line
    position = torch.arange(columns, device=W.device)
    group_of = (perm if static_groups else position) // group_size  # (columns,) of the k-th solved column
    importance = diagonal_of(factor.H) + factor.ridge if search else None  # (columns,)
    if static_groups:
        fitted = fit(grid, Wt, group_size, importance)  # (groups, rows)
    else:
        shape = (-(-columns // group_size), rows)
        fitted = Groups(*(torch.empty(shape, dtype=W.dtype, device=W.device) for _ in range(2)))
    Wt = Wt[perm]  # in solving order
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=W.device)
    E = torch.zeros_like(Wt)  # (columns, rows) W - Q of the columns solved so far
    errors = torch.zeros(rows, dtype=torch.float64, device=W.device)
    for start, stop in _column_blocks(columns, block_size, columns if static_groups else group_size):
        if not static_groups and start % group_size == 0:
            group = slice(start, min(start + group_size, columns))
            weighting = None if importance is None else importance[perm[group]]
            reached = _compensate_group(Wt, E, U, group)
            one = fit(grid, reached, len(reached), weighting)
            number = start // group_size
            fitted.scale[number], fitted.shift[number] = one.scale[0], one.shift[0]
        base = Wt[start:stop]
        if start:  # (block, rows) w' with the errors of all earlier blocks
            base = base + product(U[:start, start:stop].T, E[:start])
        codes[start:stop], Q, reached = inner_loops.choose_columns(
            base, Wt[start:stop], -U[start:stop, start:stop], fitted.scale, fitted.shift, group_of[start:stop], grid
        )
        E[start:stop] = Wt[start:stop] - Q
        residual = reached.sub_(Q).square_()  # (block, rows) (w'_k - Q_k)^2
        errors += residual.mul_(factor.D[start:stop, None]).sum(0, dtype=torch.float64)
        release(U)
    inverse = torch.argsort(perm)
    return SolvedLayer(
        codes=codes[inverse].T.contiguous(),
        g_idx=group_of[inverse].to(torch.int32),
        row_errors=errors,
        **stored_groups(grid, fitted),
    )


def stored_groups(grid: Grid, groups: Groups) -> dict[str, Tensor]:
    """The fields of `Codes` that hold the fitted groups, (rows, groups) each."""
    found: dict[str, Tensor | None] = {
        "scale": groups.scale,
        "zero": groups.shift if grid.form is Form.INTEGER else torch.zeros_like(groups.shift),
        "offset": groups.shift,
        "super_scale": groups.super_scale,
        "super_offset": groups.super_offset,
    }
    stored = {name: x.T.float().contiguous() for name, x in found.items() if name in ("scale", *grid.stored)}  # type: ignore[union-attr]
    stored["zero"] = found["zero"].T.to(torch.uint8).contiguous()  # type: ignore[union-attr]
    if "table" in grid.stored:
        every = torch.arange(2**grid.bits, device=groups.scale.device)
        stored["table"] = grid.steps(every, groups.shift.new_zeros(())).float()
    return stored


def fit_groups(W: Tensor, grid: Grid, group_size: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fit the grids of all groups of W (rows, columns); return scale and shift, (rows, groups). See `Groups`.

    Args:
        group_size: columns per group; the last group may be shorter.
        importance: (columns,) weights of the squared error that the grid search minimizes; None takes the smallest grid
            that clips nothing.
    """
    groups = fit(grid, W.T.contiguous(), group_size, importance)
    return groups.scale.T.contiguous(), groups.shift.T.contiguous()


def _compensate_group(Wt: Tensor, E: Tensor, U: Tensor, group: slice) -> Tensor:
    """The weights of a group as Algorithm 1 has updated them when it reaches the group's first column, (group, rows).

    E (columns, rows) holds the errors of columns before the group g. The result compensates E best while all columns
    from the group on are free. If each column moved alone, with the others fixed at W, W_g + P would compensate E, with
    P = E U[:start, g]; if all columns move, the change is P U[g, g]^-1.
    """
    P = product(U[: group.start, group].T, E[: group.start])  # (group, rows)
    free: Tensor = torch.linalg.solve_triangular(U[group, group].T, P, upper=False, unitriangular=True)
    return Wt[group] + free


def _column_blocks(columns: int, block_size: int, span: int) -> list[tuple[int, int]]:
    """(start, stop) of blocks of at most block_size columns; no block crosses a multiple of span."""
    return [
        (start, min(start + block_size, begin + span, columns))
        for begin in range(0, columns, span)
        for start in range(begin, min(begin + span, columns), block_size)
    ]


def round_to_nearest(W: Tensor, grid: Grid, group_size: int) -> SolvedLayer:
    """Round every weight to the nearest point of its group's grid; `error` is ||W - Q||^2 (H = I)."""
    fitted = fit(grid, W.T.contiguous(), group_size, None)
    scale, shift = fitted.scale.T, fitted.shift.T  # (rows, groups)
    g_idx = torch.arange(W.shape[1], device=W.device) // group_size
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    errors = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    columns, step = W.shape[1], group_size * profile_of(W.device).nearest_groups
    whole = columns // group_size * group_size
    bounds = [*range(0, whole, step), *([whole] if whole < columns else []), columns]  # the last group may be short
    for start, stop in pairwise(bounds):
        w = W[:, start:stop].unflatten(1, (-1, min(group_size, stop - start)))  # (rows, groups, columns of a group)
        groups = slice(start // group_size, start // group_size + w.shape[1])
        s, z = scale[:, groups, None], shift[:, groups, None]
        rounded = grid.quantize(w, s, z)
        codes[:, start:stop] = rounded.flatten(1)
        errors += (w - grid.dequantize(rounded, s, z)).square().sum((1, 2), dtype=torch.float64)
    return SolvedLayer(codes=codes, g_idx=g_idx.to(torch.int32), row_errors=errors, **stored_groups(grid, fitted))
