"""Where more samples, or more rounds of rethinking, stop paying: laws of success against budget, fits, saturation.

    geometric      F(N) = F_max (1 - (1 - p)^N)                N independent answers, or rounds until the first success
    beta-binomial  F(N) = (1 - z) (1 - B(a, b + N) / B(a, b))  problems differ, p ~ Beta(a, b); a share z is hopeless
    leaky chain    F(N) = pi + (F_0 - pi) (1 - p01 - p10)^N    a round may spoil a right answer; pi = p01 / (p01 + p10)

The marginal gain of the geometric law is dF(N) = F(N+1) - F(N) = F_max p (1 - p)^N; the saturation budget N* is the
first N >= 0 at which it is at most epsilon. Wang et al., "Scaling over Scaling" (arXiv 2505.20522) for the geometric
law, its two readings and N*; the other two laws make it testable on problems that differ and on answers that are lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares, minimize
from scipy.special import betaln, expit, gammaln, logit

from common.metrics.pools import none_in_k


def _check_chance(**chances: float) -> None:
    for name, chance in chances.items():
        if not 0 <= chance <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {chance}")


def hit_curves(counts: Sequence[int], n: int, budgets: Sequence[int]) -> np.ndarray:
    """Unbiased hit@N [problems, budgets] from c right of n samples of each problem: 1 - C(n - c, N) / C(n, N).

    Their mean over problems is the curve F(N). Raises ValueError for c > n or N outside 1..n.
    """
    seen = {int(c): [1 - none_in_k(n, int(c), N) for N in budgets] for c in set(counts)}
    return np.array([seen[int(c)] for c in counts])


def geometric(budgets: ArrayLike, p: float, ceiling: float = 1.0) -> np.ndarray:
    """F(N) = ceiling (1 - (1 - p)^N). Raises ValueError for chances outside [0, 1]."""
    _check_chance(p=p, ceiling=ceiling)
    with np.errstate(divide="ignore", invalid="ignore"):
        fails = np.where(np.asarray(budgets) == 0, 1.0, np.exp(np.asarray(budgets, dtype=float) * np.log1p(-p)))
    return ceiling * (1 - fails)


def beta_binomial(budgets: ArrayLike, a: float, b: float, hopeless: float = 0.0) -> np.ndarray:
    """F(N) = (1 - hopeless) (1 - B(a, b + N) / B(a, b)), a polynomial tail. Raises ValueError unless a, b > 0."""
    _check_chance(hopeless=hopeless)
    if min(a, b) <= 0:
        raise ValueError(f"a beta distribution needs a, b > 0, not {a} and {b}")
    return -(1 - hopeless) * np.expm1(betaln(a, b + np.asarray(budgets, dtype=float)) - betaln(a, b))


def leaky_chain(rounds: ArrayLike, p01: float, p10: float, start: float = 0.0) -> np.ndarray:
    """Chance to be right after N rounds that mend a wrong answer with p01 and spoil a right one with p10.

    start: F_0, before the first round. With p10 = 0 and start = p01 = p it is the geometric law at N + 1. Where start
    exceeds pi, rethinking lowers accuracy.
    """
    _check_chance(p01=p01, p10=p10, start=start)
    if p01 + p10 == 0:
        return np.full(np.shape(rounds), float(start))
    limit = p01 / (p01 + p10)
    return limit + (start - limit) * (1.0 - p01 - p10) ** np.asarray(rounds)


def marginal_gain(n: int, p: float, ceiling: float = 1.0) -> float:
    """dF(N) = ceiling p (1 - p)^N: what answer N + 1 adds."""
    return ceiling * p * (1 - p) ** n


def saturation_budget(p: float, epsilon: float, ceiling: float = 1.0) -> int:
    """N* = min{N >= 0: dF(N) <= epsilon} = max(0, ceil(ln(epsilon / (ceiling p)) / ln(1 - p))).

    The budget after which the next answer gains at most epsilon; 0 where even the first one does. N* of a mean curve is
    not the mean of N*. Raises ValueError for chances outside [0, 1] or epsilon <= 0.
    """
    _check_chance(p=p, ceiling=ceiling)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}: any smaller gain would never be reached")
    if ceiling * p <= epsilon:
        return 0
    if p == 1:
        return 1
    n = math.ceil(math.log(epsilon / (ceiling * p)) / math.log1p(-p))
    # the logarithms round: take the integer beside it that the definition names
    return next((k for k in range(n - 1, n + 2) if marginal_gain(k, p, ceiling) <= epsilon), n)


def budget_for(p: float, miss: float) -> int:
    """The smallest N with (1 - p)^N <= miss: ceil(ln(miss) / ln(1 - p)), answers that succeed with chance 1 - miss."""
    _check_chance(p=p)
    if not 0 < miss <= 1 or p == 0:
        raise ValueError(f"needs p > 0 and miss in (0, 1], not {p} and {miss}")
    n = int(miss < 1) if p == 1 else math.ceil(math.log(miss) / math.log1p(-p))
    return next((k for k in range(max(n - 1, 0), n + 2) if (1 - p) ** k <= miss), n)  # the logarithms round


def observed_saturation(curve: ArrayLike, epsilon: float) -> int | None:
    """The first N whose next two marginal gains are both at most epsilon; None if the curve does not get there.

    curve [N_max + 1]: F(0), F(1), ..., such as 0 and the means of `hit_curves`. Two in a row, since one may be noise.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    small = np.diff(np.asarray(curve, dtype=float)) <= epsilon
    both = np.flatnonzero(small[:-1] & small[1:])
    return int(both[0]) if len(both) else None


