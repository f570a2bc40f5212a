"""HDPO as published, and with stratified groups, on groups re-sampled from recorded branches.

The objectives that `gates.py` and `partially_known_gate.py` compare gates with: the rollouts of a group take the
policy's own decision (or a forced one), and come out as that branch was recorded; rewards and advantages are those of
`metis_agent.hdpo`, z-scored per group. Where each branch was recorded once, a group holds one record of each however
large it is, and no bound on the accuracy lost follows from it; how long it trains decides how far it goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metis_agent.hdpo.advantages import Objective, advantages
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.rewards import Scores
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["GroupTraining", "train_on_groups"]

Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GroupTraining:
    """How to train on re-sampled groups."""

    objective: Objective = Objective()
    groups: StratifiedGroups = StratifiedGroups(direct=0, tool=0)
    steps: int = 200
    """Each on one group of every question, on policy."""
    learning_rate: float = 0.02
    decay: float = 1e-3
    """Of the weights, in each step's gradient."""
    seed: int = 0


def train_on_groups(
    x: Any, table: OutcomeTable, training: GroupTraining, *, efficiency: Float | None = None
) -> tuple[Float, Float]:
    """Train one layer by the exact score function of sampled groups, with Adam.

    Args:
        x: CSR [N, D], inputs of the table's questions.
        table: N questions.
        training: How.
        efficiency: [N], multiplies a question's efficiency channel, such as `advantages.branch_weight` of evidence
            pooled over questions: a group's own records repeat one outcome, and certify nothing. HDPO only.

    Returns:
        Weights [D, A] and biases [A] of the logits of the actions.
    """
    rng = np.random.default_rng(training.seed)
    width = x.shape[1]
    # Inputs that no question has keep the weight 0, and need no place in the optimiser.
    used = np.flatnonzero(np.bincount(x.indices, minlength=width))
    x = x[:, used]
    transposed, actions = x.T.tocsr(), len(table.actions)
    parameters = np.zeros((x.shape[1] + 1, actions))
    first, second = np.zeros_like(parameters), np.zeros_like(parameters)
    for step in range(1, training.steps + 1):
        z = x @ parameters[:-1] + parameters[-1]
        pi_P_A = np.exp(z - z.max(axis=1, keepdims=True))
        pi_P_A /= pi_P_A.sum(axis=1, keepdims=True)
        drawn_P_G = _draw(pi_P_A, training.groups, rng)
        A_P_G = _advantages(drawn_P_G, table, training.objective, efficiency, rng)
        pull = np.zeros_like(pi_P_A)
        for action in range(actions):
            pull[:, action] = (A_P_G * (drawn_P_G == action)).mean(axis=1)
        pull -= A_P_G.mean(axis=1, keepdims=True) * pi_P_A
        pull /= len(table)
        gradient = np.vstack([transposed @ pull - training.decay * parameters[:-1] / actions, pull.sum(axis=0)])
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        parameters += training.learning_rate * first / (1 - 0.9**step) / scale
    weights = np.zeros((width, actions))
    weights[used] = parameters[:-1]
    return weights, parameters[-1]


def _draw(pi_P_A: Float, groups: StratifiedGroups, rng: np.random.Generator) -> NDArray[np.int64]:
    """[P, G]: actions, forced ones first; a rollout forced to call takes the policy's choice among the tools."""
    uniform = rng.random((len(pi_P_A), groups.size))
    free = (uniform[:, :, None] > pi_P_A.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
    tools = pi_P_A[:, 1:] / np.maximum(pi_P_A[:, 1:].sum(axis=1, keepdims=True), 1e-12)
    tool = 1 + (uniform[:, :, None] > tools.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
    start = np.array(groups.branches())
    return np.where(start == "direct", 0, np.where(start == "tool", tool, free)).astype(np.int64)


def _advantages(
    drawn_P_G: NDArray[np.int64],
    table: OutcomeTable,
    objective: Objective,
    efficiency: Float | None,
    rng: np.random.Generator,
) -> Float:
    rows = np.arange(len(table))[:, None]
    right = (rng.random(drawn_P_G.shape) < table.correct[rows, drawn_P_G]).astype(np.float64)
    scores = Scores(
        r_ans=right,
        r_fmt=np.ones_like(right),
        T=(drawn_P_G > 0).astype(np.int64),
        cost=table.cost[rows, drawn_P_G],
        excluded=np.zeros(right.shape, dtype=bool),
    )
    with torch.no_grad():
        channels = advantages(objective, scores)
        total = objective.w_acc * channels.acc
        if objective.name == "hdpo":
            tool = channels.tool if efficiency is None else channels.tool * torch.from_numpy(efficiency)[:, None]
            total = total + objective.w_tool * tool
    return np.asarray(total.double().numpy())
