import numpy as np
import pytest

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.evaluation.calibration import (
    Promise,
    choose_threshold,
    difference_p_value,
    exceeds_p_value,
    plan_promises,
)
from metis_agent.evaluation.comparison import drift


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Questions of which a gate knows, roughly, whether the tool helps."""
    rng = np.random.default_rng(seed)
    skill = rng.random(n)
    direct = (rng.random(n) < skill).astype(float)
    tool = (rng.random(n) < 0.75 + 0.2 * skill).astype(float)
    noisy = np.clip(1 - skill + rng.normal(0, 0.1, n), 0.01, 0.99)
    return noisy[:, None], np.stack([direct, tool], axis=1), np.tile([0.0, 1.0], (n, 1))


LOSS = Promise(kind="accuracy_loss", limit=0.02, delta=0.1)
CALLS = Promise(kind="calls", limit=0.4, delta=0.1)
COST = Promise(kind="cost", limit=0.4, delta=0.1, highest=1.0)


def quantity(promise: Promise, called: np.ndarray, correct: np.ndarray) -> float:
    """What is promised; a call costs 1 here."""
    lost = ~called * (correct[:, 1] - correct[:, 0])
    return float(np.mean(lost if promise.kind == "accuracy_loss" else called))


@pytest.mark.parametrize("promise", [LOSS, CALLS, COST], ids=lambda promise: promise.kind)
def test_over_200_calibrations_the_long_run_mean_breaks_a_promise_in_at_most_its_share(promise: Promise) -> None:
    # Each calibration has questions of its own; the long run is the mean over a hundred thousand others.
    probabilities, correct, _ = world(100_000, seed=7)
    broken = refused = 0
    for split in range(200):
        try:
            found = choose_threshold(*world(500, seed=100 + split), promise, seed=split)
        except InputError:
            refused += 1
            continue
        broken += quantity(promise, probabilities[:, 0] > found.value, correct) > promise.limit
    assert broken <= 200 * promise.delta
    assert refused < 60


def test_exact_p_values_of_paired_answers_hold_at_the_edge_and_see_more_than_bets() -> None:
    rng = np.random.default_rng(4)

    def rejected(share: float, mean: float, n: int, limit: float) -> tuple[float, float]:
        p = [(share + mean) / 2, 1 - share, (share - mean) / 2]
        draws = rng.choice([1.0, 0.0, -1.0], p=p, size=(400, n))
        exact = np.mean([difference_p_value(lost, limit) <= 0.1 for lost in draws])
        bets = np.mean([exceeds_p_value((1 + lost) / 2, (1 + limit) / 2) <= 0.1 for lost in draws])
        return float(exact), float(bets)

    # At the edge at most .1; by the binomial distribution more than .145 of 400 draws has a chance below 0.003.
    assert max(rejected(0.1, 0.02, 300, 0.02)[0], rejected(0.03, 0.02, 200, 0.02)[0]) <= 0.145
    exact, bets = rejected(0.1, 0.0, 600, 0.02)
    assert exact > bets + 0.1
    # By hand: no pair of 200 parts ways, and where the mean is .02 that has a chance of at most .98^200 = .0176.
    assert difference_p_value(np.zeros(200), 0.02) == pytest.approx(0.0176 + 0.001, abs=1e-4)


def test_a_few_records_with_nothing_lost_are_enough_for_a_bold_gambler() -> None:
    # A loss that is no 0, .5 or 1 is bet on: 200 records, none of which lost anything, support two points.
    assert exceeds_p_value(np.full(200, 0.5), 0.51) <= 0.2


def test_a_plan_says_what_calibrations_of_that_size_then_do() -> None:
    table = world(1500, seed=11)
    plans = plan_promises(*table, [LOSS], (60, 400), groups=np.arange(1500) // 2, draws=20)
    assert [plan.rows for plan in plans] == [60, 400]
    assert plans[0].refused > plans[1].refused
    assert plans[0].tool_rate > plans[1].tool_rate > 0.2
    kept = []
    for split in range(20):
        try:
            kept.append(choose_threshold(*world(400, seed=500 + split), LOSS, groups=np.arange(400) // 2).tool_rate)
        except InputError:
            kept.append(1.0)
    assert plans[1].tool_rate == pytest.approx(np.mean(kept), abs=0.1)
    assert plans[1].always - LOSS.limit < plans[1].accuracy <= 1


def halves_broken(promise: Promise, table: tuple[np.ndarray, ...], ahead: int | None = None) -> float:
    """Over 200 splits of one set into halves: share of them in which a promise is broken on the test half."""
    probabilities, correct, cost = table
    rng = np.random.default_rng(1)
    broken = 0
    for split in range(200):
        train, test = np.split(rng.permutation(len(correct)), 2)
        try:
            found = choose_threshold(
                probabilities[train], correct[train], cost[train], promise, ahead=ahead, seed=split
            )
        except InputError:
            continue
        broken += quantity(promise, probabilities[test, 0] > found.value, correct[test]) > promise.limit
    return broken / 200


def test_on_a_test_half_the_promised_loss_of_accuracy_is_exceeded_in_at_most_its_share_where_ahead_covers_it() -> None:
    promise = Promise(kind="accuracy_loss", limit=0.05, delta=0.1)
    assert halves_broken(promise, world(400, seed=5), ahead=200) <= 0.1


def test_a_sharp_bound_on_the_long_run_is_exceeded_more_often_on_a_test_half_unless_ahead_covers_it() -> None:
    # .384 of these questions are called on: a calibration half with less than .368 of them is taken for "at most .4"
    # in the long run, and then the other half has more than .4. That is one split in six.
    probabilities = np.where(np.arange(800) < 307, 0.8, 0.2)[:, None]
    table = probabilities, np.zeros((800, 2)), np.tile([0.0, 1.0], (800, 1))
    assert halves_broken(CALLS, table) > 0.12
    assert halves_broken(CALLS, table, ahead=400) <= CALLS.delta


def test_questions_of_one_group_count_as_one_record() -> None:
    # Groups of six that are called on, or not, as one: row by row, the promise would be broken far too often.
    rng = np.random.default_rng(3)
    probabilities = np.repeat(rng.random(2000), 6)[:, None]
    correct, cost = np.zeros((12_000, 2)), np.tile([0.0, 1.0], (12_000, 1))
    broken = dict.fromkeys(("rows", "groups"), 0)
    for split in range(100):
        picked = np.random.default_rng(split).choice(2000, 100, replace=False)
        rows = (picked[:, None] * 6 + np.arange(6)).ravel()
        for name, groups in (("rows", ()), ("groups", tuple(rows // 6))):
            found = choose_threshold(probabilities[rows], correct[rows], cost[rows], CALLS, groups=groups, seed=split)
            broken[name] += bool((probabilities > found.value).mean() > CALLS.limit)
            assert found.groups == (100 if groups else 600)
    assert broken["groups"] <= 10 < 15 <= broken["rows"]


def test_the_p_value_of_the_next_records_is_valid() -> None:
    # An urn whose second half is just over the limit of 0.3: chance of a p-value of 0.1 or less, over its orders.
    rng = np.random.default_rng(2)
    for values in (np.array([0.0, 1.0]), np.array([0.0, 0.5, 1.0])):
        urn = rng.choice(values, p=[0.72, 0.28] if len(values) == 2 else [0.5, 0.4, 0.1], size=240)
        misses = 0
        for _ in range(400):
            rng.shuffle(urn)
            misses += urn[120:].mean() > 0.3 and exceeds_p_value(urn[:120], 0.3, 120) <= 0.1
        assert misses <= 50
    # And in a long batch ahead it is that of the long run.
    losses = rng.choice([0.0, 0.5], size=200)
    assert exceeds_p_value(losses, 0.3, 10**7) == pytest.approx(exceeds_p_value(losses, 0.3), rel=0.01)


def test_the_p_value_is_valid_at_the_edge() -> None:
    # Mean loss exactly the limit, losses of three values as for accuracy: rejected at 0.1 in at most 10% of draws.
    rng = np.random.default_rng(1)
    draws = rng.choice([0.0, 0.5, 1.0], p=[0.05, 0.88, 0.07], size=(2000, 300))
    rejected = np.mean([exceeds_p_value(row, 0.51) <= 0.1 for row in draws])
    assert rejected <= 0.12
    # And it has power: a mean well below the limit is seen.
    assert exceeds_p_value(np.full(1000, 0.45), 0.5) < 0.01


def test_what_the_records_cannot_support_is_refused() -> None:
    probabilities, correct, cost = world(60, seed=3)
    with pytest.raises(InputError, match="can't support"):
        choose_threshold(probabilities, correct, cost, Promise(kind="accuracy_loss", limit=0.001))


def test_groups_and_ahead_that_mean_nothing_are_refused() -> None:
    probabilities, correct, cost = world(60, seed=3)
    with pytest.raises(InputError, match="one each"):
        choose_threshold(probabilities, correct, cost, CALLS, groups=("a",))
    with pytest.raises(ConfigurationError, match="at least 1"):
        choose_threshold(probabilities, correct, cost, CALLS, ahead=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "speed", "limit": 0.1},
        {"kind": "calls", "limit": -0.1},
        {"kind": "calls", "limit": 0.1, "delta": 0.0},
        {"kind": "cost", "limit": 0.1},
    ],
)
def test_a_promise_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Promise(**wrong)  # type: ignore[arg-type]


def test_drift_is_seen_and_not_imagined() -> None:
    rng = np.random.default_rng(0)
    reference = rng.random((800, 3))
    alarms = sum(drift(reference, rng.random((300, 3)), ("a", "b", "c")).drifted for _ in range(100))
    assert alarms <= 4
    moved = rng.random((300, 3)) * [1, 0.7, 1]
    found = drift(reference, moved, ("a", "b", "c"))
    assert found.drifted
    assert found.column == "b"
    assert 0.2 < found.distance < 0.4
    with pytest.raises(InputError, match="20 or more"):
        drift(reference, moved[:10], ("a", "b", "c"))
