"""The whole paper in the smoke profile, and its sources of data."""

import json

import pandas as pd
import pytest

from common.generation import records
from common.run import compose, run
from common.tasks import chain
from papers.klear_reasoner import analysis, sources
from papers.klear_reasoner.method import CELLS

SLUG, SMOKE = "klear_reasoner", ["profile=smoke", "device=cpu"]


@pytest.fixture(scope="module")
def root(smoke_stages):
    return smoke_stages(SLUG, "reasoner_base", "reasoner_small", "reasoner_mixed")


@pytest.mark.slow
def test_an_untrained_start_misses_its_gate_and_says_so(root, missing_outputs):
    out = run(SLUG, "figures", SMOKE, root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 11)]
    assert "gate: sampled accuracy of the start measured" in claims["c6"]["reason"]
    assert set(claims["c2"]["measured"]) == {f"top {a} minus top {b} sources" for a, b in ((1, 2), (2, 4), (4, 6))}
    cells = pd.read_csv(out / "tables" / "clip_cells.csv")
    assert set(cells["cell"]) == set(CELLS)
    assert cells["minibatch"].unique().tolist() == [1, 2]
    assert cells["share"].between(0, 1).all()


@pytest.mark.slow
def test_every_arm_and_seed_is_recorded(root):
    cfg = compose(SLUG, "infer", SMOKE)
    found = records.read(root / "artifacts" / "smoke" / SLUG / "infer" / "records.parquet")
    seeds = found[found["task"] == "chain"].groupby("arm")["seed"].unique().map(sorted).to_dict()
    for name in cfg.arms:
        expected = list(cfg.seeds) if name in cfg.headline else [0]
        assert seeds[f"{name} sampled"] == seeds[f"{name} greedy"] == expected
    steps = pd.read_parquet(root / "artifacts" / "smoke" / SLUG / "train" / "steps.parquet")
    first = steps[steps["step"] == 1].set_index(["arm", "seed"])
    # Arms of one seed see the same problems and, at first, the same policy: the same answers.
    for seed in cfg.seeds:
        lengths = first.xs(seed, level="seed")["length_mean"]
        assert lengths.nunique() == 1


@pytest.mark.slow
def test_claims_are_measured_where_the_gates_let_them(root, monkeypatch):
    monkeypatch.setattr(analysis, "_clip_gate", lambda cfg, found: None)
    file = root / "artifacts" / "smoke" / "reasoners" / "reasoner_mixed" / "metrics.json"
    kept = file.read_text()
    metrics = json.loads(kept)
    metrics["start"]["inside"] = True
    file.write_text(json.dumps(metrics))
    cells = root / "artifacts" / "smoke" / SLUG / "train" / "cells.parquet"
    counted = cells.read_bytes()
    frame = pd.read_parquet(cells)
    frame.loc[frame["cell"].isin(["high, A>0", "inside, A>0"]), ["tokens", "entropy"]] = [3, 0.5]
    frame.loc[frame["cell"] == "high, A>0", "entropy"] += 0.1 + 0.01 * frame["seed"]
    frame.to_parquet(cells, index=False)
    try:
        claims = json.loads((run(SLUG, "figures", SMOKE, root=root) / "claims.json").read_text())
    finally:
        file.write_text(kept)
        cells.write_bytes(counted)
    untested = [id_ for id_, claim in claims.items() if claim["verdict"] == "not testable here"]
    assert set(untested) <= {"c1", "c5", "c9"}
    assert claims["c4"]["verdict"] == "reproduced"


def test_sources_make_the_mistakes_that_they_say():
    clean = sources.traces(0, 400, (2, 8))
    assert all(chain.verify(p, p.answer) and chain.verify_step(p, p.answer) for p in clean)
    faulty = sources.traces(0, 400, (2, 8), wrong=0.25)
    wrong = [p for p in faulty if not chain.verify_step(p, p.answer)]
    assert 70 < len(wrong) < 130
    assert sum(chain.verify(p, p.answer) for p in wrong) < 0.2 * len(wrong)  # luck: a product forgot the mistake
    assert [p.prompt for p in faulty] == [p.prompt for p in clean]
    mixed = sources.traces(0, 400, (2, 8), shuffled=True)
    assert sum(chain.verify(p, p.answer) for p in mixed) < 200
    assert all(p.answer.endswith("$") for p in mixed)


def test_students_learn_from_what_their_arm_names():
    cfg = compose(SLUG, "train", SMOKE)
    top = sources.mixture_of(cfg, "top 4", 0)
    assert len(top) == cfg.students.traces
    easy, hard = (sources.mixture_of(cfg, f"{kind} 0", 0) for kind in ("easy", "hard"))
    assert (
        max(p.difficulty for p in easy)
        <= cfg.students.easy[1]
        < cfg.students.hard[0]
        <= min(p.difficulty for p in hard)
    )
    share = (
        sum(not chain.verify_step(p, p.answer) for p in sources.mixture_of(cfg, "overall 0.25", 0))
        / cfg.students.traces
    )
    assert 0.1 < share < 0.45
