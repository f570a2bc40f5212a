"""With LangChain's own middleware and structured output, each in a real agent."""

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    LLMToolSelectorMiddleware,
    ModelRetryMiddleware,
    SummarizationMiddleware,
    ToolCallLimitMiddleware,
    ToolErrorMiddleware,
    ToolRetryMiddleware,
    wrap_tool_call,
)
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from metis_agent import Budget, MetisGateMiddleware
from metis_agent.gates import ModelGate, NeverGate
from tests.fakes import call, calling, model
from tests.middleware.helpers import Only, Verdict, answered, ask, gated, statuses

THREAD = {"configurable": {"thread_id": "t"}}


def reviewed(chat, tools, gate, mode="batched"):
    review = HumanInTheLoopMiddleware({"pay": True}, interrupt_mode=mode)
    return gated(chat, tools, gate, before=[review], agent={"checkpointer": InMemorySaver()})


# A person in the loop.


@pytest.mark.parametrize("mode", ["batched", "per_call"])
def test_an_approved_call_runs_once(ran, tools, mode):
    agent = reviewed(model(calling(call("pay", amount=5)), "paid"), tools, ModelGate(), mode)
    stopped = ask(agent, config=THREAD)
    assert ran == []
    [interrupt] = stopped["__interrupt__"]
    answer = {"decisions": [{"type": "approve"}]} if mode == "batched" else {interrupt.id: {"type": "approve"}}
    state = agent.invoke(Command(resume=answer), THREAD)
    assert ran == [("pay", 5)]
    assert answered(state) == {"call_1": "paid 5"}
    assert statuses(state) == ["ok"]
    assert len(state["decisions"]) == 2


@pytest.mark.parametrize("mode", ["batched", "per_call"])
def test_a_rejected_call_is_recorded_as_blocked_and_the_model_may_go_on(ran, tools, mode):
    chat = model(calling(call("pay", amount=5)), calling(call("look", id="2", query="x")), "looked")
    agent = reviewed(chat, tools, ModelGate(), mode)
    [interrupt] = ask(agent, config=THREAD)["__interrupt__"]
    no = {"type": "reject", "message": "look first"}
    state = agent.invoke(Command(resume={"decisions": [no]} if mode == "batched" else {interrupt.id: no}), THREAD)
    assert ran == [("look", "x")]
    assert "look first" in answered(state)["call_1"]
    assert [(o.tool, o.status) for o in state["outcomes"]] == [("pay", "blocked"), ("look", "ok")]
    assert chat.asked[1].tools == ("look", "pay")


def test_an_edited_call_runs_as_the_person_wants_it(ran, tools):
    agent = reviewed(model(calling(call("pay", amount=500)), "paid"), tools, ModelGate())
    ask(agent, config=THREAD)
    edit = {"type": "edit", "edited_action": {"name": "pay", "args": {"amount": 5}}}
    state = agent.invoke(Command(resume={"decisions": [edit]}), THREAD)
    assert ran == [("pay", 5)]
    assert [(o.arguments, o.status) for o in state["outcomes"]] == [({"amount": 5}, "ok")]


def test_a_person_who_answers_in_the_tools_place_does_not_end_the_turn(ran, tools):
    chat = model(*(calling(call("pay", id=str(n), amount=n)) for n in range(3)), "done")
    agent = reviewed(chat, tools, ModelGate())
    ask(agent, config=THREAD)
    for number in range(3):
        state = agent.invoke(Command(resume={"decisions": [{"type": "respond", "message": f"did {number}"}]}), THREAD)
    assert ran == []
    assert answered(state) == {"0": "did 0", "1": "did 1", "2": "did 2"}
    assert [(o.status, o.content, o.cost) for o in state["outcomes"]] == [("ok", f"did {n}", 0) for n in range(3)]
    assert state["messages"][-1].content == "done"
    assert {decision.gate for decision in state["decisions"]} == {"ModelGate"}


@pytest.mark.parametrize("free_form", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("queries", ["xxxxxxxx", "abcdefgh"])
def test_results_that_other_code_gives_in_a_tools_place_are_within_the_budget(ran, tools, first, queries, free_form):
    @wrap_tool_call
    def cached(request, handler):
        call = request.tool_call
        said = f"cached {call['args']['query']}"
        content = [{"type": "custom_tool_call_output", "output": said}] if free_form else said
        return ToolMessage(content, tool_call_id=call["id"], name=call["name"])

    chat = model(*(calling(call("look", id=str(n), query=query)) for n, query in enumerate(queries)), "never")
    gate = MetisGateMiddleware(ModelGate(), budget=Budget(calls=2))
    state = ask(create_agent(chat, tools, middleware=[gate, cached] if first else [cached, gate]))
    executed = [outcome.content for outcome in state["outcomes"] if outcome.executed]
    assert executed == [f"cached {query}" for query in dict.fromkeys(queries)][:2]
    assert "The model gave no answer" in state["messages"][-1].text
    assert ran == []


def test_nobody_is_asked_about_a_reply_of_which_nothing_may_run(ran, tools):
    agent = reviewed(model(calling(call("pay", amount=5)), "sorry"), tools, Only("look"))
    state = ask(agent, config=THREAD)
    assert "__interrupt__" not in state
    assert state["messages"][-1].content == "sorry"
    assert list(answered(state)) == ["call_1"]


def test_a_blocked_call_does_not_run_even_when_approved(ran, tools):
    both = calling(call("look", id="1", query="x"), call("pay", id="2", amount=5))
    agent = reviewed(model(both, "ok"), tools, Only("look"))
    assert ask(agent, config=THREAD)["__interrupt__"]
    state = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}), THREAD)
    assert ran == [("look", "x")]
    assert "gate did not allow" in answered(state)["2"]


