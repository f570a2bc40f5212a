"""Does the agent call tools where they help, and only there?

Last of the flow: trajectories of an agent on fresh questions -> accuracy, tool use, redundancy, each with a
bootstrap interval over questions. Per-question means come first, so a question asked often counts once.

Whether a call was needed is a fact about the model, not about one run: it is read off two reference sets of
runs by the same model, forced direct and forced to call a tool (see `share_right`).

- *known*: the model answers rightly without tools, in at least `known_at` of its forced-direct runs (default:
  all of them, as the paper's curation drops what pass@8 = 1 solves).
- *necessary*: forced direct fails (in more than `failed_at` of the runs it is right: not necessary; default:
  none right) and forced tool runs succeed (at least `helped_at` of them right).
- In between, neither: those questions count in accuracy and tool rate only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.hdpo.exploration import branch_of
from metis_agent.hdpo.rewards import Verify, judge
from metis_agent.hdpo.verifiers import verify as default_verify
from metis_agent.types import Trajectory

__all__ = ["Estimate", "Evaluation", "Metrics", "evaluate", "share_right"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over questions and its percentile bootstrap interval; all `None` where no question counts."""

    value: float | None
    low: float | None
    high: float | None
    questions: int
    """How many questions it is a mean of."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What was measured on one set of questions."""

    accuracy: Estimate
    """Share answered rightly, of the questions that could be judged."""
    tool_rate: Estimate
    """Share with at least one executed call."""
    calls_per_question: Estimate
    redundant_rate: Estimate
    """Share of *known* questions on which a tool was called: lower is better."""
    necessary_recall: Estimate
    """Share of *necessary* questions on which a tool was called: higher is better."""
    seconds_per_question: Estimate


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One agent on one set of questions."""

    overall: Metrics
    kinds: Mapping[str, Metrics]
    """The same for each `Question.kind`, in alphabetical order."""
    questions: int
    trajectories: int
    failed: int
    """Trajectories left out of everything: the run failed for a reason that is not the model's."""
    unjudged: int
    """Trajectories left out of accuracy alone: no reference answer, or the judge was down."""
    confidence: float
    """Nominal coverage of the intervals."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)


def share_right(trajectories: Iterable[Trajectory], verify: Verify = default_verify) -> dict[str, float]:
    """Share of right answers by question id, over the trajectories that could be judged.

    Of forced-direct runs it is `direct_right`, of forced-tool runs `tool_right`. A forced run counts only if
    it took its branch: a "direct" run that called a tool, or a "tool" run that called none, says nothing of
    the branch.
    """
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for trajectory in trajectories:
        right, _ = judge(trajectory, verify)
        if right is not None and trajectory.branch in ("free", branch_of(trajectory)):
            verdicts[trajectory.question.id].append(right)
    return {question_id: sum(right) / len(right) for question_id, right in verdicts.items()}


def evaluate(
    trajectories: Sequence[Trajectory],
    *,
    direct_right: Mapping[str, float],
    tool_right: Mapping[str, float] | None = None,
    verify: Verify = default_verify,
    known_at: float = 1.0,
    failed_at: float = 0.0,
    helped_at: float = 0.5,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Measure an agent from its trajectories, one or more for each question.

    Args:
        trajectories: The agent's own runs.
        direct_right: Share of right answers of the same model forced to answer directly, by question id. A
            question that is not in it is neither known nor necessary.
        tool_right: The same, forced to call a tool. The agent's own calls are no substitute: on a question
            where it did not call, they can't tell that it should have. Without it necessary_recall is `None`.
        verify: Judges an answer.
        known_at: A question is known from this share of `direct_right` on.
        failed_at: Answering directly fails up to this share.
        helped_at: The tool succeeds from this share of `tool_right` on.
        resamples: Of the bootstrap.
        confidence: Coverage of the intervals.
        seed: Of the bootstrap.

    Raises:
        InputError: There is no trajectory that did not fail.
        ConfigurationError: A threshold, `resamples` or `confidence` is out of range.
    """
    _check(known_at, failed_at, helped_at, resamples, confidence)
    runs: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.status == "finished":
            runs[trajectory.question.id].append(trajectory)
    if not runs:
        raise InputError(
            f"None of {len(trajectories)} trajectories finished: there is nothing to evaluate. "
            "Look at their `error`, or at the filter that chose them."
        )
    judged = {question_id: [judge(run, verify)[0] for run in group] for question_id, group in runs.items()}
    table = _Table(
        accuracy=np.array([_mean([right for right in verdicts if right is not None]) for verdicts in judged.values()]),
        tool_rate=np.array([_mean([branch_of(run) == "tool" for run in group]) for group in runs.values()]),
        calls=np.array([_mean([run.tool_calls for run in group]) for group in runs.values()]),
        seconds=np.array([_mean([run.seconds for run in group]) for group in runs.values()]),
        known=np.array([direct_right.get(question_id, -1.0) >= known_at for question_id in runs]),
        necessary=np.array(
            [
                direct_right.get(question_id, math.inf) <= failed_at
                and (tool_right or {}).get(question_id, -1.0) >= helped_at
                for question_id in runs
            ]
        ),
    )
    kinds = np.array([group[0].question.kind for group in runs.values()])
    bootstrap = _Bootstrap(resamples=resamples, confidence=confidence, seed=seed)
    return Evaluation(
        overall=table.metrics(bootstrap),
        kinds={str(kind): table.where(kinds == kind).metrics(bootstrap) for kind in np.unique(kinds)},
        questions=len(runs),
        trajectories=sum(map(len, runs.values())),
        failed=len(trajectories) - sum(map(len, runs.values())),
        unjudged=sum(right is None for verdicts in judged.values() for right in verdicts),
        confidence=confidence,
    )


