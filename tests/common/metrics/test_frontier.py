"""Costs at matched accuracy: closed forms on curves whose inverse is known."""

import numpy as np
import pytest

from common.metrics.frontier import area_under, cost_at, cost_ratios

BUDGETS = np.array([1, 2, 4, 8, 16, 32])


def test_the_inverse_of_a_log_linear_curve_is_exact():
    accuracy = 0.2 + 0.1 * np.log2(BUDGETS)
    levels = np.linspace(0.2, 0.7, 11)
    assert cost_at(levels, BUDGETS, accuracy) == pytest.approx(2 ** ((levels - 0.2) / 0.1))
    assert cost_at([0.1, 0.71], BUDGETS, accuracy)[0] == 1
    assert np.isnan(cost_at([0.71], BUDGETS, accuracy)[0])


@pytest.mark.parametrize("factor", [2.0, 3.5, 8.0])
def test_a_method_that_is_so_many_times_cheaper_is_found_to_be(factor):
    ours = 0.1 + 0.1 * np.log2(BUDGETS)
    theirs = 0.1 + 0.1 * np.log2(BUDGETS / factor)
    levels, ratios = cost_ratios(BUDGETS, ours, BUDGETS, theirs)
    assert len(levels) > 5
    assert ratios == pytest.approx(np.full(len(levels), factor))


def test_a_dip_does_not_count():
    assert cost_at([0.5], [1, 2, 4], [0.5, 0.3, 0.6])[0] == 1
    assert cost_at([0.55], [1, 2, 4], [0.5, 0.3, 0.6])[0] == pytest.approx(2 * 2**0.5)


def test_nothing_shared_is_empty():
    levels, ratios = cost_ratios([1, 2], [0.1, 0.2], [1, 2], [0.3, 0.4])
    assert len(levels) == len(ratios) == 0


def test_area():
    assert area_under(BUDGETS, np.full(6, 0.3), 1, 32) == pytest.approx(0.3)
    assert area_under(BUDGETS, 0.1 * np.log2(BUDGETS), 1, 32) == pytest.approx(0.25)
    assert area_under(BUDGETS, 0.1 * np.log2(BUDGETS), 2, 8) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cost_at([0.5], [2, 1], [0.1, 0.2]),
        lambda: cost_at([0.5], [0, 1], [0.1, 0.2]),
        lambda: area_under([1], [1], 2, 1),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match=r"rising|0 < low < high"):
        call()
