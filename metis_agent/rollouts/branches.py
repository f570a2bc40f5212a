"""Record what comes of each question down every branch: direct, each tool forced, and as the model likes.

Where it stands: questions -> **recorded branches** -> `recorded` -> `gate_trainer`. Made for hours against
somebody else's model: what is finished is in the store at once and never run again, an outage is waited out, then
counted and excluded, and memory stays the same however many rollouts there are.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool

from metis_agent.errors import ConfigurationError, InfrastructureError, InputError
from metis_agent.gates.base import Gate
from metis_agent.gates.reference import BranchGate
from metis_agent.recording.store import TrajectoryStore, spread
from metis_agent.rollouts.runner import Rollout, roll_out, run_async
from metis_agent.types import UNMET, Branch, Question, Trajectory, declared_read_only

__all__ = [
    "EVERY_STEP",
    "FORK",
    "BranchPlan",
    "BranchRecorder",
    "RecordingReport",
    "branch_of",
    "branch_rollouts",
    "branch_taken",
    "record_on_ray",
    "seed_of",
    "undeclared_tools",
]

FORK = "metis_fork"
"""Key of a trajectory's metadata that says of which run it is a fork, and what going on gave."""
_PART = 32
"""Rollouts that a worker of a cluster is given at once."""
_HOPELESS = 10
"""Failures in a row after which it is no outage of a few (twice the concurrency, where that is more)."""


def branch_of(trajectory: Trajectory) -> Literal["direct", "tool"]:
    """The branch that a trajectory in fact took, whatever it was asked: "direct" if no call was executed.

    A fork that answers after calls went down "tool", though the calls are those of the run that it is a fork of.
    """
    return "tool" if trajectory.tool_calls or _after_calls(trajectory) else "direct"


def branch_taken(run: Trajectory) -> tuple[str, str]:
    """(action, ""): `direct` or the tool, or ("", the reason why this run says nothing of any one branch)."""
    first = run.decisions[0] if run.decisions else None
    if _after_calls(run):
        return "", "answered after calls"
    if first is not None and not first.allowed:
        return "direct", ""
    used = {outcome.tool for outcome in run.outcomes if outcome.executed}
    required = first.allowed if first is not None and first.required else ()
    if required and not used.intersection(required):
        return "", "no call, though one was required"
    if len(required) == 1:
        return required[0], ""
    if len(used) > 1:
        return "", "several tools"
    return (used.pop() if used else "direct"), ""


def _after_calls(run: Trajectory) -> bool:
    return FORK in run.metadata and run.metadata[FORK]["step"] > 0


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """Rollouts of each question.

    Raises:
        ConfigurationError: a count is negative, or all are 0.
    """

    direct: int = 1
    """Without any tool."""
    tool: int = 1
    """Of each tool, with its call forced."""
    free: int = 0
    """As the model decides; trained on by what it did."""

    def __post_init__(self) -> None:
        if min(self.direct, self.tool, self.free) < 0 or not self.direct + self.tool + self.free:
            raise ConfigurationError(f"{self!r}: counts are 0 or more, and at least one is above 0.")

    def starts(self, tools: Sequence[str]) -> list[tuple[Branch, str, int]]:
        """(branch, tool or "", number within it) of every rollout of one question."""
        starts: list[tuple[Branch, str, int]] = [("direct", "", index) for index in range(self.direct)]
        starts += [("tool", tool, index) for tool in tools for index in range(self.tool)]
        return starts + [("free", "", index) for index in range(self.free)]


EVERY_STEP = BranchPlan(direct=0, tool=0, free=1)
"""Rollouts of each question that are forked at every step of theirs."""


def branch_rollouts(
    questions: Iterable[Question], tools: Sequence[str], plan: BranchPlan, *, name: str, seed: int
) -> Iterator[Rollout]:
    """The rollouts of a plan, named so that a larger plan only adds to a smaller one."""
    starts = plan.starts(tools)
    for question in questions:
        for branch, tool, index in starts:
            id_ = f"{name}/{question.id}/{tool or branch}/{index}"
            yield Rollout(
                id=id_,
                question=question,
                branch=branch,
                tool=tool,
                seed=seed_of(id_, seed),
            )


def seed_of(id_: str, seed: int) -> int:
    """The seed of a rollout's randomness, from its name and the recording's."""
    return zlib.crc32(f"{seed}/{id_}".encode(errors="surrogatepass"))


