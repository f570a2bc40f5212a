"""Every scenario at every provider, in both hosts, however it is run: nothing is refused, and what is right comes out.

The clients are the providers' real ones, on a loopback server that refuses what the providers refuse. The suite runs
each scenario at each provider in one of the hosts in one of the three ways, in turn; the exhaustive test runs all.
"""

import pytest
from langchain_core.messages import HumanMessage

from metis_agent import create_metis_agent
from tests.providers.conversations import WAYS
from tests.providers.scenarios import SCENARIOS
from tests.providers.shapes import SHAPES

pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    # What clients say of model names.
    pytest.mark.filterwarnings("ignore"),
]
CELLS = [(name, shape) for name in SCENARIOS for shape in SHAPES if SCENARIOS[name].shapes(SHAPES[shape])]


def faults_in(bench, name, shape, ways):
    """By host and way."""
    scenario = SCENARIOS[name]
    runs = [(host, way) for host in scenario.hosts for way in ways[host]]
    return {run: found for run in runs if (found := bench.converse(scenario, shape, *run))}


def test_it_is_as_large_as_it_has_to_be():
    assert len(SHAPES) >= 13
    assert len(CELLS) >= 24 * len(SHAPES)


@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_a_scenario(bench, name, shape):
    turn = list(SCENARIOS).index(name) + list(SHAPES).index(shape)
    hosts = SCENARIOS[name].hosts
    ways = {host: [WAYS[turn % 3]] if host == hosts[turn % len(hosts)] else [] for host in hosts}
    assert not faults_in(bench, name, shape, ways)


@pytest.mark.parametrize("shape", ["responses", "anthropic", "gemini"])
def test_a_model_that_was_bound_to_the_tools_before_is_asked_as_one_that_was_not(bench, shape):
    scenario = SCENARIOS["a search and a call"]
    chat, tools = bench.model(shape), scenario.tools(SHAPES[shape])
    asked = []
    for model, given in ((chat, tools), (chat.bind_tools(tools), tools[:-1])):
        bench.wire.play(*scenario.script)
        state, _ = bench.ask(create_metis_agent(model, given), [HumanMessage("a question")], "invoke")
        assert state["messages"][-1].text == "it is done"
        asked.append([sorted(map(str, body["tools"])) for body in bench.wire.asked])
    assert asked[0] == asked[1] != []


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_a_scenario_in_all_ways(bench, name, shape):
    assert not faults_in(bench, name, shape, {"graph": WAYS, "middleware": WAYS})
