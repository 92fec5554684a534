"""Laws of saturation: closed forms against brute force, matrix powers, enumeration and simulated counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.costs import saturation as sat

chances = st.floats(0, 1)

# smallest N >= 0 with p (1 - p)^N <= epsilon, for epsilon = 0.1, 0.05, 0.01, 0.001
T2 = {
    0.01: [0, 0, 0, 230],
    0.05: [0, 0, 32, 77],
    0.1: [0, 7, 22, 44],
    0.2: [4, 7, 14, 24],
    0.3: [4, 6, 10, 16],
    0.5: [3, 4, 6, 9],
    0.7: [2, 3, 4, 6],
    0.9: [1, 2, 2, 3],
}


@pytest.mark.parametrize("p", T2)
def test_saturation_points_of_the_table(p: float) -> None:
    assert [sat.saturation_budget(p, epsilon) for epsilon in (0.1, 0.05, 0.01, 0.001)] == T2[p]


def test_saturation_is_the_first_small_gain_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for p, ceiling, epsilon in zip(
        rng.uniform(0.003, 1, 10_000), rng.uniform(0, 1, 10_000), 10 ** rng.uniform(-4, 0, 10_000), strict=True
    ):
        n = 0
        while ceiling * p * (1 - p) ** n > epsilon:
            n += 1
        assert sat.saturation_budget(p, epsilon, ceiling) == n


def test_the_edges_of_saturation() -> None:
    assert sat.saturation_budget(0, 0.01) == 0
    assert sat.saturation_budget(1, 0.01) == 1
    assert sat.saturation_budget(1, 0.5, ceiling=0.4) == 0
    assert sat.saturation_budget(0.3, 0.3) == 0
    assert sat.saturation_budget(0.5, 0.125) == 2  # a gain that equals epsilon is small enough
    # exact in binary, and the quotient of the logarithms comes out just above the whole number for some
    for k in range(1, 17):
        assert [sat.saturation_budget(p, p * (1 - p) ** k) for p in (0.125, 0.25, 0.5, 0.75, 0.875)] == [k] * 5
    assert sat.saturation_budget(1e-17, 1e-18) == pytest.approx(math.log(10) * 1e17)  # 1 - p rounds to 1
    assert [sat.marginal_gain(0, p) for p in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]


@settings(max_examples=200, deadline=None)
@given(st.floats(0.001, 1), st.floats(1e-6, 1))
def test_the_budget_for_a_target_is_the_first_that_reaches_it(p: float, miss: float) -> None:
    n = sat.budget_for(p, miss)
    assert (1 - p) ** n <= miss
    assert n == 0 or (1 - p) ** (n - 1) > miss


# --- the unbiased estimator


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_hit_curves_are_unbiased(p: float) -> None:
    """Over all outcomes of 8 samples the estimate's mean is 1 - (1 - p)^N, exactly."""
    budgets = range(1, 9)
    mean = stats.binom.pmf(range(9), 8, p) @ sat.hit_curves(range(9), 8, budgets)
    np.testing.assert_allclose(mean, sat.geometric(list(budgets), p), atol=1e-12)


def test_hit_curves_are_the_mean_at_one_and_the_maximum_at_all_and_the_share_of_subsets_between() -> None:
    counts = [0, 3, 8, 3]
    curves = sat.hit_curves(counts, 8, range(1, 9))
    assert curves.shape == (4, 8)
    assert curves[:, 0].tolist() == pytest.approx([c / 8 for c in counts])
    assert curves[:, 7].tolist() == [0, 1, 1, 1]
    for c, n in itertools.product((0, 3, 8), range(1, 9)):
        subsets = [any(i < c for i in subset) for subset in itertools.combinations(range(8), n)]
        assert curves[counts.index(c), n - 1] == pytest.approx(np.mean(subsets))


# --- the laws


