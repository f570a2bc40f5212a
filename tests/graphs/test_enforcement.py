"""Whatever the model returns: what is not allowed never runs, and every call is answered exactly once."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from metis_agent.agent import create_metis_agent
from metis_agent.gates import Gate
from metis_agent.rules.budget import Budget
from metis_agent.types import GateDecision
from tests.fakes import call, calling, model
from tests.middleware.helpers import make_tools


class Only(Gate):
    """Allows the tools that it was given."""

    def __init__(self, *names: str, required: bool = False):
        super().__init__(required=required)
        self.names = names

    def decide(self, request):
        return GateDecision(allowed=self.names, required=self.required)


@pytest.fixture
def ran():
    return []


@pytest.fixture
def tools(ran):
    return make_tools(ran)


def run(chat, tools, **options):
    return create_metis_agent(chat, tools, **options).invoke({"messages": [HumanMessage("q")]})


def answered(state) -> dict[str, str]:
    """Result text by call id; each call must have exactly one."""
    asked = [
        item["id"]
        for message in state["messages"]
        if isinstance(message, AIMessage)
        for item in [*message.tool_calls, *message.invalid_tool_calls]
    ]
    results = {m.tool_call_id: str(m.text) for m in state["messages"] if isinstance(m, ToolMessage)}
    assert sorted(results) == sorted(asked)
    assert len(results) == sum(isinstance(m, ToolMessage) for m in state["messages"])
    return results


def statuses(state) -> list[str]:
    return [outcome.status for outcome in state["outcomes"]]


def test_a_tool_that_the_gate_withheld_never_runs(ran, tools):
    chat = model(calling(call("pay", amount=5)), "sorry")
    state = run(chat, tools, gate=Only("look"))
    assert ran == []
    assert chat.asked[0].tools == ("look",)
    assert "gate did not allow" in answered(state)["call_1"]
    assert statuses(state) == ["blocked"]


def test_a_turn_whose_calls_were_all_blocked_is_answered_next(ran, tools):
    chat = model(calling(call("pay", amount=5)), "sorry")
    state = run(chat, tools, gate=Only("look"))
    assert [asked.tools for asked in chat.asked] == [("look",), ()]
    assert state["messages"][-1].content == "sorry"
    assert (state["decisions"][-1].gate, state["decisions"][-1].direct) == ("loop guard", True)
    assert "blocked" in state["decisions"][-1].reason


def test_allowed_calls_run_beside_blocked_ones(ran, tools):
    both = calling(call("look", id="1", query="x"), call("pay", id="2", amount=5), call("rob", id="3"))
    state = run(model(both, "ok"), tools, gate=Only("look"))
    assert ran == [("look", "x")]
    assert answered(state)["1"] == "found x"
    assert "no tool of that name, only look, pay" in answered(state)["3"]
    assert sorted(statuses(state)) == ["blocked", "blocked", "ok"]


def test_the_block_message_is_yours_to_choose(ran, tools):
    chat = model(calling(call("pay", amount=5)), "ok")
    state = run(chat, tools, gate=Only("look"), block_message="No {tool}: {reason}!")
    assert answered(state)["call_1"].startswith("No pay: the gate did not allow it")


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        ({"name": "look", "args": "query=x", "id": "1"}, "not an object"),
        ({"name": "look", "args": None, "id": "1"}, "not an object"),
        ({"name": "", "args": {"query": "x"}, "id": "1"}, "names no tool"),
        ({"name": None, "args": {}, "id": "1"}, "names no tool"),
        ("look", "names no tool"),
    ],
)
@pytest.mark.parametrize("gate", [None, Only("pay")])
def test_malformed_calls_never_run(ran, tools, broken, word, gate):
    message = AIMessage("")
    message.tool_calls = [broken]
    state = run(model(message, "ok"), tools, gate=gate)
    assert ran == []
    assert word in next(iter(answered(state).values()))
    assert statuses(state) == ["blocked"]
    assert all(isinstance(item["args"], dict) and item["name"] for item in state["messages"][1].tool_calls)


@pytest.mark.parametrize("id_", [None, ""])
def test_calls_to_which_the_server_gave_no_id_get_one_and_run(ran, tools, id_):
    message = calling(call("look", query="x"), call("look", query="y"))
    message.tool_calls = [{**it, "id": id_} for it in message.tool_calls]
    # As some clients keep them beside.
    raw = [{"id": id_, "type": "function", "function": {"name": "look", "arguments": "{}"}}] * 2
    message.additional_kwargs = {"tool_calls": raw}
    state = run(model(message, "ok"), tools)
    assert sorted(ran) == [("look", "x"), ("look", "y")]
    ids = [it["id"] for it in state["messages"][1].tool_calls]
    assert sorted(answered(state)) == sorted(set(ids))
    assert len(ids) == 2
    assert [it["id"] for it in state["messages"][1].additional_kwargs["tool_calls"]] == ids


def test_calls_that_could_not_be_parsed_never_run(ran, tools):
    broken = {"name": "look", "args": '{"query": ', "id": "1", "error": "cut short", "type": "invalid_tool_call"}
    nameless = {"name": None, "args": None, "id": None, "error": None, "type": "invalid_tool_call"}
    state = run(model(AIMessage("", invalid_tool_calls=[broken, nameless]), "ok"), tools)
    assert ran == []
    assert "cut short" in answered(state)["1"]
    assert statuses(state) == ["blocked", "blocked"]


def test_a_reply_cut_in_the_middle_of_noise_ends_no_turn(ran, tools):
    noise = {"name": "look", "args": '{"query": ' + "[" * 5000, "id": "1", "error": "?", "type": "invalid_tool_call"}
    cut = AIMessage("", invalid_tool_calls=[noise], response_metadata={"finish_reason": "length"})
    assert statuses(run(model(cut, "ok"), tools)) == ["blocked"]


def test_the_second_call_with_an_id_never_runs(ran, tools):
    state = run(model(calling(call("look", id="1", query="x"), call("look", id="1", query="y")), "ok"), tools)
    assert ran == [("look", "x")]
    results = answered(state)
    assert results.pop("1") == "found x"
    assert "belongs to another call" in next(iter(results.values()))


def test_ids_that_are_numbered_anew_in_every_reply_are_told_apart(ran, tools):
    state = run(model(calling(call("look", query="x")), calling(call("look", query="y")), "ok"), tools)
    assert ran == [("look", "x"), ("look", "y")]
    assert sorted(answered(state).values()) == ["found x", "found y"]
    assert statuses(state) == ["ok", "ok"]


def test_required_asks_for_any_tool(tools):
    chat = model(calling(call("look", query="x")), "ok")
    run(chat, tools, gate=Only("look", required=True))
    assert chat.asked[0].tool_choice == "any"


def test_bindings_are_made_once_for_each_set_of_tools(tools):
    chat = model("ok")
    agent = create_metis_agent(chat, tools, gate=Only("look"))
    for _ in range(5):
        agent.invoke({"messages": [HumanMessage("q")]})
    assert chat.bindings == [(("look", "pay"), None), (("look",), None)]


def test_parallel_calls_beyond_the_budget_are_blocked_one_by_one(ran, tools):
    many = calling(*(call("look", id=str(number), query=str(number)) for number in range(5)))
    state = run(model(many, "ok"), tools, budget=Budget(calls=2))
    assert len(ran) == 2
    assert sorted(statuses(state)) == ["blocked", "blocked", "blocked", "ok", "ok"]
    assert "budget of 2 tool calls" in answered(state)["4"]
    assert state["messages"][-1].content == "ok"


def test_calls_per_tool_and_cost_are_enforced(ran, tools):
    tools[1].metadata = {"cost": 0.4}
    greedy = calling(
        call("look", id="1", query="x"), call("look", id="2", query="y"),
        call("pay", id="3", amount=1), call("pay", id="4", amount=2), call("pay", id="5", amount=3),
    )  # fmt: skip
    state = run(model(greedy, "ok"), tools, budget=Budget(calls_per_tool={"look": 1}, cost=1.0))
    assert sorted(ran) == [("look", "x"), ("pay", 1), ("pay", 2)]
    assert "budget of 1 calls of look" in answered(state)["2"]
    assert "more than the 0.2 left" in answered(state)["5"]
    assert sum(outcome.cost for outcome in state["outcomes"]) == pytest.approx(0.8)


def test_a_tool_over_budget_is_not_offered_to_gate_or_model(tools):
    seen = []

    class Watching(Gate):
        def decide(self, request):
            seen.append((tuple(spec.name for spec in request.tools), request.spent.calls))
            return GateDecision(allowed=tuple(spec.name for spec in request.tools))

    chat = model(calling(call("look", query="x")), "ok")
    run(chat, tools, gate=Watching(), budget=Budget(calls_per_tool={"look": 1}))
    assert seen == [(("look", "pay"), 0), (("pay",), 1)]
    assert [asked.tools for asked in chat.asked] == [("look", "pay"), ("pay",)]
