"""A gate that only watches changes nothing at all about the run."""

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.middleware import ToolCallLimitMiddleware
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver

from metis_agent import MetisGateMiddleware, Recorder, TrajectoryStore
from metis_agent.gates import Gate, NeverGate
from metis_agent.gates.wrappers import ShadowGate
from metis_agent.rules.budget import Budget
from tests.fakes import call, calling, model
from tests.middleware.helpers import Verdict, ask, make_tools


class Broken(Gate):
    def decide(self, request):
        raise RuntimeError("no weights")


def plain(messages):
    """Messages without the ids that every run draws anew."""
    return [message.model_copy(update={"id": None}) for message in messages]


def both(script, *, flavour="sync", gate=None, before=(), **agent):
    """What the run is without the gate and with it: messages, what ran, and what the model was asked."""
    results = []
    for shadowed in (False, True):
        ran, chat = [], model(*script)
        shadow = [MetisGateMiddleware(ShadowGate(gate or NeverGate()), budget=Budget(calls=0))] if shadowed else []
        built = create_agent(chat, make_tools(ran), middleware=[*before, *shadow], **agent)
        config = {"recursion_limit": 15, "configurable": {"thread_id": f"{shadowed}"}}
        question = {"messages": [HumanMessage("q")]}
        try:
            state = (
                built.invoke(question, config) if flavour == "sync" else asyncio.run(built.ainvoke(question, config))
            )
            messages = plain(state["messages"])
            results.append(
                (messages, sorted(ran, key=str), [(plain(a.messages), a.tools, a.tool_choice) for a in chat.asked])
            )
        except Exception as error:
            state = {}
            results.append((type(error), sorted(ran, key=str), None))
    assert results[0] == results[1]
    return results[1], state


STEPS = {
    "an answer": ["hi"],
    "a call": [calling(call("look", query="x")), "ok"],
    "repeated calls": [*(calling(call("look", id=str(n), query="x")) for n in range(3)), "ok"],
    "parallel twins": [calling(call("look", id="1", query="x"), call("look", id="2", query="x")), "ok"],
    "an unknown tool": [calling(call("rob", amount=1)), "ok"],
    "arguments that do not fit": [calling({"name": "pay", "args": {"amount": "much"}, "id": "1"}), "ok"],
    "a call that can't be parsed": [
        AIMessage("", invalid_tool_calls=[{"name": "look", "args": "{", "id": "1", "error": None}]), "ok",
    ],
    "an empty answer": [""],
    "a model that fails": [calling(call("look", query="x")), ConnectionError("down")],
}  # fmt: skip


@pytest.mark.parametrize("flavour", ["sync", "async"])
@pytest.mark.parametrize("name", STEPS)
def test_the_run_is_the_same(name, flavour):
    both(STEPS[name], flavour=flavour)


def test_the_run_is_the_same_with_limits_structure_and_threads():
    calls = [calling(call("look", id=str(n), query=str(n))) for n in range(3)]
    limit = ToolCallLimitMiddleware(run_limit=1, exit_behavior="continue")
    both([*calls, "ok"], before=[limit])
    both([*calls, calling(call("Verdict", id="9", text="yes"))], response_format=ToolStrategy(Verdict))
    both([*calls, "ok"], checkpointer=InMemorySaver())


def test_a_gate_that_fails_in_the_shadow_changes_nothing():
    _, state = both([calling(call("look", query="x")), "ok"], gate=Broken())
    assert "no weights" in state["decisions"][0].shadow["error"]


replies = st.builds(
    lambda text, calls: AIMessage(text, tool_calls=calls),
    st.sampled_from(["", "text"]),
    st.lists(
        st.builds(
            lambda name, args, id: {"name": name, "args": args, "id": id, "type": "tool_call"},
            st.sampled_from(["look", "pay", "rob"]),
            st.sampled_from([{"query": "x"}, {"amount": 1}, {}, {"amount": "much"}]),
            st.sampled_from(["1", "2", "3"]),
        ),
        max_size=3,
        unique_by=lambda call: call["id"],
    ),
)


@pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(0)])])
def test_the_run_is_the_same_whatever_the_model_does(examples):
    @settings(max_examples=examples, deadline=None)
    @given(script=st.lists(replies, min_size=1, max_size=4))
    def holds(script):
        both([*script, "ok"])

    holds()


def test_the_shadow_says_what_it_would_have_done(tmp_path):
    ran, gate = [], ShadowGate(NeverGate())
    with TrajectoryStore(tmp_path / "runs") as store:
        shadow = MetisGateMiddleware(gate, recorder=Recorder(store))
        agent = create_agent(
            model(*itertools.chain.from_iterable([calling(call("look", query=str(n))), "ok"] for n in range(3))),
            make_tools(ran),
            middleware=[shadow],
        )
        for number in range(3):
            state = ask(agent, f"q{number}")
        trajectories = list(store.read())
    assert len(ran) == 3
    assert [d.shadow["allowed"] for d in state["decisions"]] == [[], []]
    assert [o.status for o in state["outcomes"]] == ["ok"]
    assert [t.decisions[0].shadow["gate"] for t in trajectories] == ["NeverGate"] * 3
    assert [t.tool_calls for t in trajectories] == [1, 1, 1]
    assert gate.report().calls_saved == 3


class Failing:
    """A gate, a recorder and a stream that fail in every way."""

    wants_draft = True

    def decide(self, request):
        raise RuntimeError("no weights")

    def knows(self, tool):
        raise RuntimeError("knows nothing")

    def after_turn(self, *_):
        raise RuntimeError("can't count")


class Full:
    def append(self, trajectory):
        raise OSError("full")


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_whatever_fails_in_the_shadow_is_logged_and_counted_and_changes_nothing(flavour, caplog):
    ran, chat = [], model(calling(call("look", query="x")), "ok")
    watching = MetisGateMiddleware(ShadowGate(Failing()), recorder=Recorder(Full()), budget=Budget(cost=0))
    tools = make_tools(ran)
    tools[0].metadata = {"cost": "cheap", "repeatable": "perhaps"}
    agent = create_agent(chat, tools, middleware=[watching])
    question = {"messages": [HumanMessage("q")]}
    state = agent.invoke(question) if flavour == "sync" else asyncio.run(agent.ainvoke(question))
    assert (ran, state["messages"][-1].text) == ([("look", "x")], "ok")
    assert watching.failures > 0
    assert "could not watch" in caplog.text


def test_a_state_of_ones_own_under_our_keys_ends_no_shadowed_run():
    from langchain.agents import AgentState

    class Mine(AgentState):
        metis_turn: str

    watching = MetisGateMiddleware(ShadowGate(NeverGate()))
    agent = create_agent(model("ok"), make_tools([]), middleware=[watching], state_schema=Mine)
    state = agent.invoke({"messages": [HumanMessage("q")], "metis_turn": "mine"})
    assert state["messages"][-1].text == "ok"


def test_the_error_of_inner_middleware_stays_what_it_is():
    from langchain.agents.middleware import wrap_tool_call

    @wrap_tool_call
    def strict(request, handler):
        raise ValueError("this call has no id")

    nameless = AIMessage("", tool_calls=[{"name": "look", "args": {"query": "x"}, "id": None, "type": "tool_call"}])
    agent = create_agent(
        model(nameless), make_tools([]), middleware=[MetisGateMiddleware(ShadowGate(NeverGate())), strict]
    )
    with pytest.raises(ValueError, match="this call has no id"):
        agent.invoke({"messages": [HumanMessage("q")]})


def test_what_is_taken_out_of_messages_is_in_no_record(tmp_path):
    from langchain.agents.middleware import PIIMiddleware

    def mail(name: str) -> str:
        """Find a mail address."""
        return "bob@example.com"

    pii = PIIMiddleware("email", apply_to_tool_results=True, apply_to_output=True)
    with TrajectoryStore(tmp_path / "runs") as store:
        watching = MetisGateMiddleware(ShadowGate(NeverGate()), recorder=Recorder(store))
        chat = model(calling(call("mail", name="x")), "It is carol@example.com.")
        state = ask(create_agent(chat, [mail], middleware=[pii, watching]))
        [trajectory] = store.read()
    assert "@example.com" not in f"{state} {trajectory}"
