"""From runs to trajectories."""

import asyncio
import json

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from metis_agent.agent import create_metis_agent
from metis_agent.errors import SandboxGoneError
from metis_agent.gates import BranchGate
from metis_agent.recording.recorder import Recorder, model_call_of, question_of, trajectory_of
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rules.budget import Budget
from metis_agent.types import TOKEN_RECORD, Question
from tests.fakes import call, calling, model

TOKENS = {
    "prompt_ids": [1, 2, 3],
    "completion_ids": [4, 5],
    "log_probs": [-0.1, -0.2],
    "forced": 1,
    "sampling": {"temperature": 1.0},
    "weights_version": "w",
    "template_hash": "t",
    "continues": True,
}


class Kept:
    """A store in memory."""

    def __init__(self):
        self.trajectories = []

    def append(self, trajectory):
        self.trajectories.append(trajectory)


@tool
def look(query: str) -> str:
    """Look it up."""
    if query == "gone":
        raise SandboxGoneError("the sandbox died")
    return f"found {query}"


@pytest.fixture
def kept():
    return Kept()


@pytest.fixture(params=["sync", "async"])
def run(request):
    def run(agent, text="q", config=None):
        state = {"messages": [HumanMessage(text)]}
        return asyncio.run(agent.ainvoke(state, config)) if request.param == "async" else agent.invoke(state, config)

    return run


