"""Runs an agent on a benchmark, recorded so that a run that was stopped goes on, and scores what is recorded.

Each question is asked as the agent is deployed, and, to tell what its tool calls were worth, several times without any
tool and with one forced: see `evaluation.agents`. Pictures are read when a question's turn comes, and kept once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from langchain_core.runnables import Runnable

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.evaluation.agents import Estimate, Evaluation, evaluate, share_right
from metis_agent.evaluation.benchmarks.base import Benchmark, Item, Rows, estimates
from metis_agent.gates.base import Gate
from metis_agent.gates.reference import BranchGate, ModelGate
from metis_agent.judging.verifiers import Verify, judge
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import BranchRecorder, RecordingReport
from metis_agent.rollouts.runner import Rollout
from metis_agent.tools.images import sendable_image
from metis_agent.types import Branch, Question, Trajectory

__all__ = ["BenchmarkResult", "BenchmarkRun", "Runs", "chosen_items"]

_NAME = "benchmark_run"
"""Key of `Trajectory.metadata` with the name of the run."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How often each question is asked; once as the agent is deployed.

    Raises:
        ConfigurationError: A count is negative.
    """

    direct: int = 4
    """Without a tool: a question is known where all of these are right."""
    tool: int = 1
    """With a tool's call forced."""

    def __post_init__(self) -> None:
        if min(self.direct, self.tool) < 0:
            raise ConfigurationError(f"{self!r}: counts are 0 or more.")

    @property
    def starts(self) -> list[tuple[Branch, int]]:
        """(branch, number within it) of each run of one question."""
        counts: list[tuple[Branch, int]] = [("free", 1), ("direct", self.direct), ("tool", self.tool)]
        return [(branch, number) for branch, count in counts for number in range(count)]


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What came out."""

    measures: dict[str, Estimate]
    """The benchmark's own figures; `Estimate.questions` counts units, such as a problem with its steps."""
    evaluation: Evaluation
    """Accuracy and use of tools, over questions."""
    questions: int
    units: int
    unread: int
    """Answers that no rule could read; they count as wrong, unless a judge read them."""
    unanswered: int
    """Questions without a finished run: their picture or their run failed. They are left out."""
    shrunk: int
    """Questions whose picture had more pixels than the agent reads."""


