"""A person changes the state of a thread that stands still, or goes back in time: the run goes on as at LangChain."""

import asyncio
import contextlib
from typing import Annotated

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, StateUpdate, interrupt

from metis_agent import Budget, MetisAgent, MetisGateMiddleware, Recorder, TrajectoryStore, create_metis_agent
from metis_agent.gates import ModelGate, NeverGate, ShadowGate
from tests.fakes import call, calling, model

THREAD = {"configurable": {"thread_id": "t"}}
ASK = {"messages": [HumanMessage("mail al", id="q")]}


@pytest.fixture
def sent():
    return []


@pytest.fixture
def tools(sent):
    @tool
    def mail(to: str) -> str:
        """Send a mail."""
        sent.append(to)
        return f"sent to {to}"

    @tool
    def ring(to: str) -> str:
        """Ring somebody up."""
        sent.append(f"rang {to}")
        return f"rang {to}"

    return [mail, ring]


@pytest.fixture(params=["create_agent", "graph"])
def make(request, tools):
    """An agent that stops before each tool."""

    def make(*script, **options):
        script = script or (calling(call("mail", id="1", to="al")), "Done.", "Done again.")
        if request.param == "create_agent":
            return create_agent(model(*script), tools, checkpointer=InMemorySaver(), interrupt_before=["tools"])
        stops = ["mail", "ring"]
        return create_metis_agent(
            model(*script), tools, checkpointer=InMemorySaver(), interrupt_before=stops, **options
        )

    return make


@pytest.fixture(params=["sync", "async"])
def change(request):
    def change(agent, values, config=THREAD, **options):
        if request.param == "sync":
            return agent.update_state(config, values, **options)
        return asyncio.run(agent.aupdate_state(config, values, **options))

    return change


def reply_of(agent):
    return next(m for m in reversed(agent.get_state(THREAD).values["messages"]) if isinstance(m, AIMessage))


def with_calls(agent, *calls):
    return {"messages": [reply_of(agent).model_copy(update={"tool_calls": list(calls)})]}


def gone_on(agent):
    """The rest of the run, through every stop."""
    while agent.get_state(THREAD).next:
        agent.invoke(None, THREAD)
    return [(message.type, str(message.text)) for message in agent.get_state(THREAD).values["messages"]]


def test_an_edited_call_runs_as_it_was_edited(make, change, sent):
    agent = make()
    agent.invoke(ASK, THREAD)
    change(agent, with_calls(agent, call("mail", id="1", to="alice")))
    assert gone_on(agent)[2:] == [("tool", "sent to alice"), ("ai", "Done.")]
    assert sent == ["alice"]


def test_another_tool_and_a_further_call(make, change, sent):
    agent = make()
    agent.invoke(ASK, THREAD)
    change(agent, with_calls(agent, call("ring", id="1", to="alice"), call("mail", id="2", to="bob")))
    assert gone_on(agent)[2:] == [("tool", "rang alice"), ("tool", "sent to bob"), ("ai", "Done.")]
    assert sorted(sent) == ["bob", "rang alice"]


def test_one_of_two_calls_is_answered_by_hand(make, change, sent):
    agent = make(calling(call("mail", id="1", to="al"), call("ring", id="2", to="bo")), "Done.")
    agent.invoke(ASK, THREAD)
    change(agent, {"messages": [ToolMessage("Al is away.", tool_call_id="1", name="mail")]})
    assert gone_on(agent)[2:] == [("tool", "Al is away."), ("tool", "rang bo"), ("ai", "Done.")]
    assert sent == ["rang bo"]


def test_the_only_call_is_answered_by_hand(make, change, sent):
    agent = make()
    agent.invoke(ASK, THREAD)
    # create_agent's own edges can't go from the model to the model.
    node = {} if isinstance(agent, MetisAgent) else {"as_node": "tools"}
    change(agent, {"messages": [ToolMessage("Al is away.", tool_call_id="1", name="mail")]}, **node)
    assert gone_on(agent)[2:] == [("tool", "Al is away."), ("ai", "Done.")]
    assert sent == []


