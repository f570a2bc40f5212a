"""Measure an agent on questions: run it freely, probe both branches, evaluate.

Whether a call was redundant is a fact about the model: can it answer the question without? So each question is
also run forced direct, several times, and forced to call a tool, and `evaluation` reads both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metis_agent.hdpo.evaluation import Evaluation, Metrics, evaluate, share_right
from metis_agent.hdpo.exploration import branch_of
from metis_agent.hdpo.rewards import Verify
from metis_agent.hdpo.rollouts import Rollouts, group_rollouts
from metis_agent.hdpo.verifiers import verify as default_verify
from metis_agent.types import Branch, Question, Trajectory

__all__ = ["Measurement", "Probes", "measure"]


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
