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
    # Trained with its tools in the prompt: a direct answer is then one in which a call is banned.
    policy = build_policy(tokenizer)
    return LocalChatModel(model=policy, tokenizer=tokenizer, max_new_tokens=8, offers_tools_when_direct=True)


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
    assert by_draft.allowed_log_probs is not None
    assert all(own < allowed for own, allowed in zip(by_draft.log_probs, by_draft.allowed_log_probs, strict=True))
    mean = sum(by_draft.allowed_log_probs) / len(by_draft.allowed_log_probs)
    (decision,) = drafted["decisions"]
    assert decision.probabilities["look"] == pytest.approx(1 - math.exp(mean))
    assert 0.01 < decision.probabilities["look"] < 0.99
