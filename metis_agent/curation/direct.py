"""Stage `direct`, (b) of the paper: drop what the base model answers without tools.

A run that calls a tool on such a question teaches the very habit that Metis is to lose. The base model is asked k
times, through the graph with a forced direct answer; the paper drops a question with pass@k = 1, that is with one
right answer among the k = 8. Questions are asked once, however many runs they have.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from metis_agent.agent import MetisAgent
from metis_agent.curation.stage import KEEP, Row, Verdict, drop, keep, undecided
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.gates.base import Gate
from metis_agent.judging.cache import DiskCache, content_key
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts, group_rollouts, groups_of
from metis_agent.types import Branch, Question, Trajectory

__all__ = ["DirectEvidence", "DirectProbe", "DirectStage", "GraphProbe"]


@dataclass(frozen=True, kw_only=True)
class DirectEvidence:
    """What came of asking the base model without tools."""

    right: int
    wrong: int
    failed: int = 0
    """Runs that say nothing: the model or the judge was not to be reached."""


class DirectProbe(Protocol):
    """Asks the base model."""

    @property
    def identity(self) -> str:
        """Model, k and seed: part of the cache's key."""
        ...

    def ask(self, questions: Sequence[Question]) -> Sequence[DirectEvidence]:
        """Ask each question k times."""
        ...


class GraphProbe:
    """Asks through the graph that serves users, with the direct answer forced.

    Args:
        build: makes the base model's agent around a gate, as `Rollouts` takes it.
        model: names the base model, for the cache.
        folder: where runs are kept until they are counted; a killed probe goes on from them.
        k: how often each question is asked.
        seed: of all sampling.
        verify: judges the answers.
        concurrency: runs in flight at once.
    """

    def __init__(
        self,
        build: Callable[[Gate], MetisAgent],
        *,
        model: str,
        folder: Path,
        k: int = 8,
        seed: int = 0,
        verify: Callable[[Question, str], bool | None] = default_verify,
        concurrency: int = 64,
    ) -> None:
        if k < 1:
            raise ConfigurationError(f"GraphProbe(k={k!r}): each question is asked at least once.")
        self._build, self._folder, self._k, self._seed = build, folder, k, seed
        self._verify, self._concurrency = verify, concurrency
        self.identity = f"{model} k={k} seed={seed}"

    def ask(self, questions: Sequence[Question]) -> list[DirectEvidence]:
        """As `DirectProbe`."""
        folder = self._folder / content_key(self.identity, [asdict(question) for question in questions])[:24]
        # Their own ids may clash: they come from anywhere.
        named = [Question(**{**vars(question), "id": str(number)}) for number, question in enumerate(questions)]
        with TrajectoryStore(folder) as store:
            rollouts = Rollouts(self._build, store, concurrency=self._concurrency)
            direct: Branch = "direct"
            plan = group_rollouts(named, (direct,) * self._k, name="direct", seed=self._seed)
            runs = rollouts.collect(plan)
        evidence = [self._count(group.trajectories) for group in groups_of(runs, self._k)]
        shutil.rmtree(folder, ignore_errors=True)
        return evidence

    def _count(self, runs: Sequence[Trajectory]) -> DirectEvidence:
        verdicts = [self._right(run) for run in runs]
        return DirectEvidence(right=verdicts.count(True), wrong=verdicts.count(False), failed=verdicts.count(None))

    def _right(self, run: Trajectory) -> bool | None:
        if run.status == "failed":
            return None
        try:
            return self._verify(run.question, run.answer)
        except InfrastructureError:
            return None


class DirectStage:
    """Drops runs on questions that the base model answers without tools.

    Args:
        probe: asks the base model.
        least: right answers that make a question known: 1 is pass@k; k would be "always right".
        cache: evidence of earlier probes; in memory by default.
    """

    name = "direct"

    def __init__(self, probe: DirectProbe, *, least: int = 1, cache: DiskCache | None = None) -> None:
        if least < 1:
            raise ConfigurationError(f"DirectStage(least={least!r}): it must be at least 1.")
        self._probe, self._least, self._cache = probe, least, DiskCache(None) if cache is None else cache
        self.settings: Mapping[str, Any] = {"probe": probe.identity, "least": least}

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        """As `Stage`."""
        keys = {row.number: self._key(row.value.question) for row in rows if row.value.question.answer is not None}
        questions = {keys[row.number]: row.value.question for row in rows if row.number in keys}
        evidence = {key: DirectEvidence(**kept) for key, kept in self._cache.get_many(questions).items()}
        missing = [key for key in questions if key not in evidence]
        if missing:
            asked = dict(zip(missing, self._probe.ask([questions[key] for key in missing]), strict=True))
            # What failed is asked anew next time.
            self._cache.put_many({key: asdict(it) for key, it in asked.items() if not it.failed})
            evidence |= asked
        return [
            self._verdict(evidence[keys[row.number]]) if row.number in keys else keep("no reference") for row in rows
        ]

    def _key(self, question: Question) -> str:
        parts = (question.text, question.answer, question.verifier, dict(question.metadata))
        return content_key("direct", self._probe.identity, *parts)

    def _verdict(self, evidence: DirectEvidence) -> Verdict:
        if evidence.right >= self._least:
            total = evidence.right + evidence.wrong
            return drop("known without tools", f"right in {evidence.right} of {total} direct answers")
        if evidence.right + evidence.failed >= self._least:
            return undecided("probe incomplete", f"{evidence.failed} direct answers could not be had or judged")
        return KEEP
