"""Two rewards for each rollout: was it right, and was it right with little.

Between `verifiers` and `advantages`. Arrays are shaped [P, G]: P questions, G rollouts of each.

    r_acc  = 0.9 r_ans + 0.1 r_fmt
    r_tool = 1 / (T + 1) if the answer is correct, else 0

Source: arXiv:2604.08545, section on the dual reward. Where its code differs: a rollout that the judge or a tool
server let down is scored 0 there and so trained on as the model's mistake; here it is *excluded*, NaN in every reward,
and counted. Correctness is a mask of its own, never `r_tool > 0`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import InputError
from metis_agent.judging.verifiers import Verify, judged
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.types import Group, Trajectory

__all__ = ["Scores", "accuracy_reward", "excluding", "format_reward", "pooled", "score", "tool_reward"]


def accuracy_reward(
    r_ans: NDArray[np.float64], r_fmt: NDArray[np.float64], excluded: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """r_acc = 0.9 r_ans + 0.1 r_fmt, NaN where excluded.

    Args:
        r_ans: [P, G], 1 right, 0 wrong.
        r_fmt: [P, G], 1 well formed, 0 not.
        excluded: [P, G], rollouts that say nothing of the model.

    Returns:
        [P, G], in [0, 1].
    """
    return np.where(excluded, np.nan, 0.9 * r_ans + 0.1 * r_fmt)


def tool_reward(
    cost: NDArray[np.float64], correct: NDArray[np.bool_], excluded: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """r_tool = 1 / (1 + cost) where correct, else 0; NaN where excluded.

    Args:
        cost: [P, G], at least 0: the executed calls T, as in the paper, or what they are declared to cost.
        correct: [P, G].
        excluded: [P, G].

    Returns:
        [P, G], in [0, 1].
    """
    return np.where(excluded, np.nan, np.where(correct, 1.0 / (1.0 + np.where(excluded, 0.0, cost)), 0.0))


_LEAKED_CALL = re.compile(r"</?tool_call\b", re.I)


def format_reward(trajectory: Trajectory) -> float:
    """r_fmt: 1 if the run ended in an answer and every call that the model wrote could be read, else 0.

    A call is unreadable if its arguments did not parse (`invalid_tool_calls` of a message), if it has no
    name, or if its raw text was left in the answer. A readable call that failed or was blocked is well
    formed.
    """
    if not trajectory.answer.strip() or _LEAKED_CALL.search(trajectory.answer):
        return 0.0
    # LangChain writes a message as {"type", "data": {...}} or flat, by `message_to_dict` or `model_dump`.
    if any(message.get("data", message).get("invalid_tool_calls") for message in trajectory.messages):
        return 0.0
    written = (call for model_call in trajectory.calls for call in model_call.tool_calls)
    return float(all(call.get("name") and isinstance(call.get("args", {}), Mapping) for call in written))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What is known of P x G rollouts before any advantage; rows are questions, all arrays [P, G].

    Raises:
        InputError: Shapes differ, or an entry that is not excluded is out of its range.
    """

    r_ans: NDArray[np.float64]
    """1 right, 0 wrong, NaN where excluded."""
    r_fmt: NDArray[np.float64]
    """1 well formed, 0 not, NaN where excluded."""
    T: NDArray[np.int64]
    """Executed tool calls, from the trace."""
    cost: NDArray[np.float64]
    """What r_tool prices: T itself, unless the caller declared another cost. In the caller's unit, at least
    0."""
    excluded: NDArray[np.bool_]
    """Rollouts that say nothing of the model: a failed run, a judge that is down, an answer nobody can
    judge."""
    exclusions: Mapping[str, int] = field(default_factory=dict)
    """How many were excluded, by reason."""

    def __post_init__(self) -> None:
        arrays = {name: getattr(self, name) for name in ("r_ans", "r_fmt", "T", "cost", "excluded")}
        shapes = {name: array.shape for name, array in arrays.items()}
        if len(set(shapes.values())) != 1 or self.r_ans.ndim != 2:
            raise InputError(f"Scores have shapes {shapes!r}: all must be the same [P, G].")
        rules = {
            "r_ans": (self.r_ans == 0) | (self.r_ans == 1),
            "r_fmt": (self.r_fmt == 0) | (self.r_fmt == 1),
            "T": self.T >= 0,
            "cost": (self.cost >= 0) & np.isfinite(self.cost),
        }
        for name, holds in rules.items():
            if bool(np.any(~(holds | self.excluded))):
                wrong = arrays[name][~(holds | self.excluded)]
                raise InputError(
                    f"{name} has {wrong[:5]!r}: r_ans and r_fmt are 0 or 1, T and cost finite and at least "
                    "0. Mark rollouts without a score as excluded."
                )

    @property
    def correct(self) -> NDArray[np.bool_]:
        """[P, G]: right and not excluded. With two or more in a row, its set Q."""
        return np.asarray((self.r_ans == 1) & ~self.excluded)

    @property
    def r_acc(self) -> NDArray[np.float64]:
        """[P, G], see `accuracy_reward`."""
        return accuracy_reward(self.r_ans, self.r_fmt, self.excluded)

    @property
    def r_tool(self) -> NDArray[np.float64]:
        """[P, G], see `tool_reward`."""
        return tool_reward(self.cost, self.correct, self.excluded)


