import time

import pytest

from common.metrics.timing import Timings, compare


def test_ratio_of_sleeps():
    timings = compare({"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}, rounds=5)
    ratio = timings.ratio("slow", "fast")
    assert 1.5 < ratio.low <= ratio.value <= ratio.high
    assert timings.median("slow") == pytest.approx(0.03, rel=0.5)
    assert max(timings.cpu["slow"]) < 0.01  # sleeping takes wall time only
    assert list(timings.frame()["name"]) == ["slow", "fast"]


def test_the_order_rotates_and_warm_up_is_not_counted():
    calls: list[str] = []
    timings = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert len(timings.wall["a"]) == 2


def test_min_seconds_repeats_the_call():
    calls: list[int] = []
    compare({"a": lambda: calls.append(1)}, rounds=1, warmup=0, min_seconds=0.005)
    assert len(calls) > 10


def test_contended_when_most_rounds_were_disturbed():
    assert Timings({"a": [1.0] * 3}, {"a": [1.0] * 3}, {"a": [True, True, False]}).contended
    assert not Timings({"a": [1.0] * 3}, {"a": [1.0] * 3}, {"a": [True, False, False]}).contended


def test_nothing_to_time():
    with pytest.raises(ValueError, match="0 functions"):
        compare({})
