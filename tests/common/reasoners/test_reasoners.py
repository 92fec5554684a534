"""The reasoners and their reward models in the smoke profile: what the stages write, and that it fits together."""

import json

import numpy as np
import pandas as pd
import pytest

from common.generation.steps import State
from common.models.hub import load_model, load_tokenizer
from common.models.reward import load_reward_model
from common.models.tokenizer import encode
from common.reasoners import policies, rewards, workbench
from common.run import compose, run
from common.search.particles import particle_filter
from common.search.sampling import greedy
from common.search.score import RewardModel
from common.tasks import chain, countdown

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the stages that others build on have run."""
    root = tmp_path_factory.mktemp("reasoners")
    for stage in ("reasoner_base", "reasoner_backtrack", "prm", "orm"):
        run("reasoners", stage, ["profile=smoke", "device=cpu"], root=root)
    return root / "artifacts" / "smoke" / "reasoners"


def test_tokenizer_reads_every_text_of_the_tasks_and_gives_it_back():
    words = policies.tokenizer()
    problems = countdown.generate(0, 200, (2, 5), backtrack=0.3)
    problems += [p for style in chain.STYLES for p in chain.generate(0, 100, (1, 20), style=style)]
    for problem in problems:
        ids = words.encode(problem.prompt + problem.answer)
        assert words.unk_token_id not in ids
        assert words.decode(ids) == problem.prompt + problem.answer
    texts = [problem.prompt for problem in problems]
    assert encode(words, texts) == words(texts)["input_ids"]


@pytest.mark.slow
def test_policies_are_kept_with_their_accuracies(made):
    metrics = json.loads((made / "reasoner_base" / "metrics.json").read_text())
    for name in ("final", "chain_hard", "chain_strong", "countdown"):
        model = load_model(made / "reasoner_base" / name)
        assert model.config.vocab_size == len(load_tokenizer(made / "reasoner_base" / name))
        assert name == "final" or isinstance(metrics[name]["inside"], bool)
    assert {"chain 4", "countdown 3"} <= set(metrics["final"]["accuracy"])
    assert metrics["chain_hard"]["step"] in (2, 4)
    assert json.loads((made / "reasoner_base" / "hard.json").read_text()) == {"chain": [12, 16], "countdown": 4}
    folders = [p.name for p in (made / "reasoner_backtrack").iterdir() if p.is_dir()]
    assert sorted(folders) == ["final", "start"]


@pytest.mark.slow
def test_reward_models_learn_from_labelled_prefixes(made):
    for stage in ("prm", "orm"):
        words = policies.tokenizer()
        score = RewardModel(load_reward_model(made / stage / "chain"), [words.encode("1A+2B*3=")])
        values = score([State(0, tuple(words.encode("A+2=3,")), (6,))])
        assert 0 < values[0] < 1
        assert "chain brier" in json.loads((made / stage / "metrics.json").read_text())
    labels = pd.read_parquet(made / "prm" / "labels.parquet")
    assert labels["rate"].between(0, 1).all()
    assert set(labels["task"]) == {"chain", "countdown"}
    finished = labels[labels["finished"]]
    assert finished["rate"].isin([0, 1]).all()
    assert (finished["text"] == finished["answer"]).all()
    ids, row, place = rewards.encode(labels)
    for i in range(0, len(labels), 7):
        text = labels["prompt"].iloc[i] + labels["text"].iloc[i]
        assert ids[row[i]][: place[i] + 1] == words.encode(text)
    # Reading answers whole gives what a search sees, which reads them step by step.
    model, some = load_reward_model(made / "prm" / "countdown"), labels[labels["task"] == "countdown"].iloc[::3]
    score = RewardModel(model, words(list(some["prompt"]))["input_ids"])
    states = [State(i, tuple(t), (len(t),)) for i, t in enumerate(words(list(some["text"]))["input_ids"])]
    assert rewards.predict(model, some) == pytest.approx(score(states), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["chain", "countdown"])
def test_a_workbench_searches_and_counts(made, task, monkeypatch):
    cfg = compose("reasoners", "prm", ["profile=smoke", "device=cpu", f"reasoners={made}"])
    bench = workbench.load(cfg, task, 5, weights="final")

    def search(problems, propose, score):
        return particle_filter(problems, propose, score, n=3, seed=1)

    out = bench.run(search, seed=1, stream="pf", width=3, temperature=0.8)
    assert len(out.best) == 5
    assert sum(out.tokens) == out.policy.generated_tokens
    assert 0 < sum(out.passes) <= sum(len(step["ancestors"]) for trace in out.trace for step in trace)
    rows = bench.records(out)
    assert [row["problem_id"] for row in rows] == list(range(5))
    assert sum(row["output_tokens"] + row["discarded_tokens"] for row in rows) == sum(out.tokens)
    assert sum(row["forwards"] for row in rows) == pytest.approx(out.policy.forwards)
    monkeypatch.setattr(workbench, "ROWS", 4)  # one problem at a time
    again = bench.run(search, seed=1, stream="pf", width=3, temperature=0.8)
    assert [state.tokens for state in again.best] == [state.tokens for state in out.best]
    one = bench.run(lambda problems, propose, _: greedy(problems, propose), seed=0, stream="g", width=1, greedy=True)
    assert [bench.correct(state) for state in one.best] == [row["correct"] for row in bench.records(one)]
    gold = bench.words.encode(bench.problems[0].answer)
    assert bench.correct(State(0, tuple(gold), (len(gold),), True))
    assert not bench.correct(None)


@pytest.mark.slow
def test_a_workbench_knows_its_tasks(made):
    cfg = compose("reasoners", "prm", ["profile=smoke", "device=cpu", f"reasoners={made}"])
    with pytest.raises(ValueError, match="unknown task 'sudoku'; known: chain, countdown, math500"):
        workbench.load(cfg, "sudoku", 5)
    bench = workbench.load(cfg, "chain", 2, weights="final", reward=None)
    with pytest.raises(ValueError, match="no reward model was given for chain"):
        bench.scorer()
    with pytest.raises(ValueError, match="scores partial answers, and no reward model was given"):
        bench.run(lambda p, propose, score: particle_filter(p, propose, score, n=2), seed=0, stream="x", width=2)


def test_weights_nearest_the_middle_are_kept_also_after_a_restart(tmp_path):
    from common.models.build import build

    model = build(SIZE)
    kept = policies._Kept(tmp_path / "k", "greedy", (0.2, 0.4))
    for step, accuracy in ((1, 0.9), (2, 0.35), (3, 0.1), (4, 0.36)):
        kept.offer(model, accuracy, step)
    assert (kept.step, kept.accuracy) == (2, 0.35)
    again = policies._Kept(tmp_path / "k", "greedy", (0.2, 0.4))
    again.offer(model, 0.5, 5)
    assert again.step == 2


def test_auroc_within_a_problem_against_counting():
    problems, right, scores = [0, 0, 0, 1, 1, 2], [1, 0, 0, 1, 0, 1], [0.6, 0.2, 0.6, 0.1, 0.9, 0.0]
    assert rewards.auroc_within(problems, right, scores) == (1 + 0.5 + 0) / 3  # problem 2 has no wrong answer
    assert np.isnan(rewards.auroc_within([0, 1], [1, 0], [1.0, 0.0]))


def test_quality_of_a_perfect_and_of_a_useless_scorer():
    labels = pd.DataFrame({"task": "chain", "step": 1, "rate": np.repeat([0.0, 1.0], 50)})
    perfect, table = rewards.quality(labels, labels["rate"].to_numpy())
    assert perfect["chain auroc"] == 1
    assert perfect["chain brier"] == 0
    assert table["prefixes"].sum() == 100
    useless, _ = rewards.quality(labels, np.full(100, 0.5))
    assert useless["chain auroc"] == 0.5