@dataclass(frozen=True, kw_only=True)
class _Bootstrap:
    resamples: int
    confidence: float
    seed: int

    def estimate(self, values: NDArray[np.float64]) -> Estimate:
        """The mean of those of N questions that count (the others are NaN), all N resampled."""
        counts = ~np.isnan(values)
        if not counts.any():
            return Estimate(value=None, low=None, high=None, questions=0)
        rng, n = np.random.default_rng(self.seed), len(values)
        means = np.empty(self.resamples)
        # In blocks, so that memory stays near 50 MB whatever the number of questions.
        block = max(1, 6_000_000 // n)
        for start in range(0, self.resamples, block):
            size = min(block, self.resamples - start)
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=size)[:, counts]
            with np.errstate(invalid="ignore"):  # A resample may hold no question that counts.
                means[start : start + size] = drawn @ values[counts] / drawn.sum(axis=1)
        tail = 50 * (1 - self.confidence)
        low, high = np.nanpercentile(means, [tail, 100 - tail])
        return Estimate(
            value=float(values[counts].mean()), low=float(low), high=float(high), questions=int(counts.sum())
        )


@dataclass(frozen=True, kw_only=True)
class _Table:
    """One entry for each of N questions."""

    accuracy: NDArray[np.float64]
    tool_rate: NDArray[np.float64]
    calls: NDArray[np.float64]
    seconds: NDArray[np.float64]
    known: NDArray[np.bool_]
    necessary: NDArray[np.bool_]

    def where(self, chosen: NDArray[np.bool_]) -> _Table:
        return _Table(
            accuracy=self.accuracy[chosen],
            tool_rate=self.tool_rate[chosen],
            calls=self.calls[chosen],
            seconds=self.seconds[chosen],
            known=self.known[chosen],
            necessary=self.necessary[chosen],
        )

    def metrics(self, bootstrap: _Bootstrap) -> Metrics:
        return Metrics(
            accuracy=bootstrap.estimate(self.accuracy),
            tool_rate=bootstrap.estimate(self.tool_rate),
            calls_per_question=bootstrap.estimate(self.calls),
            redundant_rate=bootstrap.estimate(np.where(self.known, self.tool_rate, np.nan)),
            necessary_recall=bootstrap.estimate(np.where(self.necessary, self.tool_rate, np.nan)),
            seconds_per_question=bootstrap.estimate(self.seconds),
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _check(known_at: float, failed_at: float, helped_at: float, resamples: int, confidence: float) -> None:
    if not 0 <= failed_at < known_at <= 1:
        raise ConfigurationError(
            f"failed_at={failed_at!r}, known_at={known_at!r}: shares with 0 <= failed_at < known_at <= 1, or "
            "a question could be both known and failed."
        )
    if not 0 < helped_at <= 1:
        raise ConfigurationError(f"helped_at={helped_at!r}: a share above 0, at most 1.")
    if resamples < 1:
        raise ConfigurationError(f"resamples={resamples!r}: at least 1; 1000 is usual.")
    if not 0 < confidence < 1:
        raise ConfigurationError(f"confidence={confidence!r}: between 0 and 1, such as 0.95.")
