"""Resampling with an imperfect verifier (Stroebl, Kapoor and Narayanan 2024), in closed form.

Sample until the verifier accepts, submit that sample. Of n samples of a task, a are accepted and right, b are accepted
and wrong, the rest is rejected. Rules are those of the authors' notebooks (benediktstroebl/inference-scaling-limits:
evalplus/visualizations.ipynb, evalplus/scaling_curves.ipynb, notebooks/limits_to_inference_scaling_model.ipynb).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from common.metrics.pools import none_in_k


@dataclass(frozen=True)
class TaskCounts:
    """Of n samples of one task: right = accepted and right, wrong = accepted and wrong. Raises ValueError for counts
    that
    are negative or exceed n."""

    n: int
    right: int
    wrong: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")
        if min(self.right, self.wrong) < 0 or self.right + self.wrong > self.n:
            raise ValueError(f"right={self.right} and wrong={self.wrong} must be counts of n={self.n} samples")

    @property
    def accepted(self) -> int:
        return self.right + self.wrong


def reward_curve(task: TaskCounts, attempts: int, penalty: float = 0.0) -> np.ndarray:
    """Expected reward of at most K = 1..attempts samples, [attempts]: 1 for a right submission, -penalty for a wrong
    one,
    0 for none.

    The first accepted sample of a random order is right with chance right/accepted, whenever it comes, so that
    reward(K) = (1 - C(n - m, K) / C(n, K)) (right - penalty * wrong) / m with m accepted samples. One task alone is
    thus
    best left alone or sampled for ever; an optimum in between exists only because tasks differ.
    Raises ValueError for attempts outside 1..n.
    """
    if not 1 <= attempts <= task.n:
        raise ValueError(f"attempts must lie in 1..{task.n}, the samples of the task, not {attempts}")
    if not task.accepted:
        return np.zeros(attempts)
    value = (task.right - penalty * task.wrong) / task.accepted
    return _accepted_within(task.n, task.accepted)[:attempts] * value


@functools.lru_cache(maxsize=10_000)
def _accepted_within(n: int, accepted: int) -> np.ndarray:
    """Chance that one of the first K samples is accepted, for K = 1..n."""
    return np.array([1 - none_in_k(n, accepted, k) for k in range(1, n + 1)])


def mean_curve(tasks: Sequence[TaskCounts], attempts: int, penalty: float = 0.0) -> np.ndarray:
    """The curve averaged over tasks, [attempts]."""
    return np.mean([reward_curve(task, attempts, penalty) for task in tasks], axis=0)


def best_attempts(curve: ArrayLike, tie: float = 0.0) -> int:
    """K*: the fewest attempts of the highest reward, 0 if each loses. At the end of the curve it is censored.

    tie: rewards that differ by no more are equal. Curves flatten out, and with tie=0 (the authors' argmax) rounding may
    say where a flat curve is highest.
    """
    values = np.asarray(curve, dtype=float)
    best = values.max()
    return 0 if best < 0 else int(np.flatnonzero(values >= best - tie)[0]) + 1


def pass_at_1(rates: ArrayLike) -> float:
    """Mean over tasks of the share of right samples."""
    return float(np.mean(rates))


def accuracy_given_pass(tasks: Sequence[TaskCounts], undefined: float | None = None) -> float:
    """Mean over tasks of right / accepted. Tasks of which nothing is accepted are left out, or count as `undefined` (0
    and 1 give the bounds); nan if nothing is left."""
    shares = [t.right / t.accepted if t.accepted else undefined for t in tasks]
    defined = [share for share in shares if share is not None]
    return float(np.mean(defined)) if defined else float("nan")


def ceiling(tasks: Sequence[TaskCounts]) -> float:
    """Accuracy of resampling without end: the mean of right / accepted, 0 where nothing is accepted."""
    return accuracy_given_pass(tasks, undefined=0.0)


def coverage(tasks: Sequence[TaskCounts]) -> float:
    """Share of tasks of which some sample is right: the ceiling with a perfect verifier."""
    return float(np.mean([task.right > 0 for task in tasks]))


def simulated_curve(
    outcomes: np.ndarray, attempts: int, penalty: float = 0.0, permutations: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(mean curve, its standard error over permutations), each [attempts]: the paper's simulation.

    outcomes [tasks, n]: 1 right and accepted, -1 wrong and accepted, 0 rejected.
    """
    random = np.random.default_rng([seed, 0xF1A5])
    tasks, n = outcomes.shape
    curves = np.zeros((permutations, attempts))
    for p in range(permutations):
        shuffled = random.permuted(outcomes, axis=1)
        first = np.where((shuffled != 0).any(1), (shuffled != 0).argmax(1), n)
        kind = shuffled[np.arange(tasks), np.minimum(first, n - 1)]
        reward = np.where(kind == 1, 1.0, -penalty) * (first < attempts)
        curves[p] = np.bincount(np.minimum(first, attempts), reward, minlength=attempts + 1)[:attempts].cumsum() / tasks
    return curves.mean(0), curves.std(0, ddof=1) / np.sqrt(permutations)


def wrong_by_attempt(tasks: Sequence[TaskCounts], edges: Sequence[int]) -> np.ndarray:
    """Share of wrong ones among the submissions made at attempts edges[i]..edges[i+1]-1, [len(edges) - 1].

    A task counts with its chance to be submitted there, so that late buckets are those of hard tasks; nan where no
    submission is possible.
    """
    shares = []
    for low, high in itertools.pairwise(edges):
        weight, wrong = 0.0, 0.0
        for task in tasks:
            if task.accepted and low <= task.n:
                within = _accepted_within(task.n, task.accepted)
                chance = within[min(high - 1, task.n) - 1] - (within[low - 2] if low > 1 else 0.0)
                weight += chance
                wrong += chance * task.wrong / task.accepted
        shares.append(wrong / weight if weight > 1e-12 else float("nan"))
    return np.array(shares)


def regression(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float]:
    """(slope, intercept, R^2) of a least-squares line; R^2 is 0 where y does not vary."""
    from scipy import stats

    if np.ptp(y) == 0:
        return 0.0, float(np.mean(y)), 0.0
    line = stats.linregress(np.asarray(x, dtype=float), np.asarray(y, dtype=float))
    return float(line.slope), float(line.intercept), float(line.rvalue**2)


@dataclass(frozen=True)
class TwoTypes:
    """The two-type model: a task is easy with chance `easy`; samples of easy and hard tasks are right with chances
    `rates`; the verifier accepts a right sample with chance `completeness` and rejects a wrong one with `soundness`.

    Raises ValueError for a chance outside [0, 1].
    """

    rates: tuple[float, float]
    easy: float
    soundness: float
    completeness: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (
            ("easy", self.easy), ("soundness", self.soundness), ("completeness", self.completeness),
            ("rates", self.rates[0]), ("rates", self.rates[1]),
        ):  # fmt: skip
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {value}")

    def value(self, attempts: int, wrong_value: float, reach: Literal["paper", "exact"] = "exact") -> np.ndarray:
        """V(K) for K = 1..attempts: 1 for a right submission, wrong_value (negative) for a wrong one.

        A sample of type i is rejected with chance beta_i = (1 - c) r_i + s (1 - r_i); after k - 1 rejections the type
        has
        the posterior q_i(k) ~ beta_i^(k-1) p_i, and the k-th attempt is reached with chance sum_i beta_i^(k-1) p_i. The
        authors' code takes q_i(k) for p_i in that last factor; reach='paper' does as well.
        """
        r = np.array(self.rates)[:, None]
        prior = np.array([self.easy, 1 - self.easy])[:, None]
        rejected = (1 - self.completeness) * r + self.soundness * (1 - r)
        power = rejected ** np.arange(attempts)
        reached = (power * prior).sum(0)
        posterior = np.divide(power * prior, reached, out=np.zeros_like(power), where=reached > 0)
        gain = (posterior * (self.completeness * r + wrong_value * (1 - r) * (1 - self.soundness))).sum(0)
        if reach == "paper":
            reached = (power * posterior).sum(0)
        elif reach != "exact":
            raise ValueError(f"unknown reach {reach!r}; known: paper, exact")
        return np.cumsum(gain * reached)

    def limit(self, wrong_value: float) -> float:
        """V of attempts without end: sum_i p_i (c r_i + V_fp (1 - r_i)(1 - s)) / (1 - beta_i)."""
        total = 0.0
        for r, p in zip(self.rates, (self.easy, 1 - self.easy), strict=True):
            rejected = (1 - self.completeness) * r + self.soundness * (1 - r)
            if rejected < 1:
                total += p * (self.completeness * r + wrong_value * (1 - r) * (1 - self.soundness)) / (1 - rejected)
        return total


def fit_two_types(base_rates: ArrayLike, plus_rates: ArrayLike, given_pass: float) -> TwoTypes | None:
    """The two-type model of a language model: easy tasks are those with a right share above 1/2.

    base_rates, plus_rates [tasks]: shares of samples that pass the limited and the full tests. given_pass: the accuracy
    given a pass, G. soundness = (1 - B - P + G B) / (1 - P), clipped to [0, 1]. None if all tasks are of one type.
    """
    base, plus = np.asarray(base_rates, dtype=float), np.asarray(plus_rates, dtype=float)
    is_easy = plus > 0.5
    if is_easy.all() or not is_easy.any() or np.isnan(given_pass):
        return None
    b, p = base.mean(), plus.mean()
    soundness = float(np.clip((1 - b - p + given_pass * b) / (1 - p), 0, 1))
    return TwoTypes((float(plus[is_easy].mean()), float(plus[~is_easy].mean())), float(is_easy.mean()), soundness)
