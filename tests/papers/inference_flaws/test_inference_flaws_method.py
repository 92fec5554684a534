"""The closed forms against enumeration, simulation and the authors' printed numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.inference_flaws import method
from papers.inference_flaws.method import TaskCounts, TwoTypes

counts = st.integers(1, 6).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda a: st.integers(0, n - a).map(lambda b: TaskCounts(n, a, b)))
)
many = st.lists(
    st.tuples(st.integers(0, 10), st.integers(0, 10)).map(lambda ab: TaskCounts(20, *ab)), min_size=1, max_size=8
)


@given(counts, st.sampled_from([0.0, 1.0, 4.0]))
@settings(max_examples=80, deadline=None)
def test_curve_equals_all_permutations(task, penalty):
    samples = [1] * task.right + [-1] * task.wrong + [0] * (task.n - task.accepted)
    rewards = np.zeros(task.n)
    orders = list(itertools.permutations(samples))
    for order in orders:
        for k in range(1, task.n + 1):
            first = next((s for s in order[:k] if s), 0)
            rewards[k - 1] += 1.0 if first == 1 else -penalty if first == -1 else 0.0
    assert method.reward_curve(task, task.n, penalty) == pytest.approx(rewards / len(orders))


def test_curve_against_the_papers_simulation():
    random = np.random.default_rng(0)
    outcomes = random.choice([1, -1, 0], p=[0.2, 0.1, 0.7], size=(15, 60))
    tasks = [TaskCounts(60, int((row == 1).sum()), int((row == -1).sum())) for row in outcomes]
    for penalty in (0.0, 2.0):
        mean, error = method.simulated_curve(outcomes, 40, penalty, seed=1)
        exact = method.mean_curve(tasks, 40, penalty)
        assert (np.abs(mean - exact) <= 4 * error + 1e-12).all()


@given(many)
@settings(max_examples=100, deadline=None)
def test_shapes_of_the_curves(tasks):
    free = method.mean_curve(tasks, 20)
    assert (np.diff(free) >= -1e-12).all()
    assert free[-1] == pytest.approx(method.ceiling(tasks))
    assert method.ceiling(tasks) <= method.coverage(tasks) + 1e-12
    right_only = [TaskCounts(20, t.right, 0) for t in tasks]
    assert method.ceiling(right_only) == pytest.approx(method.coverage(right_only))
    wrong_only = [TaskCounts(20, 0, t.wrong) for t in tasks]
    assert (method.mean_curve(wrong_only, 20, 1.0) <= 1e-12).all()


@given(many)
@settings(max_examples=200, deadline=None)
def test_best_attempts_never_rise_with_the_penalty(tasks):
    """K* is the argmax of C(K) - c W(K), with W rising: a standard exchange argument; ties go to the fewest."""
    best = [method.best_attempts(method.mean_curve(tasks, 20, c), 1e-12) for c in (0, 0.5, 1, 2, 4, 8)]
    assert best == sorted(best, reverse=True)


def test_one_task_alone_has_no_optimum_in_between():
    for a, b, c in itertools.product(range(6), range(6), (0, 1, 3)):
        curve = method.reward_curve(TaskCounts(20, a, b), 20, c)
        best = method.best_attempts(curve, 1e-12)
        assert best in (0, 1) or curve[best - 1] == pytest.approx(curve[-1])


def test_the_authors_table_row():
    """Llama-3.1-8B in the heat map; the parameters are in their notebook's output (p1 = 84/150 from pass@1)."""
    model = TwoTypes((0.8738248665464701, 0.13823971665148135), 0.56, 0.7516008131097383)
    ratios = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2, 4, 10]
    rows = {r: [method.best_attempts(model.value(800, -ratio, r)) for ratio in ratios] for r in ("paper", "exact")}
    assert rows["paper"] == [82, 81, 81, 80, 79, 76, 3, 2, 2, 2, 1, 1, 0]
    assert rows["exact"] == [80, 79, 79, 78, 77, 74, 3, 2, 2, 2, 1, 1, 0]


def test_large_entries_of_that_row_are_where_double_precision_ends():
    """The curve still rises there: each further attempt gains, so that the model has no best number of attempts."""
    from fractions import Fraction

    r, p, s = (Fraction(87, 100), Fraction(13, 100)), (Fraction(58, 100), Fraction(42, 100)), Fraction(3, 4)
    beta = [s * (1 - x) for x in r]
    for k in (50, 100, 200):  # gain of attempt k at a cost of 0.1 for a wrong submission, exact reach
        assert sum(q * b ** (k - 1) * (x - (1 - x) * (1 - s) / 10) for q, b, x in zip(p, beta, r, strict=True)) > 0


