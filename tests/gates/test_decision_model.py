"""LangChain's decision models as gates, and gates as LangChain's decision models."""

import sys
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from pydantic import Field

from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError
from metis_agent.gates import DecisionModelGate, Gate, ModelGate, as_decision_model
from metis_agent.gates import decision_model as module
from metis_agent.gates.decision import ANSWERABLE
from metis_agent.gates.decision_model import TOOL_NEEDED, answer_of, check_questions, messages_of
from metis_agent.types import GateDecision, GateRequest, ToolSpec

TOOLS = (ToolSpec(name="look", description="Look things up."), ToolSpec(name="add", description="Add."))
REQUEST = GateRequest(messages=[HumanMessage("Who won?")], tools=TOOLS)


async def both(gate, request=REQUEST):
    return [gate.decide(request), await gate.adecide(request)]


# LangChain's decision models, where this langchain-core has them


class Half(Gate):
    """Gives probabilities by the question's text."""

    def estimate(self, request):
        known = {"Who won?": {"look": 0.75, "add": 0.25}, "easy": {"look": 0.0, "add": 0.0}}
        return known[str(request.messages[-1].text)]


@pytest.fixture
def decisions():
    return pytest.importorskip("langchain_core.decisions")


async def test_a_langchain_decision_model_is_a_gate(decisions):
    class Theirs(decisions.BaseDecisionModel):
        seen: list[Any] = Field(default_factory=list)

        @property
        def _provider(self):
            return "test"

        def _classify(self, state, questions):
            self.seen.append((state, questions))
            answers = {}
            for id_, question in questions.items():
                if isinstance(question, decisions.Noul):
                    answers[id_] = {"type": "noul", "noul": 0.25}
                else:
                    assert isinstance(question, decisions.Choice)
                    chances = {"look": 0.25, "add": 0.75}
                    answers[id_] = {"type": "choice", "choice": "add", "confidence": 0.5, "probabilities": chances}
            return decisions.ClassifierResponse(model=self.model, answers=answers)

    theirs = Theirs(model="m")
    for decision in await both(DecisionModelGate(theirs)):
        assert decision.allowed == ("add",)
        assert decision.probabilities == pytest.approx({"look": 0.25, "add": 0.75})
    assert len(theirs.seen) == 4


async def test_a_gate_is_a_langchain_decision_model(decisions):
    @tool
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    made = as_decision_model(Half(), [TOOLS[0], add], model="mine")
    assert isinstance(made, decisions.BaseDecisionModel)
    questions = {
        "direct": decisions.Noul(instructions=ANSWERABLE),
        "tool": decisions.Noul(instructions=TOOL_NEEDED),
        "which": decisions.Choice(instructions="Which?", criteria={"look": None, "add": None, "none": None}),
    }
    request = {"state": "Who won?", "questions": questions}
    for response in (made.invoke(request), await made.ainvoke(request), made.batch([request])[0]):
        assert response.model == "mine"
        assert response.nouls["direct"].noul == pytest.approx(0.25)
        assert response.nouls["tool"].noul == pytest.approx(0.75)
        # none: 1 - 0.75; the tools share 0.75 as 3 to 1.
        assert response.choices["which"].probabilities == pytest.approx({"look": 0.5625, "add": 0.1875, "none": 0.25})
        assert response.choices["which"].choice == "look"
    with pytest.raises(InputError, match="spam"):
        made.invoke({"state": "x", "questions": {"s": decisions.Noul(instructions="Is it spam?")}})


async def test_there_and_back_the_decision_is_the_same(decisions):
    for text in ("Who won?", "easy"):
        request = GateRequest(messages=[HumanMessage(text)], tools=TOOLS)
        straight = Half().decide(request)
        for decision in await both(DecisionModelGate(as_decision_model(Half(), TOOLS)), request):
            assert decision.allowed == straight.allowed
            assert decision.probabilities == pytest.approx(dict(straight.probabilities))


def test_a_gate_that_cannot_be_a_decision_model_is_refused(decisions):
    drafting = Half()
    drafting.wants_draft = True
    with pytest.raises(ConfigurationError, match="draft"):
        as_decision_model(drafting, TOOLS)
    with pytest.raises(ConfigurationError, match="at least one"):
        as_decision_model(Half(), ())
    with pytest.raises(InputError, match="without probabilities"):
        as_decision_model(ModelGate(), TOOLS).invoke(
            {"state": "q", "questions": {"q": decisions.Noul(instructions=ANSWERABLE)}}
        )


def test_without_the_api_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "langchain_core.decisions", None)
    monkeypatch.setattr(module, "_model_class", module._model_class.__wrapped__)
    with pytest.raises(MissingDependencyError, match=r"langchain-core>=1\.8"):
        as_decision_model(Half(), TOOLS)


# The answers themselves, whatever langchain-core


def test_the_answers_of_a_gate():
    decision = GateDecision(allowed=("look",), probabilities={"look": 0.75, "add": 0.25})
    assert answer_of({"type": "noul", "instructions": ANSWERABLE}, decision) == {"type": "noul", "noul": 0.25}
    assert answer_of({"type": "noul", "instructions": TOOL_NEEDED}, decision) == {"type": "noul", "noul": 0.75}
    # Without "none" the tools share everything; confidence (0.75 - 1/2) / (1 - 1/2).
    two = answer_of({"type": "choice", "criteria": {"look": None, "add": None}}, decision)
    assert (two["choice"], two["probabilities"], two["confidence"]) == ("look", {"look": 0.75, "add": 0.25}, 0.5)
    one = answer_of({"type": "choice", "criteria": {"none": None}}, decision)
    assert (one["probabilities"], one["confidence"]) == ({"none": 1.0}, 1.0)
    unneeded = GateDecision(allowed=(), probabilities={"look": 0.0, "add": 0.0})
    even = answer_of({"type": "choice", "criteria": {"look": None, "add": None}}, unneeded)
    assert even["probabilities"] == {"look": 0.5, "add": 0.5}


@pytest.mark.parametrize(
    "question",
    [
        {"type": "noul", "instructions": "Is it spam?"},
        {"type": "noul", "instructions": ["x"]},
        {"type": "choice", "instructions": "?", "criteria": {"look": None, "rob": None}},
        {"type": "score", "instructions": "?", "criteria": ["low", "high"]},
        {"type": "box", "instructions": "?"},
    ],
)
def test_other_questions_are_refused(question):
    with pytest.raises(InputError, match="'it'"):
        check_questions({"it": question}, TOOLS)


@pytest.mark.parametrize(
    ("state", "contents"),
    [
        ("q", ["q"]),
        (HumanMessage("q"), ["q"]),
        ([HumanMessage("q"), AIMessage("a")], ["q", "a"]),
        ({"messages": [{"role": "user", "content": "q"}]}, ["q"]),
        ([{"type": "human", "content": "q"}], ["q"]),
        ({"ticket": "é"}, ['{"ticket": "é"}']),
        ([], ["[]"]),
    ],
)
def test_states_become_messages(state, contents):
    assert [message.content for message in messages_of(state)] == contents
