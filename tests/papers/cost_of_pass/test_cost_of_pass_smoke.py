"""All stages in the smoke profile, costs against calls, verdicts that follow the records, and the paper profile."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.costs import idealized_runtime as clock
from common.data import sources
from common.generation import records
from common.run import ROOT, compose, run
from papers.cost_of_pass import analysis, experiment

SLUG = "cost_of_pass"
REASONERS = ("reasoner_small", "reasoner_base", "reasoner_large", "prm")


@pytest.fixture(scope="module")
def root(smoke_stages):
    return smoke_stages(SLUG, *REASONERS)


@pytest.fixture(scope="module")
def written(root):
    return root / "artifacts" / "smoke" / SLUG / "infer"


def found_in(root):
    return analysis.load(compose(SLUG, "figures", ["profile=smoke", f"root={root}"]))


@pytest.mark.slow
def test_untrained_models_miss_the_gates_and_say_so(root, missing_outputs):
    out = run(SLUG, "figures", ["profile=smoke"], root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 9)]
    assert "gate: accuracy of the best lightweight model on add2 measured" in claims["c1"]["reason"]
    assert "API calls" in claims["c4"]["reason"]
    bounds = pd.read_csv(out / "tables" / "bounds.csv")
    assert bounds["unsolved_at_most"].max() == pytest.approx(15.33 / 20)
    assert {file.stem for file in (out / "figures").glob("*.png")} == {
        "scatter", "releases", "essential", "techniques",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [SLUG, f"solutions/{SLUG}"])
def test_notebooks_run(name, root, tmp_path, monkeypatch):
    from common.reporting.notebook import execute

    run(SLUG, "figures", ["profile=smoke"], root=root)
    monkeypatch.setenv("FRUGAL_ROOT", str(root))  # `execute` sets it, and it must not stay
    execute(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "out.ipynb", {"profile": "smoke", "seed": 0}, root=root)
    assert (tmp_path / "out.ipynb").exists()


@pytest.mark.slow
def test_a_run_costs_the_sum_of_its_calls(written):
    """Tokens of records and of calls agree, also for reviews (two calls) and long chains (three)."""
    runs, calls = records.read(written / "records.parquet"), pd.read_parquet(written / "calls.parquet")
    runs["written"] = runs["output_tokens"] + runs["discarded_tokens"]
    calls = calls[~calls["arm"].str.endswith(", judge")]
    summed = calls.groupby(analysis.RUN)[["prompt_tokens", "output_tokens"]].sum()
    own = runs.set_index(analysis.RUN)[["prompt_tokens", "written"]].loc[summed.index]
    assert len(summed) == len(runs)
    assert own["prompt_tokens"].tolist() == summed["prompt_tokens"].tolist()
    assert own["written"].tolist() == summed["output_tokens"].tolist()
    counts = calls.groupby(analysis.RUN).size()
    for arm, task, expected in (
        ("direct-s", "add2", 1), ("direct-s, self-refine", "add2", 2), ("direct-s, self-refine", "chain8", 6),
        ("reason-m", "chain8", 3),
    ):  # fmt: skip
        assert set(counts.loc[(arm, task)]) == {expected}
    first = runs[(runs["arm"] == "direct-s") & (runs["task"] == "add2")].sort_values(["problem_id", "sample_id"])
    again = runs[runs["arm"].eq("direct-s, self-refine") & (runs["task"] == "add2")]
    again = again.sort_values(["problem_id", "sample_id"])
    assert again["discarded_tokens"].tolist() == first["output_tokens"].tolist()
    assert (again["prompt_tokens"].to_numpy() > 2 * first["prompt_tokens"].to_numpy()).all()


@pytest.mark.slow
def test_techniques_cost_the_sum_of_their_calls(root):
    found = found_in(root)
    for price in analysis.PRICES:
        for k in (3, 4):
            base, both = analysis.technique(found, "add2", f"vote of {k}, stored", price)
            assert both.usd[3:].sum() == pytest.approx(k * base.usd.sum())
            _, fresh = analysis.technique(found, "add2", f"vote of {k}, fresh", price)
            drawn = found.attempts("add2", price, True).usd[..., : k * 4]
            assert fresh.usd[3:].sum() == pytest.approx(drawn.sum())
        base, best = analysis.technique(found, "countdown", "best of 4", price)
        reading = found.judge.xs("countdown", level="task")[price].sum()
        assert reading > 0
        assert best.usd[1].sum() == pytest.approx(4 * (base.usd.sum() + reading))
    assert analysis.technique(found, "add2", "best of 4") is None


@pytest.mark.slow
def test_prices_by_hand(root):
    found = found_in(root)
    cfg, sizes = found.cfg, {"direct-s": 1000, "prm": 3000}
    calls = pd.DataFrame({"model": ["direct-s half", "prm"], "prompt_tokens": [8, 20], "output_tokens": [4, 0]})
    profiles = {"direct-s": clock.Profile(0.01, {8: 0.05}), "prm": clock.Profile(0.02, {20: 0.1})}
    priced = analysis.priced(cfg, calls, {"direct-s half": "direct-s"}, sizes, profiles)
    assert priced["parameters"].tolist() == pytest.approx([(2 + 4) * 1000 * 1e-12, 5 * 3000 * 1e-12])
    assert priced["flat"].tolist() == pytest.approx([6 * 3e-7, 5 * 3e-7])
    assert priced["measured"].tolist() == pytest.approx([0.08 * 2 / 3600, 0.1 * 2 / 3600])


@pytest.mark.slow
def test_every_release_is_asked_what_it_may_be_asked(root, written):
    cfg = compose(SLUG, "infer", ["profile=smoke"])
    runs = records.read(written / "records.parquet")
    for entry in cfg.zoo:
        own = runs[runs["arm"] == entry.name]
        assert set(own["task"]) == set(entry.tasks or [task.name for task in cfg.tasks])
        for task in cfg.tasks:
            if task.name in set(own["task"]):
                assert (own["task"] == task.name).sum() == task.problems * cfg.runs
    releases = pd.read_csv(written / "releases.csv").set_index("name")
    flops = releases["training_flops"]
    assert flops["direct-s half"] == pytest.approx(flops["direct-s"] / 2)
    assert flops["reason-m early"] <= flops["reason-m untaught"] < flops["reason-m"]
    assert json.loads((written / "sizes.json").read_text())["prm"] > 0


@pytest.mark.slow
def test_two_workers_and_another_order_write_the_same(root, written, tmp_path):
    given = ["profile=smoke", f"artifacts={root}/artifacts/smoke/{SLUG}", f"reasoners={root}/artifacts/smoke/reasoners"]
    again = run(SLUG, "infer", [*given, "workers=2"], root=tmp_path, tracked=False)
    for name in ("calls.parquet", "records.parquet"):
        one, two = (
            pd.read_parquet(folder / name).drop(columns="seconds", errors="ignore") for folder in (written, again)
        )
        pd.testing.assert_frame_equal(one, two)


@pytest.mark.slow
def test_a_draw_does_not_depend_on_the_batch(root, tmp_path, written):
    given = ["profile=smoke", f"artifacts={root}/artifacts/smoke/{SLUG}", f"reasoners={root}/artifacts/smoke/reasoners"]
    again = run(SLUG, "infer", [*given, "rows=3"], root=tmp_path, tracked=False)
    one, two = (records.read(folder / "records.parquet") for folder in (written, again))
    same = (one["answer"].fillna("") == two["answer"].fillna("")) & (one["output_tokens"] == two["output_tokens"])
    assert same.mean() > 0.99  # float32: a draw next to the edge of a token may fall on its other side


def planted(frame, sizes):
    """Records in which the claims hold: small models do sums, the large one knows, reasoning does long chains."""
    chances = {
        ("direct-s", "basic"): 0.9, ("direct-m", "basic"): 0.95, ("direct-l", "basic"): 0.95, ("reason", "basic"): 0.95,
        ("direct-l", "knowledge"): 0.95, ("reason", "complex"): 0.9,
    }  # fmt: skip
    kinds = {"add2": "basic", "table1": "basic", "kb1": "knowledge", "chain8": "complex", "countdown": "complex"}
    random = np.random.default_rng(0)
    out = []
    for (arm, task), group in frame.groupby(["arm", "task"], sort=False):
        owner = "reason" if str(arm).startswith("reason") else str(arm).split(",")[0].split()[0]
        chance = chances.get((owner, kinds[str(task)]), 0.0)
        out.append(group.assign(correct=random.random(len(group)) < chance))
    return pd.concat(out).loc[frame.index]


@pytest.mark.slow
@pytest.mark.parametrize("effect", [True, False])
def test_verdicts_follow_the_records(root, written, effect):
    """With the effect planted, and with classes whose abilities are turned round."""
    names = ("records.parquet", "calls.parquet", "sizes.json")
    kept = {name: (written / name).read_bytes() for name in names}
    runs, calls = records.read(written / "records.parquet"), pd.read_parquet(written / "calls.parquet")
    shifted = [(i, frame) for i in range(8) for frame in (runs, calls)]
    many = [
        pd.concat([f.assign(problem_id=f["problem_id"] + 100 * i) for i, f in shifted if f is of], ignore_index=True)
        for of in (runs, calls)
    ]
    many[0] = planted(many[0], None)
    if not effect:
        many[0]["correct"] = ~many[0]["correct"]
    calls = many[1]
    calls.loc[calls["arm"].str.startswith("reason"), "output_tokens"] = 30
    calls.loc[calls["arm"].str.startswith("direct"), "output_tokens"] = 3
    many[0].loc[many[0]["arm"].str.startswith("reason"), "output_tokens"] = 90
    many[0].loc[many[0]["arm"].str.startswith("direct"), "output_tokens"] = 9
    sizes = {"direct-s": 3e4, "direct-m": 5e4, "direct-l": 4e5, "reason-s": 1e5, "reason-m": 3e5, "reason-l": 8e5}
    records.write(written / "records.parquet", many[0])
    calls.to_parquet(written / "calls.parquet", index=False)
    (written / "sizes.json").write_text(json.dumps(sizes | {"prm": 3e5}))
    try:
        out = run(SLUG, "figures", ["profile=smoke"], root=root)
    finally:
        for name, content in kept.items():
            (written / name).write_bytes(content)
    claims = json.loads((Path(out) / "claims.json").read_text())
    verdicts = {name: claims[name]["verdict"] for name in ("c1", "c2", "c3", "c5")}
    if effect:
        assert set(verdicts.values()) == {"reproduced"}, {name: claims[name] for name in verdicts}
    else:
        assert verdicts["c1"].startswith("not"), claims["c1"]
        assert "gate" in claims["c2"]["reason"]
    for name in ("c7", "c8"):
        parts = claims[name]["measured"].values()
        assert all(part["verdict"] == "reproduced" for part in parts if "exact" in part["needs"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("votes=[3,9]", r"votes=\[3, 9\] lie in 2\.\.runs"),
        ("temperature=0.0", r"temperature=0\.0 must be positive"),
        ("prices.prompt_share=-0.5", "prices must not be negative"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        experiment.check(compose(SLUG, "infer", ["profile=smoke", change]))


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("zoo", "class", "huge", "class='huge' is unknown; known: lightweight, large, reasoning"),
        ("zoo", "of", "nobody", "of='nobody' is not in the zoo"),
        ("zoo", "techniques", ["magic"], r"techniques=\['magic'\] are unknown; known: fresh, refine, judge"),
        ("zoo", "name", "direct-m", "a name stands twice"),
        ("tasks", "human_usd", 0.0, r"human_usd=0\.0 positive"),
        ("tasks", "problems", 1, "problems=1 must be at least 2"),
    ],
)
def test_bad_entries(place, key, value, message):
    cfg = compose(SLUG, "infer", ["profile=smoke"])
    cfg[place][0][key] = value
    with pytest.raises(ValueError, match=message):
        experiment.check(cfg)


def test_weights_of_an_unknown_kind():
    from papers.cost_of_pass import zoo

    cfg = compose(SLUG, "infer", ["profile=smoke"])
    cfg.zoo[0].weights = "cloud/x"
    with pytest.raises(ValueError, match=r"weights are train/\.\.\., reasoners/\.\.\. or hub:\.\.\., not 'cloud/x'"):
        zoo.weights(cfg, cfg.zoo[0])


@pytest.mark.slow
def test_the_paper_profile_on_checkpoints_and_data_in_hub_format(checkpoint, tmp_path, monkeypatch):
    data = tmp_path / "data"
    own = {name: dict(entry) for name, entry in sources.catalogue().items()}
    gsm = [{"question": f"{i} hens. How many legs?", "answer": f"2 * {i}\n#### {2 * i}"} for i in range(6)]
    math = [
        {"problem": f"What is {i}+1?", "solution": f"\\boxed{{{i + 1}}}", "answer": str(i + 1), "level": 1,
         "subject": "Algebra", "unique_id": str(i)}
        for i in range(6)
    ]  # fmt: skip
    for name, rows in (("gsm8k/test.jsonl", gsm), ("math500/test.jsonl", math)):
        file = data / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        own[name]["sha256"] = sources.digest(file)
    monkeypatch.setattr(sources, "catalogue", lambda: own)
    zoo = [
        f"{{name: {name}, class: {kind}, style: chat, weights: 'hub:{checkpoint}', of: {name}, frontier: true, "
        "tasks: null, techniques: []}"
        for name, kind in (("s", "lightweight"), ("l", "large"), ("r", "reasoning"))
    ]
    given = [
        "profile=paper", "device=cpu", "network=false",
        f"data_root={data}", f"zoo=[{','.join(zoo)}]", "runs=4", "hub.max_new_tokens=6",
        "timing.prompts=[4,8]", "timing.outputs=[1,16]", "timing.rounds=2", "resamples=5", "retries=5",
        "tasks=[{name: gsm8k, class: basic, problems: 3, human_usd: 3.5, gate: {large: 0.5}},"
        "{name: math500, class: complex, problems: 2, human_usd: 12.0, gate: {reasoning: 0.3}}]",
    ]  # fmt: skip
    for stage in ("train", "infer", "figures"):
        out = run(SLUG, stage, given, root=tmp_path)
    claims = json.loads((out / "claims.json").read_text())
    assert "no knowledge task in profile paper" in claims["c2"]["reason"]
    assert "gate" in claims["c1"]["reason"]
    table = pd.read_csv(out / "tables" / "t3.csv")
    assert set(table["model"]) == {"s", "l", "r", "human"}


@pytest.mark.slow
def test_records_of_the_paper_are_read_where_they_are(root, tmp_path):
    rows = [
        {"model_name": m, "task_name": "GSM8K", "tt_method_name": "VanillaPromptMethod", "input_idx": p,
         "num_prompt_tokens": 10, "num_completion_tokens": 100, "cost_per_prompt_token": 1e-6,
         "cost_per_completion_token": 1e-5 * (1 + i), "completed": True, "metric_name": "MathMatch",
         "metric_score": float(r % 2), "answer": "1"}
        for i, m in enumerate(("a", "b")) for p in range(2) for r in range(2)
    ]  # fmt: skip
    place = tmp_path / "cost_of_pass" / "GSM8K" / "VanillaPromptMethod" / "MathMatch_records"
    place.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(place / "dataset.parquet")
    made = f"{root}/artifacts/smoke"
    given = ["profile=smoke", f"data_root={tmp_path}", f"artifacts={made}/{SLUG}", f"reasoners={made}/reasoners"]
    out = run(SLUG, "figures", given, root=tmp_path, tracked=False)
    table = pd.read_csv(out / "tables" / "t3_public.csv")
    assert table["usd"].tolist() == pytest.approx([2 * (1e-5 + 1e-3), 2 * (1e-5 + 2e-3)])
