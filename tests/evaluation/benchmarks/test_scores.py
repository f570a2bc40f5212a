"""Values and intervals of a benchmark's figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError
from metis_agent.evaluation.agents import Estimate
from metis_agent.evaluation.benchmarks.base import Measure, estimates


def measure(right: list[list[float]], of: list[list[float]]) -> Measure:
    return Measure(right=np.array(right, dtype=float), of=np.array(of, dtype=float))


def test_an_accuracy_by_hand() -> None:
    """Three of four right. Of 4 units resampled, the share right is binomial(4, .75) / 4: 95% lie in 1/4 to 1."""
    found = estimates({"accuracy": measure([[1, 1, 1, 0]], [[1, 1, 1, 1]])}, resamples=4000)["accuracy"]
    # P(share <= 1/4) = .0508 and P(share = 0) = .0039: the 2.5% point is 1/4.
    assert found == Estimate(value=0.75, low=0.25, high=1.0, questions=4)


def test_a_mean_of_means_by_hand() -> None:
    """(2/2 + 0/1) / 2 = 1/2, where all together would be 2/3."""
    found = estimates({"m": measure([[1, 1], [0, 0]], [[1, 1], [0, 1]])}, resamples=50)["m"]
    assert found.value == 0.5
    assert found.questions == 2


def test_a_rate_by_hand() -> None:
    """RM of CM + RM: (0 + 1) / (1 + 1 + 0); the unit that is neither counts for nothing."""
    found = estimates({"RM": measure([[0, 1, 0]], [[1, 1, 0]])}, resamples=200)["RM"]
    assert found.value == 0.5
    assert (found.low, found.high, found.questions) == (0, 1, 2)


def test_what_nobody_counts_in_has_no_value() -> None:
    found = estimates({"none": measure([[0, 0]], [[0, 0]]), "no units": measure([[]], [[]])})
    assert set(map(str, found.values())) == {str(Estimate(value=None, low=None, high=None, questions=0))}


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 5))
def test_the_interval_holds_the_value_and_the_seed_decides(right: list[bool], seed: int) -> None:
    it = {"a": measure([[float(each) for each in right]], [[1.0] * len(right)])}
    found = estimates(it, resamples=100, seed=seed)["a"]
    assert found == estimates(it, resamples=100, seed=seed)["a"]
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.high <= 1
    if all(right):
        assert found.low == found.value == 1


def test_many_units_are_drawn_in_blocks() -> None:
    """The blocks change nothing: binomial(100000, .5) has a standard deviation of .0016."""
    it = {"a": measure([[1.0, 0.0] * 50_000], [[1.0] * 100_000])}
    found = estimates(it, resamples=100)["a"]
    assert found.low is not None
    assert found.high is not None
    assert 0.49 < found.low < 0.5 < found.high < 0.51


@pytest.mark.parametrize(("resamples", "confidence"), [(0, 0.95), (10, 1.0), (10, 0.0)])
def test_settings_out_of_range(resamples: int, confidence: float) -> None:
    with pytest.raises(ConfigurationError, match="1000 is usual"):
        estimates({}, resamples=resamples, confidence=confidence)