@dataclass(frozen=True)
class Geometric:
    """A fitted geometric law."""

    p: float
    ceiling: float

    def __call__(self, budgets: ArrayLike) -> np.ndarray:
        return geometric(budgets, self.p, self.ceiling)


@dataclass(frozen=True)
class BetaBinomial:
    """A fitted beta-binomial law; hopeless: share of problems that are never solved."""

    a: float
    b: float
    hopeless: float = 0.0

    def __call__(self, budgets: ArrayLike) -> np.ndarray:
        return beta_binomial(budgets, self.a, self.b, self.hopeless)


@dataclass(frozen=True)
class LeakyChain:
    """A fitted leaky chain."""

    p01: float
    p10: float
    start: float

    def __call__(self, rounds: ArrayLike) -> np.ndarray:
        return leaky_chain(rounds, self.p01, self.p10, self.start)


def fit_geometric(budgets: ArrayLike, curve: ArrayLike, deviations: ArrayLike | None = None) -> Geometric:
    """Non-linear least squares of p and the ceiling to F(N), in the logits, from several starts.

    deviations [budgets]: standard deviations of the points, as from a bootstrap; each residual is divided by its own.
    Raises ValueError for fewer than 2 points, and for deviations that are not positive.
    """
    n, y = np.asarray(budgets, dtype=float), np.asarray(curve, dtype=float)
    sigma = np.ones_like(y) if deviations is None else np.asarray(deviations, dtype=float)
    if len(n) != len(y) or len(np.unique(n)) < 2 or len(sigma) != len(y) or not (sigma > 0).all():
        raise ValueError(
            f"needs 2 budgets or more with a value and a positive deviation each: {n.tolist()}, {y.tolist()}"
        )

    def residuals(theta: np.ndarray) -> np.ndarray:
        p, ceiling = expit(theta)
        return (geometric(n, p, ceiling) - y) / sigma

    tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    starts = [logit([p, c]) for p in (0.05, 0.3, 0.8) for c in (min(max(float(y.max()), 0.01), 0.99), 0.99)]
    found = min((least_squares(residuals, start, **tight) for start in starts), key=lambda fit: fit.cost)
    p, ceiling = expit(found.x)
    return Geometric(float(p), float(ceiling))