def chain(p01: float, p10: float, start: float, rounds: int) -> float:
    """Literally: the distribution over (wrong, right) times the power of the transition matrix."""
    step = np.array([[1 - p01, p01], [p10, 1 - p10]])
    return float((np.array([1 - start, start]) @ np.linalg.matrix_power(step, rounds))[1])


@settings(max_examples=200, deadline=None)
@given(chances, chances, chances, st.integers(0, 40))
def test_the_leaky_chain_is_a_matrix_power(p01: float, p10: float, start: float, rounds: int) -> None:
    assert float(sat.leaky_chain(rounds, p01, p10, start)) == pytest.approx(chain(p01, p10, start, rounds), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(chances, st.integers(0, 40))
def test_parallel_and_sequential_scaling_are_one_law(p: float, n: int) -> None:
    """N samples, an absorbing chain after N rounds, and one that starts from a first answer."""
    law = float(sat.geometric(n, p))
    assert law == pytest.approx(1 - (1 - p) ** n, abs=1e-12)
    assert float(sat.leaky_chain(n, p, 0, 0)) == pytest.approx(law, abs=1e-12)
    assert float(sat.leaky_chain(n, p, 0, start=p)) == pytest.approx(float(sat.geometric(n + 1, p)), abs=1e-12)


def test_rethinking_lowers_accuracy_that_starts_above_the_limit() -> None:
    curve = sat.leaky_chain(np.arange(30), 0.2, 0.3, start=0.7)
    assert (np.diff(curve) < 0).all()
    assert curve[-1] == pytest.approx(0.4, abs=1e-8)
    assert sat.leaky_chain([0, 9], 0.0, 0.0, 0.3).tolist() == [0.3, 0.3]


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.9), (2.0, 5.0), (1.0, 1.0)])
def test_the_beta_binomial_law_is_the_mean_over_difficulties(a: float, b: float) -> None:
    n = np.array([0, 1, 4, 32, 200])
    literal = [stats.beta(a, b).expect(lambda p, k=k: 1 - (1 - p) ** k) for k in n]
    np.testing.assert_allclose(sat.beta_binomial(n, a, b), literal, atol=1e-6)
    np.testing.assert_allclose(sat.beta_binomial(n, a, b, hopeless=0.25), 0.75 * np.array(literal), atol=1e-6)
    np.testing.assert_allclose(sat.beta_binomial(1, a, b), a / (a + b))


def test_equal_difficulties_make_it_geometric() -> None:
    n = np.arange(65)
    np.testing.assert_allclose(sat.beta_binomial(n, 3e7, 7e7), sat.geometric(n, 0.3), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(chances, min_size=1, max_size=10), st.integers(1, 100))
def test_pooling_overestimates(difficulties: list[float], n: int) -> None:
    """Jensen: the law at the mean p is at least the mean of the laws."""
    mean = np.mean([float(sat.geometric(n, p)) for p in difficulties])
    assert float(sat.geometric(n, min(float(np.mean(difficulties)), 1.0))) >= mean - 1e-12


# --- fits


@pytest.mark.parametrize(("p", "ceiling"), [(0.05, 0.9), (0.3, 0.533), (0.5625, 0.533), (0.8, 1.0)])
def test_exact_curves_give_back_their_geometric_law(p: float, ceiling: float) -> None:
    n = np.array([1, 2, 3, 4, 6, 8])
    found = sat.fit_geometric(n, sat.geometric(n, p, ceiling))
    assert (found.p, found.ceiling) == pytest.approx((p, ceiling), abs=1e-6)
    np.testing.assert_allclose(found([16, 64]), sat.geometric([16, 64], p, ceiling), atol=1e-6)


def test_a_point_of_large_deviation_hardly_counts() -> None:
    n = np.array([1, 2, 3, 4, 6, 8])
    curve = sat.geometric(n, 0.3, 0.6) + 0.2 * (n == 8)
    weighted = sat.fit_geometric(n, curve, np.where(n == 8, 1e4, 1e-2))
    assert (weighted.p, weighted.ceiling) == pytest.approx((0.3, 0.6), abs=1e-6)
    assert sat.fit_geometric(n, curve).ceiling > 0.65


