"""The study's searches and the small calculations of part B."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.metrics.intervals import Measured
from common.models.build import build
from papers.splitwise import judge, real, study
from papers.splitwise.designs import NAMES, Design


@given(st.lists(st.integers(1, 14), min_size=1, max_size=12))
def test_provisioning_finds_every_smallest_cluster(heights: list[int]) -> None:
    """Against all pairs, where needed[i] token machines are the least for the i-th feasible number of prompts."""
    most = 12
    needed = np.minimum.accumulate(heights)  # more prompt machines never need more token machines

    def feasible_at(folder: str, design: Design, *rest: Any) -> bool:
        at = design.prompt - 1 - (most - len(needed))  # the smallest pools hold at no number of token machines
        return at >= 0 and design.token >= needed[at]

    region = {(p, t) for p in range(1, most + 1) for t in range(1, most + 1) if feasible_at("", Design("", p, t))}
    smallest = {(p, t) for p, t in region if (p - 1, t) not in region and (p, t - 1) not in region}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "feasible_at", feasible_at)
        found = study.provisioned("", "Splitwise-HA", "conv", 10, 60, 0, most)
    assert set(found) == smallest
    assert len(found) == len(smallest)


def test_provisioning_a_baseline_is_one_number() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "feasible_at", lambda folder, design, *rest: design.prompt >= 5)
        assert study.provisioned("", "Baseline-H100", "conv", 10, 60, 0, 12) == [(5, 0)]
        assert study.provisioned("", "Baseline-H100", "conv", 10, 60, 0, 4) == []
        assert study.provisioned_rows("", "Baseline-H100", "conv", 10, 60, 0, 4)[0]["cost"] is None


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_rate_is_feasible_only_below_the_largest(name: str, tmp_path: Any) -> None:
    """On a real, small search: feasible at the rate found, not at the next step of the bisection."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"prompt_tokens": rng.integers(50, 3000, 500), "output_tokens": rng.integers(2, 200, 500)})
    frame.to_csv(tmp_path / "conv.csv", index=False)
    folder, design = str(tmp_path), Design(name, 2, 0 if name.startswith("Baseline") else 1)
    rate = study.largest_rate(folder, design, "conv", 20.0, 0, {}, 0.5, 40.0, 0.5)
    assert 0.5 <= rate < 40
    assert study.feasible_at(folder, design, "conv", rate, 20.0, 0, {})
    assert not study.feasible_at(folder, design, "conv", rate + 39.5 / 128, 20.0, 0, {})


def test_a_curve_never_falls_and_is_flat_below_its_points() -> None:
    rows = [
        {"phase": phase, "threads": 1, "size": size, "wall_ms": ms}
        for phase in ("prefill", "decode")
        for size, ms in ((8, 2.0), (16, 1.5), (32, 4.0))
    ]
    curve = real._curve(rows, 1)
    assert [1e3 * curve.prompt(n) for n in (1, 8, 16, 24, 32)] == pytest.approx([2, 2, 2, 3, 4])
    assert 1e3 * curve.token(64) == pytest.approx(8)


def test_arithmetic_intensity_of_a_prefill_over_a_decode_step() -> None:
    """Both read the same bytes, so the ratio is that of the FLOPs: a little below the number of tokens."""
    model = build("llama-0.1m", seed=0)
    for tokens in (1, 64, 1024):
        ratio = real.intensity(model, tokens)
        assert tokens / 2 < ratio <= tokens
    assert real.intensity(model, 1) == 1


def test_measurements_without_a_value_are_no_measurements() -> None:
    assert judge._t(np.array([0.9, np.nan, 1.0])) is None
    interval = judge._t(np.array([0.9, 1.1, 1.0]))
    assert isinstance(interval, Measured)
    assert interval.low < 1 < interval.high
    assert np.isnan(judge._interval(None)["reproduced"])