def test_a_model_call_keeps_its_tokens():
    message = AIMessage(
        "hm",
        tool_calls=[call("look", query="x")],
        response_metadata={TOKEN_RECORD: TOKENS},
        usage_metadata={"input_tokens": 3, "output_tokens": 2, "total_tokens": 5, "input_token_details": {"cache": 1}},
    )
    record = model_call_of(message, "act", 2)
    assert (record.node, record.step, record.text, record.forced, record.continues) == ("act", 2, "hm", 1, True)
    assert (record.prompt_ids, record.completion_ids, record.log_probs) == ((1, 2, 3), (4, 5), (-0.1, -0.2))
    assert record.tool_calls[0]["name"] == "look"
    assert record.usage == {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    assert model_call_of(AIMessage("x"), "act", 0).prompt_ids is None


def test_a_trajectory_is_made_of_the_latest_turn():
    reply = AIMessage("new", response_metadata={TOKEN_RECORD: TOKENS, "model_name": "m"})
    state = {"messages": [HumanMessage("old"), AIMessage("old too"), HumanMessage("q"), reply]}
    trajectory = trajectory_of(state, id="1", question=Question(id="q", text="q"), started_at=5.0, seconds=2.0)
    assert [message["type"] for message in trajectory.messages] == ["human", "ai"]
    assert trajectory.messages[1]["data"]["response_metadata"] == {"model_name": "m"}
    assert TOKEN_RECORD in reply.response_metadata
    assert (trajectory.answer, trajectory.status, trajectory.seconds) == ("new", "finished", 2.0)


def test_a_partial_state_will_do():
    trajectory = trajectory_of(
        {"messages": []}, id="1", question=Question(id="q", text="q"), started_at=0.0, status="failed", error="gone"
    )
    assert (trajectory.answer, trajectory.messages, trajectory.calls, trajectory.error) == ("", (), (), "gone")


def test_the_same_text_is_the_same_question():
    one, two = question_of([HumanMessage("q", id="1")]), question_of([AIMessage("x"), HumanMessage("q", id="2")])
    assert one == two
    assert one.id != question_of([HumanMessage("other")]).id


def test_every_turn_is_recorded(run, kept):
    def script(messages):
        if isinstance(messages[-1], ToolMessage):
            return AIMessage("x it is", response_metadata={TOKEN_RECORD: TOKENS})
        return calling(call("look", query="x"))

    agent = create_metis_agent(model(script), [look], recorder=Recorder(kept, metadata={"where": "here"}))
    assert "record" in agent.get_graph().nodes
    state = run(agent)
    run(agent)
    first, second = kept.trajectories
    assert first.id != second.id
    assert first.question == second.question == question_of([HumanMessage("q")])
    assert (first.answer, first.status, first.branch, first.tool_calls) == ("x it is", "finished", "free", 1)
    assert [item.node for item in first.calls] == ["act", "act"]
    assert first.calls[1].completion_ids == (4, 5)
    assert first.decisions == tuple(state["decisions"])
    assert first.metadata == {"where": "here"}
    assert 0 < first.seconds < 5
    assert first.started_at > 1e9
    json.dumps(first.messages)


def test_ids_branches_and_threads(run, kept):
    agent = create_metis_agent(
        model("ok"), [look], gate=BranchGate("direct"), recorder=Recorder(kept), checkpointer=InMemorySaver()
    )
    for number in (1, 2):
        name = f"00000000-0000-0000-0000-00000000000{number}"
        run(agent, f"q{number}", {"configurable": {"thread_id": "t"}, "run_id": name})
    assert [trajectory.id[-1] for trajectory in kept.trajectories] == ["1", "2"]
    assert [trajectory.branch for trajectory in kept.trajectories] == ["direct", "direct"]
    assert [len(trajectory.calls) for trajectory in kept.trajectories] == [1, 1]
    assert [trajectory.question.text for trajectory in kept.trajectories] == ["q1", "q2"]


def test_two_turns_of_one_outer_run_have_two_ids(run, kept):
    builder = StateGraph(MessagesState)
    for name in ("one", "two"):
        builder.add_node(name, create_metis_agent(model(name), recorder=Recorder(kept)))
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    run(builder.compile(), config={"run_id": "00000000-0000-0000-0000-000000000001"})
    assert len({trajectory.id for trajectory in kept.trajectories}) == 2


@pytest.mark.parametrize("budget", [Budget(), Budget(calls=1)])
def test_a_model_that_fails_leaves_a_failed_trajectory(run, kept, budget):
    chat = model(calling(call("look", query="x")), ConnectionError("no route"))
    agent = create_metis_agent(chat, [look], recorder=Recorder(kept), budget=budget)
    with pytest.raises(ConnectionError, match="no route"):
        run(agent)
    (trajectory,) = kept.trajectories
    assert (trajectory.status, trajectory.error, trajectory.answer) == ("failed", "ConnectionError: no route", "")
    assert trajectory.tool_calls == 1
    assert len(trajectory.messages) == 3
    assert len(trajectory.calls) == 1


def test_an_infrastructure_failure_in_a_tool_leaves_a_failed_trajectory(run, kept):
    agent = create_metis_agent(model(calling(call("look", query="gone"))), [look], recorder=Recorder(kept))
    with pytest.raises(SandboxGoneError):
        run(agent)
    (trajectory,) = kept.trajectories
    assert (trajectory.status, trajectory.error) == ("failed", "SandboxGoneError: the sandbox died")
    assert [message["type"] for message in trajectory.messages] == ["human", "ai"]


def test_a_store_that_fails_does_not_hide_the_failure(run, kept, caplog):
    kept.append = lambda trajectory: 1 / 0
    agent = create_metis_agent(model(ConnectionError("no route")), recorder=Recorder(kept))
    with pytest.raises(ConnectionError):
        run(agent)
    assert "could not be recorded" in caplog.text


def test_token_records_are_kept_without_a_recorder_too(run):
    chat = model(AIMessage("ok", response_metadata={TOKEN_RECORD: TOKENS}))
    assert run(create_metis_agent(chat))["calls"][0].prompt_ids == (1, 2, 3)
    assert run(create_metis_agent(chat, record_calls=False))["calls"] == []
    assert len(run(create_metis_agent(model("ok"), record_calls=True))["calls"]) == 1


def test_trajectories_come_back_from_disk(run, tmp_path):
    store = TrajectoryStore(tmp_path)
    chat = model(calling(call("look", query="x")), AIMessage("ok", response_metadata={TOKEN_RECORD: TOKENS}))
    run(create_metis_agent(chat, [look], recorder=Recorder(store)))
    (trajectory,) = store.read()
    assert (trajectory.answer, trajectory.calls[1].prompt_ids, trajectory.tool_calls) == ("ok", (1, 2, 3), 1)
    assert trajectory.decisions[0].allowed == ("look",)


def test_every_test_of_failures_in_tools_holds_with_a_recorder(run, kept):
    chat = model(calling(call("look", id="1", query="x"), call("look", id="2", query="x")), "ok")
    state = run(create_metis_agent(chat, [look], recorder=Recorder(kept)))
    assert sorted(outcome.status for outcome in state["outcomes"]) == ["ok", "repeated"]
    assert kept.trajectories[0].outcomes == tuple(state["outcomes"])
