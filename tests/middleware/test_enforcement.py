"""What the gate did not allow never runs; the rest of the agent goes on as LangChain made it."""

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from metis_agent import MetisGateMiddleware
from metis_agent.errors import ConfigurationError
from metis_agent.gates import AlwaysGate, Gate, ModelGate, NeverGate
from metis_agent.rules.budget import Budget
from tests.fakes import call, calling, model
from tests.middleware.helpers import Only, answered, ask, gated, statuses


def test_an_allowed_call_runs_and_its_result_is_the_tools_own(ran, tools):
    chat = model(calling(call("look", query="x")), "ok")
    state = ask(gated(chat, tools, ModelGate()))
    assert ran == [("look", "x")]
    assert answered(state) == {"call_1": "found x"}
    assert [decision.allowed for decision in state["decisions"]] == [("look", "pay")] * 2
    assert [(o.tool, o.status, o.content) for o in state["outcomes"]] == [("look", "ok", "found x")]


def test_a_tool_that_the_gate_withheld_is_not_offered_and_never_runs(ran, tools):
    chat = model(calling(call("pay", amount=5)), "sorry")
    state = ask(gated(chat, tools, Only("look")))
    assert ran == []
    assert [asked.tools for asked in chat.asked] == [("look",), ()]
    assert "gate did not allow" in answered(state)["call_1"]
    assert statuses(state) == ["blocked"]
    assert state["messages"][-1].content == "sorry"
    assert state["decisions"][-1].gate == "loop guard"


def test_a_direct_decision_offers_nothing_and_strips_calls(ran, tools):
    chat = model(calling(call("pay", amount=5), text="I know it: 4."))
    state = ask(gated(chat, tools, NeverGate()))
    assert ran == []
    assert [(m.type, m.content) for m in state["messages"]] == [("human", "q"), ("ai", "I know it: 4.")]
    assert answered(state) == {}
    assert statuses(state) == ["blocked"]


def test_a_reply_that_stripping_leaves_empty_is_asked_for_again(tools):
    chat = model(calling(call("pay", amount=5)), "four")
    state = ask(gated(chat, tools, NeverGate()))
    assert state["messages"][-1].content == "four"
    assert "not answered yet" in chat.asked[1].messages[-1].text
    # What the model was told stays out of the conversation.
    assert [m.type for m in state["messages"]] == ["human", "ai"]


def test_a_model_that_never_answers_gets_an_answer_in_its_stead(tools):
    chat = model(calling(call("look", query="x")), "", "")
    state = ask(gated(chat, tools, ModelGate()))
    assert "gave no answer" in state["messages"][-1].text
    assert "found x" in state["messages"][-1].text


def test_allowed_calls_run_beside_blocked_ones(ran, tools):
    both = calling(call("look", id="1", query="x"), call("pay", id="2", amount=5), call("rob", id="3"))
    state = ask(gated(model(both, "ok"), tools, Only("look")))
    assert ran == [("look", "x")]
    results = answered(state)
    assert results["1"] == "found x"
    assert "gate did not allow" in results["2"]
    assert "no tool of that name, only look, pay" in results["3"]
    assert statuses(state) == ["blocked", "blocked", "ok"]


def test_the_block_message_is_yours_to_choose(tools):
    chat = model(calling(call("pay", amount=5)), "ok")
    state = ask(gated(chat, tools, Only("look"), block_message="No {tool}: {reason}!"))
    assert answered(state)["call_1"].startswith("No pay: the gate did not allow it")


@pytest.mark.parametrize("option", [{"block_message": "{what}"}, {"gate_timeout": 0}, {"gate_timeout": -1.0}])
def test_options_that_cannot_be_used_are_refused(option):
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        MetisGateMiddleware(ModelGate(), **option)


def test_what_is_no_gate_is_refused():
    with pytest.raises(ConfigurationError, match="no gate"):
        MetisGateMiddleware(Gate())


def test_calls_that_could_not_be_parsed_are_answered(ran, tools):
    broken = {"name": "look", "args": '{"query": ', "id": "1", "error": "cut short", "type": "invalid_tool_call"}
    alone = AIMessage("", invalid_tool_calls=[broken])
    beside = AIMessage("", tool_calls=[call("look", id="2", query="y")], invalid_tool_calls=[broken])
    for first in (alone, beside):
        state = ask(gated(model(first, "ok"), tools, ModelGate()))
        assert "cut short" in answered(state)["1"]
        assert state["messages"][-1].content == "ok"
    assert ran == [("look", "y")]


NAMELESS = AIMessage("", invalid_tool_calls=[{"name": "look", "args": "{", "id": None, "error": "cut short"}])


