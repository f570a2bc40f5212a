"""Decision points: each recorded run forked at each of its steps into "answer now", and the table of what came of it.

Where it stands: `branches` records the free runs -> **forks** (`metis rollout --every-step`) -> **`PointPool`** ->
`gate_trainer`. A fork is asked by the agent itself, from the messages that the run had read by then, and calls no tool.
It carries what going on gave, so a shard of a store can be read without the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from langchain_core.messages import ToolMessage, messages_from_dict

from metis_agent.errors import InputError
from metis_agent.gates.reading import conversation_before, observed
from metis_agent.messages import text_of
from metis_agent.rollouts.branches import FORK, seed_of
from metis_agent.rollouts.outcomes import DIRECT, OutcomeTable, question_key
from metis_agent.rollouts.recorded import OutcomePool
from metis_agent.rollouts.runner import Rollout
from metis_agent.traces.threads import steps_of
from metis_agent.types import Trajectory

__all__ = ["MAX_POINTS", "PointPool", "forks_of"]

ANSWERING, GOING_ON = "answering now", "going on"
MAX_POINTS = 100_000
"""Decision points that a pool has room for."""


def forks_of(run: Trajectory, *, acting: Collection[str] = (), seed: int = 0) -> list[Rollout]:
    """The rollouts that answer at each state of a finished run before one of its rounds of calls.

    Where the run has acted, only at the states after that: no rule may stop a run before what it went on to do. They
    have the run's own seed, as the answer of a gate in service has.

    Args:
        run: Recorded, with its messages.
        acting: Tools that may change something.
        seed: Of the recording.
    """
    if run.status != "finished" or run.branch != "free":
        return []
    *rounds, last = steps_of(run)
    if not last.answered:
        return []
    calls = [[it for it in step.round.outcomes if it.executed] if step.round else [] for step in rounds]
    first = 1 + max((k for k, made in enumerate(calls) if any(it.tool in acting for it in made)), default=-1)
    offered = run.decisions[0].allowed if run.decisions else ()
    return [
        Rollout(
            id=f"{run.id}@{step.index}",
            question=run.question,
            branch="direct",
            seed=seed_of(run.id, seed),
            begun=step.messages,
            metadata={
                "forced": ANSWERING,
                FORK: {
                    "run": run.id, "step": step.index, "first": first, "rounds": len(rounds), "answer": run.answer,
                    "calls": sum(map(len, calls[step.index :])), "tools": list(offered),
                    "cost": sum(it.cost for made in calls[step.index :] for it in made),
                }
            },
        )
        for step in rounds[first:]
    ]  # fmt: skip


@dataclass(kw_only=True)
class _Run:
    """What is known of one run."""

    text: str
    context: str
    history: str
    group: str
    steps: range
    points: dict[int, tuple[float, str, float, float]] = field(default_factory=dict)
    """By step: whether stopping there was right, what the tools had brought, whether going on was, what it cost."""


class PointPool(OutcomePool):
    """The decision points of a store, from its forks; all other runs are passed over.

    Of more than it has room for it keeps a sample: those of the questions whose hash is smallest.

    Args:
        max_points: Room.
        **options: As `OutcomePool` takes them, but for `draft`.
    """

    reads_messages = True

    def __init__(self, *, max_points: int = MAX_POINTS, **options: Any) -> None:
        super().__init__(**options)
        if self._draft:
            raise InputError("draft=True: a gate that decides at every step reads no draft.")
        self._most = max_points
        self._held = 0
        self._runs: dict[str, _Run] = {}
        self._keys: list[tuple[int, str]] = []  # a heap of (-hash of the question, run): the next to go is on top
        self._limit = 2**64
        self._offered: tuple[str, ...] = ()
        self._stops = np.zeros((2, 2))
        """[stopping and going on, all and right]"""

    def __len__(self) -> int:
        return self._held

    def extend(self, runs: Iterable[Trajectory]) -> PointPool:
        """Count many, a few in memory at a time.

        Raises:
            InputError: as `add`, or runs of agents with other tools.
        """
        forks = (run for run in runs if FORK in run.metadata and self._is_to_count(run))
        both = (it for run in forks for it in (run, replace(run, answer=str(run.metadata[FORK]["answer"]))))
        verdicts = self._judged(both)
        for (run, stopped, reason), (on, went_on, why) in zip(verdicts, verdicts, strict=True):
            if stopped is None or went_on is None:
                self.dropped[reason or why] += 1
                continue
            for row, (action, it, right) in enumerate(((ANSWERING, run, stopped), (GOING_ON, on, went_on))):
                self._stops[row] += 1, right
                if not right:
                    self._doubt(action, it)
            self._take(run, bool(stopped), bool(went_on))
        return self

    def _take(self, run: Trajectory, stopped: bool, went_on: bool) -> None:
        fork: Mapping[str, Any] = run.metadata[FORK]
        self._tools_are(tuple(fork["tools"]))
        said = self._said(run.question, conversation_before(run.history))
        if said is None:
            return
        left = float(fork["cost"] if self._use_cost else fork["calls"])
        point = float(stopped), _brought(run), float(went_on), left
        self._keep(str(fork["run"]), said, range(fork["first"], fork["rounds"]), {int(fork["step"]): point})

    def _keep(
        self,
        id_: str,
        said: tuple[str, str, str, str],
        steps: range,
        points: Mapping[int, tuple[float, str, float, float]],
    ) -> None:
        if id_ not in self._runs:
            text, context, history, group = said
            key = int(question_key(text, context, history), 16)
            if key >= self._limit:
                self.dropped["no room for the question"] += len(points)
                return
            self._runs[id_] = _Run(text=text, context=context, history=history, group=group, steps=steps)
            heapq.heappush(self._keys, (-key, id_))
        found = self._runs[id_].points
        self._held += len(points.keys() - found.keys())
        found.update(points)
        while self._held > self._most:
            self._trim(-self._keys[0][0])

    def _trim(self, limit: int) -> None:
        """Leave out the questions from this hash on, now and later."""
        self._limit = min(self._limit, limit)
        while self._keys and -self._keys[0][0] >= self._limit:
            gone = len(self._runs.pop(heapq.heappop(self._keys)[1]).points)
            self.dropped["no room for the question"] += gone
            self._held -= gone

    def _tools_are(self, tools: tuple[str, ...]) -> None:
        if tools and self._offered and {*tools} != {*self._offered}:
            raise InputError(
                f"The store's runs were offered {sorted(self._offered)!r} and {sorted(tools)!r}: what going on gave is "
                "another thing with other tools. Record into one store with one agent."
            )
        self._offered = self._offered or tools

    def merge(self, other: OutcomePool) -> PointPool:
        """Count what another pool of the same settings has counted.

        Raises:
            InputError: as `extend`.
        """
        assert isinstance(other, PointPool)
        for model in other._models:
            self._is_of_the_model(model)
        self._tools_are(other._offered)
        self._trim(other._limit)
        for id_, run in other._runs.items():
            self._keep(id_, (run.text, run.context, run.history, run.group), run.steps, run.points)
        self._stops += other._stops
        self._add_counts(other)
        return self

    def coverage(self) -> dict[str, int]:
        """Runs with at least one decision point, and those of them with all."""
        whole = sum(len(run.points) == len(run.steps) for run in self._runs.values())
        return {"runs": len(self._runs), "whole runs": whole}

    def table(self) -> OutcomeTable:
        """The decision points of the runs that have them all, in the order of their questions' hashes.

        Raises:
            InputError: there is none, or the verdicts look like the verifier's fault.
        """
        answers, right = self._stops.T.tolist()
        self._check_verdicts(dict(zip((ANSWERING, GOING_ON), zip(answers, right, strict=True), strict=True)))
        names = [id_ for _, id_ in sorted((-key, id_) for key, id_ in self._keys)]
        whole = [(id_, run) for id_ in names if len((run := self._runs[id_]).points) == len(run.steps)]
        if not whole:
            raise InputError(
                f"The store has no decision points: {self.coverage()!r}, left out: {dict(self.dropped)!r}. Record "
                "them with `metis rollout --every-step`, or from anybody's runs with `metis audit --points`."
            )
        tools = tuple(self._names) if self._fixed else tuple(sorted(self._offered))
        if {*tools} != {*self._offered}:
            raise InputError(
                f"The tools are {tools!r}, and the runs were offered {sorted(self._offered)!r}: a gate that decides at "
                "every step goes on with all that was offered, so name all of them."
            )
        rows = [(id_, run, *run.points[k]) for id_, run in whole for k in run.steps]
        _, runs, stopped, brought, went_on, left = zip(*rows, strict=True)
        missing = len(self._runs) - len(whole)
        nothing = np.zeros(len(rows))
        return OutcomeTable(
            questions=tuple(run.text for run in runs),
            actions=(DIRECT, *tools),
            correct=np.stack([stopped, *[went_on] * len(tools)], axis=1),
            cost=np.stack([nothing, *[left] * len(tools)], axis=1),
            seconds=np.full((len(rows), 1 + len(tools)), np.nan),
            contexts=tuple(run.context for run in runs) if any(run.context for run in runs) else (),
            histories=tuple(run.history for run in runs) if any(run.history for run in runs) else (),
            groups=tuple(run.group for run in runs) if self._group_by else (),
            runs=tuple(id_ for id_, *_ in rows),
            observations=tuple(brought),
            dropped={**self.dropped, **({"run without all of its steps": missing} if missing else {})},
        )


def _brought(run: Trajectory) -> str:
    """What the tools had brought where the fork answers, as a deployed gate reads it."""
    results = [
        it for it in messages_from_dict([dict(record) for record in run.messages]) if isinstance(it, ToolMessage)
    ]
    return observed((it.name or "", text_of(it), it.status == "error") for it in results)
