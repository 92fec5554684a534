"""Quantisation grids: which values a group of weights may take, and how they are fitted to it.

An asymmetric uniform grid of N bits has a scale s and an integer zero z in 0..2^N - 1 for every row of a group:

    q = clamp(round(w / s) + z, 0, 2^N - 1)        w~ = (q - z) s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """scale, zero: float [rows], as they will be stored, so that rounding sees their error."""

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int

    def codes(self, w: torch.Tensor) -> torch.Tensor:
        """The nearest codes of w [rows] or [rows, channels], float integers. A scale of zero knows only w~ = 0."""
        scale, zero = self._like(w)
        steps = torch.where(scale > 0, w / scale, 0.0)
        return (steps.round() + zero).clamp(0, 2**self.bits - 1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [rows] or [rows, channels] stand for."""
        scale, zero = self._like(codes)
        return (codes - zero) * scale

    def _like(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.scale, self.zero) if w.dim() == 1 else (self.scale[:, None], self.zero[:, None])


Fit = Callable[[torch.Tensor], Grid]  # the weights of a group [rows, channels] -> their grid


def ranges(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of each row of a group [rows, channels], widened to hold 0.

    Without that, a group of one sign would need a zero outside 0..2^N - 1, which no unsigned code stores.
    """
    return w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)


def zero_of(low: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The code of w = 0, where the lowest value gets code 0."""
    return torch.where(scale > 0, -low / scale, 0.0).round().clamp(0, 2**bits - 1)


def minmax(bits: int) -> Fit:
    """The grid from a group's lowest to its highest value, the scale in float16. A row of zeros gets scale 1.

    Raises ValueError for bits outside 1..8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"a grid has 1 to 8 bits, not {bits}")

    def fit(w: torch.Tensor) -> Grid:
        low, high = ranges(w)
        scale = ((high - low) / (2**bits - 1)).to(torch.float16).to(w.dtype)
        scale = torch.where(scale > 0, scale, 1.0)
        return Grid(scale, zero_of(low, scale, bits), bits)

    return fit
