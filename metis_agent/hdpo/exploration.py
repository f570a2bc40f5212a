"""Which branch each rollout of a group is made to take, and which it took.

A policy that calls a tool 98% of the time samples almost no direct answers, and one that has learned not to
almost no calls: in such groups no channel sees the alternative, and HDPO can't compare. Stratified groups
force a few rollouts down each branch and leave the rest free; everything after the decision is sampled as usual.

A group is then a sample of a mixture: shares f_D and f_T forced, the rest by the policy. Weighted by the balance
heuristic of multiple importance sampling (Veach and Guibas, 1995),

    w_b = pi_b / (f_b + (1 - f_D - f_T) pi_b),

the gradient is that of the policy itself. Without it (ratio 1, the obvious choice) a forced decision that turned out
badly is pushed down for ever, however rare it already is, and that drowns the questions on which it is right. With it,
a branch that is better but rare is hardly pulled up: pi_b is in its gradient. So a rollout has weight 1 where its
branch did better than its group, and w_b where it did worse. With two branches both decisions then pull the same way,
towards the better one: the weights set how far a step goes on a question, never in which direction.

The weight is the whole rollout's, not its decision's alone: what follows a decision is as rare as the decision. A wrong
answer that was forced on a question which can't be answered directly has no better one beside it to move to; pushed
down at full weight, step after step, its tokens end as noise, which then spreads to other answers (seen in the gallery
after 25 steps: accuracy .97 to .47; with the weight, .96).

Stands before `rewards`; its counts feed the branch weight in `advantages`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.hdpo.rewards import Scores
from metis_agent.types import Branch, Trajectory

__all__ = [
    "BranchCounts",
    "StratifiedGroups",
    "balance_weights",
    "count_branches",
    "decisions_of",
    "rollout_weights",
]


@dataclass(frozen=True, kw_only=True)
class StratifiedGroups:
    """How the rollouts of one question start.

    Raises:
        ConfigurationError: A count is negative, the group is empty, or the forced rollouts don't fit in it.
    """

    size: int = 16
    """G, rollouts for each question."""
    direct: int = 4
    """Rollouts forced to answer directly."""
    tool: int = 4
    """Rollouts forced to call a tool."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigurationError(f"size={self.size!r}: a group has at least 1 rollout, 2 for any advantage.")
        for name in ("direct", "tool"):
            if (count := getattr(self, name)) < 0:
                raise ConfigurationError(f"{name}={count!r}: forced rollouts can't be negative; 0 turns them off.")
        if self.direct + self.tool > self.size:
            raise ConfigurationError(
                f"direct={self.direct!r} and tool={self.tool!r} don't fit in size={self.size!r}: together "
                "they are at most the size. Raise size, or force fewer."
            )
        if self.direct and not self.tool:
            raise ConfigurationError(
                f"direct={self.direct!r} with tool=0: how likely a call is, which weights forced decisions, is read "
                "off the forced tool rollouts. Force at least one."
            )

    def branches(self) -> tuple[Branch, ...]:
        """The G starts: direct ones first, then tool, then free.

        Example:
            >>> StratifiedGroups(size=4, direct=1, tool=1).branches()
            ('direct', 'tool', 'free', 'free')
        """
        free = self.size - self.direct - self.tool
        counts: dict[Branch, int] = {"direct": self.direct, "tool": self.tool, "free": free}
        return tuple(branch for branch, count in counts.items() for _ in range(count))


def balance_weights(
    called: NDArray[np.bool_], tool_probability: NDArray[np.float64], groups: StratifiedGroups
) -> NDArray[np.float64]:
    """w_b of each rollout, [P, G], as at the head of this module.

    Args:
        called: [P, G], whether the rollout began with a call.
        tool_probability: [P], the policy's own probability of beginning with a call; NaN where it is not known.
        groups: How many were forced.

    Returns:
        [P, G]; 1 everywhere without forced rollouts, and where the probability is not known.
    """
    if not groups.direct and not groups.tool:
        return np.ones(called.shape)
    pi_T = tool_probability[:, None]
    pi_b = np.where(called, pi_T, 1 - pi_T)
    forced = np.where(called, groups.tool, groups.direct) / groups.size
    free = 1 - (groups.direct + groups.tool) / groups.size
    mixture = forced + free * pi_b
    weights = np.divide(pi_b, mixture, out=np.ones(called.shape), where=mixture > 0)
    return np.where(np.isnan(weights), 1.0, weights)


