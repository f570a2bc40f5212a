"""The agent over several turns of a thread: budgets, interrupts, and what was lost on the way."""

import logging

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt

from metis_agent.agent import create_metis_agent
from metis_agent.rules.budget import Budget
from metis_agent.types import ToolOutcome
from tests.fakes import call, calling, model
from tests.looking import ask, look, looking, thread


async def test_decisions_and_outcomes_are_those_of_the_latest_turn(caplog):
    agent = looking(checkpointer=InMemorySaver(), record_calls=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            state = await agent.ainvoke(ask(), thread())
            assert len(state["decisions"]) == 2
            assert len(state["outcomes"]) == 1
            assert [item.step for item in state["calls"]] == [0, 1]
    assert len(state["messages"]) == 12
    assert not caplog.records  # classes that a checkpointer does not know are warned about
    stored = agent.get_state(thread()).values
    assert isinstance(stored["outcomes"][0], ToolOutcome)
    assert agent.get_state(thread()).next == ()


def test_the_budget_is_new_at_every_turn():
    agent = looking(checkpointer=InMemorySaver(), budget=Budget(calls=1, seconds=60))
    for _ in range(2):
        assert [outcome.status for outcome in agent.invoke(ask(), thread())["outcomes"]] == ["ok"]


async def test_stopping_before_a_tool_and_going_on(caplog):
    for later in (False, True):
        agent = looking(checkpointer=InMemorySaver(), interrupt_before=["look"])
        if later:
            await agent.ainvoke(ask(), thread())
        else:
            agent.invoke(ask(), thread())
        assert agent.get_state(thread()).next == ("look",)
        assert agent.get_state(thread()).values["outcomes"] == []
        state = await agent.ainvoke(None, thread()) if later else agent.invoke(None, thread())
        assert state["messages"][-1].content == "x it is"
        assert [outcome.status for outcome in state["outcomes"]] == ["ok"]
    assert not caplog.records


def test_stopping_after_the_gate():
    agent = looking(checkpointer=InMemorySaver(), interrupt_after=["gate"])
    agent.invoke(ask(), thread())
    assert agent.get_state(thread()).next == ("act",)


async def test_an_interrupt_in_a_tool_and_its_answer(caplog):
    @tool
    def confirm(text: str) -> str:
        """Ask the user."""
        return f"user said {interrupt(text)}"

    for agent_maker in (create_metis_agent, create_agent):
        for later in (False, True):
            chat = model(calling(call("confirm", id="1", text="sure?"), call("look", id="2", query="x")), "ok")
            agent = agent_maker(chat, [confirm, look], checkpointer=InMemorySaver())
            state = await agent.ainvoke(ask(), thread()) if later else agent.invoke(ask(), thread())
            assert [item.value for item in state["__interrupt__"]] == ["sure?"]
            resume = Command(resume="yes")
            state = await agent.ainvoke(resume, thread()) if later else agent.invoke(resume, thread())
            results = {m.tool_call_id: m.content for m in state["messages"] if isinstance(m, ToolMessage)}
            assert results == {"1": "user said yes", "2": "found x"}
            assert "__interrupt__" not in state
    assert not [record for record in caplog.records if "metis_agent" in record.getMessage()]


def test_a_thread_whose_tool_call_was_lost_goes_on():
    agent = looking(checkpointer=InMemorySaver())
    lost = calling(call("look", id="lost", query="y"))
    agent.update_state(thread(), {"messages": [HumanMessage("before"), lost]}, as_node="act")
    chat = agent.metis.models._model
    agent.invoke(ask(), thread())
    asked = chat.asked[0].messages
    assert [message.type for message in asked] == ["human", "ai", "tool", "human"]
    assert asked[2].tool_call_id == "lost"


def test_the_same_message_sent_again_is_a_new_turn():
    agent, question = looking(checkpointer=InMemorySaver(), budget=Budget(calls=1)), HumanMessage("q", id="same")
    chat = agent.metis.models._model
    chat.script = [calling(call("look", query="x")), "one", calling(call("look", query="x")), "two"]
    for answer in ("one", "two"):
        state = agent.invoke({"messages": [question]}, thread())
        assert state["messages"][-1].content == answer
        assert [outcome.status for outcome in state["outcomes"]] == ["ok"]
