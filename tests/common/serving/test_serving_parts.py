"""Latency curves, traces, catalogue, metrics and searches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import interp1d

from common.serving import catalogue, latency, metrics, search, traces
from common.serving.engine import Block, Log


@given(
    st.lists(st.integers(1, 5000), min_size=2, max_size=8, unique=True).map(sorted),
    st.lists(st.floats(0.5, 9), min_size=8, max_size=8),
    st.integers(1, 8000),
)
def test_curves_are_scipys_linear_interpolation(tokens: list[int], gaps: list[float], at: int) -> None:
    seconds = np.cumsum(gaps[: len(tokens)]) + 5000.0  # far from zero, so that extrapolation stays positive
    expected = float(interp1d(tokens, seconds, fill_value="extrapolate")(at))
    curve = latency.Curve([float(t) for t in tokens], list(seconds))
    if expected > 0:
        assert curve(at) == pytest.approx(expected, rel=1e-12)
        assert curve(at) == curve(at)
    else:
        with pytest.raises(ValueError, match="extrapolate"):
            curve(at)


def test_curves_refuse_what_is_no_curve() -> None:
    with pytest.raises(ValueError, match="two points"):
        latency.Curve([1], [1])
    with pytest.raises(ValueError, match="ascend"):
        latency.Curve([1, 1], [1, 2])
    with pytest.raises(ValueError, match="decode_axis"):
        latency.from_points({1: 1, 2: 2}, {1: 1, 2: 2}, decode_axis="batch")


def test_an_iteration_takes_what_its_phase_takes() -> None:
    model = latency.from_points({100: 10, 200: 30}, {10: 4, 20: 5}, mixed_factor=1.1)
    assert model.iteration(150, 0) == pytest.approx(0.020)
    assert model.iteration(0, 15) == pytest.approx(0.0045)
    assert model.iteration(140, 10) == pytest.approx(1.1 * 0.020)
    context = latency.from_points({100: 10, 200: 30}, {10: 4, 20: 5}, decode_axis="context")
    assert context.iteration(0, 3, context_tokens=15) == pytest.approx(0.0045)


def test_profiles_become_medians_by_batched_tokens() -> None:
    rows = [("m", "g", 8, 64, 2, 1.0, 9.0), ("m", "g", 8, 128, 1, 3.0, 9.0), ("m", "g", 8, 256, 1, 5.0, 7.0)]
    profile = pd.DataFrame(rows, columns=list(latency.PROFILE_COLUMNS))
    model = latency.from_profile(profile, "m", "g")
    assert model.prompt(128) == pytest.approx(0.002)  # the median of 1 and 3 ms
    assert model.token(256) == pytest.approx(0.007)
    with pytest.raises(ValueError, match=r"no profile of \('m', 'other', 8\).*'g'"):
        latency.from_profile(profile, "m", "other")
    with pytest.raises(ValueError, match="prompt_time"):
        latency.medians(profile.drop(columns=["prompt_time"]))


GOOD = {"arrival": [0.0, 1.5], "prompt_tokens": [3, 4], "output_tokens": [1, 2]}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("arrival", -0.5), ("arrival", "soon"), ("arrival", float("nan")), ("arrival", float("inf")),
        ("prompt_tokens", 0), ("prompt_tokens", -3), ("prompt_tokens", "many"), ("prompt_tokens", 2.5),
        ("output_tokens", 0), ("output_tokens", -1), ("output_tokens", None), ("output_tokens", 1.25),
    ],
)  # fmt: skip
def test_a_bad_entry_is_named_by_row_and_column(column: str, value: object, tmp_path: Path) -> None:
    frame = pd.DataFrame(GOOD).astype(object)
    frame.loc[1, column] = value
    with pytest.raises(ValueError, match=f"row 1, column {column}"):
        traces.load_trace(frame)
    frame.to_csv(tmp_path / "trace.csv", index=False)
    with pytest.raises(ValueError, match=f"row 1, column {column}"):
        traces.load_trace(tmp_path / "trace.csv")


def test_a_trace_lacks_a_column_or_repeats_an_id() -> None:
    with pytest.raises(ValueError, match="lacks the column output_tokens"):
        traces.load_trace(pd.DataFrame(GOOD).drop(columns=["output_tokens"]))
    with pytest.raises(ValueError, match="row 1, column request_id: 7 occurs twice"):
        traces.load_trace(pd.DataFrame({**GOOD, "request_id": [7, 7]}))


def test_a_good_trace_comes_back_checked_and_the_original_stays(tmp_path: Path) -> None:
    frame = pd.DataFrame(GOOD)
    loaded = traces.load_trace(frame)
    assert list(loaded["request_id"]) == [0, 1]
    assert loaded["prompt_tokens"].dtype == np.int64
    assert list(frame.columns) == list(GOOD)
    frame.to_csv(tmp_path / "trace.csv", index=False)
    pd.testing.assert_frame_equal(traces.load_trace(str(tmp_path / "trace.csv")), loaded)


def test_poisson_traces_share_their_random_numbers_across_rates_and_lengths() -> None:
    prompts, outputs = np.arange(1, 1000), np.arange(1, 50)
    one = traces.poisson_trace(prompts, outputs, 5.0, 2000, seed=3)
    two = traces.poisson_trace(prompts, outputs, 10.0, 1000, seed=3)
    short = traces.poisson_trace(prompts, outputs, 5.0, 100, seed=3)
    np.testing.assert_allclose(one["arrival"], 2 * two["arrival"])
    assert (one["prompt_tokens"] == two["prompt_tokens"]).all()
    pd.testing.assert_frame_equal(one.iloc[: len(short)], short)
    assert abs(len(one) - 10_000) < 4 * np.sqrt(10_000)
    gaps = np.diff(one["arrival"])
    assert abs(gaps.std() / gaps.mean() - 1) < 4 * np.sqrt(2 / len(gaps)) + 0.01
    with pytest.raises(ValueError, match="rate 0"):
        traces.poisson_trace(prompts, outputs, 0, 10, seed=0)


def test_sizes_from_quantiles_have_these_quantiles() -> None:
    quantiles = {0: 3, 0.5: 1469, 0.9: 5187.6, 0.99: 7436, 1: 7437}
    sizes = traces.sizes_from_quantiles(quantiles, 8819)
    for level, value in quantiles.items():
        assert np.quantile(sizes, level) == pytest.approx(value, rel=0.01, abs=1)
    with pytest.raises(ValueError, match="include 0 and 1"):
        traces.sizes_from_quantiles({0.5: 3}, 10)


def test_the_catalogue_keeps_its_units_apart() -> None:
    machine, model = catalogue.hardware("dgx-h100"), catalogue.served_model("bloom-176b")
    assert machine.memory_bytes == 8 * 80 * 2**30
    assert model.kv_bytes == 2 * 14336 * 70 * 2
    assert catalogue.kv_capacity(machine, model) == 8 * 80 * 2**30 - 329 * 10**9
    assert catalogue.hardware("dgx-h200").memory_bytes == pytest.approx(8 * 141e9, rel=1e-3)
    with pytest.raises(ValueError, match="unknown machine 'dgx-b200'; known: dgx-a100"):
        catalogue.hardware("dgx-b200")
    with pytest.raises(ValueError, match="unknown model 'gpt-5'"):
        catalogue.served_model("gpt-5")
    small = catalogue.Hardware("small", catalogue.gpu("a100-80gb"), 1, 400, 0, None, None, "a test")
    with pytest.raises(ValueError, match="does not fit small"):
        catalogue.kv_capacity(small, model)


@given(st.floats(0.2, 99), st.floats(0.01, 1))
def test_bisection_finds_the_threshold(threshold: float, tolerance: float) -> None:
    found = search.largest_feasible(lambda rate: rate <= threshold, 0.1, 100, tolerance)
    assert threshold - tolerance <= found <= threshold


def test_bisection_at_its_ends() -> None:
    assert search.largest_feasible(lambda rate: True, 1, 9, 0.1) == 9
    assert search.largest_feasible(lambda rate: False, 1, 9, 0.1) == 0
    with pytest.raises(ValueError, match="low=2, high=1"):
        search.largest_feasible(bool, 2, 1, 0.1)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 70))
def test_least_feasible_finds_the_threshold_once_a_number(low: int, width: int, threshold: int) -> None:
    asked: list[int] = []

    def feasible(n: int) -> bool:
        asked.append(n)
        return n >= threshold

    high = low + width
    assert search.least_feasible(feasible, low, high) == (max(low, threshold) if threshold <= high else None)
    assert len(set(asked)) == len(asked)
    assert all(low <= n <= high for n in asked)


def test_active_tokens_and_utilisation_add_up() -> None:
    blocks = [Block(0, 0.0, 2.0, 1, 1, 500, 3), Block(0, 2.0, 3.0, 5, 0, 0, 3), Block(1, 1.0, 2.0, 5, 0, 0, 3)]

    class Machine:
        name, home, peak_memory, capacity = "m", "all", 5, 10

    log = Log([], blocks, [Machine(), Machine()], 0)
    frame = metrics.active_tokens(log)
    assert frame["tokens"].tolist() == [3, 503]
    assert frame["seconds"].tolist() == [2.0, 2.0]
    assert frame["cumulative"].iloc[-1] == pytest.approx(1)
    assert metrics.active_tokens(log, {1})["seconds"].tolist() == [1.0]
    assert metrics.utilisation(log)["busy_share"].tolist() == pytest.approx([1.0, 1 / 3])


def test_objectives_hold_strictly() -> None:
    assert metrics.meets({"ttft_p50": 1.99}, {"ttft_p50": 2.0})
    assert not metrics.meets({"ttft_p50": 2.0}, {"ttft_p50": 2.0})
    with pytest.raises(KeyError):
        metrics.meets({}, {"ttft_p50": 2.0})
