"""Winners, votes, retries and the loader of public records; the definitions are tested in tests/common/costs."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.costs import cost_of_pass as cop
from common.generation.records import frame
from papers.cost_of_pass import method


def study(seed, models=3, problems=40, runs=8):
    random = np.random.default_rng(seed)
    correct = (random.random((models, problems, runs)) < random.random((models, problems, 1))).astype(float)
    usd = random.uniform(0.5, 2.0, correct.shape) * 10.0 ** np.arange(models)[:, None, None]
    return method.Attempts([f"m{i}" for i in range(models)], list(range(problems)), correct, usd)


# --- constants of the paper


def test_the_order_of_releases_is_the_papers():
    names = [name for name, *_ in sorted(method.MODELS, key=lambda row: row[2])]
    assert names[:2] == ["gpt-4o-2024-05-13", "claude-3-5-sonnet-20240620"]
    assert names.index("Llama-3.1-8B") < names.index("Llama-3.1-405B")  # of one day: the order of the list
    assert names.index("o1-2024-12-17") < names.index("Llama-3.3-70B")  # by the date of the notebook, not of the name


def test_break_even_by_hand():
    assert method.break_even([0.1, 40.0], 20.0).tolist() == pytest.approx([0.005, 2.0])
    assert method.unsolved_at_most(2.03, 20.0) == pytest.approx(0.1015)


# --- who wins


def test_a_model_that_is_cheaper_everywhere_wins_every_sample():
    data = study(0)
    cheap = method.Attempts(data.models, data.problems, np.ones_like(data.correct), data.usd)
    shares = method.winner_shares(cheap, {"a": ["m0"], "b": ["m1", "m2"]}, 1e4, 50)
    assert shares == {"a": 1.0, "b": 0.0}
    assert method.single(cheap, 1e4)[[0, 1]].mean(1).min() == pytest.approx(data.usd[0].mean())


def test_equal_models_share_the_samples():
    random = np.random.default_rng(1)
    correct = (random.random((2, 60, 8)) < 0.5).astype(float)
    data = method.Attempts(["a", "b"], list(range(60)), correct, np.ones_like(correct))
    shares = method.winner_shares(data, {"x": ["a"], "y": ["b"]}, 1e3, 400)
    assert sum(shares.values()) == 1
    assert min(shares.values()) > 0
    assert shares == method.winner_shares(data, {"x": ["a"], "y": ["b"]}, 1e3, 400)


def test_resampling_by_task_is_the_bootstrap_for_one_task_and_shrinks_with_problems():
    random = np.random.default_rng(0)
    small, large = (random.normal(2, 1, n) for n in (50, 5000))

    def ratio(drawn):
        return min(float(b.mean() / a.mean()) for a, b in drawn)

    one, many = (method.resampled([(x, 2 * x)], ratio) for x in (small, large))
    assert (one.value, one.low, one.high) == pytest.approx((2, 2, 2))
    apart = method.resampled([(np.ones(50), small)], ratio)
    assert apart.low < small.mean() < apart.high
    close = method.resampled([(np.ones(5000), large)], ratio)
    assert close.high - close.low < apart.high - apart.low
    assert many.n == 5000


# --- votes


def voting_records(seed, runs=6):
    random = np.random.default_rng(seed)
    rows = [
        {
            "arm": "m", "problem_id": p, "sample_id": r, "answer": answer, "correct": answer == "0",
            "prompt_tokens": 3, "output_tokens": int(random.integers(1, 9)), "discarded_tokens": 0, "forwards": 1.0,
            "flops": 1.0, "seconds": 1.0,
        }
        for p in range(30) for r in range(runs)
        for answer in [random.choice(np.array(["0", "1", "2", None], dtype=object), p=[0.4, 0.3, 0.2, 0.1])]
    ]  # fmt: skip
    return frame(rows, paper="p", profile="cpu", seed=0, task="t", difficulty=1)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_stored_votes_are_those_of_the_records(k):
    """Against common's votes over records, which count one by one."""
    table = voting_records(k)
    usd = table["output_tokens"].to_numpy(dtype=float).reshape(30, 6)
    answers = table["answer"].to_numpy(dtype=object).reshape(30, 6)
    right, paid = method.vote(answers, table["correct"].to_numpy(dtype=float).reshape(30, 6), usd,
                              method.stored_windows(6, k))  # fmt: skip
    literal = cop.voted(table, k)
    assert right.ravel().tolist() == literal["correct"].astype(float).tolist()
    assert paid.ravel().tolist() == literal["output_tokens"].tolist()
    assert paid.sum() == k * usd.sum()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_stored_votes_of_equal_cost_never_pay_not_even_by_chance(seed, k):
    """Each run votes k times, and a vote is right only if one of its runs is: at most k times as many are right."""
    random = np.random.default_rng(seed)
    answers = random.choice(np.array(["0", "1", "2"], dtype=object), size=(20, 8))
    correct = (answers == "0").astype(float)
    usd = np.ones_like(correct)
    right, paid = method.vote(answers, correct, usd, method.stored_windows(8, k))
    base = method.Attempts(["m"], list(range(20)), correct[None], usd[None])
    both = method.Attempts(["m", "v"], list(range(20)), np.stack([correct, right]), np.stack([usd, paid]))
    assert method.frontier(method.values(both), 50).tolist() == method.frontier(method.values(base), 50).tolist()


