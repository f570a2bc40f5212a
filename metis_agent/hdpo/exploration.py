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

A run that decides several times may be forced at a later decision instead of the first (`steps`): the model decides
freely up to there and after it, so what is compared are states that the policy visits. With s_k its k-th decision, made
for b_k,

    w = 1 / (f_free + sum_k [f_kb / pi_b(s_k), or f_kD + f_kT where the run never came to s_k])

which with one step is the formula above.

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
from metis_agent.types import Branch, ModelCall, Trajectory

__all__ = [
    "BranchCounts",
    "LaterDecision",
    "StratifiedGroups",
    "balance_weights",
    "begins",
    "count_branches",
    "cut",
    "decisions_of",
    "forced_opening",
    "later_decisions",
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
    steps: int = 1
    """Decisions of a run that are forced: of those forced down a branch one is forced at the first, the next at the
    second, and so on in turn."""

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
        least = min(count for count in (self.direct, self.tool, self.size) if count)
        if not 1 <= self.steps <= least:
            raise ConfigurationError(
                f"steps={self.steps!r} with direct={self.direct!r} and tool={self.tool!r}: at least 1, and each branch "
                "needs a rollout for every step. Force more, or fewer steps."
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

    def forced_at(self) -> tuple[int, ...]:
        """For each of the G starts the decision that is forced, counted from 0; -1 for free ones.

        Example:
            >>> StratifiedGroups(size=6, direct=2, tool=3, steps=2).forced_at()
            (0, 1, 0, 1, 0, -1)
        """
        forced = [place % self.steps for count in (self.direct, self.tool) for place in range(count)]
        return (*forced, *[-1] * (self.size - len(forced)))

    def share(self, branch: Branch, step: int) -> float:
        """The share of the rollouts that is forced down a branch at a decision."""
        starts = zip(self.branches(), self.forced_at(), strict=True)
        return sum(start == (branch, step) for start in starts) / self.size


@dataclass(frozen=True, kw_only=True)
class LaterDecision:
    """The k-th decision of P G rollouts, k at least 1; arrays are [P, G]."""

    called: NDArray[np.bool_]
    probability: NDArray[np.float64]
    """Of a call, NaN where it is not known: nobody called there."""
    state: NDArray[np.int64]
    """The first rollout of the group that stood at the same prompt, token for token; -1 where the run had ended."""


def balance_weights(
    called: NDArray[np.bool_],
    tool_probability: NDArray[np.float64],
    groups: StratifiedGroups,
    later: Sequence[LaterDecision] = (),
    *,
    spared: Sequence[NDArray[np.bool_]] = (),
) -> NDArray[np.float64]:
    """The weight of each rollout, [P, G], as at the head of this module.

    Args:
        called: [P, G], whether the rollout began with a call.
        tool_probability: [P], the policy's own probability of beginning with a call; NaN where it is not known.
        groups: How many were forced.
        later: The decisions from the second on, where rollouts were forced at them.
        spared: [P, G] for each decision, where its forcing is not to weigh.

    Returns:
        [P, G]; 1 everywhere without forced rollouts, and where the probability is not known.
    """
    first = LaterDecision(
        called=called,
        probability=np.broadcast_to(tool_probability[:, None], called.shape),
        state=np.zeros(called.shape, np.int64),
    )
    inverse = np.full(called.shape, 1 - (groups.direct + groups.tool) / groups.size)
    for step, it in enumerate((first, *later)):
        f_D, f_T = groups.share("direct", step), groups.share("tool", step)
        pi_b = np.where(it.called, it.probability, 1 - it.probability)
        f_b = np.where(it.called, f_T, f_D)
        weighs = (it.state >= 0) & ~np.isnan(pi_b)
        if spared:
            weighs &= ~spared[step]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inverse += np.where(weighs, np.where(f_b > 0, f_b / pi_b, 0.0), f_D + f_T)
    return np.asarray(np.divide(1.0, inverse, out=np.ones(called.shape), where=inverse > 0))


def rollout_weights(
    advantages: NDArray[np.float64],
    called: NDArray[np.bool_],
    tool_probability: NDArray[np.float64],
    groups: StratifiedGroups,
    later: Sequence[LaterDecision] = (),
) -> NDArray[np.float64]:
    """Weight of each rollout, [P, G]: that of `balance_weights`, a decision that did better than the others left out.

    With one decision a run it is 1 where the rollout's branch did better than its group.

    Args:
        advantages: [P, G], of both channels together, 0 where excluded.
        called: As there.
        tool_probability: As there.
        groups: As there.
        later: As there.
    """

    def better(calls: NDArray[np.bool_], state: NDArray[np.int64]) -> NDArray[np.bool_]:
        alike = (calls[:, :, None] == calls[:, None]) & (state[:, :, None] == state[:, None])
        return np.asarray((alike * advantages[:, None]).sum(2) > 0)

    spared = [better(called, np.zeros(called.shape, np.int64)), *(better(it.called, it.state) for it in later)]
    return balance_weights(called, tool_probability, groups, later, spared=spared)


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


def forced_opening(group: Sequence[Trajectory]) -> tuple[int, ...]:
    """The tokens with which a group's calls were forced at the first decision; empty where none was."""
    forced = next((run.calls[0] for run in group if run.calls and run.calls[0].forced), None)
    return (forced.completion_ids or ())[: forced.forced] if forced else ()


def begins(call: ModelCall, opening: Sequence[int]) -> bool:
    """Whether a reply begins so; none does where there is no opening."""
    return bool(opening) and (call.completion_ids or ())[: len(opening)] == tuple(opening)


def later_decisions(
    trajectories: Sequence[Trajectory], groups: StratifiedGroups, told: NDArray[np.bool_]
) -> list[LaterDecision]:
    """The decisions from the second on at which rollouts were forced, `groups.steps - 1` of them.

    How likely a call is, is read off a call that begins as the forced ones do; in groups whose first decision can't be
    `told` from its content, [P], it is not known.
    """
    found = []
    for step in range(1, groups.steps):
        called = np.zeros(len(trajectories), dtype=bool)
        probability = np.full(len(trajectories), math.nan)
        state = np.full(len(trajectories), -1)
        for first in range(0, len(trajectories), groups.size):
            group = trajectories[first : first + groups.size]
            opening = forced_opening(group)
            at: dict[object, list[int]] = {}
            for place, run in enumerate(group, first):
                if len(run.calls) > step:
                    at.setdefault(run.calls[step].prompt_ids, []).append(place)
            for places in at.values():
                calls = [place for place in places if (it := trajectories[place].calls[step]).tool_calls or it.forced]
                called[calls] = True
                state[places] = places[0] - first
                begun = next((it for place in calls if begins(it := trajectories[place].calls[step], opening)), None)
                if begun and told[first // groups.size]:
                    probability[places] = math.exp(sum((begun.log_probs or (math.nan,))[: len(opening)]))
        shape = -1, groups.size
        found.append(
            LaterDecision(
                called=called.reshape(shape), probability=probability.reshape(shape), state=state.reshape(shape)
            )
        )
    return found


def cut(later: Sequence[LaterDecision], groups: StratifiedGroups) -> NDArray[np.bool_]:
    """[P, G], the rollouts that came to a later decision and were forced there; [0, 0] where none can be."""
    came = [(it.state >= 0) & (np.array(groups.forced_at()) == step) for step, it in enumerate(later, start=1)]
    return np.any(came, axis=0) if came else np.zeros((0, 0), dtype=bool)


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
