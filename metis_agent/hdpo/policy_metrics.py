"""What the curves of policy training show: of the step's own rollouts, and on a validation set.

`step_metrics` reads the scores that the advantages are made of. `Validation` says when and on what the agent is
measured as it is deployed: freely, and by forced probes that tell what it knows (see `measure`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metis_agent.errors import ConfigurationError
from metis_agent.evaluation.agents import Probes, evaluate, share_right
from metis_agent.hdpo.advantages import Channels
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.rewards import Scores
from metis_agent.judging.verifiers import Verify
from metis_agent.rollouts.runner import Rollout, Rollouts, group_rollouts
from metis_agent.types import Question, Trajectory

__all__ = ["Validation", "excluding", "pooled", "step_metrics", "validation_metrics", "without_tokens"]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Measures the agent while it is trained.

    Raises:
        ConfigurationError: There is nothing to ask, or `every` is below 1.
    """

    questions: Sequence[Question]
    """Held out of training."""
    rollouts: Rollouts
    """The agent as it is deployed; its model is the trained one."""
    every: int = 10
    """Updates between two measurements; one more comes before the first update."""
    probes: Probes = Probes()

    def __post_init__(self) -> None:
        if self.every < 1 or not self.questions:
            raise ConfigurationError(
                f"Validation every {self.every!r} updates on {len(self.questions)} questions: at least 1 of each."
            )

    def plan(self, step: int, process: int, processes: int, *, seed: int) -> list[Rollout]:
        """The rollouts of one process: those of every `processes`-th question."""
        own = self.questions[process::processes]
        name = f"validation/step-{step}"
        return [
            *group_rollouts(own, ("free",), name=f"{name}/free", seed=seed),
            *group_rollouts(own, self.probes.branches, name=f"{name}/probe", seed=seed),
        ]


def validation_metrics(trajectories: Sequence[Trajectory], verify: Verify, *, seed: int) -> dict[str, float]:
    """Accuracy, tool rate, redundant rate and necessary recall of free runs, judged by the forced ones beside them."""
    by_branch: dict[str, list[Trajectory]] = {"free": [], "direct": [], "tool": []}
    for run in trajectories:
        by_branch[run.branch].append(run)
    finished = [run for run in by_branch["free"] if run.status == "finished"]
    failed = float(len(trajectories) - sum(run.status == "finished" for run in trajectories))
    if not finished:
        return {"validation/failed": failed}
    overall = evaluate(
        finished,
        direct_right=share_right(by_branch["direct"], verify),
        tool_right=share_right(by_branch["tool"], verify),
        verify=verify,
        resamples=1,
        seed=seed,
    ).overall
    names = ("accuracy", "tool_rate", "redundant_rate", "necessary_recall", "calls_per_question")
    values = {name: getattr(overall, name).value for name in names}
    known = {f"validation/{name}": float(value) for name, value in values.items() if value is not None}
    return {**known, "validation/failed": failed}


def without_tokens(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """What scoring needs of runs, small enough to send to other processes."""
    return [replace(run, messages=(), calls=()) for run in trajectories]


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


def step_metrics(scores: Scores, channels: Channels, groups: StratifiedGroups) -> dict[str, float]:
    """What the training curve shows, from the step's free rollouts; NaN where the step can't tell.

    A question counts as known where every forced direct rollout was right, as needing a tool where none was.
    """
    free = np.array([branch == "free" for branch in groups.branches()]) & ~scores.excluded
    direct = np.array([branch == "direct" for branch in groups.branches()]) & ~scores.excluded
    called = scores.T > 0
    right = (direct & scores.correct).sum(1)
    probed = direct.sum(1)
    known = (probed > 0) & (right == probed)
    needed = (probed > 0) & (right == 0)

    def share(of: Any, among: Any) -> float:
        return float((of & among).sum() / among.sum()) if among.any() else float("nan")

    return {
        "hdpo/accuracy": share(scores.correct, free),
        "hdpo/tool_rate": share(called, free),
        "hdpo/redundant_rate": share(called, free & known[:, None]),
        "hdpo/necessary_recall": share(called, free & needed[:, None]),
        "hdpo/rho": float(channels.rho.mean()),
        "hdpo/excluded": float(scores.excluded.sum()),
        **{f"hdpo/excluded/{reason.replace(' ', '_')}": float(n) for reason, n in scores.exclusions.items()},
    }
