import numpy as np
import pytest

from metis_agent.evaluation.comparison import FIGURES, compare_rankings, ranking_figures
from metis_agent.evaluation.gates import Resamples, Scored
from metis_agent.rollouts.outcomes import OutcomeTable


def table(correct: np.ndarray, groups: tuple[str, ...] = ()) -> OutcomeTable:
    n = len(correct)
    return OutcomeTable(
        questions=tuple(f"question {row}" for row in range(n)),
        actions=("direct", "search"),
        correct=correct,
        cost=np.tile([0.0, 1.0], (n, 1)),
        seconds=np.full((n, 2), np.nan),
        groups=groups,
    )


def scored(direct_right: np.ndarray) -> Scored:
    return Scored(direct_right=direct_right, probabilities=1 - direct_right[:, None])


def test_figures_by_hand() -> None:
    # Direct right on the first two of four, the tool on the last three.
    outcomes = table(np.array([[1.0, 0], [1, 1], [0, 1], [0, 1]]))
    good = ranking_figures(scored(np.array([0.9, 0.8, 0.2, 0.1])), outcomes, np.arange(4))
    # Half of the calls, on the last two: all four right, where always calling gets three. Over all budgets, accuracy
    # goes .5, .75, 1, 1, .75: the area is (.5/2 + .75 + 1 + 1 + .75/2) / 4.
    assert dict(zip(FIGURES, good, strict=True)) == {
        "aucc": 0.84375, "auc": 1.0, "auc_benefit": 1.0, "accuracy_at_half": 1.0, "half_minus_always": 0.25,
    }  # fmt: skip
    bad = ranking_figures(scored(np.array([0.1, 0.2, 0.8, 0.9])), outcomes, np.arange(4))
    # On the first two: the second stays right, the first is lost, and the last two are not mended; the area is
    # (.5/2 + .25 + .25 + .5 + .75/2) / 4.
    assert bad == (0.40625, 0.0, 0.0, 0.25, -0.5)


def test_a_gap_is_narrower_than_the_figures_it_lies_between() -> None:
    rng = np.random.default_rng(0)
    skill = rng.random(600)
    outcomes = table((rng.random((600, 2)) < np.stack([skill, 0.3 + 0.5 * skill], axis=1)).astype(float))
    close = [scored(np.clip(skill + rng.normal(0, 0.05, 600), 0, 1)) for _ in range(2)]
    noisy = [scored(np.clip(skill + rng.normal(0, 0.4, 600), 0, 1)) for _ in range(2)]
    found = compare_rankings(
        {"gate": close, "same": close, "noisy": noisy},
        outcomes,
        Resamples(outcomes.groups or outcomes.keys, 200, 0),
        reference="gate",
    )
    assert found["gate"]["auc"] == pytest.approx(np.mean(found["gate"]["auc_seeds"]))
    low, high = found["gate"]["auc_interval"]
    assert low < found["gate"]["auc"] < high
    assert found["same"]["auc_below_reference"] == 0
    assert found["same"]["auc_below_reference_interval"] == [0, 0]
    gap_low, gap_high = found["noisy"]["auc_below_reference_interval"]
    assert 0 < gap_low < found["noisy"]["auc_below_reference"] < gap_high
    # The same resamples: questions that are hard for both don't widen it.
    noisy_low, noisy_high = found["noisy"]["auc_interval"]
    assert gap_high - gap_low < (high - low) + (noisy_high - noisy_low)
    assert "auc_below_reference" not in found["gate"]


def test_rows_of_a_group_are_drawn_together() -> None:
    outcomes = table(np.eye(2)[np.arange(40) % 2], groups=tuple(f"g{row // 4}" for row in range(40)))
    counts = Resamples(outcomes.groups or outcomes.keys, 50, 0).values(lambda index: np.bincount(index, minlength=40))
    assert (counts.reshape(50, 10, 4) == counts.reshape(50, 10, 4)[:, :, :1]).all()
    assert (counts.sum(axis=1) == 40).all()
