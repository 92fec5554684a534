"""The whole paper in the smoke profile, in one process; the same code on a checkpoint and data in hub format."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from common.data import corpus, sources
from common.generation import records
from common.run import ROOT, compose, run
from papers.lookahead.prompts import TASKS, TITLES

STAGES = ("tokenizer", "lm_llama", "lm_qwen2", "lm_gpt2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the smoke profile's shared models; few library files, since reading all takes seconds."""
    folder = tmp_path_factory.mktemp("smoke")
    documents = {split: corpus.stdlib_sources(split)[:40] for split in corpus.SPLITS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "stdlib_sources", documents.__getitem__)
        for stage in STAGES:
            run("shared", stage, ["profile=smoke", "device=cpu"], root=folder)
        yield folder


@pytest.fixture(scope="module")
def results(root):
    for stage in ("data", "infer", "figures"):
        out = run("lookahead", stage, ["profile=smoke", "device=cpu"], root=root)
    return out


def deterministic(folder: Path) -> dict[str, str]:
    """Tables without their timing columns."""
    contents = json.loads((folder / "provenance.json").read_text())["contents"]["tables"]
    timing = {entry["id"]: entry["timing"] for entry in contents}
    return {
        name: pd.read_csv(folder / "tables" / f"{name}.csv").drop(columns=columns).to_csv()
        for name, columns in timing.items()
    }


@pytest.mark.slow
def test_every_claim_is_judged_and_every_figure_drawn(results, root, missing_outputs):
    assert missing_outputs("lookahead", root) == []
    claims = json.loads((results / "claims.json").read_text())
    declared = yaml.safe_load((ROOT / "papers" / "lookahead" / "reported.yaml").read_text())["claims"]
    assert list(claims) == [claim["id"] for claim in declared] == [f"c{i}" for i in range(1, 9)]
    assert claims["c1"]["verdict"] == "reproduced"  # a law: holds for untrained models, too
    assert claims["c2"]["verdict"] == "reproduced"
    assert claims["c4"]["verdict"] == "not testable here"
    for name in ("draft", "decoders", "warmup", "depth", "sizes"):
        assert (results / "figures" / f"{name}.svg").stat().st_size > 2000
        assert (results / "figures" / f"{name}.png").exists()
    origin = json.loads((results / "provenance.json").read_text())["sources"]
    assert {"common.tasks.multihop", "common.tasks.chain"} < {source["name"] for source in origin}


@pytest.mark.slow
def test_tables_agree_with_each_other(results):
    tables = {path.stem: pd.read_csv(path) for path in (results / "tables").glob("*.csv")}
    main, decoders, exactness = tables["t1"], tables["decoders"], tables["exact"]
    assert set(main["model"]) == {"lm_llama", "lm_qwen2", "lm_gpt2"}
    assert len(main) == 3 * 4
    assert (exactness["other_text"] == 0).all()
    assert (exactness["more_passes"] == 0).all()
    greedy = decoders[decoders["decoder"] == "greedy"]
    assert np.allclose(greedy["tokens_per_pass"], 1)
    assert np.allclose(greedy["speed_up"], 1)
    hier = decoders[decoders["decoder"] == "hier"].set_index(["model", "task"])["tokens_per_pass"]
    assert np.allclose(hier.loc[list(zip(main["model"], main["task"], strict=True))], main["EDL"])
    assert (tables["sweep"]["tokens_per_pass"] >= 1).all()
    assert set(tables["worst"]["condition"]) == {
        "empty trie",
        "warmed trie",
        "trie of another domain",
        "adversarial trie",
    }
    assert (tables["capacity"].groupby("task")["nodes"].diff().dropna() >= 0).all()


@pytest.mark.slow
def test_every_answer_side_by_side_is_in_the_common_schema(root, results):
    infer = root / "artifacts" / "smoke" / "lookahead" / "infer"
    found, runs = records.read(infer / "records.parquet"), pd.read_parquet(infer / "runs.parquet")
    assert list(found.columns) == list(records.SCHEMA)
    assert len(found) == len(runs)
    assert (found["arm"] == runs["model"] + ", " + runs["arm"]).all()
    for ours, theirs in (("task", "task"), ("problem_id", "problem"), ("prompt_tokens", "prompt_tokens"),
                         ("output_tokens", "new_tokens"), ("forwards", "forwards")):  # fmt: skip
        assert (found[ours] == runs[theirs]).all(), ours  # no prompt is so long that it is read on its own
    assert (found["correct"] == runs["margin"].isna()).all()
    assert (found["discarded_tokens"] == runs["drafted"].map(sum) - runs["accepted"].map(sum)).all()
    assert (found.loc[found["arm"].str.endswith("greedy"), "discarded_tokens"] == 0).all()
    assert (found["seconds"] > 0).all()
    assert (found["flops"] > 0).all()
    texts = found[found["correct"]].groupby([found["arm"].str.split(",").str[0], "task", "problem_id"])["answer"]
    assert (texts.nunique() == 1).all()


