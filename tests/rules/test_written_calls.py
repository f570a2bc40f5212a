"""A call that was required and that the model wrote as text: it runs, in both hosts, and nothing else does."""

import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import StructuredTool

from metis_agent.gates import AlwaysGate, ModelGate, ShadowGate
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from tests.fakes import model
from tests.middleware.helpers import Only

BARE = '{"name": "look", "arguments": {"query": "x"}}'
FENCED = f"```json\n{BARE}\n```"


@pytest.mark.parametrize(
    "reply",
    [
        BARE, FENCED, BARE.replace("arguments", "parameters"), [{"type": "text", "text": FENCED}],
        '{"type": "function", "function": {"name": "look", "arguments": "{\\"query\\": \\"x\\"}"}}',
    ],
)  # fmt: skip
def test_a_required_call_written_as_text_runs(make, go, ran, tools, tmp_path, reply):
    with TrajectoryStore(tmp_path) as store:
        agent = make(model(AIMessage(reply), "it is x"), tools, AlwaysGate(), recorder=Recorder(store))
        state = go(agent)
        [trajectory] = store.read()
    assert (ran, state["messages"][-1].text) == ([("look", "x")], "it is x")
    asked = state["messages"][1]
    assert (asked.text, [(call["name"], call["args"]) for call in asked.tool_calls]) == ("", [("look", {"query": "x"})])
    assert [outcome.call_id for outcome in trajectory.outcomes] == [asked.tool_calls[0]["id"]]
    assert [call["name"] for call in trajectory.calls[0].tool_calls] == ["look"]


@pytest.mark.parametrize(
    "text",
    [
        f"I will call it: {BARE}", f"{BARE}\n{BARE}", BARE.replace("query", "qeury"), BARE.replace('"x"', "[1]"),
        BARE.replace("look", "fly"), BARE.replace("look", "pay"), BARE[:-1], '{"query": "x"}',
    ],
)  # fmt: skip
def test_what_is_not_exactly_one_call_that_fits_is_an_answer(make, go, ran, tools, text):
    state = go(make(model(text), tools, Only("look", required=True)))
    assert (ran, state["messages"][-1].text) == ([], text)


@pytest.mark.parametrize("gate", [ModelGate(), Only("look"), ShadowGate(AlwaysGate())])
def test_where_no_call_is_required_it_is_an_answer(make, go, ran, tools, gate):
    state = go(make(model(FENCED), tools, gate))
    assert (ran, state["messages"][-1].text) == ([], FENCED)


@pytest.mark.parametrize(("wanted", "ran_as"), [(["query"], [{"query": "x"}]), (["query", "limit"], [])])
def test_of_a_tool_whose_schema_is_json(make, go, wanted, ran_as):
    ran = []
    schema = {"type": "object", "title": "look", "properties": {"query": {"type": "string"}}, "required": wanted}
    look = StructuredTool(
        name="look", description="Look.", args_schema=schema, func=lambda **given: ran.append(given) or "found"
    )
    go(make(model(BARE, "done"), [look], AlwaysGate()))
    assert ran == ran_as
