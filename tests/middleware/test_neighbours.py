"""Beside other middleware: what LangChain's own suites want of it holds with a gate first, last, and in shadow."""

import asyncio

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    ModelFallbackMiddleware,
    ModelRefusalMiddleware,
    ModelRequest,
    wrap_model_call,
)
from langchain_core.exceptions import ModelRefusalError
from langchain_core.messages import AIMessage
from langchain_core.tools import tool

from metis_agent import Budget, MetisGateMiddleware
from metis_agent.gates import ModelGate, NeverGate, ShadowGate
from tests.fakes import call, calling, model
from tests.middleware.helpers import Only, statuses

ASK = {"messages": [("user", "q")]}
REFUSED = AIMessage([{"type": "refusal", "refusal": "No."}])


@tool
def look(query: str) -> str:
    """Look it up."""
    return f"found {query}"


@tool
def later(query: str) -> str:
    """Another tool."""
    return f"later {query}"


class Adds(AgentMiddleware):
    """Puts a tool on offer that the agent was not made with, and runs it."""

    def wrap_model_call(self, request, handler):
        return handler(request.override(tools=[*request.tools, later]))

    async def awrap_model_call(self, request, handler):
        return await handler(request.override(tools=[*request.tools, later]))

    def wrap_tool_call(self, request, handler):
        return handler(request.override(tool=later) if request.tool_call["name"] == "later" else request)

    async def awrap_tool_call(self, request, handler):
        return await handler(request.override(tool=later) if request.tool_call["name"] == "later" else request)


class Takes(AgentMiddleware):
    """Takes a tool off the offer."""

    def wrap_model_call(self, request, handler):
        return handler(request.override(tools=[one for one in request.tools if one.name != "look"]))

    async def awrap_model_call(self, request, handler):
        return await handler(request.override(tools=[one for one in request.tools if one.name != "look"]))


@pytest.fixture(params=["sync", "async"])
def go(request):
    return lambda agent: agent.invoke(ASK) if request.param == "sync" else asyncio.run(agent.ainvoke(ASK))


def results(state):
    return [str(message.text) for message in state["messages"] if message.type == "tool"]


def agent_of(chat, gate, *others, first, tools=(look,), **options):
    ours = MetisGateMiddleware(gate, **options)
    return create_agent(chat, list(tools), middleware=[ours, *others] if first else [*others, ours])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("gate", [ModelGate, lambda: ShadowGate(NeverGate())])
@pytest.mark.parametrize("tools", [(look,), ()])
def test_a_tool_that_other_middleware_adds(go, first, gate, tools):
    script = calling(call("later", query="x")), calling(call("later", id="2", query="y")), "ok"
    state = go(agent_of(model(*script), gate(), Adds(), first=first, tools=tools))
    assert results(state) == ["later x", "later y"]
    assert statuses(state) == ["ok", "ok"]


def test_an_added_tool_is_within_the_budget_and_the_lists(go):
    script = calling(call("later", query="x")), calling(call("later", id="2", query="y")), "ok"
    state = go(agent_of(model(*script), ModelGate(), Adds(), first=True, budget=Budget(calls=1)))
    assert statuses(state) == ["blocked", "ok"]
    assert "later y" not in results(state)
    state = go(agent_of(model(*script), ModelGate(), Adds(), first=True, never=["later"]))
    assert not [text for text in results(state) if text.startswith("later")]


def test_a_direct_decision_holds_for_added_tools(go):
    state = go(agent_of(model(calling(call("later", query="x")), "ok"), NeverGate(), Adds(), first=True))
    assert (results(state), state["messages"][-1].text) == ([], "ok")


def test_a_tool_that_was_taken_off_never_runs(go):
    chat = model(calling(call("look", query="x")), "ok")
    state = go(agent_of(chat, ModelGate(), Takes(), first=False, tools=(look, later)))
    assert not [text for text in results(state) if text.startswith("found")]
    assert statuses(state) == ["blocked"]


def test_a_tool_of_no_name_is_told_to_the_model(go):
    state = go(agent_of(model(calling(call("lok", query="x")), calling(call("look", id="2", query="x")), "ok"),
                        Only("look"), first=True))  # fmt: skip
    assert results(state)[1] == "found x"
    assert "look" in results(state)[0]
    assert statuses(state) == ["blocked", "ok"]


@pytest.mark.parametrize("first", [True, False])
def test_a_refusal_is_seen_by_others(go, first):
    with pytest.raises(ModelRefusalError):
        go(agent_of(model(REFUSED, "but here is how"), ModelGate(), ModelRefusalMiddleware(), first=first))
    others = ModelFallbackMiddleware(model("fallback")), ModelRefusalMiddleware()
    assert go(agent_of(model(REFUSED), ModelGate(), *others, first=first))["messages"][-1].text == "fallback"


@pytest.mark.parametrize("gate", [ModelGate, lambda: ShadowGate(NeverGate())])
def test_a_request_that_other_middleware_makes_by_hand(gate):
    @wrap_model_call
    def anew(request, handler):
        kept = {name: getattr(request, name) for name in ("model", "messages", "tools", "tool_choice")}
        return handler(ModelRequest(**kept, state={"messages": []}, runtime=None))

    ours = MetisGateMiddleware(gate())
    agent = create_agent(model("ok"), [look], middleware=[anew, ours])
    assert agent.invoke(ASK)["messages"][-1].text == "ok"
    assert ours.failures == 0
