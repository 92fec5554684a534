import copy

import pytest
import yaml

from common.metrics.intervals import Measured, exact
from common.reporting.claims import Part, combine, judge_part, load

GOOD = {
    "slug": "demo",
    "title": "Demo",
    "arxiv": "0000.00000",
    "year": 2026,
    "authors_short": "A",
    "claims": [
        {
            "id": "c1",
            "text": "faster",
            "source": {"kind": "paper", "where": "abstract"},
            "basis": "same",
            "parts": [{"name": "speed-up", "unit": "x", "kind": "greater", "bound": 1.0}],
        }
    ],
    "tables": [
        {
            "id": "t1",
            "title": "T",
            "source": {"kind": "code", "where": "README"},
            "basis": "same",
            "columns": ["a", "b"],
            "rows": [[1, 2]],
        }
    ],
}


def written(tmp_path, change):
    content = copy.deepcopy(GOOD)
    change(content)
    path = tmp_path / "reported.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_good_file_loads(tmp_path):
    assert load(written(tmp_path, lambda c: None)).claims[0].parts[0].kind == "greater"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["claims"][0].pop("source"), r"claims > 0 \(c1\) > source: Field required"),
        (lambda c: c["claims"][0].update(source={"kind": "rumour", "where": "x"}), "'paper', 'code', 'secondary'"),
        (lambda c: c["claims"].append(c["claims"][0]), "duplicate id c1"),
        (lambda c: c["tables"].append(c["tables"][0]), "duplicate id t1"),
        (lambda c: c["claims"][0].update(bassi="same"), "bassi: Extra inputs"),
        (lambda c: c["claims"][0]["parts"][0].update(kind="within"), "does not go with bound"),
        (lambda c: c["tables"][0]["rows"].append([1]), "row 1 has 1 cells"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path, change, words):
    path = written(tmp_path, change)
    with pytest.raises(ValueError, match=words) as error:
        load(path)
    assert str(path) in str(error.value)


def part(kind, bound, tolerance=0.0):
    return Part(name="p", unit="x", kind=kind, bound=bound, tolerance=tolerance)


@pytest.mark.parametrize(
    ("spec", "measured", "verdict"),
    [
        (part("greater", 1.0), Measured(2, 1.5, 2.5, 10), "reproduced"),
        (part("greater", 1.0), Measured(2, 0.5, 3.5, 10), "inconclusive"),
        (part("greater", 1.0), Measured(0.5, 0.2, 0.9, 10), "not reproduced"),
        (part("greater", 1.0), exact(1.0), "not reproduced"),
        (part("less", 1.0), Measured(0.5, 0.2, 0.9, 10), "reproduced"),
        (part("less", 1.0), Measured(2, 1.5, 2.5, 10), "not reproduced"),
        (part("less", 1.0), exact(1.0), "not reproduced"),
        (part("within", (-1.0, 1.0)), Measured(0, -0.5, 0.5, 10), "reproduced"),
        (part("within", (-1.0, 1.0)), Measured(0, -1.5, 0.5, 10), "inconclusive"),
        (part("within", (-1.0, 1.0)), Measured(2, 1.5, 2.5, 10), "not reproduced"),
        (part("exact", 0), exact(0), "reproduced"),
        (part("exact", 0), exact(1), "not reproduced"),
        (part("exact", 0.478, 0.0005), exact(0.4783), "reproduced"),
    ],
)
def test_verdicts(spec, measured, verdict):
    assert judge_part(spec, measured)[0] == verdict


def test_an_open_verdict_says_what_would_settle_it():
    assert "401 units instead of 100" in judge_part(part("greater", 0.5), Measured(1.0, 0.0, 2.0, 100))[1]


def test_a_compound_claim_needs_every_part():
    assert combine(["reproduced", "reproduced"]) == "reproduced"
    assert combine(["reproduced", "inconclusive"]) == "inconclusive"
    assert combine(["inconclusive", "not reproduced", "reproduced"]) == "not reproduced"
