"""Baselines on the policy's own inputs, and HDPO on re-sampled groups, on a world where each has something to find."""

import numpy as np
import pytest

from benchmarks.recorded_groups import GroupTraining, train_on_groups
from metis_agent.evaluation.comparison import feature_baselines, ranking_figures, supervised_baselines
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.policies.features import FeaturesPolicy
from metis_agent.rollouts.outcomes import OutcomeTable

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def table() -> OutcomeTable:
    """Sums need the tool, greetings don't, riddles are lost either way."""
    rng = np.random.default_rng(3)
    kinds = rng.integers(0, 3, 300)
    asked = ("What is {} plus {}?", "Say hello to guest {} of {}", "Riddle {}: what has {} eyes?")
    p = np.array([[0.1, 0.95], [0.95, 0.95], [0.1, 0.1]])[kinds]
    return OutcomeTable(
        questions=tuple(asked[k].format(*rng.integers(10, 10_000, 2)) for k in kinds),
        actions=("direct", "python"),
        correct=(rng.random((300, 2)) < p).astype(float),
        cost=np.tile([0.0, 1.0], (300, 1)),
        seconds=np.full((300, 2), np.nan),
    )


def test_each_baseline_finds_what_it_is_for(table: OutcomeTable) -> None:
    train, test = np.arange(200), np.arange(200, 300)
    prepared = FeaturesPolicy().prepare(table)
    x, z = prepared.inputs(train, train), prepared.inputs(train, test)
    found = {
        **feature_baselines(x, z, table.take(train)),
        **supervised_baselines(table.take(train), table.take(test)),
    }
    assert len(found) == 6
    for name, scored in found.items():
        _, auc, auc_benefit, _, _ = ranking_figures(scored, table.take(test), np.arange(100))
        # Which branch wins where just one does; a benefit regression is no estimate of P(direct right).
        assert auc_benefit > 0.75, name
        assert auc > (0.85 if "logistic regression" in name else 0.5), name
    worth = found["features + logistic regression of each branch"].probabilities[:, 0]
    riddles = np.array([question.startswith("Riddle") for question in table.take(test).questions])
    sums = np.array(["plus" in question for question in table.take(test).questions])
    assert worth[sums].mean() > worth[riddles].mean() + 0.2


def test_the_efficiency_channel_can_be_turned_off_for_a_question(table: OutcomeTable) -> None:
    rows = np.arange(len(table))
    x = FeaturesPolicy().prepare(table).inputs(rows, rows)
    training = GroupTraining(groups=StratifiedGroups(), steps=60)
    greetings = np.array([question.startswith("Say") for question in table.questions])

    def direct_share(efficiency: np.ndarray | None) -> float:
        weights, bias = train_on_groups(x, table, training, efficiency=efficiency)
        assert weights.shape == (x.shape[1], 2)
        z = x @ weights + bias
        return float((1 / (1 + np.exp(z[:, 1] - z[:, 0])))[greetings].mean())

    priced, free = direct_share(None), direct_share(np.zeros(len(table)))
    # Both ways a greeting comes out right, so only the price of a call decides.
    assert priced > free + 0.1
    assert direct_share(np.ones(len(table))) == pytest.approx(priced, abs=1e-6)
