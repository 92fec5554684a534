"""Single weights kept in float16 beside a quantised matrix (SpQR, Dettmers et al. 2023), stored by rows (CSR).

A group's range is set by its largest weight. Kept apart, that weight costs 16 bits and its column's number, and all
others of the group get a finer grid: worth it where the predicted output error falls most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from common.quantisation.grids import Fit


def removal_gain(
    weight: torch.Tensor, diagonal: torch.Tensor, group: int, fit: Fit
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gain, place) [rows, groups]: by how much sum_c H_cc (w_c - w~_c)^2 of a group falls when its largest weight, in
    channel `place`, is kept. weight [rows, channels], channels a multiple of `group`; diagonal [channels] of H.
    """
    parts = weight.unflatten(1, (-1, group)).transpose(0, 1)  # [groups, rows, group]
    cost = diagonal.view(-1, 1, group)
    largest = parts.abs().argmax(2, keepdim=True)
    without = parts.scatter(2, largest, 0.0)

    def error(w: torch.Tensor) -> torch.Tensor:
        rows = w.flatten(0, 1)
        grid = fit(rows)
        return ((rows - grid.values(grid.codes(rows))).view_as(w) ** 2 * cost).sum(2)

    first = group * torch.arange(len(parts), device=weight.device)[:, None]
    return (error(parts) - error(without)).T, (first + largest[:, :, 0]).T


def choose_outliers(weight: torch.Tensor, diagonal: torch.Tensor, group: int, fit: Fit, share: float) -> torch.Tensor:
    """bool [rows, channels]: the `share` of all weights with the largest gains above 0, at most one a row and group.

    Raises ValueError for a share outside 0..1/group.
    """
    if not 0 <= share <= 1 / group:
        raise ValueError(f"the share of outliers must lie in 0..{1 / group:g} (one of {group}), not {share}")
    gain, place = removal_gain(weight, diagonal, group, fit)
    count = min(round(share * weight.numel()), int((gain > 0).sum()))
    best = gain.flatten().topk(count).indices
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept[best // gain.shape[1], place.flatten()[best]] = True
    return kept


class SparseRows(nn.Module):
    """A sparse matrix as CSR buffers: starts int32 [rows + 1], columns int16 [n], values float16 [n]."""

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def __init__(self, matrix: torch.Tensor) -> None:
        """matrix: dense [rows, channels]. Raises ValueError for more channels than an int16 tells apart."""
        super().__init__()
        if matrix.shape[1] > 1 << 15:
            raise ValueError(f"{matrix.shape[1]} channels: int16 column numbers go up to {(1 << 15) - 1}")
        row, column = matrix.nonzero(as_tuple=True)  # row by row
        ends = torch.bincount(row, minlength=len(matrix)).cumsum(0)
        self.rows, self.channels = matrix.shape
        self.register_buffer("starts", F.pad(ends, (1, 0)).to(torch.int32))
        self.register_buffer("columns", column.to(torch.int16))
        self.register_buffer("values", matrix[row, column].to(torch.float16))

    def dense(self) -> torch.Tensor:
        """Float32 [rows, channels]."""
        matrix = torch.zeros(self.rows, self.channels, device=self.values.device)
        matrix[self._row(), self.columns.long()] = self.values.float()
        return matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, channels] -> [n, rows] in x's dtype."""
        products = x.float()[:, self.columns.long()] * self.values.float()
        return products.new_zeros(len(x), self.rows).index_add_(1, self._row(), products).to(x.dtype)

    def _row(self) -> torch.Tensor:
        counts = self.starts.diff()
        return torch.repeat_interleave(torch.arange(self.rows, device=counts.device), counts)