def test_fresh_votes_seem_to_gain_and_the_split_sample_sees_that_they_do_not():
    random = np.random.default_rng(3)
    answers = random.choice(np.array(["0", "1", "2", "3"], dtype=object), size=(400, 24), p=[0.1, 0.3, 0.3, 0.3])
    correct = (answers == "0").astype(float)
    first = random.random((400, 8)) < 0.1
    usd = np.ones((400, 24))
    right, paid = method.vote(answers, correct, usd, method.fresh_windows(24, 3, 8))
    base = method.Attempts(["m"], list(range(400)), first[None].astype(float), np.ones((1, 400, 8)))
    both = method.Attempts(["m", "v"], base.problems, np.concatenate([base.correct, right[None]]),
                           np.concatenate([base.usd, paid[None]]))  # fmt: skip
    naive = method.gain(method.frontier(method.values(base), 100), method.frontier(method.values(both), 100))
    split = method.gain(method.split_frontier(base, 100), method.split_frontier(both, 100))
    assert naive > 0.05
    assert split < 0.01


def test_which_runs_vote_together():
    assert method.stored_windows(4, 3).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]]
    assert method.fresh_windows(7, 2, 3).tolist() == [[0, 1], [2, 3], [4, 5]]
    answers = np.array([["b", "a", None, "a"], [None, None, None, "c"]], dtype=object)
    correct = np.array([[0.0, 1, 0, 1], [0, 0, 0, 1]])
    right, _ = method.vote(
        answers,
        correct,
        np.ones((2, 4)),
        np.array(
            [
                [0, 1],
                [
                    0,
                    1,
                ][::-1],
                [2, 3],
            ]
        ),
    )
    assert right.tolist() == [[0, 1, 1], [0, 0, 1]]  # the first seen of equals; a null does not vote


# --- literal retries


def test_retries_spend_c_over_r_also_where_failures_cost_more():
    """Wald: the mean spending is the mean cost times the mean number of attempts, 1/R."""
    correct, usd = np.array([1.0, 0, 0, 0, 1, 0, 0, 0]), np.array([1.0, 9, 9, 9, 1, 2, 2, 2])
    times = 20_000
    spent = method.retries(correct, usd, times, np.random.default_rng(0))
    expected = usd.mean() / correct.mean()
    assert abs(spent - expected) < 4 * 2 * expected / math.sqrt(times)  # its deviation is at most about twice its mean


# --- public records


def write_public(folder, models=("a/small", "big"), technique="VanillaPromptMethod", change=None):
    for m, task in itertools.product(models, ("GSM8K", "AIME_2024")):
        rows = [
            {
                "model_name": m, "task_name": task, "tt_method_name": technique, "input_idx": p, "answer": str(r % 2),
                "num_input_tokens": 10, "num_prompt_tokens": 30 + p, "num_completion_tokens": 100 + r,
                "num_answer_tokens": 1, "cost_per_prompt_token": 1e-6, "cost_per_completion_token": 4e-6,
                "completed": True, "timestamp": 0.0, "uid": f"{m}{p}{r}", "metric_name": "MathMatch",
                "metric_score": float((p + r) % 2),
            } | (change or {})
            for p in range(3) for r in range(4)
        ]  # fmt: skip
        place = folder / task / m / technique / "MathMatch_records"
        place.mkdir(parents=True)
        pd.DataFrame(rows).to_parquet(place / "dataset.parquet")
        full = place.with_name("full_records")
        full.mkdir()
        pd.DataFrame([{"input": "x"}]).to_parquet(full / "dataset.parquet")


