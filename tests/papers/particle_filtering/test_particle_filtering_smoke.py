"""All stages in the smoke profile in one process, and the verdicts with the gates opened."""

import json

import pandas as pd
import pytest

from common.generation import records
from common.reporting.notebook import execute
from common.run import ROOT, compose, run
from papers.particle_filtering import arms

SLUG = "particle_filtering"
SMOKE = ["profile=smoke", "device=cpu"]
OPEN = ["gates=[0.0,1.0]"]


@pytest.fixture(scope="module")
def root(smoke_stages):
    return smoke_stages(SLUG, "reasoner_small", "reasoner_base", "reasoner_large", "prm")


@pytest.mark.slow
def test_untrained_models_miss_the_gate_and_say_so(root, missing_outputs):
    out = run(SLUG, "figures", SMOKE, root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 15)]
    assert "gate: greedy accuracy of base/countdown measured" in claims["c1"]["reason"]
    assert claims["c13"]["measured"]["distance of the mean of Zhat times the estimate from the exact sum"]["value"] < 4


@pytest.mark.slow
def test_every_claim_is_measured_where_the_gates_let_it(root):
    gates = root / "artifacts" / "smoke" / SLUG / "infer" / "gates.json"
    kept, runs = gates.read_text(), gates.with_name("runs.parquet")
    measured_runs = runs.read_bytes()
    gates.write_text(json.dumps(dict.fromkeys(json.loads(kept))))
    try:
        hollow = json.loads((run(SLUG, "figures", [*SMOKE, *OPEN], root=root) / "claims.json").read_text())["c2"]
        frame = pd.read_parquet(runs)  # to pass a large policy that is no better than the small one takes no search
        frame.loc[(frame["size"] == "large") & (frame["method"] == "greedy"), "correct"] = True
        frame.to_parquet(runs, index=False)
        out = run(SLUG, "figures", [*SMOKE, *OPEN], root=root)
    finally:
        gates.write_text(kept)
        runs.write_bytes(measured_runs)
    assert "needed above that of small" in hollow["reason"]
    claims = json.loads((out / "claims.json").read_text())
    measured = [id_ for id_, claim in claims.items() if claim["verdict"] != "not testable here"]
    assert measured == ["c1", "c2", "c4", "c5", "c6", "c7", "c8", "c10", "c11", "c12", "c13"]
    for name in ("curves", "genealogy", "noise", "ablations"):
        assert (out / "figures" / f"{name}.svg").stat().st_size > 2000
    curves = pd.read_csv(out / "tables" / "curves.csv")
    one = curves[curves["N"] == 1].groupby("task")["accuracy"].nunique()
    assert (one <= 2).all()  # one sample of any method, and greedy


@pytest.mark.slow
def test_records_and_costs(root):
    cfg = compose(SLUG, "infer", SMOKE)
    folder = root / "artifacts" / "smoke" / SLUG / "infer"
    rows, runs = records.read(folder / "records.parquet"), pd.read_parquet(folder / "runs.parquet")
    listed = arms.listed(cfg)
    assert len(runs) == sum(arm.problems for arm in listed)
    assert len(rows) == sum(arm.problems * (arm.n if arm.method == "pool" else 1) for arm in listed)
    spent = rows.groupby(["arm", "seed", "task"])[["output_tokens", "discarded_tokens"]].sum().sum(axis=1)
    assert spent.to_dict() == runs.groupby(["arm", "seed", "task"])["tokens"].sum().to_dict()
    filters = runs[(runs["method"] == "pf") & (runs["task"] == "countdown")]
    assert (filters["passes"] <= filters["n"] * 12).all()  # 12 steps at most
    assert (runs[runs["method"] == "bon"]["passes"] >= runs[runs["method"] == "bon"]["n"]).all()


@pytest.mark.slow
def test_the_notebook_runs(root, tmp_path):
    run(SLUG, "figures", SMOKE, root=root)
    execute(ROOT / "notebooks" / f"{SLUG}.ipynb", tmp_path / "n.ipynb", {"profile": "smoke", "seed": 0}, root=root)
    assert "genealogy" in (tmp_path / "n.ipynb").read_text()
