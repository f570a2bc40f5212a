"""Branches through the real graph: what is forced, what is resumed, and what an outage does."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import BaseTool, tool

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.gates.base import Gate
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import BranchPlan, BranchRecorder, branch_rollouts
from metis_agent.rollouts.recorded import OutcomePool
from metis_agent.rollouts.runner import Rollout
from metis_agent.tools import InstrumentedTool, TextSearchTool
from metis_agent.tools.search.base import SearchRefusedError, SearchUnavailableError
from metis_agent.types import UNMET, Question
from tests.fakes import ScriptedChatModel, call, calling, model

QUESTIONS = [Question(id=f"q{i}", text=f"What is {i}?", answer=str(i)) for i in range(6)]
TOOLS = ("look_up", "work_out")


def look_up(word: str) -> str:
    """Look a word up."""
    return word


def work_out(sum: str) -> str:
    """Work a sum out."""
    return sum


class Plain(ScriptedChatModel):
    """Calls the only tool that it is offered, `work_out` of several, and answers with a number of the question."""

    def _generate(self, messages: list[BaseMessage], *arguments: Any, **keywords: Any) -> Any:
        tools = keywords.get("tools") or ()
        number = str(messages[0].text).strip("What is?")
        if messages[-1].type == "tool" or not tools:
            reply = AIMessage(number)
        else:
            tool = tools[0] if len(tools) == 1 else "work_out"
            reply = calling(call(tool, **{"word" if tool == "look_up" else "sum": number}))
        self.script[:] = [reply]
        return super()._generate(messages, *arguments, **keywords)


def builder(chat: Any) -> Callable[[Gate], MetisAgent]:
    return lambda gate: create_metis_agent(chat, [look_up, work_out], gate=gate)


def plan(**counts: int) -> list[Rollout]:
    return list(branch_rollouts(QUESTIONS, TOOLS, BranchPlan(**counts), name="test", seed=0))


def test_a_larger_plan_only_adds_to_a_smaller_one() -> None:
    small, large = plan(direct=1, tool=1, free=0), plan(direct=2, tool=1, free=1)
    assert len(small) == 6 * 3
    assert len(large) == 6 * 5
    names = {rollout.id: rollout for rollout in large}
    assert len(names) == len(large)
    assert all(names[rollout.id] == rollout for rollout in small)
    assert len({rollout.seed for rollout in large}) == len(large)
    with pytest.raises(ConfigurationError, match="at least one"):
        BranchPlan(direct=0, tool=0)
    with pytest.raises(ConfigurationError, match="0 or more"):
        BranchPlan(direct=-1)


def test_each_branch_runs_its_tool_and_no_other(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    seen: list[object] = []
    report = BranchRecorder(builder(Plain()), store, metadata={"model": "plain"}).record(
        plan(direct=2, tool=1, free=1), progress=seen.append
    )
    assert (report.planned, report.finished, report.failed) == (30, 30, 0)
    assert len(seen) == 30
    ran = Counter((run.metadata["forced"], tuple(outcome.tool for outcome in run.outcomes)) for run in store.read())
    assert ran == {
        ("direct", ()): 12, ("look_up", ("look_up",)): 6, ("work_out", ("work_out",)): 6, ("free", ("work_out",)): 6,
    }  # fmt: skip
    assert all(run.answer == run.question.answer and run.metadata["model"] == "plain" for run in store.read())


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    BranchRecorder(builder(Plain()), TrajectoryStore(tmp_path)).record(plan())
    report = BranchRecorder(builder(Plain()), TrajectoryStore(tmp_path)).record(plan(direct=1, tool=1, free=1))
    assert (report.found, report.finished) == (18, 6)


def test_an_outage_is_tried_again_then_excluded_and_made_up_for_by_the_next_run(tmp_path: Path) -> None:
    def reply(failures: list[int]) -> Callable[[list[BaseMessage]], AIMessage]:
        def answer(messages: list[BaseMessage]) -> AIMessage:
            number = int(str(messages[0].text).strip("What is?"))
            failures[number] -= 1
            if failures[number] >= 0:
                raise ConnectionError("the service is down")
            return AIMessage(str(number))

        return answer

    store = TrajectoryStore(tmp_path)
    # Question 1 fails once, question 2 more often than it is tried.
    flaky = BranchRecorder(builder(model(reply([0, 1, 9, 0, 0, 0]))), store, retries=2, wait=0)
    report = flaky.record(plan(direct=1, tool=0))
    assert (report.finished, report.failed, report.retried) == (5, 1, 3)
    assert report.failures == {"ConnectionError": 1}
    assert "the service is down" in report.last_failure
    failed = [run for run in store.read() if run.status == "failed"]
    assert [(run.question.id, run.answer) for run in failed] == [("q2", "")]
    again = BranchRecorder(builder(model(reply([0] * 6))), store, wait=0).record(plan(direct=1, tool=0))
    assert (again.found, again.finished, again.failed) == (5, 1, 0)


def test_where_nothing_works_it_stops_and_says_why(tmp_path: Path) -> None:
    many = [Question(id=str(i), text=f"What is {i}?") for i in range(500)]
    rollouts = branch_rollouts(many, TOOLS, BranchPlan(tool=0), name="test", seed=0)
    recorder = BranchRecorder(builder(model(RuntimeError("no such key"))), TrajectoryStore(tmp_path), retries=0)
    with pytest.raises(InfrastructureError, match="no such key"):
        recorder.record(rollouts)
    # Once concurrency is 16, 32 failures in a row; runs in flight then may add a few.
    assert 32 <= TrajectoryStore(tmp_path).count() < 64


def test_a_service_that_refuses_is_asked_once(tmp_path: Path) -> None:
    class ModelNotFoundError(Exception):
        pass

    refusing = model(ModelNotFoundError("no model x"))
    recorder = BranchRecorder(builder(refusing), TrajectoryStore(tmp_path), retries=2, concurrency=1)
    with pytest.raises(InfrastructureError, match=r"^The first rollout failed.*no model x.*Check the model's name"):
        recorder.record(plan(direct=1, tool=0))
    assert TrajectoryStore(tmp_path).count() == 1


def test_a_wrong_setting_is_no_outage(tmp_path: Path) -> None:
    wrong = ConfigurationError("this model has no tools")
    with pytest.raises(ConfigurationError, match="has no tools"):
        BranchRecorder(builder(model(wrong)), TrajectoryStore(tmp_path)).record(plan())
    with pytest.raises(ConfigurationError, match="concurrency=0"):
        BranchRecorder(builder(Plain()), TrajectoryStore(tmp_path), concurrency=0)


def test_a_run_that_hangs_is_cut_off(tmp_path: Path) -> None:
    class Hanging(ScriptedChatModel):
        async def _agenerate(self, *arguments: Any, **keywords: Any) -> Any:
            await asyncio.sleep(3600)

    recorder = BranchRecorder(builder(Hanging()), TrajectoryStore(tmp_path), timeout=0.05, retries=0)
    report = recorder.record(plan(direct=1, tool=0))
    assert report.failures == {"TimeoutError": 6}


SLOW = """
import sys, time
from tests.rollouts.test_branches import *

