"""The whole paper in the smoke profile, and what its arms are."""

import json

import numpy as np
import pandas as pd
import pytest

from common.generation import records
from common.run import compose, run
from papers.anytime_reasoner import analysis, prior

SLUG, SMOKE = "anytime_reasoner", ["profile=smoke", "device=cpu"]


@pytest.fixture(scope="module")
def root(smoke_stages):
    return smoke_stages(SLUG, "reasoner_base", "reasoner_mixed")


@pytest.mark.slow
def test_an_untrained_start_misses_its_gate_and_says_so(root, missing_outputs):
    out = run(SLUG, "figures", SMOKE, root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 11)]
    assert "gate: the start's accuracy rises by" in claims["c1"]["reason"]
    assert claims["c10"]["verdict"] == "reproduced"
    assert claims["c9"]["measured"]["time of a step over that of GRPO"]["value"] > 0


@pytest.mark.slow
def test_every_arm_answers_at_every_budget_of_the_same_thoughts(root):
    cfg = compose(SLUG, "infer", SMOKE)
    found = records.read(root / "artifacts" / "smoke" / SLUG / "infer" / "records.parquet")
    arms = {f"{name} {budget}" for name in ("start", *cfg.arms) for budget in cfg.sweep.budgets}
    assert set(found["arm"]) == arms
    thoughts = pd.read_parquet(root / "artifacts" / "smoke" / SLUG / "infer" / "thoughts.parquet")
    one = found[(found["arm"] == "grpo 4") & (found["seed"] == 1) & (found["task"] == "chain")].set_index("problem_id")
    of = thoughts[(thoughts["arm"] == "grpo") & (thoughts["seed"] == 1) & (thoughts["task"] == "chain")]
    cut = of.set_index("problem_id")["length"].clip(upper=4)
    assert ((one["output_tokens"] - cut).between(1, 2)).all()  # an answer has at most two tokens


@pytest.mark.slow
def test_arms_of_one_seed_begin_with_the_same_thoughts(root):
    steps = pd.read_parquet(root / "artifacts" / "smoke" / SLUG / "train" / "steps.parquet")
    first = steps[steps["step"] == 1].set_index(["arm", "seed"])
    for _, lengths in first["length_mean"].groupby("seed"):
        assert lengths.nunique() == 1


@pytest.mark.slow
def test_claims_are_measured_where_the_gate_lets_them(root):
    again = run(SLUG, "figures", [*SMOKE, "gate.rise=-1.0"], root=root, tracked=False)
    claims = json.loads((again / "claims.json").read_text())
    untested = {id_ for id_, claim in claims.items() if claim["verdict"] == "not testable here"}
    assert untested <= {"c6", "c8", "c9"}
    assert set(claims["c4"]["measured"]) == {
        "uniform minus linear, two smallest budgets",
        "linear minus base, two smallest budgets",
        "largest minus smallest of the three priors, last budget",
    }


def test_what_a_baseline_leaves_of_the_variance():
    random = np.random.default_rng(0)
    level = random.random((400, 1, 1))  # questions differ, thoughts of one hardly
    rewards = level + 0.01 * random.standard_normal((400, 8, 4))
    returns, of = analysis.baselines(rewards, prior("uniform", (1, 2, 3, 4)))
    left = {name: analysis.left_over(returns, baseline) for name, baseline in of.items()}
    assert (left["V2"] < 0.01).all()
    assert left["V1"][0] == pytest.approx(1.0)  # nothing is known before the first budget
    assert (left["V1"][1:] < 0.01).all()
    constant = np.ones((3, 2, 2))
    assert np.isnan(analysis.left_over(constant, constant)).all()


def test_operations_left_are_those_not_written():
    prompt = "4A+3B*2C-5="
    texts = {"": 3, "A+3=7": 3, "A+3=7,": 2, "A+3B*2=4,": 1, "A+3=7,B*2=4,C-5=9,#": 0, "A+3=7?=7~~,B*": 2}
    assert {text: analysis.operations_left(prompt, text) for text in texts} == texts
