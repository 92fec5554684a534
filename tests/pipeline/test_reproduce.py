"""`make reproduce` and DVC on a scaffolded paper, in a temporary clone."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pipeline")]


def test_the_first_run_shows_progress_and_ends_with_verdicts_and_the_report(first_run):
    clone, printed = first_run
    lines = printed.splitlines()
    for number, stage in enumerate(("demo infer", "demo figures", "demo notebook", "report"), 1):
        assert any(
            re.fullmatch(rf" +\d+:\d\d  \[{number}/4\] {stage} \(about \d+:\d\d left\)", line) for line in lines
        ), printed
    assert re.search(r"│ demo +│ \d \+ 0 .*│ 1/1 ", printed)
    assert "Claims by verdict, profile smoke" in printed
    assert re.search(r"4 stages run, \d+:\d\d min", printed)
    assert lines[-1].endswith("Report: results/smoke/REPORT.md")
    report = (clone.root / "results" / "smoke" / "REPORT.md").read_text()
    assert "[demo](demo/REPORT.md)" in report
    assert set(clone.results()) == {
        "claims.json", "metrics.json", "notebook.ipynb", "figures/tokens.png", "figures/tokens.svg", "tables/t1.csv",
    }  # fmt: skip
    seconds = json.loads((clone.root / "artifacts" / "smoke" / "seconds.json").read_text())
    assert set(seconds) == {
        *(f"papers/demo/dvc.yaml:{s}@smoke" for s in ("infer", "figures", "notebook")),
        "report@smoke",
    }


def test_a_second_run_runs_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished.root / "artifacts").rglob("steps.csv")}
    said = finished.dvc("repro").stdout
    assert "Running stage" not in said
    assert said.count("didn't change, skipping") == 4
    start = time.perf_counter()
    said = finished.reproduce().stdout
    assert time.perf_counter() - start < 10
    assert "Nothing to do: all results are up to date" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert finished.git("status", "--porcelain") == ""


def test_what_a_dvc_user_expects(finished):
    graph = finished.dvc("dag").stdout
    assert all(name in graph for name in ("infer@smoke", "figures@smoke", "notebook@smoke", "report@smoke"))
    metrics = finished.dvc("metrics", "show").stdout
    assert "claims reproduced" in metrics
    assert "c1.verdict" in metrics
    assert "index.html" in finished.dvc("plots", "show").stdout
    finished.set_params(seed=1)
    difference = finished.dvc("params", "diff").stdout
    assert re.search(r"params\.yaml +seed +0 +1", difference)
    finished.git("checkout", "params.yaml")
    finished.dvc("exp", "run", "-S", "seed=1")
    assert json.loads((finished.root / "results/smoke/demo/provenance.json").read_text())["seed"] == 1
    assert re.search(r"smoke/demo/metrics\.json|claims\.json", finished.dvc("exp", "show", "--csv").stdout)


def test_profiles_come_back_from_the_cache_and_params_stay(finished):
    smoke, params = finished.results(), (finished.root / "params.yaml").read_text()
    done = finished.reproduce("--profile", "cpu", "--paper", "demo").stdout
    assert "3 stages run" in done
    assert done.splitlines()[-1].endswith("Report: results/cpu/demo/REPORT.md")
    assert "c1 what the paper claims" in done
    provenance = json.loads((finished.root / "results/cpu/demo/provenance.json").read_text())
    assert provenance["profile"] == "cpu"
    assert not provenance["git"]["dirty"], "choosing a profile is no local change"
    assert "Nothing to do" in finished.reproduce("--profile", "smoke").stdout
    assert finished.results() == smoke
    assert (finished.root / "params.yaml").read_text() == params


def test_deleted_outputs_come_back_without_running(finished):
    shutil.rmtree(finished.root / "artifacts" / "smoke" / "demo")
    before = finished.results()
    said = finished.reproduce().stdout
    assert "Nothing to do" in said or "restored from the cache" in said
    assert "[1/4] demo infer" not in said
    assert finished.results() == before


def test_a_new_paper_is_scaffolded_and_runs_beside_a_failing_one(finished):
    """The failing stage is named with its cause; other papers and earlier results are not affected."""
    said = finished.make("new-paper", "SLUG=second").stdout
    assert "papers/second/experiment.py" in said
    assert "notebooks/second.ipynb" in said
    before = finished.results()
    method = finished.root / "papers" / "demo" / "method.py"
    method.write_text(method.read_text() + "\nraise ValueError('a distinct cause')\n")
    done = finished.make("reproduce", check=False)
    assert done.returncode != 0
    assert "FAILED  demo infer. The end of its output:" in done.stdout
    assert "ValueError: a distinct cause" in done.stdout
    assert "Failed: demo infer" in done.stderr
    assert set(finished.results(slug="second")) == set(before)
    assert {k: v for k, v in finished.results().items() if k != "notebook.ipynb"} == {
        k: v for k, v in before.items() if k != "notebook.ipynb"
    }
    page = (finished.root / "results" / "smoke" / "REPORT.md").read_text()
    assert "[second](second/REPORT.md)" in page
    assert "[demo](demo/REPORT.md)" in page
    assert "exists already" in finished.make("new-paper", "SLUG=second", check=False).stderr


def test_without_git(demo):
    """An unpacked archive: everything runs, and provenance says that there is no commit."""
    shutil.rmtree(demo.root / ".git")
    assert "4 stages run" in demo.reproduce().stdout
    provenance = json.loads((demo.root / "results/smoke/demo/provenance.json").read_text())
    assert provenance["git"]["commit"] == "none (not a git checkout)"
    assert "Nothing to do" in demo.reproduce().stdout


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--paper", "nonsense"), "unknown paper 'nonsense'; the papers are: demo"),
        (("--profile", "huge"), "unknown profile 'huge'; the profiles are: smoke, cpu, gpu, paper"),
    ],
)
def test_bad_words(finished, words, answer):
    done = finished.reproduce(*words, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == answer
    assert finished.git("status", "--porcelain") == ""


def test_a_users_run_leaves_the_tracked_results_alone(finished):
    before = finished.results()
    done = finished.python("-m", "common.run", "demo", "figures", "profile=smoke", "alphas=[0.8]")
    assert "runs/demo/figures/" in done.stdout
    sweep = finished.python("-m", "common.run", "demo", "all", "profile=smoke", "draft_length=2,3", "-m")
    assert sweep.stdout.count("runs/demo/all/") == 4
    assert finished.results() == before
    assert finished.git("status", "--porcelain") == ""
    assert not list(finished.root.glob("*.yaml.*"))
    assert not (finished.root / "multirun.yaml").exists()
