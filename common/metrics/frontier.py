"""Accuracy against cost: what a method needs for the accuracy that another one reaches."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def cost_at(levels: ArrayLike, cost: ArrayLike, accuracy: ArrayLike) -> np.ndarray:
    """The smallest cost at which a curve reaches each accuracy level; nan where it never does.

    cost [n] rising, accuracy [n]: points of the curve, joined by straight lines over the logarithm of the cost. The
    accuracy of a cost is the best up to it (who can pay more can pay less). A level at or below the first point costs
    what the first point does. Raises ValueError for costs that are not positive and rising.
    """
    x, y = np.asarray(cost, dtype=float), np.maximum.accumulate(np.asarray(accuracy, dtype=float))
    if len(x) != len(y) or len(x) < 1 or not (x > 0).all() or not (np.diff(x) > 0).all():
        raise ValueError(f"costs must be positive and rising, one for each accuracy: {x.tolist()}")
    wanted = np.atleast_1d(np.asarray(levels, dtype=float))
    found = np.full(len(wanted), np.nan)
    for i, level in enumerate(wanted):
        above = np.flatnonzero(y >= level - 1e-12)
        if len(above):
            k = int(above[0])
            if k == 0 or y[k] == y[k - 1]:
                found[i] = x[k]
            else:
                share = (level - y[k - 1]) / (y[k] - y[k - 1])
                found[i] = np.exp(np.log(x[k - 1]) + share * (np.log(x[k]) - np.log(x[k - 1])))
    return found


def cost_ratios(
    cost: ArrayLike, accuracy: ArrayLike, other_cost: ArrayLike, other_accuracy: ArrayLike, step: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """(levels, other's cost over ours) on a grid of accuracies that both curves reach by spending more than their
    least.

    Levels at or below the larger first accuracy say nothing about scaling and are left out. Empty if nothing is shared.
    """
    low = max(float(np.asarray(accuracy)[0]), float(np.asarray(other_accuracy)[0]))
    high = min(float(np.max(accuracy)), float(np.max(other_accuracy)))
    levels = np.arange(np.floor(low / step + 1e-9) + 1, np.floor(high / step + 1e-9) + 1) * step
    return levels, cost_at(levels, other_cost, other_accuracy) / cost_at(levels, cost, accuracy)


def area_under(cost: ArrayLike, accuracy: ArrayLike, low: float, high: float) -> float:
    """Mean accuracy over the logarithm of the cost from low to high (trapezoids; constant beyond the curve's ends)."""
    if not 0 < low < high:
        raise ValueError(f"an area needs 0 < low < high, not {low} and {high}")
    x, y = np.log(np.asarray(cost, dtype=float)), np.asarray(accuracy, dtype=float)
    grid = np.unique(np.concatenate([[np.log(low), np.log(high)], x[(x > np.log(low)) & (x < np.log(high))]]))
    return float(np.trapezoid(np.interp(grid, x, y), grid) / (np.log(high) - np.log(low)))