@dataclass(kw_only=True)
class RecordingReport:
    """What a recording has done so far."""

    planned: int = 0
    found: int = 0
    """Finished by an earlier run."""
    finished: int = 0
    failed: int = 0
    """Excluded: the infrastructure or the model's service failed, after all retries."""
    uncalled: int = 0
    """Finished without the call that was forced: they say nothing of the tool, and count for no branch."""
    unmet: int = 0
    """Of these: the server was told to require the call, or can't be, and its model wrote none."""
    retried: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """How many failed, by the name of the error."""
    last_failure: str = ""

    def merged(self, then: RecordingReport) -> RecordingReport:
        """This recording and the one after it."""
        counts = ("planned", "found", "finished", "failed", "uncalled", "unmet", "retried")
        return replace(
            then,
            **{name: getattr(self, name) + getattr(then, name) for name in counts},
            failures=self.failures + then.failures,
            last_failure=then.last_failure or self.last_failure,
        )


def undeclared_tools(tools: Iterable[BaseTool]) -> list[str]:
    """Tools that are not declared to change nothing, by `metadata={"read_only": True}` or MCP's `readOnlyHint`.

    To force the call of one that books, mails or writes, once a question, is not what a recording is for.
    """
    return [tool.name for tool in tools if not declared_read_only(tool.metadata)]


class BranchRecorder:
    """Runs rollouts through one agent per branch, and stores each as soon as it is finished.

    Args:
        build: makes the agent around a gate: a `MetisAgent`, or an agent of `create_agent` with a `MetisGateMiddleware`
            of that gate; called once a branch, so that model and tools stay the user's.
        store: where finished trajectories go, and where those of an earlier run are found.
        concurrency: graph runs in flight at once.
        timeout: seconds that one rollout may take; `None` for no limit.
        retries: how often a rollout that failed is tried again, each time after twice the wait.
        wait: seconds before the first retry.
        metadata: kept with every trajectory, such as the model's name.
    """

    def __init__(
        self,
        build: Callable[[Gate], Runnable[Any, Any]],
        store: TrajectoryStore,
        *,
        concurrency: int = 16,
        timeout: float | None = None,
        retries: int = 2,
        wait: float = 1.0,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if concurrency < 1 or retries < 0 or wait < 0 or (timeout is not None and timeout <= 0):
            raise ConfigurationError(
                f"concurrency={concurrency!r}, retries={retries!r}, wait={wait!r}, timeout={timeout!r}: at least 1, 0 "
                "and 0, and a timeout above 0 or none."
            )
        self._build = build
        self._store = store
        self._concurrency, self._timeout, self._retries, self._wait = concurrency, timeout, retries, wait
        self._metadata = dict(metadata or {})
        self._agents: dict[tuple[Branch, str], Runnable[Any, Any]] = {}
        self._in_a_row = 0
        self._read: frozenset[str] = frozenset()
        """Shards that hold none of the rollouts."""

    def record(
        self,
        rollouts: Iterable[Rollout],
        *,
        progress: Callable[[Trajectory | None], None] = lambda _: None,
    ) -> RecordingReport:
        """Run what is not finished yet.

        Args:
            rollouts: For example `branch_rollouts(...)`; read as they are needed.
            progress: Called with each new trajectory, and with `None` for each that was finished before.

        Raises:
            InfrastructureError: so many rollouts failed in a row that nothing works; what is finished is stored.
            ConfigurationError: the agent can't be built, or can't run as it is configured.
        """
        report = RecordingReport()
        run_async(self._run_all(self._missing(rollouts, report, progress), report, progress))
        self._store.flush()
        return report

    def _missing(
        self, rollouts: Iterable[Rollout], report: RecordingReport, progress: Callable[[Trajectory | None], None]
    ) -> Iterator[Rollout]:
        finished = self._store.ids(besides=self._read)
        for rollout in rollouts:
            report.planned += 1
            if rollout.id in finished:
                report.found += 1
                progress(None)
            else:
                yield rollout

    async def _run_all(
        self, rollouts: Iterator[Rollout], report: RecordingReport, progress: Callable[[Trajectory | None], None]
    ) -> None:
        self._in_a_row = 0

        async def worker() -> None:
            for rollout in rollouts:
                trajectory = await self._attempts(rollout, report)
                self._store.append(trajectory)
                self._count(trajectory, report)
                progress(trajectory)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._concurrency):
                    tasks.create_task(worker())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _attempts(self, rollout: Rollout, report: RecordingReport) -> Trajectory:
        for attempt in range(self._retries + 1):
            trajectory = await self._run_one(rollout)
            # What outgrows the model does so again, and a service that refuses refuses again.
            refused = trajectory.error.startswith(InputError.__name__) or _is_refusal(trajectory)
            if trajectory.status == "finished" or refused:
                break
            if attempt < self._retries:
                report.retried += 1
                await asyncio.sleep(min(60.0, self._wait * 2**attempt))
        return trajectory

    async def _run_one(self, rollout: Rollout) -> Trajectory:
        agent = self._agents.get((rollout.branch, rollout.tool))
        if agent is None:
            agent = self._build(BranchGate(rollout.branch, tool=rollout.tool))
            self._agents[rollout.branch, rollout.tool] = agent
        metadata = {**self._metadata, "forced": rollout.tool or rollout.branch, **rollout.metadata}
        # A model's service fails in as many classes as there are services, so every error may be an outage.
        return await roll_out(agent, rollout, excused=(Exception,), timeout=self._timeout, metadata=metadata)

    def _count(self, trajectory: Trajectory, report: RecordingReport) -> None:
        if trajectory.status == "finished":
            report.finished += 1
            if trajectory.branch == "tool" and not branch_taken(trajectory)[0]:
                report.uncalled += 1
                report.unmet += any(
                    UNMET in message.get("data", {}).get("response_metadata", {}) for message in trajectory.messages
                )
            self._in_a_row = 0
            return
        report.failed += 1
        report.failures[trajectory.error.partition(":")[0]] += 1
        report.last_failure = trajectory.error
        self._in_a_row += 1
        if not (report.finished or report.found) and _is_refusal(trajectory):
            raise InfrastructureError(
                f"The first rollout failed with {trajectory.error!r}. Check the model's name and its key."
            )
        if self._in_a_row >= max(_HOPELESS, 2 * self._concurrency):
            raise InfrastructureError(
                f"The last {self._in_a_row} rollouts failed, each after {self._retries} retries, the last with "
                f"{trajectory.error!r}. {report.finished} were finished and are stored: once the cause is gone, run "
                "the same again to go on."
            )