def test_an_answer_in_the_calls_place(make, change, sent):
    agent = make()
    agent.invoke(ASK, THREAD)
    change(agent, {"messages": [AIMessage("Better not.", id=reply_of(agent).id)]})
    assert gone_on(agent)[1:] == [("ai", "Better not.")]
    assert sent == []


def test_several_updates_at_once(make, sent):
    agent = make()
    agent.invoke(ASK, THREAD)
    edited = with_calls(agent, call("mail", id="1", to="alice"))
    agent.bulk_update_state(THREAD, [[StateUpdate(edited)], [StateUpdate({"messages": []})]])
    assert gone_on(agent)[2:] == [("tool", "sent to alice"), ("ai", "Done.")]


# What only our own graph has.


def of_graph(tools, *script, **options):
    script = script or (calling(call("mail", id="1", to="al")), "Done.")
    return create_metis_agent(model(*script), tools, checkpointer=InMemorySaver(), **options)


def test_going_back_to_every_place_of_a_run(tools, change):
    agent = of_graph(tools, calling(call("mail", id="1", to="al")), "Done.", "Done again.")
    agent.invoke(ASK, THREAD)
    gone_on(agent)
    for place in list(agent.get_state_history(THREAD)):
        if place.next != ("__start__",):
            fork = change(agent, {"messages": []}, place.config)
            assert agent.get_state(fork).next == place.next
            assert gone_on(agent)[-1][1].startswith("Done")


def test_a_stop_before_one_tool_only(tools, sent):
    both = calling(call("mail", id="1", to="al"), call("ring", id="2", to="bo"))
    agent = of_graph(tools, calling(call("ring", id="0", to="cy")), both, "Done.", interrupt_before=["mail"])
    agent.invoke(ASK, THREAD)
    assert sent == ["rang cy"]
    agent.invoke(None, THREAD)
    assert (sorted(sent), reply_of(agent).text) == (["al", "rang bo", "rang cy"], "Done.")