def rollout_weights(
    advantages: NDArray[np.float64],
    called: NDArray[np.bool_],
    tool_probability: NDArray[np.float64],
    groups: StratifiedGroups,
) -> NDArray[np.float64]:
    """Weight of each rollout, [P, G]: 1 where its branch did better than its group, else that of `balance_weights`.

    Args:
        advantages: [P, G], of both channels together, 0 where excluded.
        called: As there.
        tool_probability: As there.
        groups: As there.
    """
    total_T = (advantages * called).sum(1, keepdims=True)
    total_D = (advantages * ~called).sum(1, keepdims=True)
    better = np.where(called, total_T, total_D) > 0
    return np.where(better, 1.0, balance_weights(called, tool_probability, groups))


def decisions_of(
    trajectories: Sequence[Trajectory], groups: StratifiedGroups
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """What each run decided first, and how likely a call was.

    A run that was forced to call did so, also where its call came out malformed: it is weighed as what it is.

    Returns:
        [P, G]: whether the run began with a call. [P]: the probability of one, read off the forced openings; NaN where
        none was forced, or where the free rollouts belie it. A policy may call in other words, or think first: then
        what the forced opening says is no account of it.
    """
    first = [trajectory.calls[0] if trajectory.calls else None for trajectory in trajectories]
    called = np.array([bool(call and (call.tool_calls or call.forced)) for call in first]).reshape(-1, groups.size)
    opening = [
        math.exp(sum((call.log_probs or ())[: call.forced])) if call and call.forced else math.nan for call in first
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of a group in which none was forced is NaN
        probability = np.nanmean(np.array(opening).reshape(called.shape), axis=1)
    free = np.array([run.branch == "free" and bool(run.calls) for run in trajectories]).reshape(called.shape)
    for place, (calls, runs) in enumerate(zip((free & called).sum(1), free.sum(1), strict=True)):
        if not _believable(int(calls), int(runs), probability[place]):
            probability[place] = math.nan
    return called, probability


IMPLAUSIBLE = 0.005
"""Fewer calls among the free rollouts, or more, than a probability would give in so few groups belie it."""


def _believable(calls: int, runs: int, probability: float) -> bool:
    """Whether so many calls among free runs agree with the probability of one, by both tails of the binomial."""
    if math.isnan(probability):
        return True
    chances = [math.comb(runs, k) * probability**k * max(0.0, 1 - probability) ** (runs - k) for k in range(runs + 1)]
    return sum(chances[: calls + 1]) >= IMPLAUSIBLE and sum(chances[calls:]) >= IMPLAUSIBLE


@dataclass(frozen=True, kw_only=True)
class BranchCounts:
    """For each of P questions: rollouts n of each branch, and how many k of them were right; all shaped [P].

    Evidence may be pooled over questions by whoever makes the counts, so they need not be whole numbers.

    Raises:
        InputError: Shapes differ, a count is negative or not finite, or k > n.
    """

    direct_right: NDArray[np.float64]
    direct_n: NDArray[np.float64]
    tool_right: NDArray[np.float64]
    tool_n: NDArray[np.float64]

    def __post_init__(self) -> None:
        pairs = ((self.direct_right, self.direct_n), (self.tool_right, self.tool_n))
        shapes = {count.shape for pair in pairs for count in pair}
        if len(shapes) != 1 or self.direct_n.ndim != 1:
            raise InputError(f"Branch counts have shapes {sorted(shapes)!r}: all must be [P], one entry a question.")
        for right, n in pairs:
            if not bool(np.all((right >= 0) & (right <= n) & np.isfinite(n))):
                raise InputError(f"Branch counts right={right!r} of n={n!r}: each needs 0 <= right <= n, finite.")


def count_branches(scores: Scores) -> BranchCounts:
    """Count each group's own branches by what was executed (T = 0 is direct), excluded rollouts left out."""
    counted = ~scores.excluded
    direct, tool = counted & (scores.T == 0), counted & (scores.T > 0)

    def total(mask_P_G: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.asarray(mask_P_G.sum(axis=1), dtype=np.float64)

    return BranchCounts(
        direct_right=total(direct & scores.correct),
        direct_n=total(direct),
        tool_right=total(tool & scores.correct),
        tool_n=total(tool),
    )