def test_public_records_become_attempts(tmp_path):
    write_public(tmp_path)
    table = method.load_public(tmp_path)
    assert table["arm"].unique().tolist() == ["a/small", "big"]
    of = table[table["task"] == "GSM8K"]
    data = method.attempts(of.drop(columns="usd"), of["usd"].to_numpy())
    assert data.correct.shape == (2, 3, 4)
    assert data.usd[0, 1].tolist() == pytest.approx([31e-6 + 4e-6 * (100 + r) for r in range(4)])
    assert data.correct[0, 1].tolist() == [1, 0, 1, 0]
    assert method.values(data)[1, 0] == pytest.approx(data.usd[1, 0].mean() / 0.5)


def test_a_technique_is_an_arm_of_its_own(tmp_path):
    write_public(tmp_path, models=("big",))
    write_public(tmp_path, models=("big",), technique="MajorityVotingMethod_3")
    assert set(method.load_public(tmp_path)["arm"]) == {"big", "big, MajorityVotingMethod_3"}
    assert set(method.load_public(tmp_path, "VanillaPromptMethod")["arm"]) == {"big"}


def test_runs_that_were_not_completed_are_an_error_or_left_out(tmp_path):
    write_public(tmp_path)
    file = tmp_path / "AIME_2024" / "big" / "VanillaPromptMethod" / "MathMatch_records" / "dataset.parquet"
    broken = pd.read_parquet(file)
    broken.loc[0, "completed"] = False
    broken.to_parquet(file)
    with pytest.raises(ValueError, match=r"1 runs were not completed, the first of .* on AIME_2024 0"):
        method.load_public(tmp_path)
    table = method.load_public(tmp_path, ignore_bad=True)
    assert len(table) == 4 * 3 * 4 - 1
    of = table[table["task"] == "AIME_2024"]
    with pytest.raises(ValueError, match="3 of 4 runs of problem 0"):
        method.attempts(of.drop(columns="usd"), of["usd"].to_numpy())
    data = method.attempts(of.drop(columns="usd"), of["usd"].to_numpy(), ignore_bad=True)
    assert data.problems == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost_per_prompt_token": -1e-6}, "a price cannot be negative: -1e-06"),
        ({"metric_score": 0.5}, r"a score must be 0 or 1, not 0\.5"),
    ],
)
def test_bad_public_records(tmp_path, change, message):
    write_public(tmp_path, change=change)
    with pytest.raises(ValueError, match=message):
        method.load_public(tmp_path)


def test_absent_or_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no <metric>_records"):
        method.load_public(tmp_path)
    write_public(tmp_path)
    with pytest.raises(ValueError, match="no records of technique 'TALE'"):
        method.load_public(tmp_path, "TALE")
    file = next(tmp_path.rglob("MathMatch_records/dataset.parquet"))
    pd.read_parquet(file).drop(columns="metric_score").to_parquet(file)
    with pytest.raises(ValueError, match="lacks the columns metric_score"):
        method.load_public(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: method.break_even(-1.0, 2.0), "costs of at least 0"),
        (lambda: method.break_even(1.0, 0.0), "positive human cost"),
        (lambda: method.unsolved_at_most(3.0, 2.0), r"lies in 0\.\.2"),
        (lambda: method.stored_windows(3, 4), "a vote of 4 needs as many runs, not 3"),
        (lambda: method.fresh_windows(8, 3, 3), "3 votes of 3 need 9 runs, not 8"),
        (lambda: method.retries(np.zeros(3), np.ones(3), 5, np.random.default_rng(0)), "no run succeeded"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_model_among_the_classes():
    with pytest.raises(KeyError, match="no attempts of 'huge'; there are: m0, m1, m2"):
        method.winner_shares(study(0), {"a": ["huge"]}, 1.0, 2)
