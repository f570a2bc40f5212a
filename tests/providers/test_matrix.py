"""Every scenario at every provider, in both hosts, however it is run: nothing is refused, and what is right comes out.

The clients are the providers' real ones, on a loopback server that refuses what the providers refuse. The suite runs
each scenario at each provider in one of the hosts in one of the three ways, in turn; the exhaustive test runs all.
"""

import pytest

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


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_a_scenario_in_all_ways(bench, name, shape):
    assert not faults_in(bench, name, shape, {"graph": WAYS, "middleware": WAYS})
