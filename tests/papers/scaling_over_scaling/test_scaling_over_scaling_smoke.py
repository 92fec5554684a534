"""All stages in the smoke profile, verdicts that follow the answers, and the paper profile on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.generation import records
from common.reporting.notebook import execute
from common.run import ROOT, compose, run
from papers.scaling_over_scaling import arms, experiment

SLUG = "scaling_over_scaling"
SMOKE = ["profile=smoke", "device=cpu"]


@pytest.fixture(scope="module")
def root(smoke_stages):
    return smoke_stages(SLUG, "reasoner_small", "reasoner_base", "reasoner_large", "prm")


@pytest.fixture(scope="module")
def written(root):
    return root / "artifacts" / "smoke" / SLUG / "infer"


@pytest.mark.slow
def test_untrained_models_miss_the_gate_and_say_so(root, missing_outputs):
    out = run(SLUG, "figures", SMOKE, root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 8)]
    assert claims["c3"]["verdict"] == "reproduced"
    assert claims["c5"]["verdict"] == "not testable here"
    (consistent,) = claims["c5"]["measured"].values()
    assert consistent["verdict"] == "reproduced"
    assert "gate: accuracy of one answer of small on countdown measured 0.000" in claims["c4"]["reason"]
    table = pd.read_csv(out / "tables" / "t2.csv")
    reported = next(t for t in _reported().tables if t.id == "t2")
    assert table.to_numpy().tolist() == [list(row) for row in reported.rows]
    assert {p.stem for p in (out / "figures").glob("*.png")} == {"accuracy", "saturation", "pareto"}


def _reported():
    from common.reporting.claims import load

    return load(ROOT / "papers" / SLUG / "reported.yaml")


@pytest.mark.slow
def test_records_count_what_was_read_and_written(written):
    cfg = compose(SLUG, "infer", SMOKE)
    rows, pools = records.read(written / "records.parquet"), pd.read_csv(written / "pools.csv")
    size = {arm.name: cfg.samples[arm.role] for arm in arms.listed(cfg) if arm.way == "parallel"}
    size["sequential rethinker"] = cfg.chains * (cfg.rounds + 1)
    problems = 4 * cfg.problems
    for (task, arm), group in rows.groupby(["task", "arm"]):
        assert len(group) == problems * size[arm]
        assert group["output_tokens"].between(1, cfg.max_new_tokens[task]).all()
        own = pools[(pools["task"] == task) & (pools["arm"] == arm)]
        assert own["answers"].sum() == len(group)
        assert own["right"].sum() == group["correct"].sum()
        assert (own["truncated"] <= own["answers"]).all()
        assert own["distinct"].between(1, own["answers"]).all()
    scored = (rows["arm"] == "parallel small") & rows["task"].isin(list(cfg.scored))
    assert rows[scored]["score"].between(0, 1).all()
    assert rows[~scored]["score"].isna().all()
    chains = rows[rows["arm"] == "sequential rethinker"]
    for _, group in chains.groupby(["task", "problem_id"]):
        of = group.sort_values("sample_id").reset_index(drop=True)
        for i in range(len(of)):
            first, before = of.loc[i // (cfg.rounds + 1) * (cfg.rounds + 1)], of.loc[max(i - 1, 0)]
            later = i % (cfg.rounds + 1) > 0
            grown = first["prompt_tokens"] + before["output_tokens"] + 1
            assert of.loc[i, "prompt_tokens"] == (grown if later else first["prompt_tokens"])


@pytest.mark.slow
def test_two_workers_write_the_same(root, written, tmp_path):
    given = [*SMOKE, "tasks=[countdown]", "sequential=[countdown]", f"reasoners={root}/artifacts/smoke/reasoners"]
    given.append(f"artifacts={root}/artifacts/smoke/{SLUG}")
    columns = ["arm", "problem_id", "sample_id", "prompt_tokens", "output_tokens", "answer", "correct"]
    tables = []
    for count in (1, 2):
        out = run(SLUG, "infer", [*given, f"workers={count}", f"rows={7 * count}"], root=tmp_path, tracked=False)
        tables.append(records.read(out / "records.parquet")[columns])
    pd.testing.assert_frame_equal(*tables)
    whole = records.read(written / "records.parquet")
    alone = whole[whole["task"] == "countdown"][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(tables[0], alone)


FULL = [
    "problems=25", "samples={small:64,large:8,rethinker:0}", "chains=4", "rounds=12", "fit_up_to=8", "headline=32",
    "budgets=[1,2,4,8,16,32,64]", "allocation={pilot:4,most:64,votes:3,orders:2}", "refits=20",
]  # fmt: skip


def _answered(task: str, rates: np.ndarray, large: float, mend: float, spoil: float) -> list[dict]:
    """Records of answers drawn with each problem's chance; wrong ones say one of many things."""
    random, rows = np.random.default_rng(len(task)), []

    def add(arm: str, problem: int, sample: int, right: bool) -> None:
        answer = "right" if right else f"wrong {random.integers(40)}"
        rows.append(
            {
                "arm": arm, "task": task, "problem_id": problem, "sample_id": sample, "difficulty": 1,
                "prompt_tokens": 10, "output_tokens": 20, "forwards": 1, "flops": 1, "seconds": 1, "answer": answer,
                "correct": right, "score": 0.5,
            }
        )  # fmt: skip

    for problem, p in enumerate(rates):
        for arm, n, chance in (("small", 64, p), ("large", 8, large)):
            for sample, right in enumerate(random.random(n) < chance):
                add(f"parallel {arm}", problem, sample, bool(right))
        for chain in range(4 if task != "long_chain" else 0):
            right = random.random() < p
            for round_ in range(13):
                add("sequential rethinker", problem, 13 * chain + round_, bool(right))
                right = random.random() >= spoil if right else random.random() < mend
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("alike", [True, False])
def test_verdicts_follow_the_answers(root, written, alike):
    """Problems of one chance (and a share of hopeless ones) obey the law; problems of many chances do not."""
    random = np.random.default_rng(5)
    kept = {name: (written / name).read_bytes() for name in ("records.parquet", "gates.json")}
    rows = []
    for task in ("chain", "long_chain", "countdown"):
        rates = np.where(random.random(100) < 0.8, 0.5, 0.0) if alike else random.beta(0.15, 0.6, 100)
        rows += _answered(task, rates, 0.6 if alike else 0.999, 0.8 if alike else 0.02, 0.0)
    frame = records.frame(rows, paper=SLUG, profile="smoke", seed=0, discarded_tokens=0)
    records.write(written / "records.parquet", frame)
    (written / "gates.json").write_text(json.dumps(dict.fromkeys(json.loads(kept["gates.json"]), "no judge")))
    try:
        out = run(SLUG, "figures", [*SMOKE, *FULL], root=root)
    finally:
        for name, content in kept.items():
            (written / name).write_bytes(content)
    claims = json.loads((Path(out) / "claims.json").read_text())
    parallel = [part for name, part in claims["c2"]["measured"].items() if name.startswith("parallel")]
    if alike:
        assert [claims[c]["verdict"] for c in ("c1", "c6")] == ["reproduced"] * 2, [claims["c1"], claims["c6"]]
        assert parallel[0]["value"] < 0.02
        assert claims["c7"]["verdict"] != "reproduced"  # equal problems differ by luck alone
    else:
        assert [claims[c]["verdict"] for c in ("c1", "c6")] == ["not reproduced"] * 2, [claims["c1"], claims["c6"]]
        assert parallel[0]["value"] > 0.02
        assert claims["c7"]["measured"]["Spearman correlation over problems"]["value"] > 0.3
    table = pd.read_csv(Path(out) / "tables" / "held_out.csv")
    hit = table[table["mode"] == "hit@N"].groupby("law")["log_likelihood"].sum()
    assert bool(hit["beta-binomial"] > hit["geometric"]) is (not alike)
    allocation = pd.read_csv(Path(out) / "tables" / "allocation.csv")
    fixed = allocation[allocation["rule"] == "fixed N = 64"]
    assert (fixed["answers"] == 64).all()
    assert (fixed["tokens"] == 64 * 20).all()
    assert (allocation["answers"] <= 64).all()


