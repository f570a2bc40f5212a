import numpy as np
import pytest

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.hdpo.calibration import Promise, choose_threshold, drift, exceeds_p_value


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Questions of which a gate knows, roughly, whether the tool helps."""
    rng = np.random.default_rng(seed)
    skill = rng.random(n)
    direct = (rng.random(n) < skill).astype(float)
    tool = (rng.random(n) < 0.75 + 0.2 * skill).astype(float)
    noisy = np.clip(1 - skill + rng.normal(0, 0.1, n), 0.01, 0.99)
    return noisy[:, None], np.stack([direct, tool], axis=1), np.tile([0.0, 1.0], (n, 1))


@pytest.mark.parametrize(
    ("promise", "measure"),
    [
        (Promise(kind="accuracy_loss", limit=0.02, delta=0.1), "loss"),
        (Promise(kind="calls", limit=0.4, delta=0.1), "calls"),
        (Promise(kind="cost", limit=0.4, delta=0.1, highest=1.0), "calls"),
    ],
)
def test_over_200_splits_a_promise_is_broken_in_at_most_its_share(promise: Promise, measure: str) -> None:
    probabilities, correct, cost = world(12_000, seed=7)
    rng = np.random.default_rng(0)
    broken = refused = 0
    for split in range(200):
        order = rng.permutation(len(correct))
        train, test = order[:1500], order[1500:]
        try:
            found = choose_threshold(probabilities[train], correct[train], cost[train], promise, seed=split)
        except InputError:
            refused += 1
            continue
        called = probabilities[test, 0] > found.value
        if measure == "loss":
            got = float(np.mean(~called * (correct[test, 1] - correct[test, 0])))
        else:
            got = float(called.mean())
        broken += got > promise.limit
    assert broken <= 200 * promise.delta
    assert refused < 20


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
