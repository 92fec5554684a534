"""The whole paper in the smoke profile, in one process; the same code on a checkpoint and data in hub format."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from common.data import corpus, sources
from common.generation import records
from common.models.build import build
from common.models.hub import load_tokenizer, save_model
from common.quantisation.calibrate import linears_of
from common.quantisation.packed import stored_bits
from common.run import ROOT, compose, run
from papers.fast_2bit import analysis, arms, measure, texts

SLUG, SMOKE = "fast_2bit", ["profile=smoke", "device=cpu"]


@pytest.fixture(autouse=True)
def _torch_paths(monkeypatch):
    """Whole models in Triton's interpreter take minutes; tests/kernels holds the kernels to the torch paths."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the smoke profile's shared model; few library files, since reading all takes seconds."""
    folder = tmp_path_factory.mktemp("smoke")
    documents = {split: corpus.stdlib_sources(split)[:40] for split in corpus.SPLITS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "stdlib_sources", documents.__getitem__)
        patch.setenv("TRITON_INTERPRET", "0")
        for stage in ("tokenizer", "lm_llama"):
            run("shared", stage, SMOKE, root=folder)
        for stage in ("data", "infer"):
            run(SLUG, stage, SMOKE, root=folder)
        yield folder


def ground_of(root):
    cfg = compose(SLUG, "infer", [*SMOKE, f"root={root}"])
    cfg.device = "cpu"
    return cfg, measure.load(cfg)


@pytest.mark.slow
def test_an_untrained_model_misses_its_gates_and_says_so(root, missing_outputs):
    out = run(SLUG, "figures", SMOKE, root=root)
    assert missing_outputs(SLUG, root) == []
    claims = json.loads((out / "claims.json").read_text())
    declared = yaml.safe_load((ROOT / "papers" / SLUG / "reported.yaml").read_text())["claims"]
    assert list(claims) == [claim["id"] for claim in declared] == [f"c{i}" for i in range(1, 10)]
    for id_ in ("c1", "c2", "c8"):
        assert claims[id_]["reason"].startswith("gate: ")
    assert claims["c5"]["verdict"] == "reproduced"  # arithmetic of the format: holds for any model
    for name in ("layout", "rules", "recovered", "ranges"):
        assert (out / "figures" / f"{name}.svg").stat().st_size > 2000


@pytest.mark.slow
def test_claims_are_measured_where_the_gates_let_them(root):
    again = run(SLUG, "figures", [*SMOKE, "gate.accuracy=-1.0", "gate.nats=-99.0"], root=root, tracked=False)
    claims = json.loads((again / "claims.json").read_text())
    untested = {id_ for id_, claim in claims.items() if claim["verdict"] == "not testable here"}
    assert untested == {"c3", "c4", "c6", "c7", "c9"}
    assert len(claims["c2"]["measured"]) == 4


@pytest.mark.slow
def test_every_run_is_in_every_file(root):
    cfg = compose(SLUG, "infer", SMOKE)
    todo = {(run.variant, run.arm, run.draw) for run in measure.runs(cfg)}
    folder = root / "artifacts" / "smoke" / SLUG / "infer"
    bits, windows = (pd.read_parquet(folder / f"{name}.parquet") for name in ("arms", "windows"))
    answers = records.read(folder / "records.parquet")
    assert set(zip(bits["variant"], bits["arm"], bits["draw"], strict=True)) == todo
    assert set(zip(windows["variant"], windows["arm"], windows["draw"], strict=True)) == todo
    assert set(answers["arm"]) == {f"{variant}, {arm}" for variant, arm, _ in todo}
    assert len(answers) == len(todo) * cfg.problems.count
    assert (windows["kl"] > -1e-5).all()
    full = windows[windows["arm"] == "full"].pivot(index="window", columns="variant", values="nll")
    for variant in measure.VARIANTS[1:]:  # scales moved, function unchanged
        assert np.allclose(full[variant], full[measure.VARIANTS[0]], atol=1e-4)
    assert (windows.loc[windows["arm"] == "full", "kl"].abs() < 1e-4).all()


@pytest.mark.slow
def test_whole_matrices_get_at_least_the_bits_of_stripes(root):
    bits = pd.read_parquet(root / "artifacts" / "smoke" / SLUG / "infer" / "arms.parquet")
    mean = bits.groupby(["variant", "arm"])["bits"].mean()
    for ratio in compose(SLUG, "infer", SMOKE).ratios:
        trained = mean.loc[measure.VARIANTS[0]]
        assert trained[arms.name_of("matrices", ratio)] > trained[arms.name_of("hessian_range", ratio)] - 1e-9
        assert trained[arms.name_of("random", ratio)] == trained[arms.name_of("hessian_range", ratio)]


@pytest.mark.slow
def test_a_second_run_gives_the_same_numbers(root):
    cfg, _ = ground_of(root)
    todo = [measure.Run(measure.VARIANTS[1], name, 1) for name in ("two", "random 0.153", "matrices 0.153")]
    first, second = (measure.measured((cfg, order)) for order in (todo, todo[::-1]))
    for name in ("arms", "windows"):
        a, b = (pd.DataFrame(found[name]).sort_values(["arm"], kind="stable") for found in (first, second))
        assert a.reset_index(drop=True).equals(b.reset_index(drop=True)), name


@pytest.mark.slow
def test_widened_models_compute_the_same_and_are_wide(root):
    cfg, ground = ground_of(root)
    for variant in measure.VARIANTS[1:]:
        model = measure.widen(cfg, copy.deepcopy(ground.model), variant)
        with torch.no_grad():
            a, b = (m(input_ids=ground.windows[:2]).logits for m in (model, ground.model))
        assert torch.allclose(a, b, atol=1e-3)
    ranges = pd.DataFrame(measure.stripe_ranges(cfg, ground)).groupby("variant")["width"].max()
    assert ranges["wide stripes"] > 2 * ranges["as trained"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [SLUG, f"solutions/{SLUG}"])
def test_notebooks_run(name, root, tmp_path, monkeypatch):
    from common.reporting.notebook import execute

    run(SLUG, "figures", SMOKE, root=root)
    monkeypatch.setenv("FRUGAL_ROOT", str(root))  # `execute` sets it, and it must not stay
    execute(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "out.ipynb", {"profile": "smoke", "seed": 0}, root=root)
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) // 2


@pytest.mark.slow
def test_paper_profile_on_a_checkpoint_and_data_in_hub_format(root, tmp_path, monkeypatch):
    """The code of the paper's own model and data: a tiny Llama with grouped queries, a few rows in their formats."""
    words = load_tokenizer(root / "artifacts" / "smoke" / "shared" / "lm_llama")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build(sizes, intermediate_size=90, vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=0)
    checkpoint = tmp_path / "hub"
    save_model(model, checkpoint)
    words.save_pretrained(checkpoint)
    data = tmp_path / "data"
    (data / "gsm8k").mkdir(parents=True)
    row = {"question": "A farmer has 3 hens. How many legs?", "answer": "3 * 2 = 6\n#### 6"}
    lines = [json.dumps(row | {"question": f"{i} {row['question']}"}) for i in range(6)]
    own = {name: dict(entry) for name, entry in sources.catalogue().items()}
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl"):
        (data / name).write_text("\n".join(lines) + "\n")
        own[name]["sha256"] = sources.digest(data / name)
    monkeypatch.setattr(sources, "catalogue", lambda: own)
    wiki = tmp_path / "wikitext"
    wiki.mkdir()
    for split in ("train", "test"):
        text = [
            json.dumps({"text": f" = Title {i} = \n The quick brown fox {i} jumps over the lazy dog ."})
            for i in range(60)
        ]
        (wiki / f"{split}.jsonl").write_text("\n".join(text))

    common = ["profile=paper", "device=cpu", f"data_root={data}", "network=false"]
    run("shared", "lm_llama", [*common, f"hub_id={checkpoint}"], root=tmp_path)
    small = ["calibration.sources.wikitext=4", "calibration.tokens=24", "text.tokens=32", "text.windows=6"]
    small += ["problems.count=3", "problems.new_tokens=4", "ratios=[0.153]", f"wikitext.path={wiki}"]
    overrides = [*common, *small, "wikitext.name=null", "wikitext.revision=null"]
    for stage in ("data", "infer", "figures"):
        out = run(SLUG, stage, overrides, root=tmp_path)
    methods = pd.read_csv(out / "tables" / "methods.csv").set_index("method")
    assert methods.loc["full precision", "bits"] == 16
    assert methods["nll"].notna().all()
    windows = pd.read_parquet(tmp_path / "artifacts" / "paper" / SLUG / "infer" / "windows.parquet")
    assert windows["window"].nunique() == 6
    assert json.loads((out / "claims.json").read_text())["c1"]["verdict"] == "not testable here"
    origin = json.loads((out / "provenance.json").read_text())["sources"]
    assert {source["origin"] for source in origin} == {"mirror", "embedded"}