@pytest.mark.parametrize("reply", [AIMessage(""), AIMessage([]), NAMELESS])
def test_where_the_model_decides_what_code_has_made_is_taken_as_the_agent_takes_it(tools, reply):
    for gate, asked in ((ModelGate(), 1), (Only("look", "pay"), 2)):
        chat = model(reply, "ok")
        ask(gated(chat, tools, gate))
        assert len(chat.asked) == asked
    provider = reply.model_copy(update={"response_metadata": {"finish_reason": "stop"}})
    assert ask(gated(model(provider, "ok"), tools, ModelGate()))["messages"][-1].text == "ok"
    state = ask(gated(model(calling(call("look", query="x")), reply), tools, ModelGate()))
    assert "found x" in state["messages"][-1].text


def test_where_the_model_decides_an_empty_id_is_no_fault(ran, tools):
    once = calling(call("look", id="", query="x"), call("pay", id="2", amount=5))
    state = ask(gated(model(once, "ok"), tools, ModelGate()))
    assert answered(state) == {"": "found x", "2": "paid 5"}
    twice = calling(call("look", id="", query="y"), call("pay", id="", amount=6))
    state = ask(gated(model(twice, "ok"), tools, ModelGate()))
    assert statuses(state) == ["ok", "ok"]
    assert sorted(ran) == [("look", "x"), ("look", "y"), ("pay", 5), ("pay", 6)]


def test_an_identical_call_gets_the_earlier_result(ran, tools):
    again = calling(call("look", id="2", query="x"), call("look", id="3", query="y"))
    state = ask(gated(model(calling(call("look", id="1", query="x")), again, "ok"), tools, ModelGate()))
    assert ran == [("look", "x"), ("look", "y")]
    assert "not run again" in answered(state)["2"]
    assert "found x" in answered(state)["2"]
    assert statuses(state) == ["ok", "ok", "repeated"]


def test_identical_calls_in_one_message_run_once(ran, tools):
    twins = calling(call("look", id="1", query="x"), call("look", id="2", query="x"))
    state = ask(gated(model(twins, "ok"), tools, ModelGate()))
    assert ran == [("look", "x")]
    assert answered(state) == {"1": "found x", "2": state["outcomes"][0].content}
    assert "1, runs in place" in state["outcomes"][0].content
    assert statuses(state) == ["ok", "repeated"]


def test_a_model_that_only_repeats_itself_has_to_answer(ran, tools):
    same = [calling(call("look", id=str(number), query="x")) for number in range(9)]
    chat = model(*same, "never")
    state = ask(gated(chat, tools, ModelGate()), config={"recursion_limit": 30})
    assert ran == [("look", "x")]
    assert [asked.tools for asked in chat.asked][:4] == [("look", "pay")] * 3 + [()]
    assert state["decisions"][-1].gate == "loop guard"
    assert "only repeated" in state["decisions"][-1].reason
    assert state["messages"][-1].text.strip()


def test_without_the_loop_guard_calls_may_repeat(ran, tools):
    same = [calling(call("look", id=str(number), query="x")) for number in range(3)]
    ask(gated(model(*same, "ok"), tools, ModelGate(), loop_guard=False))
    assert ran == [("look", "x")] * 3


def test_a_repeatable_tool_may_repeat(ran, tools):
    tools[0].metadata = {"repeatable": True}
    same = [calling(call("look", id=str(number), query="x")) for number in range(3)]
    ask(gated(model(*same, "ok"), tools, ModelGate()))
    assert ran == [("look", "x")] * 3


def test_a_spent_budget_ends_in_an_answer(ran, tools):
    greedy = [calling(call("look", id=str(number), query=str(number))) for number in range(9)]
    chat = model(*greedy[:3], "enough")
    state = ask(gated(chat, tools, ModelGate(), budget=Budget(calls=2)))
    assert ran == [("look", "0"), ("look", "1")]
    assert [asked.tools for asked in chat.asked][:3] == [("look", "pay"), ("look", "pay"), ()]
    assert state["messages"][-1].content == "enough"
    assert (state["decisions"][-1].gate, state["decisions"][-1].direct) == ("budget", True)


def test_parallel_calls_beyond_the_budget_are_blocked_one_by_one(ran, tools):
    many = calling(*(call("look", id=str(number), query=str(number)) for number in range(5)))
    state = ask(gated(model(many, "ok"), tools, ModelGate(), budget=Budget(calls=2)))
    assert len(ran) == 2
    assert statuses(state) == ["blocked", "blocked", "blocked", "ok", "ok"]
    assert "budget of 2 tool calls" in answered(state)["4"]