@pytest.mark.slow
def test_a_second_run_gives_the_same_numbers(root, results):
    before = deterministic(results)
    for stage in ("infer", "figures"):
        run("lookahead", stage, ["profile=smoke", "device=cpu"], root=root)
    assert deterministic(results) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lookahead", "solutions/lookahead"])
def test_notebooks_run(name, root, results, tmp_path, monkeypatch):
    from common.reporting.notebook import execute

    monkeypatch.setenv("FRUGAL_ROOT", str(root))  # `execute` sets it, and it must not stay
    execute(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "out.ipynb", {"profile": "smoke", "seed": 0}, root=root)
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) // 2


@pytest.mark.slow
def test_paper_profile_on_a_checkpoint_and_data_in_hub_format(root, tmp_path, monkeypatch):
    """The code of the paper's own models and data, with a tiny checkpoint and a few rows in their formats."""
    import gzip

    data = tmp_path / "data"
    question = {"question": "A farmer has 3 hens. How many legs?", "answer": "3 * 2 = 6\n#### 6"}
    lines = [json.dumps(question | {"question": f"{i} {question['question']}"}) for i in range(12)]
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("\n".join(lines) + "\n")
    (data / "humaneval").mkdir()
    problems = [json.dumps({"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n"}) for i in range(12)]
    (data / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress("\n".join(problems).encode()))
    rows = [{"instruction": f"Say {i}.", "context": "" if i % 2 else "A text.", "response": "yes"} for i in range(12)]
    (tmp_path / "dolly").mkdir()
    (tmp_path / "dolly" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {name: dict(entry) for name, entry in sources.catalogue().items()}
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "humaneval/HumanEval.jsonl.gz"):
        own[name]["sha256"] = sources.digest(data / name)
    monkeypatch.setattr(sources, "catalogue", lambda: own)

    checkpoint = root / "artifacts" / "smoke" / "shared" / "lm_llama"
    common = ["profile=paper", "device=cpu", f"data_root={data}", "network=false"]
    run("shared", "lm_llama", [*common, f"hub_id={checkpoint}"], root=tmp_path)
    assert json.loads((tmp_path / "artifacts/paper/shared/lm_llama/model.json").read_text())["hub_id"] == str(
        checkpoint
    )
    small = ["prompts=4", "warm_prompts=4", "train_prompts=2", "new_tokens=6", "dtype=float32", "choose=[4,8]"]
    small += ["exact.prompts=3", "exact.new_tokens=4", "sweep.prompts=2", "sweep.branch_lengths=[2,4]"]
    small += ["sweep.decoding_lengths=[4,8]", "sweep.warm=[0,2]", "sweep.capacities=[1,4]", "latency.context=8"]
    small += ["latency.tokens=[1,32]", "latency.prompts=1", "latency.rounds=2", "timing.rounds=2", "timing.tokens=6"]
    overrides = [*common, *small, f"dolly.path={tmp_path / 'dolly'}", "dolly.revision=null"]
    for stage in ("data", "infer", "figures"):
        out = run("lookahead", stage, overrides, root=tmp_path)
    main = pd.read_csv(out / "tables" / "t1.csv")
    assert list(main["task"]) == ["dolly", "gsm8k", "humaneval"]
    assert json.loads((out / "claims.json").read_text())["c1"]["verdict"] == "not testable here"
    origin = json.loads((out / "provenance.json").read_text())["sources"]
    assert {source["origin"] for source in origin} == {"mirror", "embedded"}


def test_a_missing_data_set_is_named_with_the_places_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path)
    monkeypatch.delenv("FRUGAL_DATA", raising=False)
    cfg = compose("lookahead", "data", ["profile=paper", "network=false", "data_root=null"])
    for task, file in (("gsm8k", "gsm8k/train.jsonl"), ("humaneval", "humaneval/HumanEval.jsonl.gz")):
        with pytest.raises(sources.MissingSource, match=rf"{file} not found. Tried: .*make data SOURCE={file}"):
            TASKS[task](cfg)


def test_splits_share_no_prompt(tmp_path):
    cfg = compose("lookahead", "data", ["profile=smoke", f"root={tmp_path}"])
    for task in cfg.tasks:
        prompts, _ = TASKS[task](cfg)
        assert {split: len(texts) for split, texts in prompts.items()} == {"warmup": 6, "train": 3, "test": 4}
        assert len({text for texts in prompts.values() for text in texts}) == 13
    assert set(TITLES) == set(TASKS)


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_every_profile_composes(profile):
    cfg = compose("lookahead", "infer", [f"profile={profile}", "decoding_length=32"])
    assert cfg.decoding_length == 32
    assert set(cfg.roles.values()) <= set(cfg.tasks)
    assert 32 in cfg.latency.tokens  # claim c7 is about it
    assert max(cfg.sweep.warm) <= cfg.warm_prompts