def test_a_missing_data_set_is_named_with_the_places_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path)
    monkeypatch.delenv("FRUGAL_DATA", raising=False)
    cfg = compose(SLUG, "data", ["profile=paper", "network=false", "data_root=null"])
    with pytest.raises(sources.MissingSource, match=r"gsm8k/test.jsonl not found. Tried: .*make data SOURCE=gsm8k"):
        texts.problems(cfg, "gsm8k", "test", 2)


def test_draws_differ_and_splits_share_no_text(monkeypatch):
    documents = {split: corpus.stdlib_sources(split)[:40] for split in corpus.SPLITS}
    monkeypatch.setattr(corpus, "stdlib_sources", documents.__getitem__)
    cfg = compose(SLUG, "data", SMOKE)
    first, again, second = texts.calibration(cfg, 0), texts.calibration(cfg, 0), texts.calibration(cfg, 1)
    assert first == again
    assert not set(first) & set(second)
    held_out = texts.stdlib(cfg, "test", 4, 16, 0)
    assert len(held_out) == 4
    assert not {text[:40] for text in held_out} & {text[:40] for text in first}
    cfg.calibration.sources = {"poems": 3}
    with pytest.raises(ValueError, match="unknown calibration source 'poems'; there are: stdlib, wikitext, chain"):
        texts.calibration(cfg, 0)


