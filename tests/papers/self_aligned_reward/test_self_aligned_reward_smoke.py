"""The whole paper in the smoke profile, and the answers of known kind."""

import json

import pandas as pd
import pytest

from common.run import compose, run
from common.tasks import chain
from papers.self_aligned_reward import answers

SLUG, SMOKE = "self_aligned_reward", ["profile=smoke", "device=cpu"]


@pytest.fixture(scope="module")
def root(smoke_stages):
    return smoke_stages(SLUG, "reasoner_base", "reasoner_mixed")


@pytest.mark.slow
def test_an_untrained_start_misses_its_gate_and_says_so(root, missing_outputs):
    out = run(SLUG, "figures", SMOKE, root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 9)]
    assert "gate: sampled accuracy of the start measured" in claims["c1"]["reason"]
    passes = claims["c8"]["measured"]["further forward passes a rollout"]
    assert (passes["value"], passes["verdict"]) == (1, "reproduced")


@pytest.mark.slow
def test_claims_are_measured_where_the_gate_lets_them(root):
    claims = json.loads(
        (run(SLUG, "figures", [*SMOKE, "gate=[0.0,1.0]"], root=root, tracked=False) / "claims.json").read_text()
    )
    assert [id_ for id_, claim in claims.items() if claim["verdict"] == "not testable here"] == ["c5"]


@pytest.mark.slow
def test_an_arm_without_the_reward_is_grpo(root):
    """A weight of 0 leaves the term out: the same numbers, step by step."""
    from common.rl import arms

    cfg = compose(SLUG, "train", [*SMOKE, f"root={root}", "arms.self_aligned.terms.self_aligned.weight=0.0"])
    start = root / "artifacts" / "smoke" / SLUG / "train" / "start"
    records = [arms.train_arm(cfg, name, 0, start=start).record for name in ("grpo", "self_aligned")]
    assert [row["loss"] for row in records[0].rows] == [row["loss"] for row in records[1].rows]
    steps = pd.read_parquet(root / "artifacts" / "smoke" / SLUG / "train" / "steps.parquet")
    assert "reward/self_aligned" in steps.columns


def test_answers_are_of_the_kind_that_they_say():
    problems, kinds = answers.of_kinds(0, 120, (2, 6))
    assert list(kinds) == list(answers.KINDS)
    for i, problem in enumerate(problems):
        for kind in ("concise", "padded", "verified"):
            assert chain.verify(problem, kinds[kind][i])
        assert chain.FILLER in kinds["padded"][i]
        assert chain.CHECK in kinds["verified"][i]
        assert len(kinds["concise"][i]) < min(len(kinds["padded"][i]), len(kinds["verified"][i]))
        *steps, last = kinds["last step wrong"][i].split(",")[:-1]
        assert steps == kinds["concise"][i].split(",")[:-2]
        assert last != kinds["concise"][i].split(",")[-2]
        right, wrong = (kinds[kind][i].split(",")[:-1] for kind in ("concise", "all steps wrong"))
        assert all(a[:-1] == b[:-1] and a[-1] != b[-1] for a, b in zip(right, wrong, strict=True))
        assert not chain.verify(problem, kinds["last step wrong"][i])
    other = sum(a != b for a, b in zip(kinds["of another problem"], kinds["concise"], strict=True))
    assert other == len(problems)