class Slow(Plain):
    def _generate(self, *arguments, **keywords):
        time.sleep(0.05)
        return super()._generate(*arguments, **keywords)

BranchRecorder(builder(Slow()), TrajectoryStore(sys.argv[1]), concurrency=2).record(plan(direct=8, tool=1))
"""


def test_after_a_kill_each_rollout_is_finished_once(tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-c", SLOW, str(store)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if sum(path.read_bytes().count(b"\n") for path in store.glob("*.jsonl")) > 7:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = len(TrajectoryStore(store).ids())
    assert 7 < before < 6 * 10
    report = BranchRecorder(builder(Plain()), TrajectoryStore(store)).record(plan(direct=8, tool=1))
    assert (report.found, report.found + report.finished) == (before, 6 * 10)
    finished = Counter(run.id for run in TrajectoryStore(store).read() if run.status == "finished")
    assert len(finished) == 6 * 10
    assert set(finished.values()) == {1}


def test_a_forced_run_without_its_call_is_counted_apart(tmp_path: Path) -> None:
    class Stubborn(Plain):
        def _generate(self, messages: list[BaseMessage], *arguments: Any, **keywords: Any) -> Any:
            result = super()._generate(messages, *arguments, **{**keywords, "tools": ()})
            if "look_up" in keywords.get("tools", ()):
                # As a served model says that its server was told to require the call.
                result.generations[0].message.response_metadata[UNMET] = "any"
            return result

    store = TrajectoryStore(tmp_path)
    report = BranchRecorder(builder(Stubborn()), store).record(plan(direct=1, tool=1))
    assert (report.finished, report.uncalled, report.unmet) == (18, 12, 6)
    pool = OutcomePool().extend(store.read())
    assert pool.coverage() == {"direct": 6}
    assert pool.dropped["no call, though one was required"] == 12


@pytest.mark.parametrize(
    "fault",
    [
        SearchUnavailableError("The search service did not answer in time."),
        SearchRefusedError("No results, or refused."),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_outage_of_a_search_is_no_wrong_answer(tmp_path: Path, fault: Exception, wrapped: bool) -> None:
    """The model reads of it and answers without; the run is tried again, then counted and left out."""

    class Down:
        def search(self, query: str, limit: int) -> list[Any]:
            raise fault

    class Searches(Plain):
        def _generate(self, messages: list[BaseMessage], *arguments: Any, **keywords: Any) -> Any:
            reply = calling(call("text_search", query="x")) if messages[-1].type == "human" else AIMessage("No idea.")
            self.script[:] = [reply if keywords.get("tools") or messages[-1].type == "tool" else AIMessage("No idea.")]
            return ScriptedChatModel._generate(self, messages, *arguments, **keywords)

    search: Any = TextSearchTool(backend=Down())
    search = InstrumentedTool(search) if wrapped else search
    with TrajectoryStore(tmp_path) as store:
        recorder = BranchRecorder(
            lambda gate: create_metis_agent(Searches(script=[]), [search], gate=gate), store, concurrency=1, wait=0.0
        )
        report = recorder.record(branch_rollouts(QUESTIONS, ["text_search"], BranchPlan(), name="r", seed=0))
        assert (report.finished, report.failed, report.retried) == (6, 6, 12)
        assert report.failures == {"SearchUnavailableError": 6}
        pool = OutcomePool().extend(store.read())
    assert (pool.coverage(), pool.dropped["failed run"]) == ({"direct": 6, "text_search": 0}, 6)


class NotReady(BaseRetriever):
    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        raise RuntimeError("index not ready")


@tool
def unreachable(query: str) -> str:
    """Ask a service."""
    raise ConnectionError("refused")


@tool
def wrongly_asked(query: str) -> str:
    """Look a key up."""
    raise KeyError(query)


@pytest.mark.parametrize(
    ("asked", "failures"),
    [
        (TextSearchTool(backend=NotReady()), {"RuntimeError": 6}),
        (unreachable, {"ConnectionError": 6}),
        (wrongly_asked, {}),
    ],
)
def test_an_outage_in_no_words_of_ours_is_no_wrong_answer(
    tmp_path: Path, asked: BaseTool, failures: dict[str, int]
) -> None:
    """A retriever that raises whatever its client raises, or any tool whose service is out of reach."""

    class Asks(Plain):
        def _generate(self, messages: list[BaseMessage], *arguments: Any, **keywords: Any) -> Any:
            asks = keywords.get("tools") and messages[-1].type == "human"
            self.script[:] = [calling(call(asked.name, query="x")) if asks else AIMessage("No idea.")]
            return ScriptedChatModel._generate(self, messages, *arguments, **keywords)

    with TrajectoryStore(tmp_path) as store:
        recorder = BranchRecorder(
            lambda gate: create_metis_agent(Asks(script=[]), [asked], gate=gate), store, concurrency=1, retries=0
        )
        report = recorder.record(branch_rollouts(QUESTIONS, [asked.name], BranchPlan(), name="r", seed=0))
    assert (report.failures, report.finished) == (failures, 12 - sum(failures.values()))
