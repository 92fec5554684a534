"""Rounding a weight matrix: each weight to its nearest, or GPTQ (Frantar et al. 2023), which compensates.

GPTQ rounds column after column and moves the weights that are still open so that the layer's outputs change least.
With H = 2 X^T X / n over the calibration inputs and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), rounding
column c with error e = (w_c - w~_c) / U_cc changes the open columns by

    w_j <- w_j - e U_cj        j > c,

which is the least-squares answer to the rounding of w_c. The layer's squared output error is tr(D H D^T) / 2 for
D = W - W~. Where H is diagonal no column can answer for another, and GPTQ is rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.quantisation.grids import Fit, Grid

Groups = Sequence[tuple[int, Fit]]  # (channels, how to fit their grid), from the first channel to the last


@dataclass(frozen=True)
class Rounded:
    """codes [rows, channels] uint8 and a grid for each group. weight: what is stored [rows, channels], the kept weights
    exact; a kept weight's code is that of 0."""

    codes: torch.Tensor
    grids: list[Grid]
    weight: torch.Tensor


def round_to_nearest(weight: torch.Tensor, groups: Groups, kept: torch.Tensor | None = None) -> Rounded:
    """Rounds a matrix [rows, channels] by its groups. kept: bool like it, weights that stay as they are.

    Raises ValueError for groups that do not fit the channels and a matrix that is not finite.
    """
    w = _checked(weight, groups, kept)
    codes, grids, result = torch.empty_like(w, dtype=torch.uint8), [], w.clone()
    start = 0
    for width, fit in groups:
        part = slice(start, start + width)
        open_ = w[:, part] if kept is None else w[:, part].masked_fill(kept[:, part], 0)
        grid = fit(open_)
        rounded = grid.codes(open_)
        codes[:, part], result[:, part] = rounded.to(torch.uint8), grid.values(rounded)
        grids.append(grid)
        start += width
    return Rounded(codes, grids, result if kept is None else torch.where(kept, w, result))


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, groups: Groups, kept: torch.Tensor | None = None, damp: float = 0.01
) -> Rounded:
    """GPTQ of a matrix [rows, channels]; a group's grid is fitted when its turn comes, to compensated weights.

    hessian: [channels, channels]. kept: bool like the matrix, weights that are stored as they are (compensated, but
    without an error of their own). damp: added to the Hessian's diagonal, as a share of its mean. Computes in float32,
    in float64 for a float64 matrix. Raises ValueError for sizes that do not fit, values that are not finite and
    damp <= 0.
    """
    w = _checked(weight, groups, kept).clone()
    factor = inverse_factor(hessian.to(w.dtype), damp)
    if len(factor) != w.shape[1]:
        raise ValueError(f"a Hessian of {len(factor)} channels does not fit a matrix of {w.shape[1]}")
    codes, grids = torch.empty_like(w, dtype=torch.uint8), []
    start = 0
    for width, fit in groups:
        stop = start + width
        block = w[:, start:stop]
        grid = fit(block if kept is None else block.masked_fill(kept[:, start:stop], 0))
        errors = torch.zeros_like(block)
        for c in range(start, stop):
            column = w[:, c].clone()
            open_ = column if kept is None else column.masked_fill(kept[:, c], 0)
            rounded = grid.codes(open_)
            value = grid.values(rounded)
            if kept is not None:
                value = torch.where(kept[:, c], column, value)
            error = (column - value) / factor[c, c]
            w[:, c + 1 : stop] -= error[:, None] * factor[c, c + 1 : stop]
            w[:, c], codes[:, c], errors[:, c - start] = value, rounded.to(torch.uint8), error
        w[:, stop:] -= errors @ factor[start:stop, stop:]  # the columns beyond the group at once: one large product
        grids.append(grid)
        start = stop
    return Rounded(codes, grids, w)


def inverse_factor(hessian: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; a channel that is always 0 counts for itself alone.

    Raises ValueError unless the Hessian is square and finite, and for damp <= 0.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"a Hessian is [channels, channels], not {list(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian has values that are not finite: look at the calibration inputs")
    if damp <= 0:
        raise ValueError(f"damp must be above 0, not {damp}: a Hessian of few inputs has no inverse")
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1
    diagonal += damp * mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(D H D^T) / 2 for D = weight - rounded: the mean squared change of the layer's output, summed over rows."""
    d = (weight - rounded).to(hessian.dtype)
    return ((d @ hessian) * d).sum() / 2


def _checked(weight: torch.Tensor, groups: Groups, kept: torch.Tensor | None) -> torch.Tensor:
    """The matrix in the precision of the computation."""
    if weight.dim() != 2:
        raise ValueError(f"a weight matrix is [rows, channels], not {list(weight.shape)}")
    if (total := sum(width for width, _ in groups)) != weight.shape[1]:
        raise ValueError(f"the groups have {total} channels, the matrix {weight.shape[1]}")
    if kept is not None and kept.shape != weight.shape:
        raise ValueError(f"kept must be {list(weight.shape)} as the matrix, not {list(kept.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the matrix has values that are not finite")
    return weight if weight.dtype == torch.float64 else weight.float()