def score(
    groups: Sequence[Group],
    verify: Verify = default_verify,
    *,
    cost: Callable[[Trajectory], float] | None = None,
) -> Scores:
    """Score the rollouts of P groups.

    Args:
        groups: P groups of the same size G.
        verify: Judges an answer; a judge that raises `JudgeUnavailableError` excludes that rollout.
        cost: What a rollout cost, for r_tool = 1 / (1 + cost), for example `lambda t: t.cost`. T by default.

    Raises:
        InputError: There are no groups, they are empty, or their sizes differ.
    """
    sizes = sorted({len(group.trajectories) for group in groups})
    if len(sizes) != 1 or sizes[0] == 0:
        raise InputError(
            f"{len(groups)} groups of sizes {sizes!r}: scores are one array [P, G], so all groups need the "
            "same size of at least 1. Resample the groups, or score each size apart."
        )
    rollouts = [trajectory for group in groups for trajectory in group.trajectories]
    verdicts = [(right, reason) for _, right, reason in judged(rollouts, verify)]
    shape = len(groups), sizes[0]
    excluded = np.array([right is None for right, _ in verdicts]).reshape(shape)
    r_ans = np.array([np.nan if right is None else float(right) for right, _ in verdicts]).reshape(shape)
    r_fmt = np.array([format_reward(trajectory) for trajectory in rollouts]).reshape(shape)
    price = cost or (lambda trajectory: float(trajectory.tool_calls))
    return Scores(
        r_ans=r_ans,
        r_fmt=np.where(excluded, np.nan, r_fmt),
        T=np.array([trajectory.tool_calls for trajectory in rollouts], dtype=np.int64).reshape(shape),
        cost=np.array([price(trajectory) for trajectory in rollouts], dtype=np.float64).reshape(shape),
        excluded=excluded,
        exclusions=Counter(reason for right, reason in verdicts if right is None),
    )


def pooled(parts: Sequence[Scores]) -> Scores:
    """The scores of several processes as one, in their order."""
    counts: dict[str, int] = {}
    for part in parts:
        for reason, count in part.exclusions.items():
            counts[reason] = counts.get(reason, 0) + count
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("r_ans", "r_fmt", "T", "cost", "excluded")
    }
    return Scores(**arrays, exclusions=counts)


def excluding(scores: Scores, unusable: Mapping[int, str]) -> Scores:
    """The scores, with what can't be trained on excluded and counted.

    Args:
        scores: [P, G].
        unusable: Rollouts by their place among the P G, with the reason.
    """
    left_out = np.zeros(scores.excluded.size, dtype=bool)
    left_out[list(unusable)] = True
    already = scores.excluded.flatten()
    newly = Counter(reason for rollout, reason in unusable.items() if not already[rollout])
    return replace(
        scores,
        excluded=scores.excluded | left_out.reshape(scores.excluded.shape),
        exclusions=dict(Counter(scores.exclusions) + newly),
    )
