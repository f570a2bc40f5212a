"""Properties that hold for any model and any gate, however they behave.

Two ways to look for a counter-example: hypothesis, which makes a small one of what it finds, and thousands of seeded
random behaviours, which are quick because the agents are made once.
"""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from metis_agent.agent import create_metis_agent
from metis_agent.gates import Gate
from metis_agent.rules.budget import Budget
from metis_agent.types import GateDecision
from tests.any_reply import NAMES, allowed_sets, check_repetitions, replies
from tests.fakes import model


@st.composite
def budgets(draw):
    per_tool = draw(st.none() | st.dictionaries(st.sampled_from(NAMES), st.integers(0, 2)))
    cost = draw(st.none() | st.sampled_from([0.0, 0.5, 1.0]))
    return Budget(calls=draw(st.integers(0, 4)), calls_per_tool=per_tool, cost=cost)


class Scripted(Gate):
    """Decides by a script, the last decision for ever after."""

    def __init__(self, decisions):
        super().__init__()
        self.decisions = decisions
        self.asked = 0

    def decide(self, request):
        allowed, required = self.decisions[min(self.asked, len(self.decisions) - 1)]
        self.asked += 1
        return GateDecision(allowed=allowed, required=required)


decisions = st.lists(st.tuples(allowed_sets, st.booleans()), min_size=1, max_size=3)


def make_tools(ran):
    def make(name):
        @tool(name)
        def one(x: int) -> str:
            """Do it."""
            ran.append(name)
            if x == 2:
                raise ValueError("two is too much")
            return f"{name}{x}"

        one.metadata = {"cost": 0.25, "repeatable": name == "c"}
        return one

    return [make(name) for name in NAMES]


def check(state, chat, ran, budget, drafts=False):
    """What must hold of every finished turn."""
    # It ends in an answer that says something.
    final = state["messages"][-1]
    assert isinstance(final, AIMessage)
    assert final.text.strip()
    assert not final.tool_calls
    assert not final.invalid_tool_calls

    # Every call has its message, exactly one, and ids are told apart.
    asked = [
        call["id"]
        for message in state["messages"]
        if isinstance(message, AIMessage)
        for call in [*message.tool_calls, *message.invalid_tool_calls]
    ]
    answered = [message.tool_call_id for message in state["messages"] if isinstance(message, ToolMessage)]
    assert sorted(asked) == sorted(answered)
    assert len(set(asked)) == len(asked)

    # Nothing ran that was not allowed, and nothing beyond the budget.
    executed = [outcome for outcome in state["outcomes"] if outcome.executed]
    assert len(ran) <= len(executed) <= budget.calls  # arguments may be refused before a tool runs
    replies_ = [message for message in state["messages"] if isinstance(message, AIMessage)]
    for decision, reply in zip(state["decisions"], replies_, strict=True):
        ids = {call["id"] for call in reply.tool_calls}
        assert {outcome.tool for outcome in executed if outcome.call_id in ids} <= set(decision.allowed)
    for name in NAMES:
        assert ran.count(name) <= sum(outcome.tool == name for outcome in executed)
    for name, limit in (budget.calls_per_tool or {}).items():
        assert ran.count(name) <= limit
    if budget.cost is not None:
        assert sum(outcome.cost for outcome in executed) <= budget.cost + 1e-9

    check_repetitions(state["messages"], state["outcomes"])

    # The prompts hold no call without a result.
    for prompt in chat.asked:
        open_calls = {
            call["id"]
            for message in prompt.messages
            if isinstance(message, AIMessage)
            for call in [*message.tool_calls, *message.invalid_tool_calls]
        }
        assert open_calls <= {m.tool_call_id for m in prompt.messages if isinstance(m, ToolMessage)}

    # A model call is asked for once: one for each decision, the draft, and one more where an answer was empty.
    assert len(chat.asked) <= len(state["decisions"]) + drafts + 1


MANY = [pytest.mark.exhaustive, pytest.mark.timeout(0)]


@pytest.mark.parametrize("examples", [30, pytest.param(1000, marks=MANY)])
@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_whatever_the_model_does(flavour, examples):
    @settings(max_examples=examples, deadline=None)
    @given(
        script=st.lists(replies(), min_size=1, max_size=5),
        budget=budgets(),
        decided=decisions,
        wants_draft=st.booleans(),
    )
    def holds(script, budget, decided, wants_draft):
        ran = []
        chat = model(*script)
        gate = Scripted(decided)
        gate.wants_draft = wants_draft
        agent = create_metis_agent(chat, make_tools(ran), gate=gate, budget=budget, tool_timeout=None)
        # The budget's own recursion limit is on: a run that does not end within it raises here.
        question = {"messages": [HumanMessage("q")]}
        state = agent.invoke(question) if flavour == "sync" else asyncio.run(agent.ainvoke(question))
        check(state, chat, ran, budget, wants_draft)

    holds()