# Limits.


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_stubborn_model_over_langchains_limit_has_to_answer(ran, tools, place):
    chat = model(*(calling(call("look", id=str(n), query=str(n))) for n in range(20)))
    limit = ToolCallLimitMiddleware(run_limit=2, exit_behavior="continue")
    state = ask(gated(chat, tools, ModelGate(), **{place: [limit]}), config={"recursion_limit": 60})
    assert ran == [("look", "0"), ("look", "1")]
    assert len(chat.asked) <= 6
    assert statuses(state).count("ok") == 2
    assert "refused" in state["decisions"][-1].reason
    assert state["messages"][-1].text.strip()
    answered(state)


def test_langchains_limit_can_end_the_run(ran, tools):
    both = calling(call("look", id="1", query="x"), call("look", id="2", query="y"))
    limit = ToolCallLimitMiddleware(run_limit=1, exit_behavior="end")
    state = ask(gated(model(both, "never"), tools, ModelGate(), before=[limit]))
    assert ran == []
    assert sorted(answered(state)) == ["1", "2"]
    assert statuses(state) == ["blocked", "blocked"]


def test_a_blocked_call_and_langchains_limit_give_one_message_a_call(ran, tools):
    mixed = calling(call("pay", id="1", amount=1), call("look", id="2", query="x"), call("look", id="3", query="y"))
    limit = ToolCallLimitMiddleware(run_limit=2, exit_behavior="continue")
    state = ask(gated(model(mixed, "ok"), tools, Only("look"), before=[limit]))
    assert ran == [("look", "x")]
    assert sorted(answered(state)) == ["1", "2", "3"]


# Structured output.


def test_a_structured_answer_by_a_tool_call(ran, tools):
    chat = model(calling(call("look", id="1", query="x")), calling(call("Verdict", id="2", text="yes")))
    state = ask(gated(chat, tools, ModelGate(), agent={"response_format": ToolStrategy(Verdict)}))
    assert state["structured_response"] == Verdict(text="yes")
    assert ran == [("look", "x")]
    assert statuses(state) == ["ok"]


def test_a_direct_decision_leaves_only_the_structured_answer(ran, tools):
    chat = model(calling(call("Verdict", id="1", text="yes"), call("pay", id="2", amount=5)))
    state = ask(gated(chat, tools, NeverGate(), agent={"response_format": ToolStrategy(Verdict)}))
    assert chat.asked[0].tools == ("Verdict",)
    assert chat.asked[0].tool_choice == "any"
    assert state["structured_response"] == Verdict(text="yes")
    assert ran == []
    assert list(answered(state)) == ["1"]


def test_a_structured_answer_that_does_not_fit_is_asked_for_again(tools):
    bad = {"name": "Verdict", "args": {"wrong": 1}, "id": "1", "type": "tool_call"}
    chat = model(calling(bad), calling(call("Verdict", id="2", text="yes")))
    state = ask(gated(chat, tools, NeverGate(), agent={"response_format": ToolStrategy(Verdict)}))
    assert state["structured_response"] == Verdict(text="yes")
    assert sorted(answered(state)) == ["1", "2"]


def test_a_structured_answer_after_blocked_calls(ran, tools):
    chat = model(calling(call("pay", id="1", amount=5)), calling(call("Verdict", id="2", text="no")))
    state = ask(gated(chat, tools, Only("look"), agent={"response_format": ToolStrategy(Verdict)}))
    assert state["structured_response"] == Verdict(text="no")
    assert ran == []
    assert sorted(answered(state)) == ["1", "2"]


def test_a_structured_answer_by_the_provider(ran, tools):
    chat = model(calling(call("look", query="x")), '{"text": "yes"}')
    state = ask(gated(chat, tools, ModelGate(), agent={"response_format": ProviderStrategy(Verdict)}))
    assert state["structured_response"] == Verdict(text="yes")
    assert ran == [("look", "x")]


def test_the_provider_is_asked_again_in_its_format_where_it_calls_instead(ran, tools):
    chat = model(calling(call("look", query="x")), '{"text": "no"}')
    state = ask(gated(chat, tools, NeverGate(), agent={"response_format": ProviderStrategy(Verdict)}))
    assert state["structured_response"] == Verdict(text="no")
    assert ran == []
    assert "format" in chat.asked[1].messages[-1].text


# Summaries, selections, retries, errors.


def summarising(*replies):
    return SummarizationMiddleware(model(*replies), trigger=("messages", 4), keep=("messages", 2))