def test_the_reported_points_of_aime_ask_for_this_chance() -> None:
    """30.0% at one sample and 16 of 30 problems at many: p = F(1) / F_max = 0.5625 (and not 0.3)."""
    assert sat.fit_geometric([1, 32], [0.3, 16 / 30]).p == pytest.approx(0.5625, abs=1e-6)


def test_a_fit_of_samples_is_within_its_error() -> None:
    """100 problems of 64 samples, a share of them solvable: within 4 standard errors, from 20 simulations."""
    p, ceiling, n, budgets = 0.2, 0.7, 64, [1, 2, 4, 8, 16]
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        counts = rng.binomial(n, p, 100) * (rng.random(100) < ceiling)
        curves = sat.hit_curves(counts, n, budgets)
        deviations = curves.std(0, ddof=1) / 10
        law = sat.fit_geometric(budgets, curves.mean(0), deviations)
        found.append([law.p, law.ceiling])
    mean, deviation = np.mean(found, 0), np.std(found, 0, ddof=1)
    assert (abs(mean - [p, ceiling]) < 4 * deviation / math.sqrt(20)).all()
    assert deviation[1] < 1.5 * math.sqrt(ceiling * (1 - ceiling) / 100)


@pytest.mark.parametrize("hopeless", [0.0, 0.3])
def test_the_beta_binomial_fit_recovers_and_beats_the_geometric_on_unequal_problems(hopeless: float) -> None:
    rng = np.random.default_rng(5)
    solvable = rng.random(2000) >= hopeless
    difficulty = rng.beta(1.5, 3.0, 2000)
    counts, held_out = (rng.binomial(32, difficulty) * solvable for _ in range(2))
    law = sat.fit_beta_binomial(counts, 32, zero_inflated=hopeless > 0)
    assert (law.a, law.b) == pytest.approx((1.5, 3.0), rel=0.15)
    assert law.hopeless == pytest.approx(hopeless, abs=0.03)
    budgets = [1, 2, 4, 8]
    pooled = sat.fit_geometric(budgets, sat.hit_curves(counts, 32, budgets).mean(0))
    assert sat.log_likelihood(law, held_out, 32) > sat.log_likelihood(pooled, held_out, 32)
    later = sat.hit_curves(held_out, 32, [32]).mean()
    assert abs(float(law(32)) - later) < abs(float(pooled(32)) - later)


def test_the_fit_finds_the_maximum_of_the_likelihood() -> None:
    """Also that equal problems look equal, and no higher likelihood on a grid."""
    counts = np.random.default_rng(1).binomial(16, 0.4, 300)
    law = sat.fit_beta_binomial(counts, 16)
    assert law.a / (law.a + law.b) == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / 4800))
    assert law.a + law.b > 100
    spread = np.random.default_rng(2).binomial(16, np.random.default_rng(3).beta(0.8, 1.2, 300))
    best = sat.log_likelihood(sat.fit_beta_binomial(spread, 16), spread, 16)
    for a, b in itertools.product(np.geomspace(0.2, 5, 25), repeat=2):
        assert sat.log_likelihood(sat.BetaBinomial(a, b), spread, 16) <= best + 1e-6


@pytest.mark.parametrize("law", [sat.Geometric(0.3, 0.8), sat.BetaBinomial(0.7, 1.4, 0.2), sat.BetaBinomial(2, 2)])
def test_likelihoods_are_of_distributions(law: sat.Geometric | sat.BetaBinomial) -> None:
    """They sum to one over all counts, give the law's curve, and agree with scipy's distributions."""
    chance = np.exp([sat.log_likelihood(law, [c], 12) for c in range(13)])
    assert chance.sum() == pytest.approx(1)
    np.testing.assert_allclose(chance @ sat.hit_curves(range(13), 12, [1, 5, 12]), law([1, 5, 12]), atol=1e-12)
    if isinstance(law, sat.Geometric):
        inner, solvable = stats.binom.pmf(range(13), 12, law.p), law.ceiling
    else:
        inner, solvable = stats.betabinom.pmf(range(13), 12, law.a, law.b), 1 - law.hopeless
    np.testing.assert_allclose(chance, solvable * inner + (1 - solvable) * (np.arange(13) == 0), atol=1e-12)


