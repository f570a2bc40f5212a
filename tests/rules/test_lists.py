"""`ungated`, `never` and `always` say what may run; what a trained gate is checked against they leave alone."""

import numpy as np
import pytest

from metis_agent import PolicyGate, create_metis_agent
from metis_agent.errors import ConfigurationError
from metis_agent.gates import BranchGate, NeverGate, ShadowGate
from metis_agent.gates.features import BUCKETS
from tests.fakes import call, calling, model
from tests.gates.test_artefact import DECISION, write
from tests.middleware.helpers import Only, answered, make_tools

SHAPES = {
    "idf": [BUCKETS], "text_weights": [3, BUCKETS], "number_weights": [3, 11], "number_mean": [11],
    "number_scale": [11], "bias": [3],
}  # fmt: skip
THREE = {"head_temperature": [1.0] * 3, "saving": [0.0] * 3, "mean_accuracy": [0.5] * 3}


@pytest.fixture
def trained(tmp_path):
    """A gate that was trained for both tools, and always answers directly."""
    folder = write(
        tmp_path,
        tensors={name: np.ones(shape, np.float32) for name, shape in SHAPES.items()},
        tools=[{"name": "look"}, {"name": "pay"}],
        decision=DECISION | THREE,
        threshold={"value": 1.0},
    )
    return PolicyGate(folder)


def both_called():
    return model(calling(call("look", query="x"), call("pay", id="2", amount=5)), "ok")


@pytest.mark.parametrize(
    ("lists", "offered"),
    [
        ({}, ()),
        ({"never": ["pay"]}, ()),
        ({"never": ["look", "pay"]}, ()),
        ({"ungated": ["pay"]}, ("pay",)),
        ({"ungated": ["look"], "never": ["pay"]}, ("look",)),
        ({"always": ["look"]}, ("look",)),
        ({"always": ["look"], "ungated": ["pay"]}, ("look", "pay")),
    ],
)
def test_with_a_trained_gate(trained, make, go, lists, offered):
    ran = []
    agent = make(both_called(), make_tools(ran), trained, **lists)
    state = go(agent)
    assert state["decisions"][0].allowed == offered
    assert not any("failed" in decision.reason for decision in state["decisions"])
    assert {name for name, _ in ran} == set(offered)


def test_behind_another_gate_they_stay(trained):
    agent = create_metis_agent(both_called(), make_tools([]), gate=BranchGate("free"), never=["pay"])
    other = agent.with_gate(ShadowGate(trained))
    state = other.invoke({"messages": [("user", "q")]})
    assert {outcome.tool: outcome.status for outcome in state["outcomes"]} == {"look": "ok", "pay": "blocked"}


def test_a_tool_that_is_missing_is_still_refused(trained):
    look, _ = make_tools([])
    with pytest.raises(ConfigurationError, match="the sets must be the same"):
        create_metis_agent(model(), [look], gate=trained)


def test_lists_by_tool(make, go, ran, tools):
    chat = model(calling(call("look", query="x"), call("pay", id="2", amount=5)), "ok")
    state = go(make(chat, tools, NeverGate(), always=["look"], never=["pay"]))
    assert ran == [("look", "x")]
    assert [asked.tools for asked in chat.asked] == [("look",)] * 2
    assert "never to be called" in answered(state)["2"]
    gate = Only()
    chat = model(calling(call("pay", id="2", amount=5)), "ok")
    go(make(chat, tools, gate, ungated=["pay"]))
    assert [spec.name for spec in gate.requests[0].tools] == ["look"]
    assert ran[-1] == ("pay", 5)


def test_a_tool_is_in_one_list_only(make, tools):
    with pytest.raises(ConfigurationError, match="ungated and never both name"):
        make(model(), tools, NeverGate(), ungated=["look"], never=["look"])