@pytest.mark.parametrize("stop", ["gate", "act", "answer", "record"])
@pytest.mark.parametrize("when", ["interrupt_before", "interrupt_after"])
def test_an_unrelated_change_at_every_stop(tools, tmp_path, stop, when):
    class State(MessagesState):
        note: str

    store = TrajectoryStore(tmp_path)
    agent = of_graph(
        tools, state_schema=State, recorder=Recorder(store), budget=Budget(calls=1, seconds=60), **{when: [stop]}
    )
    agent.invoke(ASK, THREAD)
    for _ in range(8):
        if not agent.get_state(THREAD).next:
            break
        before = agent.get_state(THREAD).next
        agent.update_state(THREAD, {"note": "approved"})
        assert agent.get_state(THREAD).next == before
        agent.invoke(None, THREAD)
    state = agent.get_state(THREAD).values
    assert [m.type for m in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert state.get("note", stop) == ("record" if (stop, when) == ("record", "interrupt_after") else "approved")
    assert [run.tool_calls for run in store.read()] == [1]


def test_a_copy_of_a_stop_goes_on_from_there(make, change):
    agent = make()
    agent.invoke(ASK, THREAD)
    before = agent.get_state(THREAD).next
    change(agent, None)
    assert agent.get_state(THREAD).next == before
    assert gone_on(agent)[2:] == [("tool", "sent to al"), ("ai", "Done.")]


class Noted(AgentMiddleware):
    """Notes which of its hooks run."""

    def __init__(self, name, ran):
        self._name, self._ran = name, ran

    @property
    def name(self):
        return self._name

    def before_agent(self, state, runtime):
        self._ran.append(f"{self._name}.before_agent")

    def before_model(self, state, runtime):
        self._ran.append(f"{self._name}.before_model")

    def after_model(self, state, runtime):
        self._ran.append(f"{self._name}.after_model")

    def after_agent(self, state, runtime):
        self._ran.append(f"{self._name}.after_agent")


def between_hooks(make, tools, ran, **options):
    middleware, saver = [Noted("one", ran), Noted("two", ran)], InMemorySaver()
    chat = model(calling(call("mail", id="1", to="al")), "Done.", "Done again.")
    return make(chat, tools, middleware=middleware, checkpointer=saver, **options)


@pytest.mark.parametrize("values", [None, {}, {"messages": []}])
def test_a_change_at_a_stop_runs_no_hook_twice(tools, tmp_path, values):
    ran, plain = [], []
    between_hooks(create_agent, tools, plain).invoke(ASK, THREAD)
    for recorder in (None, Recorder(TrajectoryStore(tmp_path))):
        ran.clear()
        agent = between_hooks(create_metis_agent, tools, ran, recorder=recorder, interrupt_before="*")
        agent.invoke(ASK, THREAD)
        while before := agent.get_state(THREAD).next:
            agent.update_state(THREAD, values)
            assert agent.get_state(THREAD).next == before
            agent.invoke(None, THREAD)
        assert ran == plain
        assert [m.type for m in agent.get_state(THREAD).values["messages"]] == ["human", "ai", "tool", "ai"]


@pytest.mark.parametrize("hook", ["one.before_model", "two.before_model", "two.after_model", "one.after_model"])
def test_a_change_made_as_a_hook_goes_on_after_it(tools, hook):
    told = []
    for make, stop in ((create_agent, "tools"), (create_metis_agent, "mail")):
        ran = []
        agent = between_hooks(make, tools, ran, interrupt_before=[stop])
        agent.invoke(ASK, THREAD)
        ran.clear()
        agent.update_state(THREAD, with_calls(agent, call("mail", id="1", to="bo")), as_node=hook)
        told.append((gone_on(agent), ran))
    assert told[0] == told[1]


@pytest.mark.parametrize("host", ["graph", "gated", "watched"])
def test_a_run_may_be_sent_to_two_nodes_at_once(tools, sent, host):
    chat = model(calling(call("mail", id="1", to="al")), "Done.", "Done again.")
    if host == "graph":
        agent, first = create_metis_agent(chat, tools, checkpointer=InMemorySaver(), interrupt_before=["mail"]), "gate"
    else:
        gate = MetisGateMiddleware(ModelGate() if host == "gated" else ShadowGate(ModelGate()))
        saver = InMemorySaver()
        agent = create_agent(chat, tools, middleware=[gate], checkpointer=saver, interrupt_before=["tools"])
        first = "model"
    agent.invoke(ASK, THREAD)
    assert agent.invoke(Command(goto=first), THREAD)["messages"][-1].text == "Done again."
    assert sent == ["al"]


def test_parallel_tools_have_run(tools):
    both = calling(call("mail", id="1", to="al"), call("ring", id="2", to="bo"))
    agent = of_graph(tools, both, "Done.", interrupt_after=["mail", "ring"])
    agent.invoke(ASK, THREAD)
    agent.update_state(THREAD, {"messages": []})
    assert agent.get_state(THREAD).next == ("gate",)
    assert gone_on(agent)[-1] == ("ai", "Done.")


def test_one_of_parallel_tools_waits_for_a_person(tools, sent):
    @tool
    def confirm(text: str) -> str:
        """Ask the user."""
        return str(interrupt(text))

    both = calling(call("mail", id="1", to="al"), call("confirm", id="2", text="sure?"))
    agent = of_graph([*tools, confirm], both, "Done.")
    agent.invoke(ASK, THREAD)
    agent.update_state(THREAD, {"messages": [ToolMessage("yes", tool_call_id="2", name="confirm")]})
    results = gone_on(agent)[2:]
    assert sorted(results) == [("ai", "Done."), ("tool", "sent to al"), ("tool", "yes")]


def test_a_new_question_at_a_stop_is_a_turn_of_its_own(tools, sent):
    agent = of_graph(tools, calling(call("mail", id="1", to="al")), "As you like.", interrupt_before=["mail"])
    agent.invoke(ASK, THREAD)
    lost = reply_of(agent)
    agent.update_state(THREAD, {"messages": [RemoveMessage(lost.id), HumanMessage("No, don't.")]})
    assert gone_on(agent)[-2:] == [("human", "No, don't."), ("ai", "As you like.")]
    assert sent == []


def test_a_call_that_is_never_to_be_made_is_not_made_by_hand(tools, sent):
    agent = of_graph(tools, never=["ring"], interrupt_before=["mail"])
    agent.invoke(ASK, THREAD)
    agent.update_state(THREAD, with_calls(agent, call("ring", id="1", to="al")))
    assert gone_on(agent)[-1] == ("ai", "Done.")
    assert sent == []


def test_a_stop_before_the_answer(tools):
    agent = of_graph(tools, "Hello.", gate=NeverGate(), interrupt_before=["answer"])
    agent.invoke(ASK, THREAD)
    agent.update_state(THREAD, {"messages": [HumanMessage("mail Al, please", id="q")]})
    assert gone_on(agent) == [("human", "mail Al, please"), ("ai", "Hello.")]


def test_an_agent_within_a_graph(tools, sent):
    worker = create_metis_agent(
        model(calling(call("mail", id="1", to="al")), "Done."), tools, interrupt_before=["mail"], name="worker"
    )
    outer = StateGraph(MessagesState).add_node("worker", worker).add_edge(START, "worker")
    agent = outer.compile(checkpointer=InMemorySaver())
    agent.invoke(ASK, THREAD)
    inner = agent.get_state(THREAD, subgraphs=True).tasks[0].state
    reply = inner.values["messages"][-1]
    edited = reply.model_copy(update={"tool_calls": [call("mail", id="1", to="alice")]})
    agent.update_state(inner.config, {"messages": [edited]})
    assert gone_on(agent)[2:] == [("tool", "sent to alice"), ("ai", "Done.")]


def test_going_back_behind_a_gate_in_create_agent(tools):
    """What has run before the place that somebody goes back to counts as run."""
    chat = model(calling(call("mail", id="1", to="al")), "Done.")
    gate = MetisGateMiddleware(ModelGate())
    agent = create_agent(chat, tools, middleware=[gate], checkpointer=InMemorySaver())
    agent.invoke(ASK, THREAD)
    place = next(p for p in agent.get_state_history(THREAD) if p.values["messages"][-1].type == "tool")
    state = agent.invoke(None, place.config)
    assert [(outcome.tool, outcome.status) for outcome in state["outcomes"]] == [("mail", "ok")]


@pytest.mark.parametrize("why", ["a pause", "an error"])
def test_a_message_that_a_tool_has_brought_begins_no_turn_where_the_run_goes_on(why):
    @tool
    def show(page: int, tool_call_id: Annotated[str, InjectedToolCallId]) -> Command:
        """Show a page."""
        said = ToolMessage("see below", tool_call_id=tool_call_id)
        return Command(update={"messages": [said, HumanMessage("[the page]")]})

    shows = [calling(call("show", id=str(page), page=page)) for page in range(9)]
    chat = model(shows[0], ConnectionError("down"), *shows[1:]) if why == "an error" else model(*shows)
    agent = create_metis_agent(
        chat, [show], budget=Budget(calls=2), checkpointer=InMemorySaver(),
        interrupt_before=["act"] if why == "a pause" else None,
    )  # fmt: skip
    with contextlib.suppress(ConnectionError):
        agent.invoke({"messages": [HumanMessage("q")]}, THREAD)
    while agent.get_state(THREAD).next:
        agent.invoke(None, THREAD)
    assert [outcome.status for outcome in agent.get_state(THREAD).values["outcomes"]][:3] == ["ok", "ok", "blocked"]
