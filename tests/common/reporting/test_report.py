import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from omegaconf import OmegaConf

from common.metrics.intervals import Measured
from common.reporting import page
from common.reporting.report import Report

REPORTED = """
slug: demo
title: Demo
arxiv: "0000.00000"
year: 2026
authors_short: A
claims:
  - id: c1
    text: faster
    source: {kind: paper, where: abstract}
    basis: same
    reported: 2.0
    parts:
      - {name: speed-up, unit: x, kind: greater, bound: 1.0}
      - {name: same output, unit: mismatches, kind: exact, bound: 0}
  - {id: c2, text: private, source: {kind: code, where: README}, basis: same}
tables:
  - id: t1
    title: Speeds
    source: {kind: code, where: README}
    basis: same
    columns: [model, speed]
    rows: [[big, 2.0]]
  - id: t2
    title: Private
    source: {kind: code, where: README}
    basis: same
    columns: [model]
    rows: [[huge]]
    regenerate: never
tables_not_seen: [Table 9]
"""


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "reported.yaml").write_text(REPORTED)
    (tmp_path / "out").mkdir()
    return OmegaConf.create(
        {
            "slug": "demo",
            "profile": "cpu",
            "seed": 0,
            "device": "cpu",
            "paper": str(tmp_path / "paper"),
            "out": str(tmp_path / "out"),
            "artifacts": str(tmp_path / "artifacts" / "cpu" / "demo"),
        }
    )


def complete(report):
    report.measure("c1", "speed-up", Measured(2.0, 1.5, 2.5, 40))
    report.measure("c1", "same output", Measured(0, 0, 0, 64))
    report.not_testable("c2", "private data")


def test_the_whole_way(cfg, tmp_path):
    report = Report(cfg)
    report.table("t1", pd.DataFrame({"model": ["tiny"], "speed": [1.23456789012345]}), timing=["speed"])
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    report.figure("line", fig, "A line")
    complete(report)
    report.finish()
    out = tmp_path / "out"
    claims = json.loads((out / "claims.json").read_text())
    assert [claims[c]["verdict"] for c in ("c1", "c2")] == ["reproduced", "not testable here"]
    assert json.loads((out / "metrics.json").read_text())["claims reproduced"] == 1
    assert (out / "tables" / "t1.csv").read_text() == "model,speed\ntiny,1.23456789\n"
    assert (out / "figures" / "line.svg").exists()
    text = (out / "REPORT.md").read_text()
    told = ("🟢 **reproduced**", "private data", "Reported (code: README)", "t2: Private", "never", "- Table 9")
    for words in (*told, "figures/line.svg"):
        assert words in text
    assert "1 comparisons were judged by a 95% interval" in text


def test_figures_and_json_are_byte_equal_from_run_to_run(cfg, tmp_path):
    texts = []
    for _ in range(2):
        report = Report(cfg)
        fig, ax = plt.subplots()
        ax.plot([1, 2], label="a")
        ax.legend()
        report.figure("line", fig, "A line")
        complete(report)
        report.finish()
        names = ("figures/line.svg", "figures/line.png", "claims.json")
        texts.append([(tmp_path / "out" / name).read_bytes() for name in names])
    assert texts[0] == texts[1]


def test_every_claim_needs_a_measurement_or_a_reason(cfg, tmp_path):
    report = Report(cfg)
    report.measure("c1", "speed-up", Measured(2.0, 1.5, 2.5, 40))
    with pytest.raises(ValueError, match=r"c1 \(same output\); c2 \(declares no parts\)"):
        report.finish()
    assert not (tmp_path / "out" / "claims.json").exists()


def test_a_failed_part_fails_the_claim(cfg, tmp_path):
    report = Report(cfg)
    complete(report)
    report.measure("c1", "same output", Measured(3, 3, 3, 64))
    report.finish()
    assert json.loads((tmp_path / "out" / "claims.json").read_text())["c1"]["verdict"] == "not reproduced"


def test_a_substitute_lowers_the_basis(cfg, tmp_path):
    report = Report(cfg)
    complete(report)
    report.measure("c1", "speed-up", Measured(2.0, 1.5, 2.5, 40), basis="analogue")
    report.finish()
    assert json.loads((tmp_path / "out" / "claims.json").read_text())["c1"]["basis"] == "analogue"


def test_unknown_names_are_refused_with_the_valid_ones(cfg):
    report = Report(cfg)
    with pytest.raises(KeyError, match="c1, c2"):
        report.not_testable("c9", "x")
    with pytest.raises(KeyError, match="speed-up, same output"):
        report.measure("c1", "speed", Measured(1, 1, 1, 1))
    with pytest.raises(KeyError, match="seconds"):
        report.table("t1", pd.DataFrame({"a": [1]}), timing=["seconds"])


def test_scoreboard_counts_by_basis_and_the_readme_keeps_its_text(cfg, tmp_path, monkeypatch):
    report = Report(cfg)
    complete(report)
    report.finish()
    results = tmp_path / "results" / "cpu"
    results.mkdir(parents=True)
    (tmp_path / "out").rename(results / "demo")
    (tmp_path / "papers").mkdir()
    (tmp_path / "paper").rename(tmp_path / "papers" / "demo")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    assert "| 1 + 0 | 0 | 0 | 1 + 0 | 0/2 |" in page.scoreboard(results, "{slug}")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n")
    page.update_readme(readme)
    page.update_readme(readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("1 + 0") == 2
    assert "old" not in text
    assert page.build("cpu").read_text().count("private data") == 1


def test_readme_without_markers(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="lacks the markers"):
        page.update_readme(tmp_path / "README.md")


def test_markdown_table_aligns_numbers_and_escapes():
    assert page.markdown_table(["a", "b"], [["x|y", 1.5]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1.5 |"
