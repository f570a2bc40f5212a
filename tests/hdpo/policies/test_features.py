"""What one fit of the `features` policy is."""

import numpy as np
import pytest

from metis_agent.gates.features import BUCKETS
from metis_agent.hdpo.policies.features import DENSE_WEIGHT, FeaturesPolicy
from metis_agent.rollouts.outcomes import OutcomeTable


@pytest.fixture(scope="module")
def table() -> OutcomeTable:
    """Whether direct is right follows from the draft; whether the tool is, from the question's first word."""
    rng = np.random.default_rng(0)
    uncertainty, asks = rng.normal(size=200), rng.integers(0, 2, 200)
    p = np.stack([1 / (1 + np.exp(2 * uncertainty)), np.where(asks, 0.9, 0.2)], axis=1)
    return OutcomeTable(
        questions=tuple(f"{('Count', 'Describe')[a]} the things numbered {n}" for n, a in enumerate(asks)),
        actions=("direct", "search"),
        correct=(rng.random((200, 2)) < p).astype(float),
        cost=np.tile([0.0, 1.0], (200, 1)),
        seconds=np.full((200, 2), np.nan),
        draft={"draft_uncertainty": uncertainty},
    )


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_a_fit_is_where_the_gradient_is_zero(table: OutcomeTable, strength: float) -> None:
    rows = np.arange(200)
    prepared = FeaturesPolicy(iterations=500).prepare(table)
    tensors = prepared.fit(rows, table.correct, np.full(2, strength)).tensors()
    x = prepared.inputs(rows, rows)
    weights = np.hstack([tensors["text_weights"], tensors["number_weights"]]).astype(float)
    # Text is held back by 1 / strength, numbers by 1.
    prior = np.r_[np.full(BUCKETS, 1 / strength), np.ones(weights.shape[1] - BUCKETS)]
    residual = 1 / (1 + np.exp(-(x @ weights.T + tensors["bias"]))) - table.correct
    assert np.abs(x.T @ residual + (prior * weights).T).max() < 0.05
    assert np.abs(residual.sum(axis=0)).max() < 0.2


def test_strength_is_that_of_the_text_alone(table: OutcomeTable) -> None:
    rows = np.arange(200)
    prepared = FeaturesPolicy().prepare(table)
    weak, strong = (prepared.fit(rows, table.correct, np.full(2, strength)).tensors() for strength in (1e-4, 10.0))
    assert np.abs(weak["text_weights"]).max() < 1e-3 < 0.5 < np.abs(strong["text_weights"]).max()
    # The draft's uncertainty, last of the numbers: a deviation of it moves the logit of direct far, even so.
    assert DENSE_WEIGHT * weak["number_weights"][0, -1] < -1
