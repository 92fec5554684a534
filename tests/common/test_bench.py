import json
import sys

import pytest

from common import bench

CODE = """
import pandas as pd

def tables():
    return {"two words": pd.DataFrame({"n": [1, 2], "seconds": [0.5, 1.25]})}
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("papers/demo", "common/part", "kernels"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "bench.py").write_text(CODE)
    (tmp_path / "alone.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("alone", None)


def test_benchmarks_are_found_by_their_file_name(tree):
    assert bench.found(tree) == ["common.part.bench", "kernels.bench", "papers.demo.bench"]
    assert {"common.generation.bench", "common.training.bench"} <= set(bench.found())


def test_tables_and_provenance_are_written(tree, capsys):
    assert bench.run("alone", tree / "out") == [tree / "out" / "alone" / "two_words.csv"]
    assert (tree / "out" / "alone" / "two_words.csv").read_text() == "n,seconds\n1,0.5\n2,1.25\n"
    assert "alone: two words" in capsys.readouterr().out
    origin = json.loads((tree / "out" / "alone" / "provenance.json").read_text())
    assert {"time", "git", "versions", "machine"} <= set(origin)


def test_a_bench_without_tables_is_refused(tree):
    (tree / "alone.py").write_text("def main(): pass\n")
    with pytest.raises(AttributeError, match=r"alone has no function tables\(\)"):
        bench.run("alone", tree / "out")


def test_every_bench_of_the_project_offers_tables():
    for name in bench.found():
        text = (bench.ROOT / f"{name.replace('.', '/')}.py").read_text()
        assert "\ndef tables()" in text, name


def test_an_unknown_benchmark_is_answered_with_the_known_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "common.nothing"])
    with pytest.raises(SystemExit, match=r"there are: .*common\.training\.bench"):
        bench.main()
