"""A gate that only watches changes nothing that a provider is asked, to the byte, recorder on, over the matrix."""

import json
import re

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage

from metis_agent import MetisGateMiddleware, Recorder, ShadowGate, TrajectoryStore
from metis_agent.gates import NeverGate
from tests.providers.conversations import WAYS
from tests.providers.scenarios import RAN, SCENARIOS
from tests.providers.shapes import SHAPES

pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore"),
]
# Made up by the clients, anew each time.
MADE_UP = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|lc_[0-9a-f]{32}")


def asked(bench, scenario, shape, way, middleware):
    """What the provider is asked in two turns, and how they end."""
    RAN.clear()
    tools = scenario.tools(SHAPES[shape])
    bench.wire.play(*scenario.script)
    # Without a limit, a model that only ever calls would go on for thousands of steps.
    agent = create_agent(bench.model(shape), tools, middleware=middleware).with_config(recursion_limit=12)
    messages, ends = list(scenario.earlier), []
    for question in (scenario.question, "thanks"):
        try:
            state, _ = bench.ask(agent, [*messages, HumanMessage(question)], way)
        except Exception as error:
            ends.append(f"{type(error).__name__}: {error}")
            break
        messages = state["messages"]
        ends.append(messages[-1].text)
    return (
        [MADE_UP.sub("", raw.decode()) for raw in bench.wire.raw],
        [MADE_UP.sub("", end) for end in ends],
        sorted(RAN),
    )


CELLS = [(name, shape) for name in SCENARIOS for shape in SHAPES if SCENARIOS[name].shapes(SHAPES[shape])]


def check(bench, folder, name, shape, way):
    scenario = SCENARIOS[name]
    plain = asked(bench, scenario, shape, way, [])
    store = TrajectoryStore(folder)
    watching = MetisGateMiddleware(ShadowGate(NeverGate()), recorder=Recorder(store))
    assert asked(bench, scenario, shape, way, [watching]) == plain
    # Bedrock's client itself refuses to send a call without an id.
    assert json.loads(plain[0][0]) if plain[0] else plain[1][0].startswith("ParamValidationError")
    # At the recursion limit LangGraph ends a run between its nodes, where no middleware is asked: it leaves no record.
    assert len(list(store.read())) == sum(not end.startswith("GraphRecursionError") for end in plain[1])


@pytest.mark.parametrize(("name", "shape"), CELLS[::11])
def test_requests_are_those_of_the_plain_agent(bench, tmp_path, name, shape):
    check(bench, tmp_path, name, shape, WAYS[(len(name) + len(shape)) % len(WAYS)])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_they_are_in_the_whole_matrix(bench, tmp_path, name, shape, way):
    check(bench, tmp_path, name, shape, way)