@pytest.mark.parametrize(
    ("wrong_value", "best", "paper", "exact"),
    [(-1.0, 2, 0.4884, 0.4724), (-0.7, 3, 0.5541, 0.5246), (-2.0, 1, 0.3388, 0.3388)],
)
def test_printed_values(wrong_value, best, paper, exact):
    model = TwoTypes((0.87, 0.13), 0.58, 0.75)
    for reach, value in (("paper", paper), ("exact", exact)):
        curve = model.value(200, wrong_value, reach)
        assert method.best_attempts(curve) == best
        assert curve.max() == pytest.approx(value, abs=5e-5)
    assert model.limit(-1.0) == pytest.approx(0.4325, abs=5e-5)
    assert model.value(100_000, wrong_value)[-1] == pytest.approx(model.limit(wrong_value), abs=1e-9)


def test_two_types_against_simulation():
    model, random = TwoTypes((0.7, 0.1), 0.4, 0.8), np.random.default_rng(3)
    runs, total = 40_000, []
    easy = random.random(runs) < model.easy
    rate = np.where(easy, *model.rates)
    open_, reward = np.ones(runs, dtype=bool), np.zeros(runs)
    for _ in range(5):
        right = random.random(runs) < rate
        accepted = right | (random.random(runs) > model.soundness)
        reward[open_ & accepted] = np.where(right, 1.0, -1.5)[open_ & accepted]
        open_ &= ~accepted
        total.append(reward.mean())
    error = reward.std() / np.sqrt(runs)
    assert (np.abs(model.value(5, -1.5) - total) < 4 * error).all()


def test_wrong_submissions_by_attempt_against_simulation():
    tasks = [TaskCounts(40, 20, 2), TaskCounts(40, 2, 3), TaskCounts(40, 0, 0)]
    outcomes = np.array([[1] * t.right + [-1] * t.wrong + [0] * (40 - t.accepted) for t in tasks])
    random, edges = np.random.default_rng(1), [1, 2, 4, 8, 41]
    wrong, made = np.zeros(4), np.zeros(4)
    for _ in range(4000):
        for row in random.permuted(outcomes, axis=1):
            if row.any():
                k = int((row != 0).argmax())
                bucket = int(np.searchsorted(edges, k + 1, side="right")) - 1
                made[bucket] += 1
                wrong[bucket] += row[k] == -1
    error = np.sqrt(0.25 / made)
    assert (np.abs(method.wrong_by_attempt(tasks, edges) - wrong / made) < 4 * error).all()
    assert np.isnan(method.wrong_by_attempt([TaskCounts(4, 0, 0)], [1, 5])[0])


def test_accuracy_given_pass_and_its_bounds():
    tasks = [TaskCounts(10, 3, 1), TaskCounts(10, 0, 2), TaskCounts(10, 0, 0)]
    assert method.accuracy_given_pass(tasks) == pytest.approx((0.75 + 0) / 2)
    assert method.accuracy_given_pass(tasks, 0.0) == pytest.approx(0.25)
    assert method.accuracy_given_pass(tasks, 1.0) == pytest.approx(1.75 / 3)
    assert np.isnan(method.accuracy_given_pass([TaskCounts(5, 0, 0)]))


def test_fit_of_two_types_recovers_a_mixture():
    """Tasks of two rates and a verifier that accepts wrong samples with one chance."""
    rates, soundness = np.array([0.9] * 6 + [0.1] * 4), 0.8
    base = rates + (1 - rates) * (1 - soundness)
    pooled = rates.mean() / base.mean()  # G over pooled samples; the mean over tasks would be biased
    fitted = method.fit_two_types(base, rates, pooled)
    assert fitted.rates == pytest.approx((0.9, 0.1))
    assert (fitted.easy, fitted.soundness) == pytest.approx((0.6, 0.8))
    assert method.fit_two_types([0.9], [0.8], 0.9) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaskCounts(0, 0, 0), "n must be at least 1"),
        (lambda: TaskCounts(5, 3, 3), "right=3 and wrong=3 must be counts of n=5"),
        (lambda: TaskCounts(5, -1, 3), "right=-1"),
        (lambda: method.reward_curve(TaskCounts(5, 1, 1), 6), r"attempts must lie in 1\.\.5"),
        (lambda: TwoTypes((0.5, 0.1), 0.5, 1.2), r"soundness must lie in \[0, 1\], not 1\.2"),
        (lambda: TwoTypes((0.5, 0.1), 0.5, 0.9).value(3, -1, "half"), "unknown reach 'half'; known: paper, exact"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
