"""The paper once more, in NumPy and plain loops, written apart from the package, to test its maths against.

Also a short way to write trajectories down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from metis_agent.types import Branch, Group, OutcomeStatus, Question, ToolOutcome, Trajectory

Rows = Sequence[Sequence[float]]


def standardise(values: list[float], *, eps: float, ddof: int) -> list[float]:
    """(x - mean) / (std + eps), by the definition; no signal without a difference."""
    if len(values) < 2 or max(values) == min(values):
        return [0.0] * len(values)
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - ddof))
    return [(value - mean) / (std + eps) for value in values]


def over(members: list[int], row: Sequence[float], *, eps: float, ddof: int) -> list[float]:
    """Standardise the members of a row; the others get 0."""
    result = [0.0] * len(row)
    for place, value in zip(members, standardise([row[i] for i in members], eps=eps, ddof=ddof), strict=True):
        result[place] = value
    return result


def grpo(rewards: Rows, excluded: Rows, *, eps: float = 1e-4, ddof: int = 1) -> np.ndarray:
    return np.array(
        [
            over([i for i in range(len(row)) if not out[i]], row, eps=eps, ddof=ddof)
            for row, out in zip(rewards, excluded, strict=True)
        ]
    )


def tool_channel(T: Rows, correct: Rows, excluded: Rows, *, eps: float = 1e-4, ddof: int = 1) -> np.ndarray:
    """A_tool with r_tool = 1/(T+1) among Q = correct and not excluded, |Q| >= 2."""
    result = []
    for counts, right, out in zip(T, correct, excluded, strict=True):
        Q = [i for i in range(len(counts)) if right[i] and not out[i]]
        result.append(over(Q, [1 / (count + 1) for count in counts], eps=eps, ddof=ddof))
    return np.array(result)


def gdpo(r_acc: Rows, r_tool: Rows, excluded: Rows, *, w_tool: float, eps: float = 1e-4) -> np.ndarray:
    total = grpo(r_acc, excluded, eps=eps) + w_tool * grpo(r_tool, excluded, eps=eps)
    return grpo(total.reshape(1, -1), np.reshape(excluded, (1, -1)), eps=eps).reshape(total.shape)


def surrogate(
    log_probs: Rows, old: Rows, A: Sequence[float], mask: Rows, *, low: float, high: float, normaliser: str
) -> float:
    """L_clip, token by token."""
    sums, lengths, active = [], [], 0
    for b in range(len(A)):
        row = 0.0
        for t in range(len(log_probs[b])):
            if mask[b][t]:
                ratio = math.exp(log_probs[b][t] - old[b][t])
                row -= min(ratio * A[b], min(max(ratio, 1 - low), 1 + high) * A[b])
                active += A[b] != 0
        sums.append(row)
        lengths.append(sum(map(bool, mask[b])))
    if normaliser == "grpo":
        return sum(row / max(n, 1) for row, n in zip(sums, lengths, strict=True)) / len(A)
    return sum(sums) / max(active if normaliser == "active" else sum(lengths), 1)


def probability_direct_does(k_D: float, n_D: float, k_T: float, n_T: float, margin: float) -> float:
    """Pr[p_D >= p_T - margin] under Jeffreys posteriors, by the trapezoid rule in the logit of p.

    With p = 1/(1+e^-x), Beta(a, b) has the density p^a (1-p)^b / B(a, b) in x.
    """
    x = np.linspace(-40, 40, 320_001)
    p, q, h = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x)), x[1] - x[0]

    def density(k: float, n: float) -> np.ndarray:
        a, b = k + 0.5, n - k + 0.5
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return np.exp(a * np.log(p) + b * np.log(q) - log_beta)

    f_D = density(k_D, n_D)
    F_D = np.concatenate([[0.0], np.cumsum((f_D[1:] + f_D[:-1]) / 2 * h)])
    needed = p - margin
    logit = np.log(np.where(needed > 0, needed, 1.0)) - np.log(q + margin)  # 1 - needed = q + margin
    below = np.where(needed > 0, np.interp(logit, x, F_D), 0.0)
    return float(1 - np.sum(density(k_T, n_T) * below) * h)


def trajectory(
    answer: str = "yes",
    *,
    T: int = 0,
    question: Question | None = None,
    branch: Branch = "free",
    statuses: Sequence[OutcomeStatus] | None = None,
    cost: float = 0.0,
    **fields: Any,
) -> Trajectory:
    """A run with T executed calls, or with calls of the given statuses; the right answer is "yes"."""
    return Trajectory(
        id="run",
        question=question or Question(id="q", text="Is it?", answer="yes"),
        answer=answer,
        branch=branch,
        outcomes=tuple(
            ToolOutcome(call_id=str(i), tool="python", arguments={}, status=status, cost=cost)
            for i, status in enumerate(statuses if statuses is not None else ["ok"] * T)
        ),
        **fields,
    )


def group(*trajectories: Trajectory) -> Group:
    return Group(question=trajectories[0].question, trajectories=trajectories)