def test_a_summary_within_a_turn_keeps_its_budget_and_its_question(ran, tools):
    from metis_agent.rules.budget import Budget

    gate = Only("look", "pay")
    chat = model(*(calling(call("look", id=str(n), query=str(n))) for n in range(9)))
    agent = gated(chat, tools, gate, before=[summarising("a summary")], budget=Budget(calls=4))
    state = ask(agent, "How far is it?", config={"recursion_limit": 60})
    assert len(ran) == 4
    assert any("a summary" in str(m.text) for m in state["messages"])
    assert not any(m.text == "How far is it?" for m in state["messages"])
    assert [r.spent.calls for r in gate.requests] == [0, 1, 2, 3]
    human = [[m.text for m in r.messages if m.type == "human"][-1] for r in gate.requests]
    assert human == ["How far is it?"] * 4
    assert statuses(state).count("ok") == 4


def test_a_selection_of_tools_is_what_the_gate_decides_on(ran, tools):
    gate = Only("look", "pay")

    class Selecting(AgentMiddleware):
        def wrap_model_call(self, request, handler):
            return handler(request.override(tools=request.tools[:1]))

    chat = model(calling(call("pay", amount=1)), "ok")
    state = ask(gated(chat, tools, gate, before=[Selecting()]))
    assert [spec.name for spec in gate.requests[0].tools] == ["look"]
    assert ran == []
    assert "no tool of that name" in answered(state)["call_1"]


def test_a_selection_by_a_model(tools):
    chooser = model(AIMessage('{"tools": ["look"]}'))

    class Choosing(type(chooser)):
        def with_structured_output(self, schema, **kwargs):
            from langchain_core.runnables import RunnableLambda

            return RunnableLambda(lambda _: {"tools": ["look"]})

    gate = Only("look", "pay")
    ask(gated(model("ok"), tools, gate, before=[LLMToolSelectorMiddleware(model=Choosing())]))
    assert [spec.name for spec in gate.requests[0].tools] == ["look"]


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_tool_that_is_tried_again_counts_once(place):
    tries = []

    @tool
    def flaky(x: int) -> str:
        """Fails once."""
        tries.append(x)
        if len(tries) == 1:
            raise ValueError("not yet")
        return "there"

    retry = ToolRetryMiddleware(max_retries=2, initial_delay=0.0, jitter=False)
    state = ask(gated(model(calling(call("flaky", x=1)), "ok"), [flaky], ModelGate(), **{place: [retry]}))
    assert len(tries) == 2
    assert answered(state) == {"call_1": "there"}
    assert statuses(state) == ["ok"]


def test_an_error_that_becomes_a_message_is_an_outcome():
    @tool
    def broken(x: int) -> str:
        """Fails."""
        raise ValueError("no disk")

    errors = ToolErrorMiddleware(lambda error, request: str(error))
    state = ask(gated(model(calling(call("broken", x=1)), "ok"), [broken], ModelGate(), after=[errors]))
    assert statuses(state) == ["error"]
    assert state["messages"][-1].content == "ok"


def test_a_model_that_is_tried_again_leaves_one_decision(tools):
    chat = model(ConnectionError("down"), "up")
    retry = ModelRetryMiddleware(max_retries=2, initial_delay=0.0, jitter=False)
    state = ask(gated(chat, tools, ModelGate(), before=[retry]))
    assert state["messages"][-1].content == "up"
    assert len(state["decisions"]) == 1


def test_a_call_that_other_middleware_brings_in_is_gated_too(ran, tools):
    class Meddling(AgentMiddleware):
        def after_model(self, state, runtime):
            last = state["messages"][-1]
            if isinstance(last, AIMessage) and last.text == "ok":
                return {"messages": [AIMessage("", tool_calls=[call("pay", id="9", amount=9)])]}

    meddler = Meddling()
    chat = model("ok", "really", "really")
    state = ask(gated(chat, tools, Only("look"), before=[meddler]))
    assert ran == []
    assert "gate did not allow" in answered(state)["9"]
    assert ("pay", "blocked") in [(o.tool, o.status) for o in state["outcomes"]]


def test_an_agent_that_is_a_node_of_another_graph(ran, tools):
    from langgraph.graph import START, MessagesState, StateGraph

    graph = StateGraph(MessagesState)
    graph.add_node(
        "agent", gated(model(calling(call("look", query="x")), "ok"), tools, ModelGate(), agent={"name": "agent"})
    )
    graph.add_edge(START, "agent")
    state = graph.compile().invoke({"messages": [HumanMessage("q")]})
    assert ran == [("look", "x")]
    assert state["messages"][-1].content == "ok"
    assert isinstance(state["messages"][-2], ToolMessage)


def test_two_agents_may_share_one_middleware(ran, tools):
    shared = MetisGateMiddleware(Only("look"))
    first = create_agent(model(calling(call("pay", amount=1)), "one"), tools, middleware=[shared])
    second = create_agent(model(calling(call("look", query="x")), "two"), tools[:1], middleware=[shared])
    assert ask(first)["messages"][-1].content == "one"
    assert ask(second)["messages"][-1].content == "two"
    assert ran == [("look", "x")]
