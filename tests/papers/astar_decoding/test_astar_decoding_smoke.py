"""All stages in the smoke profile, the notebook with them, and verdicts that follow the costs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.generation import records
from common.run import ROOT, compose, run

SLUG = "astar_decoding"
HEADLINE = ("a_star", "a_star_budget", "particle_filter", "beam")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    for stage in ("reasoner_base", "reasoner_small", "reasoner_large", "prm"):
        run("reasoners", stage, ["profile=smoke", "device=cpu"], root=folder)
    run(SLUG, "infer", ["profile=smoke"], root=folder)
    return folder


@pytest.fixture(scope="module")
def written(root):
    return root / "artifacts" / "smoke" / SLUG / "infer"


@pytest.mark.slow
def test_untrained_policies_miss_their_gates_and_say_so(root, missing_outputs):
    out = run(SLUG, "figures", ["profile=smoke"], root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 8)]
    assert "gate: greedy accuracy of base/chain_hard measured" in claims["c1"]["reason"]
    assert "large/countdown" in claims["c3"]["reason"]
    assert claims["c7"]["verdict"] == "reproduced"
    assert {p.stem for p in (out / "figures").glob("*.png")} == {"frontiers", "difficulty", "tree", "robustness"}
    run(SLUG, "notebook", ["profile=smoke"], root=root)
    assert (root / "results" / "smoke" / SLUG / "notebook.ipynb").exists()


@pytest.mark.slow
def test_the_solutions_run(root, tmp_path):
    from common.reporting.notebook import execute

    target = tmp_path / "solutions.ipynb"
    execute(ROOT / "notebooks" / "solutions" / f"{SLUG}.ipynb", target, {"profile": "smoke", "seed": 0}, root=root)
    assert target.exists()


@pytest.mark.slow
def test_costs_agree_with_the_records_and_with_what_was_visited(written):
    cfg = compose(SLUG, "infer", ["profile=smoke"])
    costs, pool = pd.read_csv(written / "costs.csv"), pd.read_csv(written / "pool.csv")
    rows = records.read(written / "records.parquet")
    rows["tokens"] = rows["output_tokens"] + rows["discarded_tokens"]
    for task in cfg.tasks:
        for arm in HEADLINE:
            own = costs[(costs["task"] == task) & (costs["arm"] == arm) & (costs["seed"] == 0)]
            for n, group in own.groupby("n"):
                mine = rows[(rows["task"] == task) & (rows["arm"] == f"{arm}@{n}") & (rows["seed"] == 0)]
                assert mine["tokens"].tolist() == group["tokens"].tolist()
        samples = rows[(rows["task"] == task) & (rows["arm"] == f"pool@{max(cfg.ns[task])}")]
        assert samples["output_tokens"].tolist() == pool[pool["task"] == task]["tokens"].tolist()
    nodes = pd.read_csv(written / "nodes.csv", keep_default_na=False)
    for (task, problem), tree in nodes.groupby(["task", "problem_id"]):
        own = costs[(costs["task"] == task) & (costs["arm"] == "a_star") & (costs["seed"] == 0)]
        row = own[own["problem_id"] == problem].sort_values("n").iloc[-1]
        assert len(tree) == row["passes"] - (row["ended"] == "finish")
        assert (tree["copies"] - 1).sum() == row["duplicates"]
        assert tree["tokens"].sum() <= row["tokens"]


@pytest.mark.slow
def test_two_workers_write_the_same(root, written, tmp_path):
    given = ["profile=smoke", "tasks=[countdown]", f"reasoners={root}/artifacts/smoke/reasoners"]
    one, two = (
        run(SLUG, "infer", [*given, f"workers={count}"], root=tmp_path / str(count), tracked=False) for count in (1, 2)
    )
    for name in ("costs.csv", "pool.csv", "nodes.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    costs = pd.read_csv(written / "costs.csv")
    alone = costs[costs["task"] == "countdown"].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(one / "costs.csv"), alone, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cheap", [True, False])
def test_verdicts_follow_the_costs(root, written, cheap):
    """The accuracy of every method rises alike with N; A* pays a quarter of the others' costs, or four times."""
    files = {name: (written / name).read_bytes() for name in ("costs.csv", "pool.csv", "gates.json")}
    costs, pool = pd.read_csv(written / "costs.csv"), pd.read_csv(written / "pool.csv")
    random, factor = np.random.default_rng(0), 0.25 if cheap else 4.0
    chance, luck = {1: 0.2, 2: 0.8}, random.random(240)
    many = pd.concat([costs.assign(problem_id=costs["problem_id"] + 4 * i) for i in range(60)])
    many["correct"] = luck[many["problem_id"]] < many["n"].map(chance)
    many.loc[many["arm"] == "large greedy", "correct"] = luck[many["problem_id"][many["arm"] == "large greedy"]] < 0.5
    many["tokens"] = 100.0 * many["n"] * np.where(many["arm"].str.contains("a_star"), factor, 1.0)
    many["passes"] = 10.0 * many["n"] * np.where(many["arm"].str.contains("a_star"), factor, 1.0)
    twice = pd.concat([pool.assign(problem_id=pool["problem_id"] + 4 * i) for i in range(60)])
    twice["tokens"], twice["steps"] = 100, 10
    right = luck[twice["problem_id"]] < np.where(twice["sample_id"] == 0, 0.2, 0.8)
    twice["correct"], twice["score"] = right, np.where(twice["sample_id"] == 0, 0.1, 0.9)
    many.to_csv(written / "costs.csv", index=False)
    twice.to_csv(written / "pool.csv", index=False)
    (written / "gates.json").write_text(json.dumps(dict.fromkeys(json.loads(files["gates.json"]))))
    try:
        out = run(SLUG, "figures", ["profile=smoke", "resamples=60"], root=root)
    finally:
        for name, content in files.items():
            (written / name).write_bytes(content)
    claims = json.loads((Path(out) / "claims.json").read_text())
    for claim in ("c1", "c2"):
        assert claims[claim]["verdict"] == ("reproduced" if cheap else "not reproduced"), claims[claim]
    assert claims["c3"]["verdict"] == "reproduced"
