"""The two columns of a report, by hand and from a parquet file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from common.costs.catalogue import accelerator, transformer
from common.costs.idealized_runtime import Profile
from common.costs.per_answer import REFERENCE, USD_PER_HOUR, per_answer, report_costs, roofline_clock
from common.generation import records
from common.metrics.intervals import paired_bootstrap, ratio_of_sums

CLOCK = Profile(0.1, {10: 1.0}).seconds  # a prompt of 10 tokens takes a second, a further output token 0.1


def samples(seed: int = 0, problems: int = 30, right: float = 0.6) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        {
            "arm": arm, "problem_id": problem, "sample_id": sample, "prompt_tokens": 10, "forwards": 6.0, "flops": 1.0,
            "output_tokens": int(rng.integers(1, 40)), "discarded_tokens": 20 * (arm == "search"), "seconds": 1.0,
            "correct": bool(rng.random() < right),
        }
        for arm in ("plain", "search") for problem in range(problems) for sample in range(2)
    ]  # fmt: skip
    return records.frame(rows, paper="p", profile="cpu", seed=0, task="t", difficulty=1)


def test_by_hand() -> None:
    """Two problems of two attempts: 1 + 0.1 (o - 1) seconds each, 3600 dollars an hour on 2 accelerators."""
    table = samples(problems=2)
    table = table[table["arm"] == "plain"].assign(output_tokens=[1, 11, 21, 31], correct=[True, False, True, False])
    row = per_answer(table, CLOCK, usd_per_hour=3600, accelerators=2).iloc[0]
    assert (row["task"], row["arm"], row["problems"], row["accuracy"]) == ("t", "plain", 2, 0.5)
    assert row["idealized_seconds"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert row["usd_per_correct"] == pytest.approx(2 * (1 + 2 + 3 + 4) / 2)


def test_discarded_tokens_cost_what_output_does_unless_forwards_are_counted() -> None:
    table = samples()
    plain, search = per_answer(table, CLOCK, 1.0)["idealized_seconds"]
    of = table.groupby("arm")["output_tokens"].mean()
    assert plain == pytest.approx(1 + 0.1 * (of["plain"] - 1))
    assert search == pytest.approx(1 + 0.1 * (of["search"] + 20 - 1))
    assert per_answer(table, CLOCK, 1.0, steps="forwards")["idealized_seconds"].tolist() == pytest.approx([1.5, 1.5])


def test_intervals_are_paired_over_problems() -> None:
    """The cost per correct answer: that of the ratio of sums, resampled on the same draws."""
    table = samples(3)
    row = per_answer(table, CLOCK, 3600.0).iloc[0]
    one = table[table["arm"] == "plain"].assign(usd=lambda t: CLOCK(t["prompt_tokens"], t["output_tokens"]))
    means = one.groupby("problem_id")[["usd", "correct"]].mean()
    direct = paired_bootstrap(means["usd"], means["correct"], ratio_of_sums)
    assert row["usd_per_correct"] == pytest.approx(direct.value)
    assert row["usd_per_correct_low"] == pytest.approx(direct.low, rel=5e-3)
    assert row["usd_per_correct_high"] == pytest.approx(direct.high, rel=5e-3)
    assert row["idealized_seconds_low"] < row["idealized_seconds"] < row["idealized_seconds_high"]


def test_no_correct_answer_costs_infinitely_much() -> None:
    row = per_answer(samples(right=0.0), CLOCK, 1.0).iloc[0]
    assert row["usd_per_correct"] == row["usd_per_correct_high"] == np.inf
    rare = samples(problems=40).assign(correct=lambda t: t.index == 0)
    row = per_answer(rare[rare["arm"] == "plain"], CLOCK, 1.0).iloc[0]
    assert np.isfinite(row["usd_per_correct"])
    assert row["usd_per_correct_high"] == np.inf  # a resample may miss the one right answer


def test_from_a_file_and_a_catalogued_model(tmp_path: Path) -> None:
    records.write(tmp_path / "records.parquet", samples())
    clock = roofline_clock(transformer("yi-34b-200k"), accelerator("h200-141gb"))
    table = per_answer(records.read(tmp_path / "records.parquet"), clock, usd_per_hour=3.0)
    assert table["arm"].tolist() == ["plain", "search"]
    step = 34_388_917_248 * 2 / 4.8e12  # reading the weights bounds a step, and a short prompt too
    output = samples().query("arm == 'plain'")["output_tokens"].mean()
    assert table["idealized_seconds"][0] == pytest.approx(step * output, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: per_answer(samples().iloc[:0], CLOCK, 1.0), "no records"),
        (lambda: per_answer(samples(), CLOCK, 1.0, steps="tokens"), "'generated' or 'forwards', not 'tokens'"),
        (lambda: per_answer(samples(), CLOCK, 0.0), "every attempt must cost something"),
        (lambda: per_answer(samples(), CLOCK, -1.0), "usd_per_hour >= 0"),
        (lambda: per_answer(samples().assign(prompt_tokens=0), CLOCK, 1.0), "1 prompt token or more, not 0"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_single_problem_has_no_interval() -> None:
    row = per_answer(samples(problems=1), CLOCK, 1.0).iloc[0]
    assert np.isfinite(row["idealized_seconds"])
    assert np.isnan([row["idealized_seconds_low"], row["usd_per_correct_high"]]).all()


class Page:
    """What `report_costs` needs of a report."""

    def __init__(self, artifacts: Path) -> None:
        self.cfg = SimpleNamespace(artifacts=artifacts)

    def table(self, id: str, frame: pd.DataFrame, title: str, note: str) -> None:
        self.id, self.frame, self.note = id, frame, note


def test_the_columns_of_a_page_value_each_arm_with_its_own_model(tmp_path: Path) -> None:
    (tmp_path / "infer").mkdir()
    records.write(tmp_path / "infer" / "records.parquet", samples())
    large, small = transformer("yi-34b-200k"), transformer("llama-3.1-8b")
    page = Page(tmp_path)
    report_costs(cast("Any", page), lambda arm: large if arm == "search" else small)
    shown = page.frame.set_index("arm")
    assert page.id == "costs"
    for arm, model in (("search", large), ("plain", small)):
        alone = samples().query("arm == @arm")
        direct = per_answer(alone, roofline_clock(model, accelerator(REFERENCE)), USD_PER_HOUR).iloc[0]
        assert shown.loc[arm, "idealized_us"] == pytest.approx(1e6 * direct["idealized_seconds"])
        assert shown.loc[arm, "usd_per_million_correct_high"] == pytest.approx(1e6 * direct["usd_per_correct_high"])
    report_costs(cast("Any", page), small, steps="forwards")
    assert "paid once" in page.note
    assert page.frame["idealized_us"].nunique() == 1  # all of six forwards


def test_every_paper_that_samples_shows_both_columns() -> None:
    root = Path(__file__).resolve().parents[3]
    for page in sorted((root / "results" / "cpu").glob("*/tables")):
        sources = "".join(path.read_text() for path in (root / "papers" / page.parent.name).glob("*.py"))
        if "records.write(" in sources:
            table = pd.read_csv(page / "costs.csv")
            assert {"accuracy", "idealized_us", "usd_per_million_correct"} <= set(table.columns), page
            assert table["accuracy"].between(0, 1).all()
            assert (table["idealized_us"] > 0).all()
            assert (table["usd_per_million_correct"] > 0).all()
