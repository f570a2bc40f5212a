"""Properties that hold for any model, however it behaves: thousands of generated behaviours."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from metis_agent.gates import Gate
from metis_agent.rules.budget import Budget
from metis_agent.types import GateDecision
from tests.any_reply import NAMES, allowed_sets, check_repetitions, replies, sound
from tests.fakes import call, calling, model
from tests.middleware.helpers import Verdict, gated

BUDGETS = (
    Budget(calls=0),
    Budget(calls=2),
    Budget(calls=4, calls_per_tool={"a": 1, "b": 0}),
    Budget(calls=4, cost=0.5),
    Budget(),
)


decisions = st.lists(st.tuples(allowed_sets, st.booleans()), min_size=1, max_size=3)


class Scripted(Gate):
    """Decides by a script, the last decision for ever after."""

    def __init__(self):
        super().__init__()
        self.script, self.asked = [((), False)], 0

    def decide(self, request):
        allowed, required = self.script[min(self.asked, len(self.script) - 1)]
        self.asked += 1
        return GateDecision(allowed=allowed, required=required, gate="scripted")


class Bench:
    """One agent for all examples of a budget: compiling a graph anew would take most of the time."""

    def __init__(self, budget, **agent):
        self.budget, self.ran, self.gate, self.chat = budget, [], Scripted(), model("done")
        self.agent = gated(self.chat, self.make_tools(), self.gate, budget=budget, agent=agent)

    def make_tools(self):
        def make(name):
            @tool(name)
            def one(x: int) -> str:
                """Do it."""
                self.ran.append(name)
                return f"{name}{x}"

            one.metadata = {"cost": 0.25, "repeatable": name == "c"}
            return one

        return [make(name) for name in NAMES]

    def run(self, flavour, script, decided):
        self.ran.clear()
        self.chat.asked.clear()
        self.chat.script[:] = script
        self.gate.script, self.gate.asked = decided, 0
        question, config = {"messages": [HumanMessage("q")]}, {"recursion_limit": 40}
        if flavour == "sync":
            return self.agent.invoke(question, config)
        return asyncio.run(self.agent.ainvoke(question, config))


def calls_of(messages):
    return [c for m in messages if isinstance(m, AIMessage) for c in [*m.tool_calls, *m.invalid_tool_calls]]


def check(bench, state):
    asked = [c["id"] for c in calls_of(state["messages"])]
    results = [m.tool_call_id for m in state["messages"] if isinstance(m, ToolMessage)]
    assert sorted(asked) == sorted(results)
    assert len(set(asked)) == len(asked)

    # Nothing ran that the decision of its reply did not allow. A tool-less last reply decides for itself.
    executed = [outcome for outcome in state["outcomes"] if outcome.executed]
    assert len(bench.ran) <= len(executed) <= bench.budget.calls
    said = [m for m in state["messages"] if isinstance(m, AIMessage)]
    for decision, reply in zip(state["decisions"], said, strict=True):
        ids = {c["id"] for c in reply.tool_calls}
        assert {outcome.tool for outcome in executed if outcome.call_id in ids} <= set(decision.allowed)
    for name, limit in (bench.budget.calls_per_tool or {}).items():
        assert bench.ran.count(name) <= limit
    if bench.budget.cost is not None:
        assert sum(outcome.cost for outcome in executed) <= bench.budget.cost + 1e-9

    check_repetitions(state["messages"], state["outcomes"])

    # No prompt held a call without its result.
    for prompt in bench.chat.asked:
        shown = {m.tool_call_id for m in prompt.messages if isinstance(m, ToolMessage)}
        assert {c["id"] for c in calls_of(prompt.messages)} <= shown


PLACES = range(len(BUDGETS))
THOUSANDS = [pytest.mark.exhaustive, pytest.mark.timeout(0)]


@pytest.fixture(scope="module")
def benches():
    return [Bench(budget) for budget in BUDGETS]


@pytest.fixture(scope="module")
def structured_benches():
    return [Bench(budget, response_format=ToolStrategy(Verdict)) for budget in BUDGETS]


# 350 scripts of up to five replies; thousands where tests that take minutes are run.
@pytest.mark.parametrize(
    ("flavour", "examples"),
    [("sync", 50), ("async", 20), *(pytest.param(way, 1000, marks=THOUSANDS) for way in ("sync", "async"))],
)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_the_model_does(benches, place, flavour, examples):
    @settings(max_examples=examples, deadline=None)
    @given(script=st.lists(replies(), min_size=1, max_size=5), decided=decisions)
    def holds(script, decided):
        state = benches[place].run(flavour, script, decided)
        check(benches[place], state)
        final = state["messages"][-1]
        assert isinstance(final, AIMessage)
        assert final.text.strip()
        assert not final.tool_calls
        assert not final.invalid_tool_calls

    holds()


@pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=THOUSANDS)])
@pytest.mark.parametrize("place", PLACES)
def test_a_structured_answer_comes_whatever_else_the_model_calls(structured_benches, place, examples):
    @settings(max_examples=examples, deadline=None)
    @given(
        script=st.lists(st.lists(sound, max_size=3), max_size=4),
        together=st.lists(sound, max_size=2),
        decided=decisions,
    )
    def holds(script, together, decided):
        final = calling(*({**c, "type": "tool_call"} for c in together), call("Verdict", id="verdict", text="yes"))
        bench = structured_benches[place]
        state = bench.run("sync", [*(AIMessage("", tool_calls=calls) for calls in script if calls), final], decided)
        check(bench, state)
        # A round that leads nowhere ends the turn, and such a model may waste its last reply.
        if any(c["name"] == "Verdict" for c in calls_of(state["messages"])):
            assert state["structured_response"] == Verdict(text="yes")
        else:
            assert state["messages"][-1].text.strip()

    holds()
