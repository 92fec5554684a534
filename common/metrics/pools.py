"""What k samples would have given, from a pool of n >= k: closed forms over all subsets, without sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..{n}, the size of the pool, not {k}")


def _log_binomial(n: np.ndarray | float, k: np.ndarray | float) -> np.ndarray:
    return gammaln(np.asarray(n) + 1.0) - gammaln(np.asarray(k) + 1.0) - gammaln(np.asarray(n) - np.asarray(k) + 1.0)


def none_in_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, have none of c: C(n - c, k) / C(n, k)."""
    if not 0 <= c <= n:
        raise ValueError(f"the count must lie in 0..{n}, not {c}")
    _check(n, k)
    if n - c < k:
        return 0.0
    return float(np.exp(_log_binomial(n - c, k) - _log_binomial(n, k)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from c right of n (Chen et al. 2021, eq. 1)."""
    return 1.0 - none_in_k(n, c, k)


def best_of_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Expected correctness of the sample of the highest score among k of the pool; equal scores share their chance.

    scores, correct [n]. The sample of rank i from below (0-based) is the best of k with chance C(i, k-1) / C(n, k).
    """
    values, right = np.asarray(scores, dtype=float), np.asarray(correct, dtype=float)
    n = len(values)
    if len(right) != n:
        raise ValueError(f"{n} scores, but {len(right)} marks")
    _check(n, k)
    order = np.argsort(values, kind="stable")
    ranks = np.arange(n)
    chance = np.where(ranks >= k - 1, np.exp(_log_binomial(np.maximum(ranks, k - 1), k - 1) - _log_binomial(n, k)), 0.0)
    total = 0.0
    ordered, marks = values[order], right[order]
    start = 0
    while start < n:
        end = int(np.searchsorted(ordered, ordered[start], side="right"))
        total += chance[start:end].sum() * marks[start:end].mean()
        start = end
    return float(total)


def majority_at_k(
    answers: Sequence[str | None], correct: Sequence[bool], k: int, seed: int = 0, draws: int = 400
) -> float:
    """Mean correctness of the majority answer of k samples, over random orders of the pool; first seen of equals.

    answers, correct [n]; None does not vote. Exact for k = n up to the order of equals; else by `draws` subsets.
    """
    n = len(answers)
    if len(correct) != n:
        raise ValueError(f"{n} answers, but {len(correct)} marks")
    _check(n, k)
    labels: dict[str, int] = {}
    codes = np.array([-1 if a is None else labels.setdefault(a, len(labels)) for a in answers])
    if not labels:
        return 0.0
    right = np.zeros(len(labels))
    for code, mark in zip(codes, correct, strict=True):
        if code >= 0:
            right[code] = max(right[code], float(mark))
    random = np.random.default_rng([seed, 0x3A])
    hits = 0.0
    for _ in range(draws):
        voters = codes[random.permutation(n)[:k]]
        voters = voters[voters >= 0]
        if len(voters):
            counts = np.bincount(voters, minlength=len(labels))
            tied = counts[voters] == counts.max()
            hits += right[voters[int(np.argmax(tied))]]
    return hits / draws
