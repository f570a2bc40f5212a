"""The objectives that the benchmark compares with, against their papers' formulas in plain loops, and the registry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks import hdpo, peers
from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.advantages import Objective, advantages, group_advantage, register_objective

from . import reference
from .test_advantages import scores_of
from .test_contrast import random_scores


def fewest(right: list[bool], T: list[int]) -> int:
    return min((t for t, r in zip(T, right, strict=True) if r), default=0)


def otc(right: list[bool], fmt: list[bool], T: list[int]) -> list[float]:
    """Equations 6 and 7 of arXiv:2504.14870v2, alpha 1 and c 2, and the tenth for the form."""
    n, found = fewest(right, T), []
    for r, form, m in zip(right, fmt, T, strict=True):
        if m == n == 0:
            k = 1.0
        elif n == 0:
            k = math.cos(m * math.pi / (2 * m + 2))
        else:
            k = math.sin(2 * n * m / (m + n) * math.pi / (2 * n))
        found.append(0.9 * k * r + 0.1 * form)
    return found


def eapo(right: list[bool], fmt: list[bool], T: list[int]) -> list[float]:
    """Equations 4 to 7 of arXiv:2606.02132v2, beta 1."""
    n, d = fewest(right, T), 1 - sum(right) / len(right)
    factors = [d + (1 - d) * math.exp(-((c or n) - n)) for c in T]
    return [k * (r if form else -1) for k, r, form in zip(factors, right, fmt, strict=True)]


@pytest.mark.parametrize("name", ["otc", "eapo"])
def test_random_groups_equal_the_papers_formulas(name: str) -> None:
    scores, _, _ = random_scores(1_000, 8)
    rewards = np.zeros(scores.T.shape)
    for row, out in enumerate(scores.excluded):
        counts = np.flatnonzero(~out)
        right, fmt, T = (each[row, counts].tolist() for each in (scores.r_ans, scores.r_fmt, scores.T))
        if len(counts):
            rewards[row, counts] = {"otc": otc, "eapo": eapo}[name](right, fmt, T)
    found = advantages(Objective(name=name), scores)
    # Rewards that are equal but for their rounding give no signal: ours tells them by their distance.
    np.testing.assert_allclose(found.acc, reference.grpo(rewards.round(9), scores.excluded), atol=1e-6)
    assert not found.tool.any()


def test_what_a_call_costs() -> None:
    # Where none was needed two calls halve what OTC gives; EAPO takes e^-1 a call, as far as the group is right.
    alike = scores_of([[1, 1, 1, 1]], [[0, 0, 1, 2]])
    assert peers.otc_rewards(alike)[0].tolist() == pytest.approx([1, 1, 0.9 * math.cos(math.pi / 4) + 0.1, 0.55])
    assert peers.eapo_rewards(alike)[0].tolist() == pytest.approx([1, 1, math.exp(-1), math.exp(-2)])
    half = scores_of([[1, 0, 1, 0]], [[1, 0, 2, 0]])
    assert peers.eapo_rewards(half)[0].tolist() == pytest.approx([1, 0, 0.5 + 0.5 * math.exp(-1), 0])


def test_an_objective_of_ones_own() -> None:
    def thrift(objective: Objective, scores: object) -> torch.Tensor:
        cost = -objective.alpha * torch.as_tensor(scores.cost)  # type: ignore[attr-defined]
        return group_advantage(cost, torch.ones_like(cost, dtype=torch.bool), eps=0.0)

    register_objective("thrift", thrift)
    register_objective("thrift", thrift)  # once more is no other
    A = advantages(Objective(name="thrift"), scores_of([[1, 0, 1]], [[0, 1, 2]], [[False, False, True]])).acc
    assert A[0].tolist() == pytest.approx([1, 0, 0])
    for taken in ("thrift", "hdpo", "contrast"):
        with pytest.raises(ConfigurationError, match=f"'{taken}' already"):
            register_objective(taken, lambda objective, scores: torch.zeros(1, 1))


def test_a_rate_that_is_not_known_is_left_out_of_the_table() -> None:
    assert [hdpo._short(value) for value in (None, math.nan, 0.1234, 1.0)] == ["", "", ".123", "1.00"]