def _log_choose(counts: np.ndarray, n: int) -> np.ndarray:
    return gammaln(n + 1.0) - gammaln(counts + 1.0) - gammaln(n - counts + 1.0)


def log_likelihood(law: Geometric | BetaBinomial, counts: ArrayLike, n: int) -> float:
    """Log-likelihood of c right of n samples of each problem.

    Geometric: a problem is solvable with chance `ceiling`, then with p a sample. Beta-binomial: with the hopeless share
    at zero. For held-out samples of the problems it says which law describes them.
    """
    c = _checked_counts(counts, n)
    if isinstance(law, Geometric):
        with np.errstate(divide="ignore", invalid="ignore"):
            hits = np.where(c > 0, c * np.log(law.p), 0.0) + np.where(n > c, (n - c) * np.log1p(-law.p), 0.0)
        solvable, hopeless = law.ceiling, 1 - law.ceiling
    else:
        hits = betaln(law.a + c, law.b + n - c) - betaln(law.a, law.b)
        solvable, hopeless = 1 - law.hopeless, law.hopeless
    with np.errstate(divide="ignore"):
        terms = np.log(solvable) + _log_choose(c, n) + hits
        return float(np.where(c == 0, np.logaddexp(terms, np.log(hopeless)), terms).sum())


def fit_beta_binomial(counts: ArrayLike, n: int, zero_inflated: bool = False) -> BetaBinomial:
    """Maximum likelihood of a and b, and of the hopeless share if zero_inflated, from c right of n of each problem.

    Problems that are all alike drive a and b to their bound of 1e4. Raises ValueError for c outside 0..n, and for fewer
    than 2 samples a problem, from which nobody could tell luck from difference.
    """
    c = _checked_counts(counts, n)
    if n < 2:
        raise ValueError(f"a spread of difficulty needs at least 2 samples a problem, not {n}")

    def law(theta: np.ndarray) -> BetaBinomial:
        a, b = np.exp(theta[:2])
        return BetaBinomial(float(a), float(b), float(expit(theta[2])) if zero_inflated else 0.0)

    mean = min(max(float(c.mean()) / n, 0.01), 0.99)
    tail, bounds = ([-2.0], [(-12.0, 12.0)]) if zero_inflated else ([], [])
    bounds = [(math.log(1e-4), math.log(1e4))] * 2 + bounds
    starts = [[*np.log([mean * size, (1 - mean) * size]), *tail] for size in (0.5, 2.0, 20.0)]
    fits = [
        minimize(lambda theta: -log_likelihood(law(theta), c, n), start, method="L-BFGS-B", bounds=bounds)
        for start in starts
    ]
    return law(min(fits, key=lambda fit: fit.fun).x)


def _checked_counts(counts: ArrayLike, n: int) -> np.ndarray:
    c = np.asarray(counts, dtype=float)
    if c.size == 0 or (c < 0).any() or (c > n).any():
        raise ValueError(f"counts must be given and lie in 0..{n}: {c.tolist()}")
    return c


def fit_leaky_chain(right: ArrayLike) -> LeakyChain:
    """Maximum likelihood from observed chains: shares of wrong answers that were mended and of right ones spoilt.

    right: bool [chains, rounds + 1], whether the answer is right before the first round and after each. Raises
    ValueError for no round; a transition that nobody could make (never wrong, or never right) is given the chance 0.
    """
    state = np.asarray(right, dtype=bool)
    if state.ndim != 2 or state.shape[1] < 2 or not len(state):
        raise ValueError(f"needs chains [chains, rounds + 1] of at least one round, not of shape {state.shape}")
    before, after = state[:, :-1], state[:, 1:]
    p01 = (~before & after).sum() / max((~before).sum(), 1)
    p10 = (before & ~after).sum() / max(before.sum(), 1)
    return LeakyChain(float(p01), float(p10), float(state[:, 0].mean()))