def _is_refusal(run: Trajectory) -> bool:
    """Whether it failed as it always will: the service knows no such model, or not this key."""
    return re.match(r"(?!File|Module)\w*(Authentication|NotFound|PermissionDenied)Error:", run.error) is not None


def record_on_ray(
    rollouts: Iterable[Rollout],
    url: str,
    build: Callable[[int], Callable[[Gate], Runnable[Any, Any]]],
    *,
    ray: str,
    progress: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> RecordingReport:
    """As `BranchRecorder.record`, on the workers of a Ray cluster, a few rollouts at a time on each.

    A worker stores each run as soon as it is finished, so the death of one costs the runs that were under way in it:
    they are made again, and what it had stored is found.

    Args:
        rollouts: What to run.
        url: Of the store; all machines must see it.
        build: Makes an agent's `build` on a worker, given the number of its part: which of several servers to ask, say.
        ray: Address of the cluster, see `spread`.
        progress: Called with how many more are done, and how many of them failed.
        **options: Of `BranchRecorder`.

    Raises:
        InfrastructureError, ConfigurationError: as `BranchRecorder.record`.
        MissingDependencyError: the `ray` extra is not installed.
    """
    store = TrajectoryStore(url)
    finished, shards = store.ids(), frozenset(store.shards())
    every = list(rollouts)
    missing = [rollout for rollout in every if rollout.id not in finished]
    report = RecordingReport(planned=len(every) - len(missing), found=len(every) - len(missing))
    progress(report.found, 0)
    parts = [(number, missing[at : at + _PART]) for number, at in enumerate(range(0, len(missing), _PART))]
    for made in spread(partial(_recorded, url=url, build=build, shards=shards, options=options), parts, ray=ray):
        for of_part in made:
            report = report.merged(of_part)
            progress(of_part.planned, of_part.failed)
    return report


def _recorded(
    part: tuple[int, list[Rollout]],
    *,
    url: str,
    build: Callable[[int], Callable[[Gate], Runnable[Any, Any]]],
    shards: frozenset[str],
    options: Mapping[str, Any],
) -> Iterator[RecordingReport]:
    number, rollouts = part
    with TrajectoryStore(url) as store:
        recorder = BranchRecorder(build(number), store, **options)
        recorder._read = shards
        yield recorder.record(rollouts)
