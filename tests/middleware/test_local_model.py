"""A model of this process behind the middleware: told to answer, it answers, though it was trained to call."""

from langchain.agents import create_agent

from metis_agent import DraftConfidenceGate, MetisGateMiddleware, NeverGate, ShadowGate
from metis_agent.worlds.almanac.agent import Noise, almanac_model, almanac_tools

TOOLS = list(almanac_tools(noise=Noise(wrong=0.0, error=0.0)))
ASKED = {"messages": [("user", "What is the capital of France?")]}


def test_a_direct_decision_gets_a_direct_answer() -> None:
    state = create_agent(almanac_model(), TOOLS, middleware=[MetisGateMiddleware(NeverGate())]).invoke(ASKED)
    assert [message.type for message in state["messages"]] == ["human", "ai"]
    assert state["messages"][-1].text == "Paris"


def test_a_draft_is_a_direct_answer_with_its_log_probabilities() -> None:
    sure = MetisGateMiddleware(DraftConfidenceGate(threshold=0.02, reading="min"))
    model = almanac_model()
    state = create_agent(model, TOOLS, middleware=[sure]).invoke(ASKED)
    assert state["messages"][-1].text == "Paris"
    assert max(state["decisions"][0].probabilities.values()) < 0.02

    shadow = ShadowGate(DraftConfidenceGate(threshold=0.02, reading="min"))
    watched = create_agent(model, TOOLS, middleware=[MetisGateMiddleware(shadow)])
    for question in ("What is the capital of France?", "What is 4821 * 7310?"):
        watched.invoke({"messages": [("user", question)]})
    assert (shadow.report().calls, shadow.report().calls_saved) == (2, 1)
