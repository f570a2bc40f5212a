"""A gate that fails leaves the decision to the model, and the record says so."""

import asyncio
import json
import threading

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langgraph.errors import GraphInterrupt

from metis_agent.agent import create_metis_agent
from metis_agent.errors import ConfigurationError, GateError
from metis_agent.gates import Gate
from metis_agent.gates.base import offered_only
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import GateDecision, GateRequest, ToolSpec
from tests.fakes import call, calling, model


@tool
def look(query: str) -> str:
    """Look it up."""
    return f"found {query}"


class Wrong(Gate):
    def __init__(self, decided):
        super().__init__(name="wrong", version="3")
        self.decided = decided

    def decide(self, request):
        if isinstance(self.decided, Exception):
            raise self.decided
        return self.decided


def turn(gate, flavour, **options):
    agent = create_metis_agent(model(calling(call("look", query="x")), "x it is"), [look], gate=gate, **options)
    question = {"messages": [HumanMessage("q")]}
    return agent.invoke(question) if flavour == "sync" else asyncio.run(agent.ainvoke(question))


NONSENSE = [
    (ValueError("bad weights"), "ValueError: bad weights"),
    (None, "no GateDecision"),
    ({"allowed": ()}, "no GateDecision"),
    (GateDecision(allowed=None), "allowed None"),
    (GateDecision(allowed="look"), "allowed 'look'"),
    (GateDecision(allowed=(), seconds=float("nan")), "nan seconds"),
    (GateDecision(allowed=(), seconds=-1), "-1 seconds"),
    (GateDecision(allowed=(), seconds="long"), "'long' seconds"),
    (GateDecision(allowed=(), reason=object), "no text"),
    (GateDecision(allowed=(), probabilities={"look": 2.0}), "'look'"),
    (GateDecision(allowed=(), probabilities={"look": None}), "'look'"),
    (GateDecision(allowed=(), probabilities=(0.1,)), "map tool names"),
]


@pytest.mark.parametrize("flavour", ["sync", "async"])
@pytest.mark.parametrize(("decided", "word"), NONSENSE)
def test_the_model_decides_and_the_reason_says_why(flavour, decided, word, tmp_path):
    with TrajectoryStore(tmp_path) as store:
        state = turn(Wrong(decided), flavour, recorder=Recorder(store))
        (trajectory,) = store.read()
    assert state["messages"][-1].content == "x it is"
    for decision in (*state["decisions"], *trajectory.decisions):
        assert (decision.allowed, decision.required, decision.gate, decision.version) == (
            ("look",),
            False,
            "wrong",
            "3",
        )
        assert decision.reason.startswith("the gate failed with ")
        assert decision.reason.endswith("; the model decides")
        assert word in decision.reason
    assert json.dumps([vars(decision) for decision in state["decisions"]])


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_a_gate_that_takes_too_long(flavour):
    release = threading.Event()

    class Hanging(Gate):
        def decide(self, request):
            release.wait(60)
            return GateDecision(allowed=())

    class AlsoHanging(Gate):
        async def adecide(self, request):
            await asyncio.sleep(60)
            return GateDecision(allowed=())

    try:
        for gate in (Hanging(), AlsoHanging()):
            state = turn(gate, flavour, gate_timeout=0.05)
            assert state["messages"][-1].content == "x it is"
            assert state["decisions"][0].reason == "the gate did not decide within 0.05 seconds; the model decides"
            assert state["decisions"][0].seconds >= 0.04
    finally:
        release.set()


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_a_gate_in_time_is_not_disturbed(flavour):
    state = turn(Wrong(GateDecision(allowed=(), reason="known")), flavour, gate_timeout=60)
    assert (state["decisions"][0].allowed, state["decisions"][0].reason) == ((), "known")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout):
    with pytest.raises(ConfigurationError, match="gate_timeout"):
        create_metis_agent(model(), [look], gate_timeout=timeout)


def test_an_interrupt_in_a_gate_is_no_failure():
    class Asking(Gate):
        def decide(self, request):
            raise GraphInterrupt(())

    state = turn(Asking(), "sync")
    assert "decisions" not in state or state["decisions"] == []


def test_what_is_sound_stays_as_it_is():
    request = GateRequest(messages=[HumanMessage("q")], tools=(ToolSpec(name="a"), ToolSpec(name="b")))
    decision = GateDecision(allowed=("a",), required=True)
    assert offered_only(decision, request) is decision
    kept = offered_only(GateDecision(allowed=("b", "rob", "a"), probabilities={"a": 1, "other": 0.5}), request)
    assert (kept.allowed, kept.probabilities) == (("a", "b"), {"a": 1.0, "other": 0.5})
    with pytest.raises(GateError):
        offered_only(object(), request)
