import numpy as np
import pytest
from scipy import stats

from common.metrics.intervals import (
    Measured,
    bootstrap_mean,
    exact,
    paired_bootstrap,
    paired_t,
    ratio_of_sums,
    sign_test,
    units_to_settle,
)


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    measured = bootstrap_mean(x, seed=1)
    assert measured.value == pytest.approx(x.mean())
    half = 1.96 * x.std(ddof=1) / np.sqrt(len(x))
    assert measured.high - measured.value == pytest.approx(half, rel=0.15)
    assert measured.value - measured.low == pytest.approx(half, rel=0.15)


def test_bootstrap_covers_the_truth_in_95_percent_of_repetitions():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        measured = bootstrap_mean(rng.exponential(1.0, size=100), resamples=300)
        hits += measured.low <= 1.0 <= measured.high
    # 4 standard errors of a binomial with p = 0.93 (the percentile interval is slightly short on a skewed sample)
    assert abs(hits / 300 - 0.93) < 4 * np.sqrt(0.93 * 0.07 / 300)


def test_pairing_cancels_what_the_problems_share():
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 10, size=200)
    a, b = difficulty + rng.normal(1, 0.1, 200), difficulty + rng.normal(0, 0.1, 200)
    assert paired_bootstrap(a, b).low > 0.9
    assert paired_bootstrap(a, rng.permutation(b)).low < 0.9


def test_ratio_of_sums_weighs_by_size():
    measured = paired_bootstrap([100.0, 1.0] * 20, [50.0, 1.0] * 20, ratio_of_sums)
    assert measured.value == pytest.approx(101 / 51)


def test_paired_t_is_scipys():
    a, b = [1.0, 2.5, 3.0, 4.2], [0.5, 2.0, 3.5, 3.0]
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    measured = paired_t(a, b)
    assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high))


def test_sign_test_drops_ties():
    assert sign_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) == pytest.approx(2 * 0.5**5)
    assert sign_test([1, 2], [1, 2]) == 1.0


def test_units_to_settle_follows_the_square_root_law():
    measured = Measured(1.0, 0.0, 2.0, 100)
    assert units_to_settle(measured, 0.5) == 401
    assert units_to_settle(measured, 1.0) is None


def test_no_number_of_units_settles_a_difference_that_is_rounding():
    rounded = Measured(0.1 + 0.2, 0.2, 0.4, 50)  # 0.30000000000000004
    assert units_to_settle(rounded, 0.3) is None
    assert units_to_settle(Measured(1.0, 0.0, 2.0, 100), 1.0 + 1e-5) == pytest.approx(1e12, rel=1e-3)
    assert units_to_settle(exact(2.0), 2.0) is None
    assert units_to_settle(exact(2.0), 2.0 + 1e-12) == 1  # no width at all: every distance is one


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_mean([1.0]), "at least 2"),
        (lambda: bootstrap_mean([1.0, float("nan")]), "index 1"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3"),
        (lambda: paired_t([1.0, 2.0], [0.0, 0.0]), "at least 3 seeds"),
        (lambda: Measured(1.0, 2.0, 0.0, 1), "not ordered"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_exact_has_no_width():
    assert exact(3).is_exact
    assert str(exact(3)) == "3"
