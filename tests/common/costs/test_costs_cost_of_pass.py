"""Cost-of-pass: hand examples, retries by simulation, laws of the frontier, the voting theorem by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.costs import cost_of_pass as cop
from common.costs.cost_of_pass import Attempts, Price, frontier, values
from common.generation.records import frame

HUMAN = 10.0


def records(correct: dict[str, list[list[int]]], tokens: dict[str, tuple[int, int]] | None = None) -> pd.DataFrame:
    """correct: arm -> [problems][runs]. tokens: arm -> (prompt, output) of each run."""
    tokens = tokens or {}
    rows = []
    for arm, problems in correct.items():
        prompt, output = tokens.get(arm, (5, 10))
        for problem, runs in enumerate(problems):
            for run, right in enumerate(runs):
                rows.append(
                    {
                        "arm": arm, "problem_id": problem, "sample_id": run, "correct": bool(right),
                        "answer": "right" if right else f"wrong {run % 2}", "prompt_tokens": prompt,
                        "output_tokens": output, "discarded_tokens": 0, "flops": 1.0, "seconds": 0.5, "forwards": 2.0,
                    }
                )  # fmt: skip
    return frame(rows, paper="p", profile="cpu", seed=0, task="t", difficulty=1)


def random_attempts(seed: int, models: int = 4, problems: int = 12, runs: int = 8) -> Attempts:
    rng = np.random.default_rng(seed)
    correct = rng.random((models, problems, runs)) < rng.random((models, problems, 1))
    usd = rng.uniform(0.5, 2, (models, problems, runs)) * 10.0 ** rng.uniform(-1, 1, (models, 1, 1))
    return Attempts([f"m{i}" for i in range(models)], list(range(problems)), correct.astype(float), usd)


# --- by hand

SMALL = {"cheap": [[1, 0], [0, 0], [1, 1]], "dear": [[1, 1], [1, 0], [1, 1]]}
PRICES = {"cheap": Price(0.1, 0.05), "dear": Price(0.2, 0.4)}  # attempts of 5 + 10 tokens cost 1 and 5


def test_a_hand_example() -> None:
    """v = [2, inf, 1] and [5, 10, 5]; with a human at 8 the frontier is [2, 8, 1], of mean 11/3."""
    data = cop.attempts(records(SMALL), PRICES)
    np.testing.assert_allclose(values(data), [[2, np.inf, 1], [5, 10, 5]])
    assert frontier(values(data), 8).tolist() == [2, 8, 1]
    assert frontier(values(data)).tolist() == [2, 10, 1]
    assert frontier(values(data)[:0], 8).tolist() == [8, 8, 8]
    alone = frontier(values(cop.without(data, ["cheap"])), 8)  # [5, 8, 5], mean 6
    assert cop.gain(alone, frontier(values(data), 8)) == pytest.approx((6 - 11 / 3) / 6)
    assert cop.essentialness(data, ["cheap"], 8).value == pytest.approx((6 - 11 / 3) / 6)
    assert cop.essentialness(data, ["cheap", "dear"], 8).value == pytest.approx((8 - 11 / 3) / 8)
    table = cop.tracking(data, ["dear", "cheap"], 8)
    assert table["value"].tolist() == pytest.approx([8, 6, 11 / 3])
    assert table["gain"].tolist() == pytest.approx([0, 1 / 4, 7 / 18])


def test_the_mean_of_minima_is_not_the_minimum_of_means() -> None:
    for seed in range(20):
        v = np.minimum(values(random_attempts(seed)), HUMAN)
        assert frontier(v, HUMAN).mean() <= v.mean(1).min()
    data = cop.attempts(records({"a": [[1], [0]], "b": [[0], [1]]}), [1.0, 1.0, 1.0, 1.0])
    v = np.minimum(values(data), HUMAN)
    assert frontier(v, HUMAN).mean() == 1
    assert v.mean(1).min() == (1 + HUMAN) / 2


def test_shrinkage_makes_a_failure_expensive_and_not_impossible() -> None:
    data = cop.attempts(records({"m": [[0] * 8, [1] * 8, [1, 0] * 4]}), np.ones(24))
    assert values(data)[0].tolist() == [math.inf, 1, 2]
    assert values(data, prior=0.5)[0].tolist() == pytest.approx([9 / 0.5, 9 / 8.5, 2])


def test_costs_count_every_token() -> None:
    table = records({"m": [[1, 0]]}).assign(discarded_tokens=[0, 4])
    assert cop.attempts(table, {"m": Price(1.0, 100.0)}).usd.tolist() == [[[1005.0, 1405.0]]]
    assert cop.attempts(table, table["seconds"] * 2).usd.tolist() == [[[1.0, 1.0]]]


# --- what it means


@pytest.mark.parametrize(("cost", "success"), [(0.02, 0.05), (3.0, 0.5), (1.0, 0.9)])
def test_it_is_the_money_spent_until_the_first_success(cost: float, success: float) -> None:
    """Literal retries, within 4 standard errors of the mean of the geometric distribution."""
    spent = cost * np.random.default_rng(3).geometric(success, 20_000)
    error = cost * math.sqrt(1 - success) / success / math.sqrt(len(spent))
    assert abs(spent.mean() - cop.cost_of_pass(cost, success)) < 4 * error


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_laws_of_the_frontier(seed: int, order: list[int]) -> None:
    data = random_attempts(seed)
    table = cop.tracking(data, [f"m{i}" for i in order], HUMAN)
    value = table["value"].to_numpy()
    assert (np.diff(value) <= 1e-12).all()  # a model never makes it worse
    assert value[-1] == pytest.approx(frontier(values(data), HUMAN).mean())  # in any order
    assert np.prod(1 - table["gain"]) == pytest.approx(value[-1] / value[0])  # gains telescope
    assert value.max() <= HUMAN
    twice = Attempts(
        [*data.models, "copy"], data.problems, *(np.concatenate([x, x[:1]]) for x in (data.correct, data.usd))
    )
    assert frontier(values(twice), HUMAN).tolist() == frontier(values(data), HUMAN).tolist()
    shuffled = np.random.default_rng(seed).permutation(len(data.problems))
    other = Attempts(data.models, data.problems, data.correct[:, shuffled], data.usd[:, shuffled])
    assert frontier(values(other), HUMAN).mean() == pytest.approx(value[-1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_essentialness_lies_in_0_to_1_and_is_0_for_the_dominated(seed: int) -> None:
    data = random_attempts(seed)
    found = cop.essentialness(data, ["m1", "m2"], HUMAN)
    assert 0 <= found.low <= found.value <= found.high <= 1
    right, usd = np.concatenate([data.correct, data.correct[:1]]), np.concatenate([data.usd, 2 * data.usd[:1]])
    worse = Attempts([*data.models, "w"], data.problems, right, usd)
    assert cop.essentialness(worse, ["w"], HUMAN).value == 0
    assert cop.essentialness(worse, ["w"], HUMAN).is_exact


def test_the_interval_is_a_paired_bootstrap_of_the_gain() -> None:
    """On the same draws as a literal loop."""
    rng = np.random.default_rng(0)
    before, after = rng.uniform(1, 9, 50), rng.uniform(0.5, 4, 50)
    found = cop.gain_interval(before, after, seed=7)
    draws = np.random.default_rng([7, 0xB007]).integers(0, 50, size=(2000, 50))
    literal = [1 - after[d].sum() / before[d].sum() for d in draws]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(literal, [0.025, 0.975])), abs=1e-12)
    assert found.value == pytest.approx(1 - after.mean() / before.mean())


def test_splitting_removes_the_winners_curse() -> None:
    """Six models that are all alike, of v = 2: the naive frontier lies far below; the split one has no such bias.

    What is left is that of the posterior mean from 4 runs: E[5 / (k + 1/2)], k ~ Binomial(4, 1/2).
    """
    rng = np.random.default_rng(1)
    correct = (rng.random((6, 4000, 8)) < 0.5).astype(float)
    data = Attempts([f"m{i}" for i in range(6)], list(range(4000)), correct, np.ones_like(correct))
    naive, split = frontier(values(data), 100.0), cop.split_frontier(data, 100.0)
    assert naive.mean() < 1.6
    literal = np.zeros(4000)  # the definition, problem by problem
    for problem in range(4000):
        for first in (0, 1):
            choose, judge = (correct[:, problem, start::2].sum(-1) for start in (first, 1 - first))
            literal[problem] += 5 / (judge[int(choose.argmax())] + 0.5) / 2
    np.testing.assert_allclose(split, literal)
    expected = sum(math.comb(4, k) / 16 * 5 / (k + 0.5) for k in range(5))
    assert abs(split.mean() - expected) < 4 * split.std() / math.sqrt(4000)
    assert cop.split_frontier(data, 0.7).tolist() == [0.7] * 4000


@pytest.mark.parametrize("half_life", [2.6, 7.1, 30.0])
def test_a_half_life_comes_back(half_life: float) -> None:
    t = np.linspace(100, 100 + 3 * half_life, 9)
    found = cop.half_life(t, 5 * np.exp(-math.log(2) / half_life * (t - 100)) + 0.4)
    assert found["half_life"] == pytest.approx(half_life, rel=1e-4)
    assert (found["a"], found["c"]) == pytest.approx((5, 0.4), rel=1e-3)
    noise = 1 + 0.002 * np.random.default_rng(0).normal(size=9)
    assert cop.half_life(t, 5 * np.exp(-math.log(2) / half_life * (t - 100)) * noise)["half_life"] == pytest.approx(
        half_life, rel=0.05
    )


# --- voting


def literal_vote(chances: list[float], k: int) -> float:
    total = 0.0
    for answers in itertools.product(range(len(chances)), repeat=k):
        if max(answers, key=lambda a: (answers.count(a), -answers.index(a))) == 0:
            total += math.prod(chances[a] for a in answers)
    return total


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("chances", [[0.5, 0.5], [0.2, 0.5, 0.3], [0.6, 0.1, 0.1, 0.2], [0.0, 1.0], [1.0]])
def test_the_chance_of_a_vote_by_enumeration_of_all_orders(chances: list[float], k: int) -> None:
    assert cop.vote_success(chances, k) == pytest.approx(literal_vote(chances, k), abs=1e-12)


def test_a_vote_of_one_or_two_is_a_single_answer() -> None:
    for chances in ([0.3, 0.3, 0.4], [0.9, 0.1]):
        assert cop.vote_success(chances, 1) == pytest.approx(chances[0])
        assert cop.vote_success(chances, 2) == pytest.approx(chances[0])


@pytest.mark.parametrize("k", range(2, 10))
def test_voting_never_lowers_the_cost_of_a_pass(k: int) -> None:
    """The theorem, for chances of success in (0, 1] and wrong answers that agree, scatter or lie between."""
    for right in (0.01, 0.05, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99, 1.0):
        for shape in ([1.0], [0.5, 0.5], [0.8, 0.2], [0.4, 0.3, 0.3], [0.25] * 4):
            chance = cop.vote_success([right, *((1 - right) * np.array(shape))], k)
            assert chance <= 1 - (1 - right) ** k + 1e-12 <= k * right + 2e-12
            assert cop.cost_of_pass(k, min(chance, 1.0)) >= cop.cost_of_pass(1, right) * (1 - 1e-12)


def test_votes_over_stored_runs_cost_the_sum_of_their_runs() -> None:
    table = records({"m": [[1, 0, 0, 1], [0, 1, 1, 1]]}, {"m": (7, 20)})
    votes = cop.voted(table, 3)
    assert votes["arm"].unique().tolist() == ["m, vote of 3"]
    assert len(votes) == len(table)
    for name in ("prompt_tokens", "output_tokens", "seconds", "flops", "forwards"):
        assert votes[name].sum() == 3 * table[name].sum()
    # problem 0 answers right, wrong 1, wrong 0, right: windows of three in a circle, the first seen of equals
    assert votes["answer"].tolist()[:4] == ["right", "wrong 1", "right", "right"]
    assert cop.voted(table, 1)["correct"].tolist() == table["correct"].tolist()
    silent = table.assign(answer=None, correct=False)
    assert not cop.voted(silent, 2)["correct"].any()


def test_a_measured_gain_of_voting_is_the_winners_curse() -> None:
    """No technique raises the frontier that it joins; what voting seems to gain, the split frontier does not see."""
    rng = np.random.default_rng(2)
    chance = rng.uniform(0.1, 0.9, 150)
    table = records({"m": [(rng.random(8) < p).astype(int).tolist() for p in chance]})
    both = pd.concat([table, cop.voted(table, 3)])
    data = cop.attempts(both, (both["prompt_tokens"] + both["output_tokens"]).to_numpy())
    base = data.of(["m"])
    assert cop.gain(frontier(values(base), 1e4), frontier(values(data), 1e4)) >= 0
    assert cop.gain(cop.split_frontier(base, 1e4), cop.split_frontier(data, 1e4)) <= 0.05


# --- bad input


def broken(**columns: object) -> pd.DataFrame:
    return records(SMALL).assign(**columns)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Price(-1e-6, 1e-6), ValueError, "a price cannot be negative"),
        (lambda: cop.attempts(broken(correct=2), PRICES), ValueError, "correct must be 0 or 1, not 2"),
        (lambda: cop.attempts(broken(seed=range(12)), PRICES), ValueError, "one task and one seed"),
        (lambda: cop.attempts(records(SMALL), {"cheap": Price(1, 1)}), ValueError, "no price of dear"),
        (lambda: cop.attempts(records(SMALL), [-1.0] * 12), ValueError, "finite and not negative, not -1"),
        (lambda: cop.attempts(records(SMALL).iloc[:-1], PRICES), ValueError, "'dear' has 1 of 2 runs of problem 2"),
        (lambda: cop.attempts(records({"a": [[1]], "b": []}), [1.0]).of(["b"]), KeyError, "no attempts of 'b'"),
        (lambda: cop.without(cop.attempts(records(SMALL), PRICES), ["big"]), KeyError, "'big'; there are: cheap, dear"),
        (lambda: cop.cost_of_pass(-1, 0.5), ValueError, "costs cannot be negative"),
        (lambda: cop.cost_of_pass(1, 1.5), ValueError, r"success lies in \[0, 1\]"),
        (lambda: frontier(np.ones((1, 2)), 0), ValueError, "must be positive, not 0"),
        (lambda: cop.gain_interval([1, np.inf], [1, 1]), ValueError, "problem 1 has no finite cost-of-pass"),
        (lambda: cop.split_frontier(random_attempts(0, runs=1)), ValueError, "at least 2 runs"),
        (lambda: cop.half_life([0, 1, 2], [3, 2, 1]), ValueError, "4 values or more"),
        (lambda: cop.half_life([0, 1, 2, 3], [1, 1, 1, 1]), ValueError, "do not fall"),
        (lambda: cop.vote_success([0.5, 0.4], 3), ValueError, "chances of sum 1"),
        (lambda: cop.voted(records(SMALL), 3), ValueError, "a vote of 3 needs as many runs; 'cheap' has 2"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_problems_with_missing_runs_can_be_left_out() -> None:
    data = cop.attempts(records(SMALL).iloc[:-1], PRICES, ignore_bad=True)
    assert data.problems == [0, 1]
    assert cop.gain([np.inf, 1], [np.inf, 1]) == 0
    assert cop.gain([np.inf, 1], [2, 1]) == 1
