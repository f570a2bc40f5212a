import pytest

from metis_agent.errors import ConfigurationError, GateError
from metis_agent.gates import Gate, NeverGate, allows, as_gate
from metis_agent.types import GateDecision, GateRequest, ToolSpec

REQUEST = GateRequest(messages=(), tools=(ToolSpec(name="a"), ToolSpec(name="b")))


class SyncEstimate(Gate):
    def estimate(self, request):
        return {"a": 0.5, "b": 0.51}


class AsyncEstimate(Gate):
    async def aestimate(self, request):
        return {"a": 0.5, "b": 0.51}


class SyncDecide(Gate):
    def decide(self, request):
        return GateDecision(allowed=("b",))


class AsyncDecide(Gate):
    async def adecide(self, request):
        return GateDecision(allowed=("b",))


class NotAGateButDecides:
    name, version = "mine", "3"

    def decide(self, request):
        return GateDecision(allowed=("b",))


class NotAGateButDecidesLater:
    async def adecide(self, request):
        return GateDecision(allowed=("b",))


def test_a_tie_is_direct():
    assert not allows(0.5, 0.5)
    assert allows(0.5000001, 0.5)
    assert not allows(1.0, 1.0)
    assert not allows(0.0, 0.0)


@pytest.mark.parametrize("gate_class", [SyncEstimate, AsyncEstimate])
async def test_the_base_applies_the_threshold_in_both_flavours(gate_class):
    gate = gate_class(threshold=0.5, version="7", required=True)
    for decision in (gate.decide(REQUEST), await gate.adecide(REQUEST)):
        assert decision.allowed == ("b",)
        assert decision.required
        assert decision.probabilities == {"a": 0.5, "b": 0.51}
        assert (decision.threshold, decision.gate, decision.version) == (0.5, gate_class.__name__, "7")
        assert decision.seconds > 0


def test_nothing_above_the_threshold_is_direct_and_requires_nothing():
    decision = SyncEstimate(threshold=0.9, required=True).decide(REQUEST)
    assert decision.direct
    assert not decision.required


@pytest.mark.parametrize(
    "gate", [SyncDecide(), AsyncDecide(), as_gate(NotAGateButDecides()), as_gate(NotAGateButDecidesLater())]
)
async def test_one_flavour_is_enough(gate):
    # Sync, while an event loop runs in this thread, is the hard case.
    assert gate.decide(REQUEST).allowed == ("b",)
    assert (await gate.adecide(REQUEST)).allowed == ("b",)


def test_async_gates_decide_without_an_event_loop_too():
    assert AsyncDecide().decide(REQUEST).allowed == ("b",)


def test_an_adapted_gate_keeps_its_name():
    assert (as_gate(NotAGateButDecides()).name, as_gate(NotAGateButDecides()).version) == ("mine", "3")


def test_a_tool_without_an_estimate_is_not_called():
    class Half(Gate):
        def estimate(self, request):
            return {"b": 1.0}

    assert Half().decide(REQUEST).probabilities == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "high", None])
def test_what_is_no_probability_is_refused(value):
    class Wrong(Gate):
        def estimate(self, request):
            return {"a": value}

    with pytest.raises(GateError, match="'a'"):
        Wrong().decide(REQUEST)


@pytest.mark.parametrize("candidate", [Gate(), object(), "always"])
def test_what_is_no_gate_is_refused(candidate):
    with pytest.raises(ConfigurationError, match="no gate"):
        as_gate(candidate)


def test_a_gate_s_class_is_refused_with_the_call_that_is_missing():
    with pytest.raises(ConfigurationError, match=r"NeverGate\(\)"):
        as_gate(NeverGate)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_0_and_1_is_refused(threshold):
    with pytest.raises(ConfigurationError, match=r"\[0, 1\]"):
        SyncEstimate(threshold=threshold)
