"""All stages in the smoke profile in one process, and the analysis on counts of a family that passes the gate."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.generation import records
from common.run import compose, run

SLUG = "inference_flaws"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    for stage in ("train", "infer"):
        run(SLUG, stage, ["profile=smoke"], root=folder)
    return folder


@pytest.mark.slow
def test_untrained_models_miss_the_gate_and_say_so(root, missing_outputs):
    out = run(SLUG, "figures", ["profile=smoke"], root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    assert list(claims) == [f"c{i}" for i in range(1, 10)]
    assert claims["c9"]["verdict"] == "reproduced"
    assert "gate: pass@1 of m3 measured" in claims["c1"]["reason"]
    samples = records.read(root / "artifacts" / "smoke" / SLUG / "infer" / "records.parquet")
    cfg = compose(SLUG, "infer", ["profile=smoke"])
    assert len(samples) == len(cfg.family) * cfg.tasks * cfg.samples
    assert samples["output_tokens"].between(1, 48).all()


@pytest.mark.slow
def test_stages_give_the_same_twice(root, tmp_path):
    again = run(
        SLUG, "infer", ["profile=smoke", f"artifacts={root}/artifacts/smoke/{SLUG}"], root=tmp_path, tracked=False
    )
    before = root / "artifacts" / "smoke" / SLUG / "infer"
    assert (again / "counts.csv").read_bytes() == (before / "counts.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("effect", [True, False])
def test_verdicts_follow_the_counts(root, effect):
    """A family whose false positives fall with its strength, and one whose verifier is perfect."""
    cfg, random = compose(SLUG, "figures", ["profile=smoke"]), np.random.default_rng(0)
    hard = random.uniform(0, 1, cfg.tasks)
    rows = []
    for strength, name in zip(np.linspace(0.15, 0.9, len(cfg.family)), cfg.family, strict=True):
        for task in range(cfg.tasks):
            right = random.binomial(cfg.samples, np.clip(strength + 0.3 * (0.5 - hard[task]), 0.02, 0.98))
            for tests in sorted({*cfg.coverage, cfg.base_tests}):
                gap = 0.5 * (1 - strength) * hard[task] * (tests < 289) * effect
                wrong = random.binomial(cfg.samples - right, gap)
                rows.append([name, task, tests, cfg.samples, right, wrong, 3, int(right > 2)])
    columns = ["model", "task", "tests", "samples", "right", "wrong", "distinct", "majority"]
    folder = root / "artifacts" / "smoke" / SLUG / "infer"
    kept = (folder / "counts.csv").read_bytes()
    pd.DataFrame(rows, columns=columns).to_csv(folder / "counts.csv", index=False)
    try:
        gates = ["gates.weak=[0.0,0.9]", "gates.strong=[0.5,1.0]"]
        out = run(SLUG, "figures", ["profile=smoke", *gates], root=root)
    finally:
        (folder / "counts.csv").write_bytes(kept)
    claims = json.loads((Path(out) / "claims.json").read_text())
    assert claims["c2"]["measured"]["wrong ones among the accepted"]["verdict"] == (
        "reproduced" if effect else "not reproduced"
    )
    assert claims["c1"]["measured"]["ceiling lost with the full tests"]["value"] == 0
    assert claims["c5"]["measured"]["models whose K* rises with the penalty"]["value"] == 0
    assert (claims["c3"]["measured"]["slope over our family"]["value"] > 0.01) is effect
    for name in ("ceiling", "attempts"):
        assert (Path(out) / "figures" / f"{name}.png").exists()
