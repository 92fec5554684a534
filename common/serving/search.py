"""The largest feasible rate and the smallest feasible cluster, by bisection."""

from __future__ import annotations

from collections.abc import Callable


def largest_feasible(feasible: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    """The largest rate in [low, high] found feasible, to `tolerance`; 0 if `low` is not feasible.

    Takes feasible(rate) to be true below some rate and false above it; where it is not, as with a quantile of a random
    trace, the answer is one such crossing. `high` is tried first. Raises ValueError unless 0 < low < high and
    tolerance > 0.
    """
    if not 0 < low < high or not tolerance > 0:
        raise ValueError(f"need 0 < low < high and tolerance > 0, got low={low}, high={high}, tolerance={tolerance}")
    if feasible(high):
        return high
    if not feasible(low):
        return 0.0
    while high - low > tolerance:
        middle = (low + high) / 2
        if feasible(middle):
            low = middle
        else:
            high = middle
    return low


def least_feasible(feasible: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number in [low, high] found feasible, or None; tries low, then doubles the step, then bisects.

    Takes feasible(n) to be false below some n and true from it on. Small numbers come first, since a cluster that is
    too small shows it soonest. Raises ValueError unless low <= high.
    """
    if low > high:
        raise ValueError(f"need low <= high, got {low} and {high}")
    step, tried = 1, low
    while not feasible(tried):
        if tried == high:
            return None
        low = tried + 1
        tried = min(tried + step, high)
        step *= 2
    high = tried
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(middle) else (middle + 1, high)
    return high