def test_budgets_begin_anew_with_every_run(ran, tools):
    from langgraph.checkpoint.memory import InMemorySaver

    chat = model(
        calling(call("look", id="1", query="x")), "one", calling(call("look", id="1", query="x")), "two",
    )  # fmt: skip
    agent = gated(chat, tools, ModelGate(), budget=Budget(calls=1), agent={"checkpointer": InMemorySaver()})
    thread = {"configurable": {"thread_id": "t"}}
    ask(agent, config=thread)
    state = ask(agent, "again", config=thread)
    assert ran == [("look", "x")] * 2
    assert state["messages"][-1].content == "two"
    assert statuses(state) == ["ok"]
    assert len(state["decisions"]) == 2


def test_required_asks_for_any_tool(tools):
    chat = model(calling(call("look", query="x")), "ok")
    ask(gated(chat, tools, AlwaysGate()))
    assert [asked.tool_choice for asked in chat.asked] == ["any", None]


def test_the_gate_sees_tools_within_budget_and_what_is_spent(tools):
    gate = Only("look", "pay")
    tools[0].metadata = {"cost": 0.5}
    ask(gated(model(calling(call("look", query="x")), "ok"), tools, gate, budget=Budget(calls_per_tool={"look": 1})))
    assert [[spec.name for spec in request.tools] for request in gate.requests] == [["look", "pay"], ["pay"]]
    assert gate.requests[0].tools[0].description == "Look it up."
    assert [(r.spent.calls, r.spent.cost) for r in gate.requests] == [(0, 0.0), (1, 0.5)]


def test_a_gate_that_fails_leaves_it_to_the_model(ran, tools):
    class Broken(Gate):
        def estimate(self, request):
            raise RuntimeError("no weights")

    state = ask(gated(model(calling(call("look", query="x")), "ok"), tools, Broken()))
    assert ran == [("look", "x")]
    assert "no weights" in state["decisions"][0].reason
    assert "the model decides" in state["decisions"][0].reason


def test_a_provider_tool_is_withheld_by_name_or_type(tools):
    gate = Only("look")
    chat = model("ok")
    provider = [{"type": "web_search"}, {"type": "function", "function": {"name": "remote", "description": "Far."}}]

    class Naming(type(chat)):
        def bind_tools(self, tools, **kwargs):
            kept = [tool if isinstance(tool, dict) else tool.name for tool in tools]
            return self.bind(tools=tuple(map(str, kept)))

    chat = Naming(script=["ok"])
    ask(create_agent(chat, [*tools, *provider], middleware=[MetisGateMiddleware(gate)]))
    assert [(spec.name, spec.description) for spec in gate.requests[0].tools] == [
        ("look", "Look it up."), ("pay", "Pay."), ("web_search", ""), ("remote", "Far."),
    ]  # fmt: skip
    assert chat.asked[0].tools == ("look",)


def test_a_tool_that_returns_directly_ends_the_run(ran):
    @tool(return_direct=True)
    def quote(query: str) -> str:
        """Quote."""
        return f"quoted {query}"

    chat = model(calling(call("quote", query="x")), "never")
    state = ask(gated(chat, [quote], ModelGate()))
    assert len(chat.asked) == 1
    assert state["messages"][-1].content == "quoted x"
    assert statuses(state) == ["ok"]


def test_calls_of_an_earlier_run_that_broke_off_get_a_result_in_the_prompt(tools):
    lost = [HumanMessage("a"), calling(call("look", id="lost", query="x")), HumanMessage("b")]
    chat = model("ok")
    gated(chat, tools, ModelGate()).invoke({"messages": lost})
    results = [m for m in chat.asked[0].messages if isinstance(m, ToolMessage)]
    assert [m.tool_call_id for m in results] == ["lost"]


def test_an_agent_without_tools_just_answers():
    state = ask(gated(model("hi"), [], NeverGate()))
    assert state["messages"][-1].content == "hi"
    assert state["decisions"][0].reason == "the agent has no tools"


def test_a_budget_for_a_tool_that_is_not_offered_is_logged_once(tools, caplog):
    agent = gated(model("ok"), tools, ModelGate(), budget=Budget(calls_per_tool={"lok": 1}))
    ask(agent)
    ask(agent)
    assert sum("lok" in record.message for record in caplog.records) == 1


def test_a_state_schema_that_takes_our_keys_is_refused(tools):
    from langchain.agents import AgentState

    class Mine(AgentState):
        decisions: str

    agent = gated(model("ok"), tools, ModelGate(), agent={"state_schema": Mine})
    with pytest.raises(ConfigurationError, match="decisions"):
        ask(agent)