def test_windows_are_whole_and_as_many_as_asked_for():
    own = compose(SLUG, "infer", ["text.tokens=4", "text.windows=3", "text.per_document=2"]).text
    found = measure.windows_of([list(range(11)), [1, 2, 3], list(range(20, 29))], own)
    assert found.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [20, 21, 22, 23]]
    with pytest.raises(ValueError, match="no text has 4 tokens: the longest has 2"):
        measure.windows_of([[1, 2]], own)


def test_matrices_and_unknown_kinds_of_arms():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = build(sizes, vocab_size=40, seed=1)
    batches = [torch.randint(2, 40, (4, 20), generator=torch.Generator().manual_seed(0))]
    assert arms.whole_matrices(model, batches, 0.0) == set()
    assert arms.whole_matrices(model, batches, 1.0) == set(linears_of(model))
    some = arms.whole_matrices(model, batches, 0.3)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(20)  # now the most sensitive by far
    assert "model.layers.1.mlp.down_proj" in arms.whole_matrices(model, batches, 0.05)
    assert 0 < len(some) < 14
    cfg = compose(SLUG, "infer", SMOKE)
    before = copy.deepcopy(model)
    arms.quantised(cfg, model, {"kind": "random", "ratio_4bit": 0.5}, batches, 3)
    arms.quantised(cfg, before, {"kind": "random", "ratio_4bit": 0.5}, batches, 3)
    assert stored_bits(model) == stored_bits(before)
    orders = [[m.order.tolist() for m in x.modules() if hasattr(m, "order")] for x in (model, before)]
    assert orders[0] == orders[1]
    with pytest.raises(ValueError, match="unknown kind of arm 'magic'; there are: full, groups"):
        arms.quantised(cfg, model, {"kind": "magic"}, batches, 0)


def test_the_share_won_back():
    full, two = np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])
    assert analysis.recovered(full, two, full, 0).value == 1
    assert analysis.recovered(full, two, two, 0).value == 0
    assert analysis.recovered(full, two, (full + two) / 2, 0).value == pytest.approx(0.5)


def test_bytes_of_llama_2():
    weights, packed, rest = analysis.model_bytes("Llama-2-7B", 0.153)
    assert weights + rest // 2 == 6738415616  # parameters of the checkpoint
    assert 8 * packed / weights == pytest.approx(2.85, abs=0.005)


def test_times_of_the_variants_have_the_claims_quantities():
    from papers.fast_2bit.speed import speed

    cfg = compose(SLUG, "infer", [*SMOKE, "speed.shapes=[[64,192]]", "speed.rounds=3", "speed.cold=1e4"])
    cfg.device = "cpu"
    rows = speed(cfg)
    declared = yaml.safe_load((ROOT / "papers" / SLUG / "reported.yaml").read_text())["claims"]
    parts = [part["name"] for claim in declared if claim["id"] in ("c3", "c4") for part in claim["parts"]]
    assert [row["quantity"] for row in rows] == parts
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_every_profile_composes(profile):
    cfg = compose(SLUG, "infer", [f"profile={profile}"])
    assert cfg.headline in cfg.ratios
    assert {"hessian_range", "random", "matrices"} <= set(cfg.rules)
    found = arms.arms(cfg)
    assert set(found) >= {run.arm for run in measure.runs(cfg)}
    assert {arm["kind"] for arm in found.values()} <= set(arms.KINDS)
