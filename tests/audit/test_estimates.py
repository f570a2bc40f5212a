import numpy as np
import pytest

from metis_agent.audit.frontier import Resampled, corrected_ratio


def test_a_ratio_is_one_of_sums_and_its_interval_is_by_conversation() -> None:
    above, below = np.array([1.0, 0, 2, 0]), np.array([1.0, 1, 2, 2])
    alone = Resampled(["a", "b", "c", "d"]).ratio(above, below)
    assert (alone.value, alone.questions) == (pytest.approx(0.5), 6)
    # Turns of two conversations that are all alike within them say less.
    many = np.tile([1.0, 0.0], 50)
    free = Resampled([str(row) for row in range(100)]).ratio(many, np.ones(100))
    bound = Resampled([str(row % 2) for row in range(100)]).ratio(many, np.ones(100))
    assert free.high - free.low < 0.25
    assert (bound.low, bound.high) == (0.0, 1.0)


def test_what_never_varies_has_the_exact_bound() -> None:
    # 20 conversations without an exception: up to 1 - 0.025^(1/20) = 16.8% are compatible with it.
    every = Resampled([str(row) for row in range(20)])
    none = every.ratio(np.zeros(20), np.ones(20))
    assert (none.value, none.low, none.high) == (0.0, 0.0, pytest.approx(0.1684, abs=1e-4))
    whole = every.ratio(np.ones(20), np.ones(20))
    assert (whole.low, whole.high) == (pytest.approx(0.8316, abs=1e-4), 1.0)
    # One call of two in each conversation: as a share seen in 20 questions.
    half = every.ratio(np.ones(20), np.full(20, 2.0))
    assert (half.low, half.high) == (pytest.approx(0.299, abs=1e-3), pytest.approx(0.701, abs=1e-3))


def test_without_calls_nothing_is_known() -> None:
    assert Resampled([]).ratio(np.zeros(0), np.zeros(0)).value is None
    assert Resampled(["a"]).ratio(np.zeros(1), np.zeros(1)).value is None


def test_a_total_stands_for_what_was_not_sampled() -> None:
    total = Resampled(["a", "b"]).total(np.array([1.0, 3.0]), scale=10)
    assert total.value == 40
    assert (total.low, total.high) == (20.0, 60.0)  # both draws the cheap one, both the dear one


def test_a_correction_by_hand() -> None:
    # The judge calls all four redundant; a person checked two of them, and found one.
    found = corrected_ratio(np.ones(4), np.ones(4), np.array([0, 1]), np.array([1.0, 0.0]), list("abcd"))
    assert found.value == pytest.approx(0.5)  # w = 1 by default: 1 + (1/2 - 1)


def test_a_judge_that_errs_is_corrected_to_the_truth() -> None:
    inside, raw_inside, widths, alone = 0, 0, [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = 400
        truth = (rng.random(n) < 0.6).astype(float)
        judged = np.where(rng.random(n) < 0.25, 1 - truth, truth)
        checked = rng.choice(n, 80, replace=False)
        groups = [str(row) for row in range(n)]
        found = corrected_ratio(judged, np.ones(n), checked, truth[checked], groups, seed=seed)
        person = Resampled([groups[row] for row in checked], seed=seed).ratio(truth[checked], np.ones(80))
        raw = Resampled(groups, seed=seed).ratio(judged, np.ones(n))
        inside += found.low <= 0.6 <= found.high
        raw_inside += raw.low <= 0.6 <= raw.high
        widths.append(found.high - found.low)
        alone.append(person.high - person.low)
    # 95% of 30 is 28.5, with a standard error of 1.2; uncorrected the judge's share is off by 5 points.
    assert inside >= 26
    assert raw_inside < inside
    assert np.mean(widths) < 0.95 * np.mean(alone)


def test_checks_without_an_error_do_not_prove_that_there_are_none() -> None:
    judged = np.tile([1.0, 0.0], 500)
    found = corrected_ratio(judged, np.ones(1000), np.arange(30), judged[:30], [str(row) for row in range(1000)])
    assert found.value == pytest.approx(0.5)
    assert found.high - found.low > 0.15
