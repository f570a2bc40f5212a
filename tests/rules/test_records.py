"""What either host leaves on record of a turn, and that recording changes nothing."""

import time
from typing import Annotated

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from metis_agent.errors import InfrastructureError
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rules.budget import Budget
from tests.fakes import call, calling, model
from tests.middleware.helpers import results

THREAD = {"configurable": {"thread_id": "t"}}


def test_a_failed_turn_has_its_seconds(make, go, tools, tmp_path):
    def fail(messages):
        time.sleep(0.05)
        raise ConnectionError("down")

    with TrajectoryStore(tmp_path) as store:
        with pytest.raises(ConnectionError):
            go(make(model(fail), tools, recorder=Recorder(store)))
        [trajectory] = store.read()
    assert (trajectory.status, trajectory.error) == ("failed", "ConnectionError: down")
    assert trajectory.seconds >= 0.05


def test_a_turn_that_a_tool_ends_has_that_tools_seconds_and_price(make, go, tmp_path):
    @tool
    def look(query: str) -> str:
        """Look."""
        time.sleep(0.05)
        raise InfrastructureError("the server is gone")

    look.metadata = {"cost": 2.0}
    with TrajectoryStore(tmp_path) as store:
        with pytest.raises(InfrastructureError):
            go(make(model(calling(call("look", query="x"))), [look], recorder=Recorder(store)))
        [trajectory] = store.read()
    [outcome] = trajectory.outcomes
    assert (outcome.status, outcome.cost) == ("error", 2.0)
    assert outcome.content == "InfrastructureError: the server is gone"
    assert min(outcome.seconds, trajectory.seconds) >= 0.05


def test_a_lost_call_keeps_no_thread_stuck(make, go, tools):
    lost = [HumanMessage("a"), calling(call("look", id="l:0", query="x")), HumanMessage("b")]
    chat = model("ok")
    go(make(chat, tools), {"messages": lost})
    assert [message.type for message in chat.asked[0].messages] == ["human", "ai", "tool", "human"]


def test_an_agent_that_a_tool_asks_keeps_its_records_to_itself(make, go, ran, tools):
    inner = make(model(calling(call("look", id="s1", query="inner")), "inner says x"), tools[:1])

    @tool
    def task(description: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> Command:
        """Hand a task over, and all of the state that comes back."""
        state = inner.invoke({"messages": [HumanMessage(description)]})
        answer = ToolMessage(state.pop("messages")[-1].text, tool_call_id=tool_call_id)
        return Command(update={**state, "messages": [answer]})

    chat = model(calling(call("task", id="m1", description="x")), calling(call("look", id="m2", query="y")), "done")
    state = go(make(chat, [task, *tools], budget=Budget(calls=2)))
    assert [outcome.call_id for outcome in state["outcomes"]] == ["m1", "m2"]
    assert [decision.gate for decision in state["decisions"]][-1] == "budget"
    assert (len(state["decisions"]), ran) == (3, [("look", "inner"), ("look", "y")])


def test_a_recorder_changes_nothing_that_the_model_reads(make, go, tmp_path):
    @tool
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    read = []
    with TrajectoryStore(tmp_path) as store:
        for options in ({}, {"recorder": Recorder(store)}):
            chat = model(calling(call("add", a="x", b=1)), "done")
            read.append(results(go(make(chat, [add], **options))))
    assert read[0] == read[1]


def test_a_recorder_that_cannot_write_takes_no_answer(make, go, tools):
    class Full:
        def append(self, trajectory):
            raise OSError("full")

    recorder = Recorder(Full())
    assert go(make(model("the answer"), tools, recorder=recorder))["messages"][-1].text == "the answer"
    assert recorder.report.lost == 1


def test_a_result_that_a_person_has_changed_is_in_no_record_as_it_was(make, go, ran, tools, tmp_path):
    chat = model(calling(call("look", id="1", query="x")), "ok", calling(call("look", id="2", query="x")), "nothing")
    with TrajectoryStore(tmp_path) as store:
        agent = make(chat, tools, checkpointer=InMemorySaver(), recorder=Recorder(store))
        go(agent, config=THREAD)
        past = next(one for one in agent.get_state_history(THREAD) if one.values["messages"][-1].type == "tool")
        changed = past.values["messages"][-1].model_copy(update={"content": "nothing there"})
        state = go(agent, None, agent.update_state(past.config, {"messages": [changed]}))
        trajectory = list(store.read())[-1]
    assert len(ran) == 1
    assert "found" not in f"{state} {trajectory} {chat.asked[-1].messages}"
    assert [outcome.content.splitlines()[-1] for outcome in state["outcomes"]] == ["nothing there"] * 2


def test_the_result_of_a_free_form_tool_is_recorded_as_it_is(make, go, tmp_path):
    @tool
    def code(text: str) -> list:
        """Run code, as a free-form tool of OpenAI's does."""
        return [{"type": "custom_tool_call_output", "output": "27"}]

    with TrajectoryStore(tmp_path) as store:
        state = go(make(model(calling(call("code", text="print(27)")), "ok"), [code], recorder=Recorder(store)))
        [trajectory] = store.read()
    assert [outcome.content for outcome in (*state["outcomes"], *trajectory.outcomes)] == ["27", "27"]
