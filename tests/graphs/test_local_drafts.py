"""Drafts by a real model, token by token."""

import asyncio
import math

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

pytest.importorskip("torch")

from metis_agent.agent import create_metis_agent
from metis_agent.gates import DraftConfidenceGate, NeverGate
from metis_agent.models.local import LocalChatModel
from tests.models.conftest import build_policy, build_tokenizer


@tool
def look(query: str) -> str:
    """Look it up."""
    return f"found {query}"


@pytest.fixture(scope="module")
def chat():
    tokenizer = build_tokenizer()
    return LocalChatModel(model=build_policy(tokenizer), tokenizer=tokenizer, max_new_tokens=8)


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_the_draft_is_token_for_token_the_answer_of_a_direct_turn(chat, flavour):
    def turn(gate):
        agent = create_metis_agent(chat, [look], gate=gate)
        question = {"messages": [HumanMessage("Hello world")]}
        return agent.invoke(question) if flavour == "sync" else asyncio.run(agent.ainvoke(question))

    drafted, direct = turn(DraftConfidenceGate(threshold=1)), turn(NeverGate())
    assert drafted["messages"][-1].content == direct["messages"][-1].content
    (by_draft,), (by_answer,) = drafted["calls"], direct["calls"]
    assert (by_draft.node, by_answer.node) == ("draft", "answer")
    assert by_draft.prompt_ids == by_answer.prompt_ids
    assert by_draft.completion_ids == by_answer.completion_ids
    assert by_draft.log_probs == pytest.approx(by_answer.log_probs, abs=1e-4)
    # 1 - the geometric mean of the tokens' probabilities, among the tokens that may be written.
    log_probs = by_draft.allowed_log_probs or by_draft.log_probs  # nothing is banned where no tool is offered
    assert log_probs is not None
    mean = sum(log_probs) / len(log_probs)
    (decision,) = drafted["decisions"]
    assert decision.probabilities["look"] == pytest.approx(1 - math.exp(mean))
    assert 0.01 < decision.probabilities["look"] < 0.99
