import numpy as np
import pytest

from metis_agent.evaluation.gates import (
    accuracy_at_rate,
    area_under_curve,
    area_under_frontier,
    brier,
    expected_calibration_error,
    frontier,
)


def test_area_under_curve_by_hand() -> None:
    # Pairs (right, wrong): (.9, .1) won, (.9, .5) won, (.5, .1) won, (.5, .5) tied: 3.5 of 4.
    assert area_under_curve(np.array([0.9, 0.5, 0.1, 0.5]), np.array([1.0, 1, 0, 0])) == 3.5 / 4
    assert np.isnan(area_under_curve(np.array([0.1, 0.2]), np.array([1.0, 1.0])))


def test_a_share_counts_as_that_many_records() -> None:
    score, half = np.array([0.9, 0.1]), np.array([0.5, 0.0])
    assert area_under_curve(score, half) == area_under_curve(np.array([0.9, 0.9, 0.1, 0.1]), np.array([1.0, 0, 0, 0]))


def test_calibration_error_and_brier_by_hand() -> None:
    p, y = np.array([0.95, 0.95, 0.05, 0.05]), np.array([1.0, 0, 0, 0])
    # Bins: mean .95 of which .5 right, gap .45; mean .05 of which none, gap .05; each half of the rows.
    assert expected_calibration_error(p, y) == pytest.approx(0.25)
    assert brier(p, y) == pytest.approx((0.05**2 + 0.95**2 + 2 * 0.05**2) / 4)


def test_the_frontier_calls_where_the_need_is_highest_and_shares_out_ties() -> None:
    need = np.array([0.9, 0.5, 0.5, 0.1])
    direct, tool = np.array([0.0, 0, 1, 1]), np.array([1.0, 1, 1, 0])
    # Direct: 2 of 4. First call +1; the tied two give +1 and 0, so half each; the last -1.
    found = [point["accuracy"] for point in frontier(need, direct, tool, (0, 0.25, 0.5, 0.75, 1))]
    assert found == [0.5, 0.75, 0.875, 1.0, 0.75]
    assert accuracy_at_rate(np.zeros(4), direct, tool, 0.5) == pytest.approx((0.5 + 0.75) / 2)


def test_the_area_under_accuracy_and_calls_by_hand() -> None:
    # Accuracy at 0 to 4 calls: .5, .75, .875, 1, .75, joined by lines: (.5/2 + .75 + .875 + 1 + .75/2) / 4.
    need = np.array([0.9, 0.5, 0.5, 0.1])
    direct, tool = np.array([0.0, 0, 1, 1]), np.array([1.0, 1, 1, 0])
    assert area_under_frontier(need, direct, tool) == pytest.approx((0.25 + 0.75 + 0.875 + 1 + 0.375) / 4)
    # An order that knows nothing: between never and always.
    assert area_under_frontier(np.zeros(4), direct, tool) == pytest.approx((0.5 + 0.75) / 2)
