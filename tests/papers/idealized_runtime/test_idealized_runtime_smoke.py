"""The whole paper in the smoke profile, in one process, with the released logs and without them; the paper profile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from common.costs import idealized_runtime as ir
from common.data import sources
from common.generation import records
from common.run import run
from papers.idealized_runtime import Profile, analysis, published, verdicts

SLUG = "idealized_runtime"
LOG = f"{published.FOLDER}/logs/{published.SCENARIOS}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("smoke")
    for stage in ("reasoner_small", "reasoner_base", "reasoner_large"):
        run("reasoners", stage, ["profile=smoke", "device=cpu"], root=folder)
    run(SLUG, "infer", ["profile=smoke", "device=cpu"], root=folder)
    return folder


@pytest.fixture(scope="module")
def results(root: Path) -> Path:
    """Without the released logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FRUGAL_DATA", raising=False)
        patch.setattr("common.data.sources.DOWNLOADS", root / "nowhere")
        for stage in ("data", "figures"):
            out = run(SLUG, stage, ["profile=smoke", "device=cpu"], root=root)
    return out


@pytest.mark.slow
def test_without_the_logs_the_rest_stands(
    results: Path, root: Path, missing_outputs: Callable[[str, Path], list[str]]
) -> None:
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((results / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 9)]
    assert (claims["c6"]["verdict"], claims["c6"]["basis"]) == ("reproduced", "same")
    for claim in ("c1", "c2", "c3", "c4", "c5", "c7"):
        assert claims[claim]["verdict"] == "not testable here"
        assert "data not present" in claims[claim]["reason"]
        assert "make data SOURCE=idealized_runtime/logs/" in claims[claim]["reason"]
    assert len(claims["c3"]["measured"]) == 2  # our own part is shown all the same
    tables = {path.stem for path in (results / "tables").glob("*.csv")}
    assert {"t1", "t4", "own", "cheap", "cost_aware", "costs", "apis", "tradeoff"} <= tables
    assert not {"t2", "t3", "t5", "helm", "denoised", "fronts"} & tables
    origins = {s["name"]: s["origin"] for s in json.loads((results / "provenance.json").read_text())["sources"]}
    assert set(origins.values()) == {"embedded"}
    assert len(origins) == 19
    for name in ("linear", "ranks", "tradeoff"):
        assert (results / "figures" / f"{name}.svg").stat().st_size > 5000


@pytest.mark.slow
def test_with_the_logs_every_published_number_is_there(root: Path, results: Path, tmp_path: Path) -> None:
    if sources.offline_origin(LOG) == "embedded":
        pytest.skip("the released logs are not here")
    (tmp_path / "artifacts" / "smoke" / SLUG).mkdir(parents=True)
    for folder in (f"{SLUG}/infer", "reasoners"):
        (tmp_path / "artifacts" / "smoke" / folder).symlink_to(root / "artifacts" / "smoke" / folder)
    for stage in ("data", "figures"):
        out = run(SLUG, stage, ["profile=smoke", "device=cpu"], root=tmp_path)
    claims = json.loads((out / "claims.json").read_text())
    assert {claims[c]["verdict"] for c in ("c2", "c6", "c7")} == {"reproduced"}
    of_same = [
        part for claim in claims.values() for name, part in claim["measured"].items()
        if name.startswith(("davinci over", "raw over", "generated", "slope on", "released", "Kendall tau of raw"))
    ]  # fmt: skip
    assert len(of_same) >= 3 + 4 + 1 + 2 + 9 + 5 + 2
    assert {part["verdict"] for part in of_same} == {"reproduced"}
    assert "gate: accuracy" in claims["c8"]["reason"]
    assert len(pd.read_csv(out / "tables" / "helm.csv")) == 8