@pytest.mark.slow
def test_the_notebook_and_the_solutions_run(root, tmp_path):
    run(SLUG, "figures", SMOKE, root=root)
    for name in (SLUG, f"solutions/{SLUG}"):
        target = tmp_path / "n.ipynb"
        execute(ROOT / "notebooks" / f"{name}.ipynb", target, {"profile": "smoke", "seed": 0}, root=root)
        assert target.exists()


@pytest.mark.slow
def test_the_paper_profile_asks_checkpoints_of_the_hub(checkpoint, tmp_path, monkeypatch):
    from common.tasks import benchmark

    row = {"problem": "What is $2+2$?", "solution": "\\boxed{4}.", "answer": "4", "level": 1}
    rows = [row | {"problem": f"What is $2+{i}$?"} for i in range(4)]
    monkeypatch.setattr(benchmark, "rows", lambda name, root, network: rows)
    tiny = ["profile=paper", "device=cpu", "network=false", "problems=4", "max_new_tokens.math500=6", "rounds=2"]
    tiny += ["samples={small:16,large:2,rethinker:0}", "fit_up_to=4", "budgets=[1,2,4,8,16]", "headline=8"]
    tiny += ["allocation.most=16", f"grounds.math500.small={checkpoint}", f"grounds.math500.large={checkpoint}"]
    for stage in ("train", "infer", "figures"):
        out = run(SLUG, stage, tiny, root=tmp_path)
    claims = json.loads((out / "claims.json").read_text())
    assert claims["c3"]["verdict"] == "reproduced"
    assert "small on math500" in claims["c7"]["reason"] or "interior p" in claims["c7"]["reason"]
    cfg = compose(SLUG, "infer", [*tiny, f"root={tmp_path}"])
    own = arms.ground(cfg, "math500", "rethinker")
    (first,), last = own.decode([own.first[0]]), own.decode([own.again(0, own.first[1])])[0]
    assert cfg.told.first in first
    assert cfg.told.again in last
    assert own.problems[1].prompt in last  # what stood for its last answer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budgets=[1,2,3]"], r"budgets=\[1, 2, 3\] must be doublings of 1"),
        (["budgets=[1,2]"], "at least three of them"),
        (["budgets=[1,2,4,8,16,32,64,128]"], "exceed the samples.small=64"),
        (["fit_up_to=1"], "fit_up_to=1 must be at least 2"),
        (["fit_up_to=33"], "at most half of samples.small=64"),
        (["headline=33"], r"headline=33 must lie in 1\.\.32"),
        (["chains=3"], "chains=3 must be even"),
        (["rounds=0"], "rounds=0 at least 1"),
        (["samples.large=1"], "need at least 2 each"),
        (["temperature=0.0"], "temperature=0.0 must be positive"),
        (["epsilons=[0.0]"], r"epsilons=\[0.0\] must lie in \(0, 1\)"),
        (["allocation.pilot=65"], "1 <= pilot <= most <= samples.small=64"),
        (["problems=0"], "a task needs at least 2 problems"),
        (["sequential=[sudoku]"], r"sequential=\['sudoku'\]: sudoku not in tasks="),
    ],
)
def test_settings_out_of_range_are_named_before_any_model_is_loaded(words, message):
    with pytest.raises(ValueError, match=message):
        experiment.check(compose(SLUG, "infer", ["profile=cpu", *words]))


def test_a_profile_without_a_model_says_so():
    cfg = compose(SLUG, "infer", ["profile=cpu", "tasks=[math500]"])
    with pytest.raises(ValueError, match=r"grounds.math500.small names no model in profile cpu"):
        arms.source_of(cfg, "math500", "small")
