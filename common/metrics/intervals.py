"""Measured values with 95% intervals: exact, bootstrap over problems, Student t over training seeds, sign test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Measured:
    """A value, its 95% interval [low, high] and the number n of independent units (problems or seeds) behind it."""

    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.low <= self.high:
            raise ValueError(f"interval [{self.low}, {self.high}] of value {self.value} is not ordered")

    @property
    def is_exact(self) -> bool:
        return self.low == self.high

    def __str__(self) -> str:
        if self.is_exact:
            return f"{self.value:.6g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def exact(value: float, n: int = 1) -> Measured:
    """A quantity without sampling error: a closed form, a count, a replayed simulation."""
    return Measured(value, value, value, n)


def _units(x: ArrayLike, name: str) -> np.ndarray:
    values = np.asarray(x, dtype=float)
    if values.ndim < 1 or len(values) < 2:
        raise ValueError(f"{name}: an interval needs at least 2 units, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name}: not finite at index {int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(1)))}"
        )
    return values


def _mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean(a) - np.mean(b))


def ratio_of_sums(a: np.ndarray, b: np.ndarray) -> float:
    """sum(a) / sum(b): for totals such as tokens per forward; a mean of ratios would weigh short problems too much."""
    return float(np.sum(a) / np.sum(b))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, statistic: Statistic | None = None, seed: int = 0, resamples: int = 2000
) -> Measured:
    """Percentile interval of statistic(a, b), resampling the pairs (rows of a and b) together.

    a, b: [n] or [n, k], one row a problem. statistic defaults to the difference of means.
    """
    left, right = _units(a, "a"), _units(b, "b")
    if len(left) != len(right):
        raise ValueError(f"pairs differ in number: {len(left)} and {len(right)}")
    measure = statistic or _mean_difference
    rng = np.random.default_rng([seed, 0xB007])
    draws = rng.integers(0, len(left), size=(resamples, len(left)))
    values = np.array([measure(left[d], right[d]) for d in draws])
    low, high = np.quantile(values, [0.025, 0.975])
    return Measured(measure(left, right), float(low), float(high), len(left))


def bootstrap_mean(x: ArrayLike, seed: int = 0, resamples: int = 2000) -> Measured:
    """Mean of x [n] with a percentile interval over its n units."""
    values = _units(x, "x")
    return paired_bootstrap(values, np.zeros_like(values), seed=seed, resamples=resamples)


def paired_t(a: ArrayLike, b: ArrayLike | float = 0.0) -> Measured:
    """Mean of a - b over training seeds [n >= 3] with Student's t interval."""
    from scipy import stats

    difference = _units(a, "a") - np.asarray(b, dtype=float)
    n = len(difference)
    if n < 3:
        raise ValueError(f"a t interval needs at least 3 seeds, got {n}")
    half = float(stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n))
    mean = float(difference.mean())
    return Measured(mean, mean - half, mean + half, n)


def sign_test(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided exact p-value of the sign test on pairs a [n], b [n]; ties are dropped, as usual."""
    from scipy import stats

    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def units_to_settle(measured: Measured, bound: float) -> int | None:
    """How many units would shrink the interval to the distance from value to bound (half width falls as 1/sqrt(n)).

    None where no number would: a distance of a millionth of the interval's width or less is rounding, not a distance.
    """
    distance = abs(measured.value - bound)
    if distance <= 1e-6 * (measured.high - measured.low):
        return None
    side = measured.low if measured.value > bound else measured.high
    return int(np.ceil(measured.n * (abs(measured.value - side) / distance) ** 2)) + 1