@pytest.mark.slow
def test_every_answer_is_in_the_common_schema(root: Path) -> None:
    infer = root / "artifacts" / "smoke" / SLUG / "infer"
    found, profiles = records.read(infer / "records.parquet"), ir.load(infer / "profiles.json")
    assert list(found.columns) == list(records.SCHEMA)
    arms = [f"{size}@{provider}" for size in ("small", "base", "large") for provider in "XYZ"]
    assert {arm: n for arm, n in found["arm"].value_counts().items() if "@" in arm} == dict.fromkeys(arms, 2)
    assert {"reasoner_small", "reasoner_base", "reasoner_large", "llama 1x32", "gpt2 2x32"} <= set(profiles)
    assert (found["seconds"] > 0).all()
    calls = pd.read_parquet(infer / "calls.parquet")
    assert set(calls["model"]) == set(arms)
    assert (calls.groupby(["model", *ir.CELL]).size() == 2).all()
    before = found.drop(columns="seconds")
    again = run(SLUG, "infer", ["profile=smoke", "device=cpu"], root=root)
    pd.testing.assert_frame_equal(records.read(again / "records.parquet").drop(columns="seconds"), before)


@pytest.mark.slow
def test_the_paper_profile_runs_offline_at_a_small_size(tmp_path: Path) -> None:
    small = ["profile=paper", "device=cpu", "network=false", "head_size=16", "vocabulary=64", "positions=64",
             "shapes=[[1,32],[2,32],[1,48],[2,48]]", "prompts=[1,8]", "outputs=[1,20]", "held_out.prompt=12",
             "held_out.output=10", "held_out.outputs=[]", "rounds=2", "stacks.layers=1", "stacks.hidden=32",
             "stacks.prompts=[4,8]", "stacks.outputs=[1,12]", "layers.hidden=32", "layers.counts=[1,2,4]",
             "layers.prompts=[4,8]", "layers.output=24", "resamples=5", "query.prompt=8",
             "round_resamples=5"]  # fmt: skip
    for stage in ("data", "infer", "figures"):
        out = run(SLUG, stage, small, root=tmp_path)
    claims = json.loads((out / "claims.json").read_text())
    assert claims["c6"]["verdict"] == "reproduced"
    assert "measures architectures alone" in claims["c8"]["reason"]
    own = pd.read_csv(out / "tables" / "own.csv")
    assert own["model"].tolist() == ["gpt2 1x32", "gpt2 2x32", "gpt2 1x48", "gpt2 2x48"]


def test_quality_of_exact_cells() -> None:
    """Cells of a profile fit it exactly, and the savings are a ratio of sums."""
    true, prompts, outputs = Profile(0.02, {1: 0.03, 64: 0.08, 512: 0.64}), (1, 64, 512), (1, 2, 8)
    both = [(p, o) for p in (*prompts, 256) for o in (*outputs, 4)]
    rows = [(p, o, float(true.seconds(p, o))) for p, o in both]
    cells = pd.DataFrame(rows, columns=[*ir.CELL, "seconds"])
    found = analysis.quality(prompts, outputs, cells)
    assert found["r_squared"] == pytest.approx(1)
    assert found["cheap_error"] == pytest.approx(0, abs=1e-12)
    assert (found["other_output"], found["other_prompt"]) == pytest.approx((0, 0), abs=1e-12)
    assert found["held_out_mean"] == pytest.approx(0, abs=1e-12)  # F(256) = F(512) / 2 is the rule, and here the truth
    seconds = cells.set_index(ir.CELL)["seconds"]
    full = sum(seconds[p, o] for p in prompts for o in outputs)
    cheap = sum(seconds[p, 1] for p in prompts) + seconds[64, 2] + seconds[64, 8]
    assert found["saving"] == pytest.approx(full / cheap)


def test_ratios_of_a_made_up_market() -> None:
    """X takes a third of Y and Z twice Y, whatever the model: what the parts of c1 and c5 see."""
    random = np.random.default_rng(0)
    work = random.uniform(1, 2, (40, 1)) * np.array([1.0, 2.0, 3.0])  # problems, sizes
    apis = [f"{size}@{provider}" for size in ("small", "base", "large") for provider in "XYZ"]
    raw = np.concatenate([work[:, [i]] * np.array([1 / 3, 1, 2]) for i in range(3)], axis=1)
    of = analysis.Market(apis, raw, raw, np.repeat(work, 3, axis=1))
    assert verdicts._ratio(of, of.raw, "Z", "Y").value == pytest.approx(2)
    assert verdicts._ratio(of, of.raw, "X", "Y").high == pytest.approx(1 / 3)
    assert verdicts._spread(of, of.raw, ["X", "Y", "Z"], least=True).value == pytest.approx(6)
    assert verdicts._spread(of, of.idealized, ["X", "Y", "Z"], least=False).high == pytest.approx(1)
