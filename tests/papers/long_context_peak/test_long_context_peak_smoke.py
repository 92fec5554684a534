"""The whole paper in the smoke profile, in one process; the same code on a checkpoint in hub format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from common.generation import records
from common.run import ROOT, compose, run

SLUG, SMOKE = "long_context_peak", ["profile=smoke", "device=cpu"]
MEASURED = {"c1", "c5", "c7", "c9"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("smoke")
    run(SLUG, "infer", SMOKE, root=folder)
    return folder


@pytest.fixture(scope="module")
def results(root: Path) -> Path:
    return run(SLUG, "figures", SMOKE, root=root)


def test_every_claim_is_judged_and_every_table_and_figure_is_there(
    results: Path, root: Path, missing_outputs: Callable[[str, Path], list[str]]
) -> None:
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((results / "claims.json").read_text())
    declared = yaml.safe_load((ROOT / "papers" / SLUG / "reported.yaml").read_text())
    assert list(claims) == [claim["id"] for claim in declared["claims"]] == [f"c{i}" for i in range(1, 10)]
    for id_ in set(claims) - MEASURED:  # closed forms, whatever the profile
        assert (claims[id_]["verdict"], claims[id_]["basis"]) == ("reproduced", "same"), id_
    for id_ in MEASURED:
        assert claims[id_]["basis"] == "analogue"
        parts = claims[id_]["measured"].items()
        exact = {name: part["verdict"] for name, part in parts if name.startswith(("closed form", "texts"))}
        assert set(exact.values()) <= {"reproduced", "not reproduced"}
        assert [name for name, verdict in exact.items() if verdict != "reproduced"] == (
            ["closed form: prefill at 50K with the KV bytes of 4K, over prefill at 4K"] if id_ == "c1" else []
        )
    for table in declared["tables"]:
        assert (results / "tables" / f"{table['id']}.csv").exists()
    for name in ("context", "measured", "sessions", "compression"):
        assert (results / "figures" / f"{name}.svg").stat().st_size > 5000


def test_users_admitted_are_the_formulas_and_texts_survive_swaps(root: Path, results: Path) -> None:
    infer = root / "artifacts" / "smoke" / SLUG / "infer"
    arena, identity = pd.read_csv(infer / "arena.csv"), pd.read_csv(infer / "identity.csv")
    assert set(arena["attention"]) == {"MHA", "GQA"}
    assert (arena["admitted"] == arena["formula"]).all()
    assert arena["intact"].all()
    assert (arena["admitted"] > 1).all()
    assert (identity["same_text"] == identity["users"]).all()
    assert identity.set_index("resident")["swapped"].to_dict() == {3: False, 2: True, 1: True}
    assert not list(infer.glob("swapped*"))
    samples = records.read(infer / "records.parquet")
    assert list(samples.columns) == list(records.SCHEMA)
    assert samples["arm"].value_counts().to_dict() == {"resident 3": 3, "resident 2": 3, "resident 1": 3}
    assert samples["correct"].all()


def test_a_second_run_gives_the_same_deterministic_files(root: Path, results: Path) -> None:
    infer = root / "artifacts" / "smoke" / SLUG / "infer"

    def kept() -> dict[str, str]:
        paths = [*(infer / "closed").glob("*.csv"), infer / "arena.csv", infer / "identity.csv"]
        samples = records.read(infer / "records.parquet").drop(columns="seconds").to_csv()
        return {path.name: path.read_text() for path in paths} | {"records": samples}

    before = kept()
    assert len(before) == 13
    run(SLUG, "infer", SMOKE, root=root)
    assert kept() == before


def test_figures_say_why_decode_cannot_be_judged(root: Path, results: Path) -> None:
    out = run(SLUG, "figures", [*SMOKE, "decode.fit_above=1e6"], root=root, tracked=False)
    claims = json.loads((out / "claims.json").read_text())
    for id_ in ("c1", "c7"):
        assert claims[id_]["verdict"] == "not testable here"
        assert claims[id_]["reason"].startswith("gate: 0 caches of 999 MiB or more were measured, a line needs 4")


@pytest.mark.slow
@pytest.mark.parametrize("name", [SLUG, f"solutions/{SLUG}"])
def test_notebooks_run(name: str, root: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.reporting.notebook import execute

    monkeypatch.setenv("FRUGAL_ROOT", str(root))  # `execute` sets it, and it must not stay
    execute(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "out.ipynb", {"profile": "smoke", "seed": 0}, root=root)
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) // 2


@pytest.mark.slow
def test_paper_profile_on_a_checkpoint_in_hub_format(checkpoint: Path, tmp_path: Path) -> None:
    """The code of the paper's own size: a checkpoint, bfloat16, peak rates of the catalogue, the host as the store."""
    small = ["prefill.tokens=[8,16,32]", "prefill.compared=16", "prefill.rounds=3", "rounds=3", "cache_mib=0.001"]
    small += ["decode.kv_mib=[0.0625,0.125,0.1875,0.25]", "decode.read=32", "decode.growing_mib=[0.0625]"]
    small += ["decode.steps=1", "arena.mib=0.25", "arena.tokens=[16]", "switch.kv_mib=[0.0625,0.125,0.25]"]
    small += ["session.tokens=16", "session.output_tokens=2", "session.think_seconds=0.001", "session.repeats=3"]
    overrides = ["profile=paper", "device=cpu", "network=false", f"model.hub_id={checkpoint}", *small]
    for stage in ("infer", "figures"):
        out = run(SLUG, stage, overrides, root=tmp_path)
    claims = json.loads((out / "claims.json").read_text())
    assert claims["c7"]["reason"] == "gate: one kind of attention was measured, the comparison needs two"
    assert claims["c9"]["measured"]["texts that a swap has changed"]["value"] == 0
    facts = json.loads((tmp_path / "artifacts" / "paper" / SLUG / "infer" / "machine.json").read_text())
    assert facts["machine"]["name"] == "h200-141gb"
    assert facts["models"]["own"]["bytes_per_kv"] == 2
    laws = pd.read_csv(out / "tables" / "laws.csv")
    assert set(laws["law"]) == {"prefill", "decode", "switch"}
    assert (laws["measured_s"] > 0).all()


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_every_profile_composes(profile: str) -> None:
    cfg = compose(SLUG, "infer", [f"profile={profile}"])
    assert cfg.prefill.compared in cfg.prefill.tokens
    assert set(cfg.decode.growing_mib) <= set(cfg.decode.kv_mib)
    assert set(cfg.attention) <= set(cfg.model.kv_heads)
    assert len(cfg.session.resident) == 3
    assert cfg.session.resident[0] >= cfg.session.users
    assert cfg.decode.read <= cfg.model.sizes.max_position_embeddings
