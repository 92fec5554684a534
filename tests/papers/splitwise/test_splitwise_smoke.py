"""The whole paper in the smoke profile, in one process, with the trace files and without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from common.generation import records
from common.models.build import build
from common.models.hub import save_model
from common.models.tokenizer import train_tokenizer
from common.run import ROOT, run
from common.serving.traces import load_trace
from common.workers import run_jobs
from papers.splitwise.study import call

SLUG = "splitwise"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of random weights in place of the shared one."""
    folder = tmp_path_factory.mktemp("smoke")
    shared = folder / "artifacts" / "smoke" / "shared" / "lm_llama"
    texts = ["Anna Abel was born at Arden. Where was Anna Abel born? = $"] * 20
    words = train_tokenizer(texts, 270)
    words.save_pretrained(shared)
    save_model(build("llama-0.1m", seed=0, vocab_size=len(words)), shared)
    return folder


@pytest.fixture(scope="module")
def results(root: Path) -> Path:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FRUGAL_DATA", raising=False)
        patch.setattr("common.data.sources.DOWNLOADS", root / "nowhere")
        for stage in ("data", "infer", "figures"):
            out = run(SLUG, stage, ["profile=smoke", "device=cpu"], root=root)
    return out


@pytest.mark.slow
def test_every_claim_is_judged_and_every_table_and_figure_is_there(
    results: Path, root: Path, missing_outputs: Callable[[str, Path], list[str]]
) -> None:
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((results / "claims.json").read_text())
    declared = yaml.safe_load((ROOT / "papers" / SLUG / "reported.yaml").read_text())
    assert list(claims) == [claim["id"] for claim in declared["claims"]] == [f"c{i}" for i in range(1, 14)]
    for claim in ("c5", "c6", "c8"):  # closed forms, whatever the profile
        assert (claims[claim]["verdict"], claims[claim]["basis"]) == ("reproduced", "same")
    assert {part["verdict"] for name, part in claims["c9"]["measured"].items() if "real" in name} == {"reproduced"}
    for claim in ("c2", "c4", "c7", "c13"):  # judged on a substitute of the trace, if at all
        assert claims[claim]["basis"] == "analogue" or claims[claim]["verdict"] == "not testable here"
    for table in declared["tables"]:
        assert (results / "tables" / f"{table['id']}.csv").exists()
    for name in ("latency", "gantt", "ratios", "active_tokens", "transfer"):
        assert (results / "figures" / f"{name}.svg").stat().st_size > 5000


@pytest.mark.slow
def test_golden_tables_come_out_as_reported(results: Path) -> None:
    declared = yaml.safe_load((ROOT / "papers" / SLUG / "reported.yaml").read_text())["tables"]
    for table in (table for table in declared if table["id"] in ("t1", "t2", "t3", "t5", "t7")):
        reproduced = pd.read_csv(results / "tables" / f"{table['id']}.csv")
        expected = pd.DataFrame(table["rows"], columns=table["columns"])
        pd.testing.assert_frame_equal(reproduced, expected, check_dtype=False, rtol=0, atol=5.1e-7)


@pytest.mark.slow
def test_every_text_of_the_split_is_in_the_common_schema(root: Path, results: Path) -> None:
    infer = root / "artifacts" / "smoke" / SLUG / "infer"
    found, identity = records.read(infer / "records.parquet"), pd.read_csv(infer / "identity.csv")
    assert list(found.columns) == list(records.SCHEMA)
    assert found["arm"].value_counts().to_dict() == {"one process": 2, "serialized": 2, "layerwise": 2}
    assert (found["output_tokens"] == 4).all()
    assert (found["forwards"] == 4).all()
    read = identity.groupby("prompt")["prompt_tokens"].first()
    assert (found["prompt_tokens"] == found["problem_id"].map(read)).all()
    assert identity["same_text"].all()
    assert (found.groupby("problem_id")["answer"].nunique() == 1).all()
    assert (found["seconds"] > 0).all()


def test_costs_and_answers_of_a_text() -> None:
    """Against the sampler's own ledger and the task's own verifier."""
    from common.generation.sampler import generate
    from common.tasks import multihop
    from papers.splitwise.real import samples

    problems = multihop.generate(0, 2, split="test")
    words = train_tokenizer([problem.prompt + problem.answer for problem in problems] * 20, 300)
    model = build("llama-0.1m", seed=0, vocab_size=len(words)).eval()
    prompt = words.encode(problems[1].prompt)
    out = generate(model, [prompt], 5, stop_tokens=())
    gold = words.encode(problems[1].answer)
    texts = [
        {"prompt": 1, "arm": arm, "tokens": tokens, "seconds": 0.5}
        for arm, tokens in (("one process", out.tokens[0].tolist()), ("layerwise", gold))
    ]
    wrong, right = samples(model, words, problems, texts)
    assert (wrong["forwards"], wrong["flops"]) == (out.ledger.forwards, out.ledger.flops)
    assert (wrong["prompt_tokens"], wrong["output_tokens"]) == (len(prompt), 5)
    assert (wrong["correct"], right["correct"]) == (False, True)
    assert (right["problem_id"], right["difficulty"]) == (1, problems[1].difficulty)
    assert right["answer"] == problems[1].answer


@pytest.mark.slow
def test_a_second_run_gives_the_same_simulations(root: Path, results: Path) -> None:
    first = root / "artifacts" / "smoke" / SLUG / "infer"
    kept = {p.name: p.read_text() for p in first.glob("*.csv") if p.stem not in ("handover", "phases", "cpu_cluster")}
    assert {"largest.csv", "rates.csv", "provisioned.csv", "identity.csv"} < set(kept)
    run(SLUG, "infer", ["profile=smoke", "device=cpu"], root=root)
    assert {name: (first / name).read_text() for name in kept} == kept


@pytest.mark.slow
def test_the_released_traces_are_read_as_they_are(root: Path, tmp_path: Path) -> None:
    from common.data.sources import MissingSource, locate

    try:
        locate("azure_llm/AzureLLMInferenceTrace_conv.csv")
    except MissingSource as missing:
        pytest.skip(str(missing))
    out = run(SLUG, "data", ["profile=smoke", "device=cpu"], root=tmp_path)
    reported = yaml.safe_load((ROOT / "papers" / SLUG / "reported.yaml").read_text())["tables"][3]
    from papers.splitwise.judge import trace_row

    rows = pd.DataFrame([trace_row(name, load_and_check(out / f"{name}.csv")) for name in ("code", "conv")])
    expected = pd.DataFrame(reported["rows"], columns=reported["columns"])
    pd.testing.assert_frame_equal(rows, expected, check_dtype=False, rtol=0, atol=5.1e-7)
    assert {s["origin"] for s in json.loads((out / "sources.json").read_text())} <= {"mirror", "public"}


def load_and_check(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path)
    load_trace(frame)
    return frame


@pytest.mark.slow
def test_jobs_come_back_in_order_from_one_process_or_two() -> None:
    jobs = [(divmod, (n, 3)) for n in range(7)]
    assert run_jobs(call, jobs, 1) == run_jobs(call, jobs, 2) == [divmod(n, 3) for n in range(7)]
