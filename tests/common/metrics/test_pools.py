"""Selection from a pool in closed form, against brute force over all subsets or orders."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics.pools import best_of_k, majority_at_k, none_in_k, pass_at_k

pools = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.integers(1, n),
    )
)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
@settings(max_examples=200, deadline=None)
def test_pass_at_k_by_enumeration(case):
    n, c, k = case
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    assert none_in_k(n, c, k) == pytest.approx(np.mean([not any(s) for s in subsets]))


@given(pools)
@settings(max_examples=200, deadline=None)
def test_best_of_k_by_enumeration(case):
    """Equal scores share their chance: the mean correctness of all samples of that score in the pool."""
    scores, correct, k = case
    value = []
    for subset in itertools.combinations(range(len(scores)), k):
        top = max(scores[i] for i in subset)
        value.append(np.mean([correct[i] for i in range(len(scores)) if scores[i] == top]))
    assert best_of_k(scores, correct, k) == pytest.approx(np.mean(value))


def test_majority_by_enumeration_of_orders():
    answers, correct = ["a", "b", "b", None, "c"], [True, False, False, False, False]
    for k in (1, 2, 3, 5):
        hits = []
        for order in itertools.permutations(range(5)):
            said = [answers[i] for i in order[:k] if answers[i] is not None]
            hits.append(bool(said) and max(said, key=lambda a: (said.count(a), -said.index(a))) == "a")
        estimate = majority_at_k(answers, correct, k, draws=4000)
        assert abs(estimate - np.mean(hits)) < 4 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(5, 2, 6), r"k must lie in 1\.\.5, the size of the pool, not 6"),
        (lambda: pass_at_k(5, 6, 1), r"the count must lie in 0\.\.5, not 6"),
        (lambda: best_of_k([1.0], [True, False], 1), "1 scores, but 2 marks"),
        (lambda: majority_at_k(["a"], [], 1), "1 answers, but 0 marks"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