@dataclass(kw_only=True)
class BenchmarkRun:
    """An agent on a benchmark.

    Args:
        benchmark: Says what is asked and what is right.
        items: The questions: see `chosen_items`.
        rows: Of its data set.
        name: Of this run in the store: a run of the same name goes on where it stopped.
        runs: How often each question is asked.
        seed: Of all sampling.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    rows: Rows
    name: str
    runs: Runs = field(default_factory=Runs)
    seed: int = 0
    bad_pictures: list[str] = field(default_factory=list, init=False)
    """Why a picture could not be used, one entry each."""

    @property
    def planned(self) -> int:
        """Runs in all."""
        return len(self.items) * len(self.runs.starts)

    def record(
        self,
        build: Callable[[Gate], Runnable[Any, Any]],
        store: str,
        *,
        gate: Gate | None = None,
        progress: Callable[[Trajectory | None], None] = lambda _: None,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> RecordingReport:
        """Run what is not in the store yet.

        Args:
            build: Makes the agent around a gate.
            store: Folder or URL of the trajectories; pictures go to its folder `images`, once each.
            gate: Decides where nothing is forced; by default the model itself.
            progress: Called with each new trajectory, and with `None` for what needs no run.
            metadata: Kept with every trajectory.
            **options: Of `BranchRecorder`: concurrency, timeout, retries.

        Raises:
            InfrastructureError: nothing works any more; what is finished is stored.
        """
        deployed = gate or ModelGate()

        def around(branch: Gate) -> Runnable[Any, Any]:
            free = isinstance(branch, BranchGate) and branch.branch == "free"
            return build(deployed if free else branch)

        with TrajectoryStore(store) as kept:
            recorder = BranchRecorder(around, kept, metadata={**(metadata or {}), _NAME: self.name}, **options)
            finished = kept.ids()
            report = recorder.record(self._missing(finished, progress), progress=progress)
        found = sum(self._id(item, branch, number) in finished for item, branch, number in self._all())
        return replace(report, planned=self.planned, found=found)

    def score(
        self,
        store: str,
        *,
        judge_unread: Verify | None = None,
        prepare: Callable[[Sequence[tuple[Question, str]]], None] = lambda _: None,
        resamples: int = 1000,
    ) -> BenchmarkResult:
        """Score what is recorded; no model is asked but a judge or an extractor.

        Args:
            store: As given to `record`.
            judge_unread: Judges the answers that the benchmark's rule can't read.
            prepare: Called once with all answers, so that whoever needs a model can ask it for many at once.
            resamples: Of the bootstrap.

        Raises:
            InputError: nothing of this run is in the store.
        """
        runs = self._recorded(store)
        by_branch = {
            branch: [
                runs[id_]
                for item, start, number in self._all()
                if start == branch and (id_ := self._id(item, start, number)) in runs
            ]
            for branch in ("free", "direct", "tool")
        }
        free = by_branch["free"]
        prepare([(run.question, run.answer) for run in runs.values() if run.status == "finished"])
        verify = _Reading(self.benchmark, judge_unread)
        verdicts = {run.question.id: right for run in free if (right := judge(run, verify)[0]) is not None}
        evaluation = evaluate(
            free, direct_right=share_right(by_branch["direct"], verify),
            tool_right=share_right(by_branch["tool"], verify) if self.runs.tool else None, verify=verify,
            resamples=resamples, seed=self.seed,
        )  # fmt: skip
        finished = [run for run in free if run.status == "finished"]
        return BenchmarkResult(
            measures=estimates(self.benchmark.measures(self.items, verdicts), resamples=resamples, seed=self.seed),
            evaluation=evaluation,
            questions=len(self.items),
            units=len({item.unit for item in self.items}),
            unread=sum(self.benchmark.right(run.question, run.answer) is None for run in finished),
            unanswered=len(self.items) - len(finished),
            shrunk=sum(bool(run.question.metadata.get("shrunk")) for run in finished),
        )

    def _all(self) -> Iterator[tuple[Item, Branch, int]]:
        """Question by question, so that a run that is stopped leaves whole ones."""
        for item in self.items:
            for branch, number in self.runs.starts:
                yield item, branch, number

    def _id(self, item: Item, branch: Branch, number: int) -> str:
        return f"{self.name}/{item.question.id}/{branch}/{number}"

    def _missing(self, finished: set[str], progress: Callable[[None], None]) -> Iterator[Rollout]:
        for item in self.items:
            starts = self.runs.starts
            open_ = [start for start in starts if self._id(item, *start) not in finished]
            for _ in range(len(starts) - len(open_)):
                progress(None)
            question = self._with_picture(item) if open_ else None
            for branch, number in open_:
                if question is None:
                    progress(None)
                    continue
                id_ = self._id(item, branch, number)
                seed = zlib.crc32(f"{self.seed}/{id_}".encode(errors="surrogatepass"))
                yield Rollout(id=id_, question=question, branch=branch, seed=seed)

    def _with_picture(self, item: Item) -> Question | None:
        try:
            picture = sendable_image(self.rows.picture(item.row))
        except InputError as error:
            self.bad_pictures.append(f"{item.question.id}: {error}")
            return None
        shown: dict[str, Any] = {"images": [picture.uri], **({"shrunk": True} if picture.shrunk else {})}
        return replace(item.question, metadata={**item.question.metadata, **shown})

    def _recorded(self, store: str) -> dict[str, Trajectory]:
        """The runs of this name by id: the finished one, where one failed before."""
        found: dict[str, Trajectory] = {}
        for run in TrajectoryStore(store, read_only=True).read(whole=False):
            if run.metadata.get(_NAME) != self.name:
                continue
            if run.status == "finished" or run.id not in found:
                found[run.id] = run
        return found


class _Reading:
    """The benchmark's rule as a verifier, with a judge for what it can't read."""

    def __init__(self, benchmark: Benchmark, judge_unread: Verify | None) -> None:
        self._benchmark, self._judge = benchmark, judge_unread

    def __call__(self, question: Question, answer: str) -> bool | None:
        right = self._benchmark.right(question, answer)
        if right is not None:
            return right
        if self._judge is None or not answer.strip():
            return False
        return self._judge(replace(question, answer=str(question.metadata["reference"])), answer)


def chosen_items(benchmark: Benchmark, rows: Rows, limit: int | None = None) -> list[Item]:
    """The questions of a benchmark, or of so many units, taken evenly over the data set.

    Args:
        benchmark: Makes questions of rows.
        rows: Of its data set.
        limit: Units: questions that are scored together count as one.

    Raises:
        InputError: the data set is empty, or a row is not as the benchmark has them.
    """
    items = benchmark.items(rows)
    units = list(dict.fromkeys(item.unit for item in items))
    if not units:
        raise InputError(f"the data set of {benchmark.name!r} has no rows.")
    if limit is None or limit >= len(units):
        return items
    taken = {units[place * len(units) // limit] for place in range(limit)}
    return [item for item in items if item.unit in taken]
