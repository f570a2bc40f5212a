"""Does the agent call tools where they help, and only there? Run it freely, probe both branches, evaluate.

Trajectories of an agent on fresh questions -> accuracy, tool use, redundancy, each with a bootstrap interval over
questions. Per-question means come first, so a question asked often counts once.

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.judging.verifiers import Verify, judged
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.rollouts.branches import branch_of
from metis_agent.rollouts.runner import Rollouts, group_rollouts
from metis_agent.types import Branch, Question, Trajectory

__all__ = ["Estimate", "Evaluation", "Measurement", "Metrics", "Probes", "evaluate", "measure", "share_right"]


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
    for trajectory, right, _ in judged(trajectories, verify):
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
    verdicts: dict[str, list[bool]] = {question_id: [] for question_id in runs}
    unjudged = 0
    for run, right, _ in judged([run for group in runs.values() for run in group], verify):
        unjudged += right is None
        if right is not None:
            verdicts[run.question.id].append(right)
    table = _Table(
        accuracy=np.array([_mean(right) for right in verdicts.values()]),
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
        unjudged=unjudged,
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


@dataclass(frozen=True, kw_only=True)
class Probes:
    """How often each question is run with its start forced."""

    direct: int = 4
    """A question is known where all of these are right."""
    tool: int = 1

    @property
    def branches(self) -> tuple[Branch, ...]:
        """One entry a forced run."""
        direct: Branch = "direct"
        tool: Branch = "tool"
        return (direct,) * self.direct + (tool,) * self.tool


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """An evaluation, the free runs behind it, and how long they took."""

    evaluation: Evaluation
    trajectories: tuple[Trajectory, ...]
    seconds_per_question: float
    """Wall time in which free runs were under way, divided by the questions: what one costs when many run at once."""
    forced: Mapping[Branch, Evaluation]
    """The probes of each branch: how often the model is right when it answers directly, and when it must call."""
    classes: Mapping[str, Metrics]
    """The free runs on several kinds together."""

    def to_dict(self) -> dict[str, Any]:
        """Point estimates by name, `intervals` beside them, and `kinds`, `classes` and `forced` with both."""
        evaluation = self.evaluation.to_dict()
        forced = {branch: probes.to_dict() for branch, probes in self.forced.items()}
        return {
            **_flat(evaluation["overall"]),
            "seconds_per_question": self.seconds_per_question,
            "questions": evaluation["questions"],
            "failed": evaluation["failed"],
            "unjudged": evaluation["unjudged"],
            "confidence": evaluation["confidence"],
            "kinds": {kind: _flat(metrics) for kind, metrics in evaluation["kinds"].items()},
            "classes": {name: _flat(asdict(metrics)) for name, metrics in self.classes.items()},
            "forced": {
                branch: {
                    **_accuracy(probes["overall"]),
                    "kinds": {kind: _accuracy(metrics) for kind, metrics in probes["kinds"].items()},
                }
                for branch, probes in forced.items()
            },
        }


def measure(
    rollouts: Rollouts,
    questions: Sequence[Question],
    *,
    name: str,
    seed: int = 0,
    probes: Probes = Probes(),
    probe_rollouts: Rollouts | None = None,
    verify: Verify = default_verify,
    classes: Mapping[str, Collection[str]] | None = None,
    progress: Callable[[Trajectory], None] = lambda _: None,
) -> Measurement:
    """Run `questions` freely once each and by the probes, and evaluate.

    Args:
        rollouts: The agent as it is deployed.
        questions: Held-out questions.
        name: Of the rollouts in the store; a crashed measurement of the same name is taken up again.
        seed: Of all sampling.
        probes: How many forced runs.
        probe_rollouts: The agent that the probes sample from, for instance at another temperature.
        verify: Judges the answers.
        classes: Kinds of questions to look at together, by name.
        progress: Called with each finished trajectory.
    """
    free = rollouts.collect(group_rollouts(questions, ("free",), name=f"{name}/free", seed=seed), progress=progress)
    forced = (probe_rollouts or rollouts).collect(
        group_rollouts(questions, probes.branches, name=f"{name}/probe", seed=seed), progress=progress
    )
    by_branch: dict[Branch, list[Trajectory]] = {
        branch: [run for run in forced if run.branch == branch] for branch in dict.fromkeys(probes.branches)
    }
    right = {branch: share_right(runs, verify) for branch, runs in by_branch.items()}

    def evaluated(runs: Sequence[Trajectory]) -> Evaluation:
        return evaluate(
            runs, direct_right=right.get("direct", {}), tool_right=right.get("tool"), verify=verify, seed=seed
        )

    took = {branch: [run for run in runs if branch_of(run) == branch] for branch, runs in by_branch.items()}
    together = {name: [run for run in free if run.question.kind in kinds] for name, kinds in (classes or {}).items()}
    return Measurement(
        evaluation=evaluated(free),
        trajectories=tuple(free),
        seconds_per_question=_busy(free) / len(questions),
        forced={branch: evaluated(runs) for branch, runs in took.items() if _finished(runs)},
        classes={name: evaluated(runs).overall for name, runs in together.items() if _finished(runs)},
    )


def _finished(runs: Sequence[Trajectory]) -> bool:
    return any(run.status == "finished" for run in runs)


def _busy(trajectories: Sequence[Trajectory]) -> float:
    """Seconds covered by at least one run; pauses between a crash and its resumption don't count."""
    covered, end = 0.0, 0.0
    for run in sorted(trajectories, key=lambda run: run.started_at):
        finish = run.started_at + run.seconds
        covered += max(0.0, finish - max(run.started_at, end))
        end = max(end, finish)
    return covered


def _accuracy(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    it = metrics["accuracy"]
    return {"accuracy": it["value"], "interval": [it["low"], it["high"]]}


def _flat(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    # Latencies of runs that share a batch are not what a single question takes.
    names = [name for name in metrics if name != "seconds_per_question"]
    return {
        **{name: metrics[name]["value"] for name in names},
        "intervals": {name: [metrics[name]["low"], metrics[name]["high"]] for name in names},
    }
