"""Random conversations through all interventions: whatever the model does, no provider refuses what it is asked next.

A few dozen in the suite; ten thousand where tests that take minutes are run.
"""

import random

import pytest
from langchain_core.messages import HumanMessage

from metis_agent import Budget
from tests.providers.conversations import HOSTS, WAYS, check_history
from tests.providers.scenarios import PICTURE, Scenario, Steps
from tests.providers.server import Call, Reply
from tests.providers.shapes import SHAPES

pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore"),
]

ARGUMENTS = (
    {"query": "x"}, {"query": "y"}, {"amount": 1}, {}, {"query": 5}, '{"query": x}', '{"query": "/da', "", "{",
)  # fmt: skip
NAMES = ("look", "pay", "find", "photo", "look", "pay", "fly", "look it up!")
QUESTIONS = ("a question", [{"type": "text", "text": "what is this?"}, PICTURE])


def a_call(dice):
    id_ = dice.choice([None, None, None, None, "", "c1", "c2"])
    return Call(dice.choice(NAMES), dice.choice(ARGUMENTS[: dice.choice([3, 9])]), id_)


def a_reply(dice, shape):
    text = dice.choice(["", "", " ", "some words", "it is done"])
    kind = dice.random()
    if kind < 0.05:
        return Reply(refusal="I can't help with that.")
    if kind < 0.3:
        return Reply(text, end=dice.choice(["", "", "length", "filter"]))
    searched = "x" if shape.search and dice.random() < 0.2 else ""
    calls = tuple(a_call(dice) for _ in range(dice.choice([1, 1, 1, 2, 2, 3])))
    end = "length" if dice.random() < 0.1 else "pause" if searched and dice.random() < 0.2 else ""
    return Reply(text, calls=() if end == "pause" else calls, searched=searched, end=end)


def a_gate(dice, tools):
    steps = [[name for name in tools if dice.random() < 0.7] for _ in range(dice.choice([1, 2, 4]))]
    return Steps(*steps, required=dice.random() < 0.1, draft=dice.random() < 0.2)


def a_conversation(bench, host, seed):
    """Hold it; what is wrong with it."""
    dice = random.Random(seed)
    name = dice.choice(list(SHAPES))
    shape = SHAPES[name]
    # Where a result is text, there is no tool for pictures.
    tools = ("look", "pay", "find", "find" if shape.text_results else "photo", "web_search", "google_search")
    gate = a_gate(dice, tools)
    scenario = Scenario(
        script=(), gate=lambda: gate, uses=tuple(dict.fromkeys(tools[:4])),
         budget=dice.choice([None, None, Budget(calls=0), Budget(calls=1), Budget(calls=3)]),
        more=lambda shape: [dict(shape.search)] if shape.search and dice.random() < 0.5 else [],
    )  # fmt: skip
    agent = bench.agent(host, name, scenario)
    bench.wire.play(Reply("begun"))
    messages = []
    for _ in range(dice.choice([1, 2, 3])):
        bench.wire.go_on(*(a_reply(dice, shape) for _ in range(dice.choice([1, 2, 3, 5]))))
        question = HumanMessage(dice.choice(QUESTIONS))
        try:
            state, shown = bench.ask(agent, [*messages, question], way := dice.choice(WAYS))
        except Exception as error:
            return [name, f"{type(error).__name__}: {error}", *bench.wire.refused]
        messages = state["messages"]
        answer = str(messages[-1].text)
        faults = [*bench.wire.refused, *check_history(messages)]
        if not answer.strip() or messages[-1].type != "ai" or messages[-1].tool_calls:
            faults.append(f"the turn ends in {messages[-1]!r}")
        if way == "stream" and answer not in shown:
            faults.append(f"the answer {answer!r} was not streamed, only {shown!r}")
        if faults:
            return [name, *faults]
    return []


def faults_in(bench, host, seeds):
    return {seed: found for seed in seeds if (found := a_conversation(bench, host, seed))}


@pytest.mark.parametrize("host", HOSTS)
def test_dozens(bench, host):
    assert not faults_in(bench, host, range(24))


@pytest.mark.parametrize("host", HOSTS)
def test_those_that_found_something(bench, host):
    assert not faults_in(bench, host, [211, 227, 558, 731, 4487, 202602])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("host", HOSTS)
def test_thousands(bench, host):
    assert not faults_in(bench, host, range(24, 5024))
