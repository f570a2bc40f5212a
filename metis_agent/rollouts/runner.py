"""Group rollouts through the graph that serves users: hundreds at once, recorded, and resumed after a crash.

A rollout is named before it runs. Its trajectory is stored under that name as soon as it is finished, so
whoever asks for the same rollouts again, after a kill -9 say, gets the finished ones back from the store and
runs only the rest.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool

from metis_agent.agent import MetisAgent
from metis_agent.errors import ConfigurationError, InfrastructureError, InputError, noted_outages
from metis_agent.gates.base import Gate
from metis_agent.gates.reference import BranchGate
from metis_agent.recording.recorder import definitions_of, keep, trajectory_of
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Branch, Group, Question, Trajectory, TrajectoryStatus

__all__ = [
    "Rollout",
    "Rollouts",
    "group_rollouts",
    "groups_of",
    "heap_set_aside",
    "question_message",
    "roll_out",
    "run_async",
    "tools_of",
]

T = TypeVar("T")

BRANCHES: tuple[Branch, ...] = ("free", "direct", "tool")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One rollout to run: its name, the question, how it starts, and the seed of all its randomness."""

    id: str
    question: Question
    branch: Branch = "free"
    tool: str = ""
    """With branch "tool", the one that is forced; any of them by default."""
    at: int = 0
    """Which decision of the run is forced, counted from 0; those before it are the model's own."""
    seed: int = 0
    begun: tuple[BaseMessage, ...] = ()
    """What the turn has come to already, the question first; by default it begins with the question."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """For its trajectory."""


def group_rollouts(
    questions: Iterable[Question], branches: Sequence[Branch], *, name: str, seed: int, at: Sequence[int] = ()
) -> list[Rollout]:
    """One rollout a question and branch given; `name` and `seed` make ids and seeds distinct.

    Args:
        questions: What is asked.
        branches: How the rollouts of a question start.
        name: Of all of them.
        seed: Likewise.
        at: For each branch, which decision of the run is forced; by default the first.
    """
    return [
        Rollout(
            id=f"{name}/{question.id}/{index}",
            question=question,
            branch=branch,
            at=at[index] if at else 0,
            seed=zlib.crc32(f"{seed}/{name}/{question.id}/{index}".encode(errors="surrogatepass")),
        )
        for question in questions
        for index, branch in enumerate(branches)
    ]


def groups_of(trajectories: Sequence[Trajectory], size: int) -> list[Group]:
    """Consecutive trajectories, `size` at a time, as groups of one question each."""
    chunks = (tuple(trajectories[start : start + size]) for start in range(0, len(trajectories), size))
    return [Group(question=chunk[0].question, trajectories=chunk) for chunk in chunks]


class Rollouts:
    """Runs rollouts through one agent per branch.

    Args:
        build: makes the agent around a gate; called once a branch and decision, so that model and tools stay the
            user's.
        store: where finished trajectories go, and where those of an earlier process are found.
        concurrency: graph runs in flight at once.
        timeout: seconds that one run may take; one that never ends would hold up all others. It then comes back
            failed, like one whose infrastructure failed.

    Raises:
        ConfigurationError: concurrency or timeout is out of range.
    """

    def __init__(
        self,
        build: Callable[[Gate], MetisAgent],
        store: TrajectoryStore,
        *,
        concurrency: int = 256,
        timeout: float | None = None,
    ) -> None:
        if concurrency < 1 or not (timeout is None or timeout > 0):
            raise ConfigurationError(
                f"concurrency={concurrency!r}, timeout={timeout!r}: at least 1 run at once, and more than 0 seconds "
                "for each, or None for no limit."
            )
        self._build = build
        self._agents = {(branch, 0): build(BranchGate(branch)) for branch in BRANCHES}
        self._store = store
        self._concurrency, self._timeout = concurrency, timeout
        self._finished_before = frozenset(store.ids())

    def collect(
        self, rollouts: Sequence[Rollout], *, progress: Callable[[Trajectory], None] = lambda _: None
    ) -> list[Trajectory]:
        """Run the rollouts and return their trajectories in the same order.

        A rollout whose infrastructure fails (sandbox, judge), whose conversation outgrows the model, or that takes
        too long comes back with `status="failed"`, to be excluded and counted. Any other exception is a defect and
        propagates; what was finished by then is in the store.

        Raises:
            StorageError: the store can't be written to, such as on a full disk.
        """
        found = self._recall({rollout.id for rollout in rollouts} & self._finished_before)
        for trajectory in found.values():
            progress(trajectory)
        missing = [rollout for rollout in rollouts if rollout.id not in found]
        with heap_set_aside():
            for trajectory in run_async(self._run_all(missing, progress)):
                found[trajectory.id] = trajectory
        return [found[rollout.id] for rollout in rollouts]

    def _recall(self, ids: frozenset[str] | set[str]) -> dict[str, Trajectory]:
        if not ids:
            return {}
        return {trajectory.id: trajectory for trajectory in self._store.read() if trajectory.id in ids}

    async def _run_all(self, rollouts: Sequence[Rollout], progress: Callable[[Trajectory], None]) -> list[Trajectory]:
        slots = asyncio.Semaphore(self._concurrency)

        async def one(rollout: Rollout) -> Trajectory:
            async with slots:
                trajectory = await self._run_one(rollout)
            keep(self._store, trajectory)
            progress(trajectory)
            return trajectory

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(rollout)) for rollout in rollouts]
        except BaseExceptionGroup as failures:
            # What hundreds of runs met is one thing, such as a full disk: say that, not "ExceptionGroup".
            raise _first(failures) from failures
        return [task.result() for task in running]

    async def _run_one(self, rollout: Rollout) -> Trajectory:
        start = rollout.branch, rollout.at
        if start not in self._agents:
            self._agents[start] = self._build(BranchGate(rollout.branch, at=rollout.at))
        return await roll_out(
            self._agents[start],
            rollout,
            excused=(InfrastructureError, InputError, TimeoutError),
            timeout=self._timeout,
        )


def question_message(question: Question) -> HumanMessage:
    """What the agent is asked: the text, after the pictures in `metadata["images"]` (data URIs) where there are any."""
    images = question.metadata.get("images") or ()
    if not images:
        return HumanMessage(question.text)
    blocks = [{"type": "image_url", "image_url": {"url": uri}} for uri in images]
    return HumanMessage([*blocks, {"type": "text", "text": question.text}])


async def roll_out(
    agent: Runnable[Any, Any],
    rollout: Rollout,
    *,
    excused: tuple[type[Exception], ...] = (InfrastructureError, InputError),
    timeout: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Trajectory:
    """Run one rollout through the agent of its branch.

    A run in which the service of a search, or of any other tool, gave no answer is `failed` as well: what was answered
    without it says nothing of the tool.

    Args:
        agent: Made around that branch's gate.
        rollout: To run.
        excused: Exceptions that make the trajectory `failed`; any other, and a wrong setting, propagates.
        timeout: Seconds, after which it fails with `TimeoutError`; `None` for no limit.
        metadata: For the trajectory.
    """
    started = time.time()
    # No thread_id: that belongs to conversations, and each rollout is a run of its own.
    config = RunnableConfig(configurable={"seed": rollout.seed})
    run = agent.aresult if isinstance(agent, MetisAgent) else agent.ainvoke
    state: Mapping[str, Any] = {"messages": []}
    status: TrajectoryStatus = "finished"
    error = ""
    try:
        with noted_outages() as outages:
            async with asyncio.timeout(timeout):
                begun = list(rollout.begun) or [question_message(rollout.question)]
                state = await run({"messages": begun}, config)
    except ConfigurationError:
        raise
    except excused as failure:
        status, error = "failed", f"{type(failure).__name__}: {failure}"
    if outages and status == "finished":  # the answer was given without what the search would have found
        status, error = "failed", outages[0]
    return trajectory_of(
        state, id=rollout.id, question=rollout.question, branch=rollout.branch, started_at=started,
        seconds=time.time() - started, status=status, error=error, metadata=metadata, tools=_definitions(agent),
    )  # fmt: skip


def tools_of(agent: Runnable[Any, Any]) -> Mapping[str, BaseTool]:
    """The tools of an agent of ours, or of `create_agent`, that run here, by name; none where it hides them."""
    if isinstance(agent, MetisAgent):
        return agent.tools
    node = getattr(agent, "nodes", {}).get("tools")
    return dict(getattr(node and node.bound, "tools_by_name", {}))


def _definitions(agent: Runnable[Any, Any]) -> tuple[Mapping[str, Any], ...]:
    if isinstance(agent, MetisAgent) and agent.metis is not None:
        return agent.metis.offer.definitions
    return definitions_of(tools_of(agent).values())


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure in a group of groups."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, also where an event loop is already running (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()


_YOUNG = 50_000
"""Objects made before the youngest are looked at: those of some dozens of turns."""

_lock = threading.Lock()
_inside = 0
_thresholds: tuple[int, int, int] | None = None
_froze = False


@contextmanager
def heap_set_aside() -> Iterator[None]:
    """Set aside what is on the heap now; at the end of the outermost such block everything is as it was.

    A process that has turned its collector off, or frozen a heap of its own, keeps that as it is.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _thresholds, _froze
    with _lock:
        _inside += 1
        if _inside > 1 or not gc.isenabled():
            return
        _thresholds = gc.get_threshold()
        if 0 < _thresholds[0] < _YOUNG:
            gc.set_threshold(_YOUNG, *_thresholds[1:])
        _froze = gc.get_freeze_count() == 0
        if _froze:
            gc.collect(1)  # or what has just become garbage would be kept for the while
            gc.freeze()


def _leave() -> None:
    global _inside, _thresholds, _froze
    with _lock:
        _inside -= 1
        if _inside or _thresholds is None:
            return
        if _froze:
            gc.unfreeze()
        gc.set_threshold(*_thresholds)
        _thresholds, _froze = None, False
