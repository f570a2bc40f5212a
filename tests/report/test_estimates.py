"""Intervals of means over questions."""

import numpy as np
import pytest

from metis_agent.report.figures import MANY, difference_of_means, mean_of, wilson


def test_nothing_counts() -> None:
    found = mean_of(np.array([np.nan, np.nan]))
    assert (found.value, found.low, found.high, found.questions) == (None, None, None, 0)


def test_a_share_that_never_varied_still_has_an_interval() -> None:
    # After 20 questions without an exception: 1 - 0.025^(1/20) = 0.1684 (Clopper-Pearson).
    none, all_ = mean_of(np.zeros(20), low=0, high=1), mean_of(np.ones(20), low=0, high=1)
    assert (none.low, none.high) == (0.0, pytest.approx(0.16843, abs=1e-5))
    assert (all_.low, all_.high) == (pytest.approx(1 - 0.16843, abs=1e-5), 1.0)
    # A quantity without bounds can't be bounded by what was seen.
    calls = mean_of(np.full(20, 3.0))
    assert (calls.low, calls.high) == (3.0, 3.0)


def test_the_bootstrap_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).random(400) < 0.3
    found = mean_of(values.astype(float), low=0, high=1)
    error = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.01)
    assert found.high == pytest.approx(values.mean() + error, abs=0.01)


def test_many_questions_and_few_agree_where_they_meet() -> None:
    values = np.random.default_rng(1).random(MANY - 1)
    few, many = mean_of(values), mean_of(np.append(values, values.mean()))
    assert few.low == pytest.approx(many.low, abs=1e-3)
    assert few.high == pytest.approx(many.high, abs=1e-3)


def test_a_difference_of_two_means() -> None:
    before = mean_of(np.array([1.0, 1, 1, 0] * 25), low=0, high=1)
    after = mean_of(np.array([0.0, 0, 0, 1] * 25), low=0, high=1)
    found = difference_of_means(before, after)
    assert found.value == pytest.approx(-0.5)
    # Each has a standard error of sqrt(.25 * .75 / 100) = .0433, together .0612: half width .12.
    assert found.low == pytest.approx(-0.62, abs=0.015)
    assert found.high == pytest.approx(-0.38, abs=0.015)
    assert difference_of_means(before, mean_of(np.array([np.nan]))).value is None


def test_wilson() -> None:
    # The textbook case: 0 of 10 gives 0 to 0.2775.
    assert wilson(0.0, 10) == (0.0, pytest.approx(0.27753, abs=1e-4))
    assert wilson(0.5, 0) == (0.0, 1.0)