# Hundreds


class Fickle(Gate):
    """Decides by script, and now and then as no gate should."""

    def __init__(self, *, wants_draft):
        super().__init__()
        self.wants_draft = wants_draft
        self.script, self.asked = [], 0

    def decide(self, request):
        decided = self.script[min(self.asked, len(self.script) - 1)]
        self.asked += 1
        assert (request.draft is not None) <= self.wants_draft
        if isinstance(decided, Exception):
            raise decided
        return decided

    async def adecide(self, request):
        return self.decide(request)


ODD = (
    RuntimeError("down"),
    None,
    "a",
    GateDecision(allowed=None),
    GateDecision(allowed="abc"),
    GateDecision(allowed=("rob", "a"), required=True),
    GateDecision(allowed=("a",), probabilities={"a": "high"}),
    GateDecision(allowed=("a",), probabilities=[1.0]),
    GateDecision(allowed=("a",), seconds=float("nan")),
    GateDecision(allowed=("a",), reason=5),
)


def random_decision(rng):
    if rng.random() < 0.15:
        return rng.choice(ODD)
    allowed = NAMES if rng.random() < 0.4 else tuple(rng.sample(NAMES, rng.randint(0, 3)))
    return GateDecision(allowed=allowed, required=rng.random() < 0.5)


def random_call(rng, broken):
    if not broken:
        return {"name": rng.choice(NAMES), "args": {"x": rng.randint(0, 2)}, "id": str(rng.randint(0, 10**6))}
    return {
        "name": rng.choice([*NAMES, "unknown", "", None]),
        "args": rng.choice([{"x": 1}, {}, {"x": "not a number"}, "x=1", None, 5, ["x"]]),
        "id": rng.choice(["1", "2", "", None]),
    }


def random_reply(rng):
    message = AIMessage(rng.choice(["", " ", "text", "text"]))
    if rng.random() < 0.8:
        message.tool_calls = [random_call(rng, rng.random() < 0.3) for _ in range(rng.randint(0, 4))]
        if message.tool_calls and rng.random() < 0.2:
            message.tool_calls.append(dict(message.tool_calls[0]))  # the same call twice, id and all
    if rng.random() < 0.15:
        message.invalid_tool_calls = [
            {"name": rng.choice([*NAMES, None]), "args": '{"x": ', "id": rng.choice(["1", None]), "error": None}
        ]
    return message


BUDGETS = (
    Budget(calls=4),
    Budget(calls=0),
    Budget(calls=3, calls_per_tool={"a": 1, "c": 0}),
    Budget(calls=4, cost=0.5),
)


@pytest.mark.parametrize("behaviours", [120, pytest.param(3000, marks=MANY)])
@pytest.mark.parametrize("wants_draft", [False, True])
@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_hundreds_of_models_and_gates(flavour, wants_draft, behaviours):
    rng = random.Random(f"{flavour} {wants_draft}")
    ran, chat, gate = [], model(), Fickle(wants_draft=wants_draft)
    tools, seen = make_tools(ran), []
    agents = [create_metis_agent(chat, tools, gate=gate, budget=budget, tool_timeout=None) for budget in BUDGETS]

    def behave():
        chat.script[:] = [random_reply(rng) for _ in range(rng.randint(1, 5))]
        gate.script = [random_decision(rng) for _ in range(rng.randint(1, 4))]
        gate.asked = 0
        chat.asked.clear()
        ran.clear()
        return rng.choice(agents), {"messages": [HumanMessage("q")]}

    def judge(agent, state):
        check(state, chat, ran, agent.budget, wants_draft)
        seen.append((len(ran), len(state["decisions"]), [outcome.status for outcome in state["outcomes"]]))

    async def run_async():
        for _ in range(behaviours):
            agent, question = behave()
            judge(agent, await agent.ainvoke(question))

    if flavour == "async":
        asyncio.run(run_async())
    else:
        for _ in range(behaviours):
            agent, question = behave()
            judge(agent, agent.invoke(question))

    # The behaviours were not idle: tools ran, were blocked, failed and were repeated, over several steps.
    statuses = {status for _, _, found in seen for status in found}
    assert statuses >= {"ok", "error", "blocked", "repeated"}
    assert sum(count for count, _, _ in seen) > behaviours / 2
    assert max(steps for _, steps, _ in seen) >= 4
