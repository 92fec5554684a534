"""The rule that allocates against its definition; selections, blocks, fits, training rows and problems against literal
versions. (Laws, N* and their bad input are tested in tests/common/costs.)"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.costs.saturation import Geometric, fit_beta_binomial, marginal_gain
from common.metrics.pools import best_of_k, majority_at_k, none_in_k
from papers.scaling_over_scaling import analysis, arms, method, training

said = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=40, max_size=40)


def drawer(answers, costs=None):
    """A draw that hands out a list in order and refuses to skip or repeat."""
    made = []

    def draw(number):
        assert number == len(made)
        made.append(number)
        return answers[number], (costs or range(1, len(answers) + 1))[number]

    return draw, made


# --- allocation


@given(said, st.integers(1, 8), st.floats(1e-4, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_it_stops_at_the_first_answer_whose_successor_gains_little(answers, pilot, epsilon, ceiling):
    """Literally: after each answer from the pilot on, dF(n) at the posterior mean decides."""
    n = pilot
    while n < 40:
        p = (1 + max((answers[:n].count(a) for a in set(answers[:n]) - {None}), default=0)) / (2 + n)
        if marginal_gain(n, p, ceiling) <= epsilon:
            break
        n += 1
    draw, made = drawer(answers)
    found = method.allocate(draw, pilot=pilot, most=40, epsilon=epsilon, ceiling=ceiling)
    assert found.answers == answers[:n]
    assert len(made) == n
    assert found.tokens == n * (n + 1) // 2
    assert pilot <= found.planned <= 40


@given(said, st.integers(1, 8), st.integers(8, 40))
@settings(max_examples=100, deadline=None)
def test_epsilon_zero_draws_most_and_epsilon_one_the_pilot(answers, pilot, most):
    """Elsewhere an epsilon of 0 is an error; the allocator has an end, and so a meaning for it."""
    assert method.allocate(drawer(answers)[0], pilot=pilot, most=most, epsilon=0).answers == answers[:most]
    assert method.allocate(drawer(answers)[0], pilot=pilot, most=most, epsilon=1).answers == answers[:pilot]
    for epsilon in (1e-9, 0.001, 0.1):
        found = method.allocate(drawer(answers)[0], pilot=pilot, most=most, epsilon=epsilon)
        assert pilot <= len(found.answers) <= most
        assert found.tokens == sum(range(1, len(found.answers) + 1))


def test_agreement_stops_early_and_difference_goes_on():
    sure = method.allocate(drawer(["a"] * 64)[0])
    unsure = method.allocate(drawer([str(i) for i in range(64)])[0])
    assert len(sure.answers) == sure.planned == 4
    assert sure.success == pytest.approx(5 / 6)
    assert unsure.planned == 9  # p = 2/6 after the pilot; it is 2/(n + 2) later, so that the plan moves on
    assert len(unsure.answers) > 15


def test_a_verifier_can_say_what_a_success_is():
    answers = ["wrong", "right"] * 20
    found = method.allocate(drawer(answers)[0], hits=lambda given: given.count("right"), most=40)
    assert found.success == pytest.approx(0.5, abs=0.1)
    assert len(found.answers) == method.saturation_budget(0.5, 0.01)


@given(said, st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_votes_stop_at_the_first_answer_that_has_them(answers, votes, most):
    ends = [n for n in range(1, most + 1) if max(answers[:n].count(a) for a in ("a", "b", "c")) >= votes]
    found = method.until_votes(drawer(answers)[0], votes, most)
    assert len(found.answers) == min(ends, default=most)
    assert found.tokens == sum(range(1, len(found.answers) + 1))


def test_none_agrees_with_nothing():
    assert method.agreement([None, None, "a"]) == 1
    assert method.agreement([None, None]) == method.agreement([]) == 0
    assert method.vote([None, "b", "a", "a", "b"]) == "b"
    assert method.vote([None]) is None


def test_rethinking_feeds_the_last_answers_back():
    seen = []

    def attempt(last):
        seen.append(last)
        return [0, 10] if last is None else [x + 1 for x in last]

    assert method.rethink(attempt, 3) == [[0, 10], [1, 11], [2, 12], [3, 13]]
    assert seen == [None, [0, 10], [1, 11], [2, 12]]
    assert method.rethink(attempt, 0) == [[0, 10]]


# --- selection


def test_the_majority_curve_is_that_of_common_at_every_n():
    random = np.random.default_rng(0)
    answers = [None if x == 4 else str(x) for x in random.integers(0, 5, 20)]
    right = [a == "1" for a in answers]
    curve = analysis.majority_curve(answers, right, seed=3, draws=50)
    assert curve.tolist() == pytest.approx([majority_at_k(answers, right, k, seed=3, draws=50) for k in range(1, 21)])
    assert analysis.majority_curve([None, None], [False, False]).tolist() == [0, 0]


def test_majority_of_one_and_of_two_is_one_sample():
    """With ties to the first seen, the second answer never outvotes the first one."""
    answers = ["a"] * 5 + ["b"] * 9 + ["c"] * 6
    right = [a == "a" for a in answers]
    draws = 4000
    curve = analysis.majority_curve(answers, right, seed=1, draws=draws)
    error = np.sqrt(0.25 * 0.75 / draws)
    assert abs(curve[0] - 0.25) < 4 * error
    assert abs(curve[1] - 0.25) < 4 * error
    assert curve[-1] == 0  # the mode is wrong: majority voting falls with N, which no saturation law covers


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=10))
@settings(max_examples=100, deadline=None)
def test_the_oracle_is_above_best_of_n_which_is_above_all_right(samples):
    scores, right = zip(*samples, strict=True)
    n, c = len(right), sum(right)
    hit = method.hit_curves([c], n, range(1, n + 1))[0]
    for k in range(1, n + 1):
        assert none_in_k(n, n - c, k) - 1e-9 <= best_of_k(scores, right, k) <= hit[k - 1] + 1e-9


def test_curves_of_chains_against_a_loop():
    states = np.random.default_rng(0).random((5, 4, 7)) < 0.3
    first, last = (analysis.chain_curves(states, mode) for mode in (analysis.FIRST, analysis.LAST))
    for problem, n in itertools.product(range(5), range(7)):
        assert first[problem, n] == np.mean([any(chain[: n + 1]) for chain in states[problem]])
        assert last[problem, n] == np.mean([chain[n] for chain in states[problem]])


# --- fits


def test_blocks_against_a_loop_and_their_curve_is_the_curve():
    right = np.random.default_rng(0).random((6, 35)) < 0.4
    counts = method.block_counts(right, 8)
    literal = [row[start : start + 8].sum() for row in right for start in range(0, 32, 8)]
    assert counts.tolist() == literal
    one = method.hit_curves(counts, 8, [1]).mean()
    assert one == pytest.approx(right[:, :32].mean())


def test_laws_see_no_more_than_up_to():
    """The three laws of a pool are those of its parts: the curve of unbiased estimates, and the counts of blocks."""
    random = np.random.default_rng(1)
    right = random.random((200, 32)) < random.beta(0.6, 1.2, 200)[:, None]
    laws = method.fit_laws(right, 8)
    assert laws["beta-binomial"] == fit_beta_binomial(method.block_counts(right, 8), 8)
    assert laws["zero-inflated"].hopeless >= 0
    curve = method.hit_curves(right.sum(1), 32, range(1, 9))
    assert laws["geometric"] == method.fit_curve(curve)
    n = np.arange(1, 9)
    misses = {name: np.abs(law(n) - curve.mean(0)).max() for name, law in laws.items()}
    assert (
        misses["beta-binomial"] < misses["geometric"] < 0.05
    )  # the geometric law misses unequal problems where it was fitted


def test_unequal_problems_saturate_later_than_the_geometric_law_says():
    """Beta(0.5, 1): from N <= 8 the beta-binomial law finds F(32), the geometric one stays below it."""
    random = np.random.default_rng(2)
    difficulty = random.beta(0.5, 1.0, 3000)
    laws = method.fit_laws(random.random((3000, 32)) < difficulty[:, None], 8)
    truth = float(np.mean(1 - (1 - difficulty) ** 32))
    assert abs(float(laws["beta-binomial"](32)) - truth) < 0.02
    assert float(laws["geometric"](32)) < truth - 0.04


def test_exact_curves_give_back_their_law():
    curve = method.geometric(np.arange(1, 9), 0.2, 0.7)
    law = method.fit_curve(np.tile(curve, (5, 1)))
    assert (law.p, law.ceiling) == pytest.approx((0.2, 0.7), abs=1e-5)
    assert method.fit_curve(curve[None]).p == pytest.approx(0.2, abs=1e-5)


def test_predicted_and_observed_points_of_an_exact_curve_agree():
    curve = np.tile(method.geometric(np.arange(1, 41), 0.3, 0.8), (4, 1))
    found = analysis.curves_of(curve, curve, curve, 8)
    assert found.law == Geometric(pytest.approx(0.3, abs=1e-5), pytest.approx(0.8, abs=1e-5))
    for epsilon in (0.05, 0.01):
        assert found.predicted(epsilon) == found.observed(epsilon) == method.saturation_budget(0.3, epsilon, 0.8)


# --- problems and training rows


def test_bins_hold_so_many_problems_from_easy_to_hard():
    chains = arms.problems_of("chain", [2, 5], 4, 0)
    assert [p.difficulty for p in chains] == [2] * 4 + [5] * 4
    hands = arms.problems_of("countdown", [3, 3, 4, 4], 5, 0)
    assert [p.difficulty for p in hands] == [3] * 10 + [4] * 10
    chances = [arms._luck_of(p) for p in hands]
    assert chances[:10] == sorted(chances[:10], reverse=True)
    assert chances[10:] == sorted(chances[10:], reverse=True)
    assert len({p.prompt for p in [*chains, *hands]}) == 28
    assert {p.split for p in [*chains, *hands]} == {"test"}


def test_streams_of_random_numbers_differ():
    made = [arms.stream(p, s, r) for p, s, r in itertools.product(range(20), range(70), range(13))]
    assert len(set(made)) == len(made)


def test_a_training_row_teaches_the_new_answer_alone():
    from common.reasoners import policies

    words, problem = policies.tokenizer(), arms.problems_of("chain", [3], 1, 0)[0]
    wrong = problem.answer.replace(f"#{problem.result}", f"#{(int(problem.result) + 1) % 10}")
    verify = policies.VERIFY["chain"]
    row = training.example(words, problem, wrong, verify)
    assert words.decode(row.ids[: row.prompt_tokens]) == f"{wrong}?{problem.prompt}"
    assert words.decode(row.ids[row.prompt_tokens :]) == problem.answer
    lucky = f"#{problem.result}$"  # right without a step: kept as it is
    assert words.decode(training.example(words, problem, lucky, verify).ids) == f"{lucky}?{problem.prompt}{lucky}"
    plain = training.example(words, problem)
    assert words.decode(plain.ids) == problem.prompt + problem.answer
    assert words.decode(plain.ids[: plain.prompt_tokens]) == problem.prompt


# --- on any model


@pytest.mark.slow
def test_solve_draws_from_a_model_until_it_may_stop(checkpoint):
    from common.generation.sampler import generate
    from common.models.hub import load_model, load_tokenizer

    model, words = load_model(checkpoint), load_tokenizer(checkpoint)
    settings_ = {"max_new_tokens": 5, "seed": 4, "temperature": 1.3}
    answer, drawn = method.solve(model, words, "2+2=", lambda text: text[:1] or None, most=7, epsilon=0, **settings_)
    out = generate(
        model, [words("2+2=")["input_ids"]] * 7, 5, do_sample=True, temperature=1.3, seed=4, streams=range(7)
    )
    texts = [words.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]
    assert drawn.answers == [text[:1] or None for text in texts]
    assert drawn.tokens == sum(map(len, out.tokens))
    assert answer == method.vote(drawn.answers)
    _, same = method.solve(model, words, "2+2=", lambda text: "4", most=7, **settings_)
    assert same.answers == ["4"] * 4


# --- bad input


def _answers(number):
    return "a", 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: method.allocate(_answers, pilot=0), r"the pilot must lie in 1\.\.64, the most answers, not 0"),
        (lambda: method.allocate(_answers, pilot=9, most=8), r"the pilot must lie in 1\.\.8, the most answers, not 9"),
        (lambda: method.allocate(_answers, epsilon=-0.1), r"epsilon must lie in \[0, 1\], not -0.1"),
        (lambda: method.allocate(_answers, epsilon=1.5), r"epsilon must lie in \[0, 1\], not 1.5"),
        (lambda: method.allocate(_answers, ceiling=1.5, epsilon=0), r"ceiling must lie in \[0, 1\], not 1.5"),
        (lambda: method.allocate(lambda n: ("a", -1)), "draw 0 cost -1 tokens"),
        (lambda: method.allocate(_answers, hits=lambda a: 9), r"hits must lie in 0\.\.4, the number of draws, not 9"),
        (lambda: method.posterior_mean(-1, 3), r"hits must lie in 0\.\.3"),
        (lambda: method.until_votes(_answers, 0), "votes and most must be at least 1, not 0 and 64"),
        (lambda: method.until_votes(_answers, 3, 0), "not 3 and 0"),
        (lambda: method.rethink(lambda last: [1], -1), "rounds must not be negative, not -1"),
        (lambda: method.rethink(lambda last: [1] if last is None else [], 1), "1 chains went into a round, 0 came out"),
        (lambda: method.block_counts(np.ones((2, 4)), 5), r"size must lie in 1\.\.n .* not 5 for shape \(2, 4\)"),
        (lambda: method.block_counts(np.ones(4), 1), r"not 1 for shape \(4,\)"),
        (lambda: method.fit_laws(np.ones((3, 4)), 1), "needs 2 budgets or more|at least 2 samples"),
        (lambda: arms.problems_of("sudoku", [3], 1, 0), "unknown kind of problem 'sudoku'; known: chain, countdown"),
        (lambda: analysis.chain_curves(np.ones((1, 1, 2), bool), "best"), "unknown mode 'best' of chains"),
        (
            lambda: analysis.pool_curves(SimpleNamespace(right=np.ones((1, 2)), answers=[], scores=[[1, 2]]), "last"),
            "unknown mode 'last' of samples",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
