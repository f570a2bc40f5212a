import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from metis_agent.errors import ConfigurationError, GateError
from metis_agent.gates import DraftConfidenceGate, Gate, NeverGate
from metis_agent.gates.reference import draft_of, log_probs_of
from metis_agent.types import TOKEN_RECORD, Draft, GateDecision, GateRequest, ToolSpec

TOOLS = (ToolSpec(name="a"), ToolSpec(name="b"))
QUESTION = [HumanMessage("q")]
# Tokens of probability 0.5, 0.8 and 0.4.
DRAFT = Draft(text="x", log_probs=(math.log(0.5), math.log(0.8), math.log(0.4)))


def request(draft=DRAFT, messages=QUESTION):
    return GateRequest(messages=messages, tools=TOOLS, draft=draft)


@pytest.mark.parametrize(
    ("reading", "confidence"),
    [
        ("mean", (0.5 * 0.8 * 0.4) ** (1 / 3)),  # 0.16 ** (1/3) = 0.5429
        ("min", 0.4),
        ("first", 0.5),
        ("all", 0.16),
    ],
)
async def test_the_formulas(reading, confidence):
    gate = DraftConfidenceGate(reading=reading)
    assert gate.probability(DRAFT) == pytest.approx(1 - confidence)
    for decision in (gate.decide(request()), await gate.adecide(request())):
        assert decision.probabilities == pytest.approx({"a": 1 - confidence, "b": 1 - confidence})
        assert decision.direct == (1 - confidence <= 0.5)


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=8))
def test_it_is_a_probability_and_the_readings_are_ordered(log_probs):
    draft = Draft(text="x", log_probs=tuple(log_probs))
    p = {
        reading: DraftConfidenceGate(reading=reading).probability(draft) for reading in ("mean", "min", "first", "all")
    }
    assert all(0 <= value <= 1 for value in p.values())
    # Surer on the average than at the worst token, and there surer than of everything together.
    assert p["mean"] <= p["min"] + 1e-12
    assert p["min"] <= p["all"] + 1e-12


def test_a_certain_draft_needs_no_tool_and_an_impossible_one_does():
    gate = DraftConfidenceGate()
    assert gate.probability(Draft(text="x", log_probs=(0.0,))) == 0
    assert gate.probability(Draft(text="x", log_probs=(1e-9,))) == 0  # rounding may go over 0
    assert gate.probability(Draft(text="x", log_probs=(-math.inf, 0.0))) == 1


@pytest.mark.parametrize("draft", [None, Draft(text="x"), Draft(text="x", log_probs=(math.nan,))])
async def test_without_log_probabilities_it_can_not_decide(draft):
    with pytest.raises(GateError):
        DraftConfidenceGate().decide(request(draft))
    with pytest.raises(GateError):
        await DraftConfidenceGate().adecide(request(draft))


class Which(Gate):
    def __init__(self, *allowed):
        super().__init__(name="which one")
        self.allowed, self.asked = allowed, 0

    def decide(self, request):
        self.asked += 1
        return GateDecision(allowed=self.allowed, gate=self.name)


async def test_a_second_gate_says_which_and_is_asked_only_where_a_tool_is_needed():
    second = Which("b")
    gate = DraftConfidenceGate(threshold=0.4, which=second, required=True)
    sure = request(Draft(text="x", log_probs=(-0.01,)))
    for decision in (gate.decide(request()), await gate.adecide(request())):
        assert (decision.allowed, decision.required) == (("b",), True)
        assert decision.probabilities == pytest.approx({"a": 0.0, "b": 1 - 0.16 ** (1 / 3)})
    assert second.asked == 2
    assert gate.decide(sure).direct
    assert (await gate.adecide(sure)).direct
    assert second.asked == 2
    assert DraftConfidenceGate(threshold=0.1, which=NeverGate(), required=True).decide(request()).direct


def test_a_call_is_required_at_the_first_step_only():
    later = [*QUESTION, AIMessage("", tool_calls=[]), ToolMessage("x", tool_call_id="1")]
    gate = DraftConfidenceGate(threshold=0.1, required=True)
    assert gate.decide(request()).required
    assert not gate.decide(request(messages=later)).required
    assert gate.decide(request(messages=later)).allowed == ("a", "b")


@pytest.mark.parametrize(("options", "word"), [({"reading": "worst"}, "'worst'"), ({"threshold": 2}, r"\[0, 1\]")])
def test_wrong_arguments(options, word):
    with pytest.raises(ConfigurationError, match=word):
        DraftConfidenceGate(**options)
    with pytest.raises(ConfigurationError, match="no gate"):
        DraftConfidenceGate(which="search")


def test_tools_are_checked_by_the_second_gate():
    class Picky(Which):
        def check_tools(self, tools):
            raise ConfigurationError("no")

    with pytest.raises(ConfigurationError):
        DraftConfidenceGate(which=Picky()).check_tools(TOOLS)


@pytest.mark.parametrize(
    ("metadata", "log_probs"),
    [
        ({}, ()),
        ({"logprobs": None}, ()),
        ({"logprobs": {"content": None}}, ()),
        ({"logprobs": {"content": [{"token": "P", "logprob": -0.5}, {"token": "x", "logprob": -1}]}}, (-0.5, -1.0)),
        ({TOKEN_RECORD: {"log_probs": [-3.0, -0.25], "forced": 1}}, (-0.25,)),
        ({TOKEN_RECORD: {"log_probs": [-3.0, -0.25], "allowed_log_probs": [-0.5, -0.25]}}, (-0.5, -0.25)),
        ({TOKEN_RECORD: {"log_probs": [-3.0, -0.25]}, "logprobs": {"content": []}}, (-3.0, -0.25)),
    ],
)
def test_both_forms_of_log_probabilities_are_read(metadata, log_probs):
    reply = AIMessage([{"type": "text", "text": "Paris"}], response_metadata=metadata)
    assert log_probs_of(reply) == log_probs
    assert draft_of(reply) == Draft(text="Paris", log_probs=log_probs)
