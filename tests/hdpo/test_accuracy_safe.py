"""The bound of docs/accuracy-safe.md, by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_agent.hdpo.gate_trainer import Contrast


def contrast(beta: float, saving: np.ndarray) -> Contrast:
    tools = len(saving)
    return Contrast(
        beta=beta,
        trust=1.0,
        saving=np.r_[0.0, saving],
        mean_accuracy=np.full(tools + 1, 0.5),
        head_temperature=np.ones(tools + 1),
        temperature=0.1,
    )


def decide(rule: Contrast, p: np.ndarray) -> np.ndarray:
    probabilities = rule.probabilities(p)
    return np.where(probabilities.max(axis=1) > 0.5, probabilities.argmax(axis=1) + 1, 0)


@given(seed=st.integers(0, 10**6), beta=st.floats(0.001, 0.3), tools=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_at_most_beta_is_lost_where_accuracies_are_known(seed: int, beta: float, tools: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random((500, tools + 1))
    chosen = decide(contrast(beta, rng.random(tools)), p)
    assert (p.max(axis=1) - p[np.arange(500), chosen]).max() <= beta + 1e-9


@given(seed=st.integers(0, 10**6), error=st.floats(0, 0.2))
@settings(max_examples=50, deadline=None)
def test_with_errors_of_e_at_most_beta_and_twice_e(seed: int, error: float) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random((500, 2))
    estimate = p + rng.uniform(-error, error, p.shape)
    chosen = decide(contrast(0.05, np.array([0.5])), estimate)
    assert (p.max(axis=1) - p[np.arange(500), chosen]).max() <= 0.05 + 2 * error + 1e-9


def test_it_saves_the_calls_that_cost_less_accuracy_than_their_price() -> None:
    # c = 0.5, beta = 0.1: a tool is worth it from a benefit of 0.05 on.
    p = np.array([[0.90, 0.94], [0.90, 0.96], [0.3, 0.9], [0.9, 0.3]])
    assert decide(contrast(0.1, np.array([0.5])), p).tolist() == [0, 1, 1, 0]


def test_z_scored_advantages_go_direct_where_the_tool_is_far_better() -> None:
    torch = pytest.importorskip("torch")
    from metis_agent.hdpo.advantages import hdpo_advantages

    # One direct answer of 16 right, by luck; tool answers all right: the rare direct one is pushed the most.
    cost = torch.ones(1, 16)
    cost[0, 0] = 0.0
    correct = torch.ones(1, 16, dtype=torch.bool)
    channels = hdpo_advantages(correct.double(), 1 / (1 + cost.double()), correct, ~correct)
    assert channels.tool[0, 0] > 3.5
    assert channels.tool[0, 1:].max() < 0
