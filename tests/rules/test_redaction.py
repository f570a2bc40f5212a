"""What other middleware takes out of messages stays out of all that either host keeps and streams."""

import asyncio

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, PIIMiddleware
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from metis_agent import MetisGateMiddleware, create_metis_agent
from metis_agent.gates import ModelGate, ShadowGate
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from tests.fakes import call, calling, model
from tests.middleware.helpers import Only, Verdict

THREAD = {"configurable": {"thread_id": "t"}}
QUESTION = {"messages": [("user", "Who is dave@example.com?")]}


@tool
def look(query: str) -> str:
    """Look it up."""
    return "bob@example.com"


@tool
def pay(amount: int) -> str:
    """Pay."""
    return "paid"


@pytest.fixture(params=["graph", "gate last", "gate first"])
def make(request):
    """Makes an agent of either kind, with middleware that redacts addresses wherever it is shown any."""

    def make(chat, gate, **options):
        pii = PIIMiddleware("email", apply_to_input=True, apply_to_output=True, apply_to_tool_results=True)
        own = {name: options.pop(name) for name in ("recorder", "record_calls") if name in options}
        options |= {"checkpointer": InMemorySaver()}
        if request.param == "graph":
            return create_metis_agent(chat, [look, pay], gate=gate, middleware=[pii], **own, **options)
        ours = MetisGateMiddleware(gate, **own)
        middleware = [ours, pii] if request.param == "gate first" else [pii, ours]
        return create_agent(chat, [look, pay], middleware=middleware, **options)

    return make


LOOK = calling(call("look", query="x"), text="I ask alice@example.com.")
AGAIN = calling(call("look", id="2", query="x"), text="I ask erin@example.com again.")
REPLIES = {
    "a call": (LOOK, "It is carol@example.com."),
    "a mistyped name": (calling(call("lok"), text="I ask alice@example.com."), LOOK, "ok"),
    "a call twice": (LOOK, AGAIN, "ok"),
    "a call that is refused": (calling(call("pay", amount=1), text="I pay alice@example.com."), "ok"),
    "arguments that are no JSON": (
        AIMessage("To alice@example.com", invalid_tool_calls=[{"name": "look", "args": "{", "id": "1", "error": ""}]),
        "ok",
    ),
    "blocks": (
        AIMessage(
            [{"type": "text", "text": "I pay alice@example.com."}, {"type": "tool_use", "id": "1", "name": "pay",
              "input": {"amount": 1}}], tool_calls=[call("pay", id="1", amount=1)],
        ), "ok",
    ),
}  # fmt: skip


@pytest.mark.parametrize("replies", REPLIES)
@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_no_reply_is_kept_as_it_was_said(make, replies, flavour, tmp_path):
    with TrajectoryStore(tmp_path) as store:
        agent = make(model(*REPLIES[replies]), Only("look"), recorder=Recorder(store))
        asked = agent.invoke(QUESTION, THREAD) if flavour == "sync" else asyncio.run(agent.ainvoke(QUESTION, THREAD))
        [trajectory] = store.read()
    assert "@" not in f"{asked} {agent.get_state(THREAD).values} {trajectory}"


def test_nor_is_one_that_does_not_have_the_format(make):
    wrong = calling(call("Verdict", txt=""), text="alice@example.com")
    agent = make(model(wrong, calling(call("Verdict", id="2", text="ok"))), ModelGate(), record_calls=True,
                 response_format=ToolStrategy(Verdict))  # fmt: skip
    state = agent.invoke(QUESTION, THREAD)
    assert state["structured_response"] == Verdict(text="ok")
    assert "@" not in f"{state} {agent.get_state(THREAD).values}"


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
@pytest.mark.parametrize("gate", [ModelGate, lambda: ShadowGate(ModelGate())])
@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_nothing_is_streamed_as_it_was_said(make, gate, flavour):
    look = calling(call("look", query="erin@example.com"), text="I ask alice@example.com.")
    agent = make(model(look, "It is carol@example.com."), gate(), record_calls=True)

    async def streamed():
        return [event async for event in await agent.astream_events(QUESTION, THREAD, version="v3")]

    events = list(agent.stream_events(QUESTION, THREAD, version="v3")) if flavour == "sync" else asyncio.run(streamed())
    assert {event["method"] for event in events} >= {"messages", "tools", "values"}
    assert "@" not in str(events)
    assert events[-1]["params"]["data"]["outcomes"][0].arguments == {"query": "[REDACTED_EMAIL]"}


@pytest.mark.parametrize("flavour", ["sync", "async"])
@pytest.mark.parametrize(
    "host", ["graph", "graph with a hook around the model", "graph with a hook after it", "middleware"]
)
def test_words_beside_calls_that_are_answered_at_once_stay_where_nothing_can_redact_them(host, flavour):
    class Around(AgentMiddleware):
        def wrap_model_call(self, request, handler):
            return handler(request)

        async def awrap_model_call(self, request, handler):
            return await handler(request)

    class After(AgentMiddleware):
        def after_model(self, state, runtime):
            return None

    chat, gate = model(calling(call("pay", amount=1), text="I pay."), "ok"), Only("look")
    if host == "middleware":
        # Also where it is the only one: it is not told of any others.
        agent = create_agent(chat, [look, pay], middleware=[MetisGateMiddleware(gate, record_calls=True)])
    else:
        hooks = {"graph": [], "graph with a hook around the model": [Around()]}.get(host, [After()])
        agent = create_metis_agent(chat, [look, pay], gate=gate, middleware=hooks, record_calls=True)
    state = agent.invoke(QUESTION) if flavour == "sync" else asyncio.run(agent.ainvoke(QUESTION))
    words = "" if host in ("graph with a hook after it", "middleware") else "I pay."
    said = [message for message in state["messages"] if isinstance(message, AIMessage)]
    read = [message for message in chat.asked[-1].messages if isinstance(message, AIMessage)]
    assert [message.text for message in said] == [words, "ok"]
    assert [message.text for message in read] == [words]
    assert [one.text for one in state["calls"]] == [words, "ok"]
    assert said[0].tool_calls[0]["name"] == "pay"