def test_the_leaky_fit_counts_transitions() -> None:
    """By a literal loop, and within 4 standard errors of the truth."""
    rng, p01, p10, start = np.random.default_rng(0), 0.25, 0.1, 0.3
    right = np.zeros((400, 13), dtype=bool)
    right[:, 0] = rng.random(400) < start
    for t in range(12):
        u = rng.random(400)
        right[:, t + 1] = np.where(right[:, t], u >= p10, u < p01)
    law = sat.fit_leaky_chain(right)
    mended = spoilt = wrong = good = 0
    for one in right:
        for before, after in itertools.pairwise(one):
            good, wrong = good + before, wrong + (not before)
            mended, spoilt = mended + (not before and after), spoilt + (before and not after)
    assert (law.p01, law.p10, law.start) == (mended / wrong, spoilt / good, right[:, 0].mean())
    assert abs(law.p01 - p01) < 4 * math.sqrt(p01 * (1 - p01) / wrong)
    assert abs(law.p10 - p10) < 4 * math.sqrt(p10 * (1 - p10) / good)
    np.testing.assert_allclose(law(np.arange(13)), right.mean(0), atol=4 * 0.5 / 20)
    assert sat.fit_leaky_chain([[True, True]]).p01 == 0


def test_observed_saturation_waits_for_two_small_gains() -> None:
    exact = sat.geometric(np.arange(40), 0.3)
    assert sat.observed_saturation(exact, 0.01) == sat.saturation_budget(0.3, 0.01) == 10
    assert sat.observed_saturation([0, 0.3, 0.3, 0.6, 0.61, 0.61, 0.62], 0.02) == 3  # one flat step may be noise
    assert sat.observed_saturation([0, 0.3, 0.6, 0.9], 0.02) is None


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sat.hit_curves([9], 8, [1]), r"the count must lie in 0\.\.8, not 9"),
        (lambda: sat.hit_curves([1], 8, [9]), r"k must lie in 1\.\.8, the size of the pool, not 9"),
        (lambda: sat.geometric(3, 1.2), r"p must lie in \[0, 1\], not 1.2"),
        (lambda: sat.geometric(3, 0.2, -0.1), r"ceiling must lie in \[0, 1\], not -0.1"),
        (lambda: sat.beta_binomial(3, 0, 1), "needs a, b > 0, not 0 and 1"),
        (lambda: sat.leaky_chain(3, 0.2, 1.1), r"p10 must lie in \[0, 1\], not 1.1"),
        (lambda: sat.saturation_budget(0.5, 0), "epsilon must be positive, not 0"),
        (lambda: sat.saturation_budget(-0.5, 0.1), r"p must lie in \[0, 1\], not -0.5"),
        (lambda: sat.budget_for(0, 0.1), "needs p > 0"),
        (lambda: sat.observed_saturation([0, 1], -1), "epsilon must be positive"),
        (lambda: sat.fit_geometric([1, 1], [0.2, 0.3]), "2 budgets or more"),
        (lambda: sat.fit_geometric([1, 2], [0.2, 0.3], [0.1, 0.0]), "positive deviation"),
        (lambda: sat.fit_beta_binomial([5], 4), r"lie in 0\.\.4"),
        (lambda: sat.fit_beta_binomial([1], 1), "at least 2 samples a problem, not 1"),
        (lambda: sat.fit_leaky_chain([[True]]), r"at least one round, not of shape \(1, 1\)"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
