"""Pages, pictures and what notebooks show, on a small results folder."""

import json

import nbformat
import pandas as pd
import pytest
import yaml

from common.reporting import build, notebook, overview, page, view
from common.reporting.claims import Table

SOURCE = {"kind": "code", "where": "README"}
REPORTED = {
    "slug": "demo", "title": "A demo", "arxiv": "0000.00000", "year": 2026, "authors_short": "A",
    "claims": [
        {"id": "c1", "text": "faster", "source": SOURCE, "basis": "same",
         "parts": [{"name": "speed-up", "unit": "x", "kind": "greater", "bound": 1.0}]},
        {"id": "c2", "text": "private", "source": SOURCE, "basis": "analogue"},
    ],
    "tables": [
        {"id": "t1", "title": "Speeds", "source": SOURCE, "basis": "same", "columns": ["model", "speed", "size"],
         "rows": [["big", 2.0, 10], ["small", 4.0, 1]]},
        {"id": "t2", "title": "Other", "source": SOURCE, "basis": "analogue", "columns": ["model", "speed"],
         "rows": [["big", 2.0]]},
    ],
}  # fmt: skip
JUDGED = {
    "c1": {"text": "faster", "basis": "same", "verdict": "not reproduced",
           "measured": {"speed-up": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "unit": "x", "needs": "greater 1.0",
                                     "verdict": "not reproduced", "detail": ""}}},
    "c2": {"text": "private", "basis": "analogue", "verdict": "not testable here", "reason": "private data",
           "measured": {}},
}  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with one paper that has results at the cpu profile, and one that has none."""
    for slug in ("demo", "later"):
        (tmp_path / "papers" / slug).mkdir(parents=True)
        (tmp_path / "papers" / slug / "reported.yaml").write_text(yaml.safe_dump(REPORTED | {"slug": slug}))
    out = tmp_path / "results" / "cpu" / "demo"
    (out / "tables").mkdir(parents=True)
    (out / "claims.json").write_text(json.dumps(JUDGED))
    listed = [{"id": id_, "title": id_, "note": "", "timing": [], "reported": True} for id_ in ("t1", "t2")]
    provenance = {
        "profile": "cpu", "seed": 0, "device": "cpu", "git": {"commit": "0" * 40, "dirty": True}, "notes": ["A note."],
        "machine": {"cpu": "a CPU", "threads": 2}, "versions": {"torch": "2"}, "seconds": {"infer": 61.0},
        "sources": [{"name": "set/x.csv", "origin": "mirror", "sha256": "0"}],
        "contents": {"tables": listed, "figures": []},
    }  # fmt: skip
    (out / "provenance.json").write_text(json.dumps(provenance))
    pd.DataFrame({"model": ["small", "big"], "speed": [4.02, 3.0], "size": [1, 10]}).to_csv(
        out / "tables" / "t1.csv", index=False
    )
    pd.DataFrame({"model": ["big"], "speed": [9.0]}).to_csv(out / "tables" / "t2.csv", index=False)
    (tmp_path / "README.md").write_text(f"# Head\n{page.START}\n{page.END}\n")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(view, "ROOT", tmp_path)
    monkeypatch.setenv("FRUGAL_ROOT", str(tmp_path))
    return tmp_path


def test_make_report_writes_all_pages_the_scoreboard_and_the_picture(root, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build"])
    build.main()
    assert capsys.readouterr().out.split() == [
        "results/cpu/REPORT.md", "README.md", "docs/images/reported_and_reproduced.svg",
    ]  # fmt: skip
    own = (root / "results/cpu/demo/REPORT.md").read_text()
    assert "speed-up: 0.5 [0.4, 0.6], n=9 x (needs greater 1.0)" in own
    assert "Data: set/x.csv (mirror)" in own
    assert "with local changes" in own
    assert "A note." in own
    whole = (root / "results/cpu/REPORT.md").read_text()
    assert "| [demo](demo/REPORT.md) | 0 | 1 + 0 | 0 | 0 + 1 | 2/2 | 61 |" in whole
    assert "🔴 **c1** faster — speed-up: 0.5 x (needs greater 1.0)" in whole
    assert "⚪ **c2** private — private data" in whole
    assert "later" not in whole
    assert "[demo](results/cpu/demo/REPORT.md)" in (root / "README.md").read_text()
    first = (root / overview.PLACE).with_suffix(".svg").read_bytes()
    build.main()
    assert (root / overview.PLACE).with_suffix(".svg").read_bytes() == first
    assert not list(root.rglob("*.partial*"))


def test_dvcs_report_stage_writes_one_profile_and_leaves_the_readme_alone(root, monkeypatch):
    readme = (root / "README.md").read_text()
    monkeypatch.setattr("sys.argv", ["build", "--profile", "cpu"])
    build.main()
    table = pd.read_csv(root / "artifacts" / "cpu" / "report" / "scoreboard.csv")
    assert table.groupby("verdict")["claims"].sum().to_dict() == {
        "reproduced": 0, "not reproduced": 1, "inconclusive": 0, "not testable here": 1,
    }  # fmt: skip
    assert (root / "README.md").read_text() == readme


def test_long_tables_are_cut_on_the_page_and_say_so(root):
    pd.DataFrame({"model": [f"m{i}" for i in range(50)], "speed": 1.0, "size": 1}).to_csv(
        root / "results/cpu/demo/tables/t1.csv", index=False
    )
    page.build("cpu")
    text = (root / "results/cpu/demo/REPORT.md").read_text()
    assert "| m39 |" in text
    assert "| m40 |" not in text
    assert "First 40 of 50 rows; all are in `tables/t1.csv`." in text


def test_pairs_are_matched_by_text_columns_and_only_on_the_papers_own_quantities(root):
    assert sorted(overview.collect(root, "cpu")["demo"]) == [(1, 1), (2, 3), (4, 4.02), (10, 10)]


def test_a_table_that_we_recomputed_has_no_pairs(root):
    path = root / "papers/demo/reported.yaml"
    told = yaml.safe_load(path.read_text())
    for table in told["tables"]:
        table["source"]["kind"] = "recomputed"
    path.write_text(yaml.safe_dump(told))
    assert "demo" not in overview.collect(root, "cpu")


def test_constants_are_shown_and_count_as_nothing(root):
    path = root / "papers/demo/reported.yaml"
    told = yaml.safe_load(path.read_text())
    before = {row["paper"]: row["tables"] for row in page.scoreboard_rows(root / "results/cpu")}["demo"]
    told["tables"][0]["constants"] = True
    path.write_text(yaml.safe_dump(told))
    after = {row["paper"]: row["tables"] for row in page.scoreboard_rows(root / "results/cpu")}["demo"]
    assert [int(n) for n in before.split("/")] == [int(n) + 1 for n in after.split("/")]
    page.build("cpu")
    assert "Constants, as they are in use here:" in (root / "results/cpu/demo/REPORT.md").read_text()


def test_an_infinite_value_has_no_place_in_the_picture():
    table = Table.model_validate(
        REPORTED["tables"][0] | {"columns": ["model", "speed"], "rows": [["a", 2.0], ["b", float("inf")]]}
    )
    frame = pd.DataFrame({"model": ["a", "b"], "speed": [2.0, float("inf")]})
    assert overview.pairs(table, frame) == [(2.0, 2.0)]


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"speed": [3.0, 4.0]}),
        pd.DataFrame({"model": ["big", "big"], "speed": [3.0, 4.0]}),
        pd.DataFrame({"model": ["huge"], "speed": [3.0]}),
    ],
    ids=["no key", "two rows a key", "other rows"],
)
def test_tables_that_do_not_match_have_no_pairs(frame):
    assert overview.pairs(Table.model_validate(REPORTED["tables"][0]), frame) == []


def test_pairs_of_a_table_of_numbers_are_matched_by_its_first_column():
    table = Table.model_validate(REPORTED["tables"][0] | {"columns": ("n", "a"), "rows": ((1, 5.0), (2, 6.0))})
    assert overview.pairs(table, pd.DataFrame({"n": [2, 1], "a": [60.0, 50.0]})) == [(5, 50), (6, 60)]


def test_the_picture_counts_claims_and_close_values(root):
    import matplotlib.pyplot as plt

    fig = overview.draw(root)
    left, right = fig.axes
    assert left.get_title() == "3 of 4 reproduced values\nlie within 1% of the reported ones"
    assert len(right.patches) == 2
    assert [label.get_text() for label in right.get_yticklabels()] == ["demo"]
    plt.close(fig)


def test_view_reads_results(root):
    assert view.table("demo", "t1")["speed"].tolist() == [4.02, 3.0]
    assert view.reported("demo", "t1").values.tolist() == [["big", 2.0, 10], ["small", 4.0, 1]]
    assert view.measurements("demo", "c1")[["part", "value", "verdict"]].values.tolist() == [
        ["speed-up", 0.5, "not reproduced"]
    ]
    html = view.claims("demo").to_html()
    assert "c1: faster" in html
    assert "not testable here" in html
    assert view.claims("demo").to_html() == html, "no random ids: a notebook without news is no diff"
    with pytest.raises(KeyError, match="t1, t2"):
        view.reported("demo", "t9")


def test_view_shrinks_figures(root):
    import io

    from PIL import Image

    (root / "results/cpu/demo/figures").mkdir()
    Image.new("RGB", (2000, 1000), "white").save(root / "results/cpu/demo/figures/f.png")
    picture = Image.open(io.BytesIO(view.figure("demo", "f", width=400).data))
    assert picture.size == (400, 200)


def test_a_figure_that_a_gate_left_out_is_a_sentence(root):
    (root / "results/cpu/demo/figures").mkdir(exist_ok=True)
    assert "`curves` was not drawn in profile `cpu`" in view.figure("demo", "curves").data


@pytest.mark.parametrize("call", [lambda: view.table("later", "t1"), lambda: view.artifacts("later", "cpu")])
def test_what_does_not_exist_yet_names_the_command(root, call):
    with pytest.raises(FileNotFoundError, match="make reproduce PAPER=later PROFILE=cpu"):
        call()


def test_the_map_of_papers_shows_those_without_results_too(root):
    frame = view.papers("cpu").data.set_index("paper")
    assert frame.loc["demo", ["reproduced", "not reproduced", "not testable here"]].tolist() == ["0", "1", "1"]
    assert set(frame.loc["later", ["reproduced", "inconclusive"]]) == {"–"}
    assert view.papers("cpu").to_html() == view.papers("cpu").to_html()


def made(path, *sources, tagged=True):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if tagged:
        cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.mark.slow
def test_execution_is_clean_and_the_same_twice(tmp_path):
    code = "import os, sys\nprint(profile, seed, os.environ['FRUGAL_ROOT'])\nobject()"
    source = made(tmp_path / "n.ipynb", "profile = 'cpu'\nseed = 0", code)
    texts = []
    for _ in range(2):
        notebook.execute(source, tmp_path / "out.ipynb", {"profile": "smoke", "seed": 7}, root=tmp_path)
        texts.append((tmp_path / "out.ipynb").read_text())
    assert texts[0] == texts[1]
    assert f"smoke 7 {tmp_path}" in texts[0]
    assert "object at 0x…>" in texts[0]
    cells = json.loads(texts[0])["cells"]
    assert [cell["id"] for cell in cells] == ["cell-0", "cell-1"]
    assert "papermill" not in texts[0]
    assert all(cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_a_failing_cell_and_a_large_notebook_leave_no_result(tmp_path, monkeypatch):
    from papermill.exceptions import PapermillExecutionError

    source = made(tmp_path / "n.ipynb", "profile = 'cpu'", "raise ValueError('a distinct cause')")
    with pytest.raises(PapermillExecutionError, match="a distinct cause"):
        notebook.execute(source, tmp_path / "out.ipynb", {})
    monkeypatch.setattr(notebook, "MAX_BYTES", 100)
    source = made(tmp_path / "n.ipynb", "profile = 'cpu'", "print('x' * 200)")
    with pytest.raises(ValueError, match="the limit is 100"):
        notebook.execute(source, tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.ipynb").exists()


def test_a_notebook_without_parameters_is_refused_before_it_runs(tmp_path):
    source = made(tmp_path / "n.ipynb", "open('ran', 'w')", tagged=False)
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        notebook.execute(source, tmp_path / "out.ipynb", {})
    assert not (tmp_path / "ran").exists()


def test_an_unknown_notebook_is_answered_with_the_known_ones(monkeypatch):
    monkeypatch.setattr("sys.argv", ["notebook", "nonsense"])
    with pytest.raises(SystemExit, match="00_start_here"):
        notebook.main()
