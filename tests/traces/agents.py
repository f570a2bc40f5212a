"""An agent with tools that takes two turns and fails a call: what all clients trace."""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.tools import tool

from metis_agent.traces import steps_of
from tests.fakes import call, calling, model

QUESTION, FOLLOW_UP = "How many people live in Oslo?", "And in Bergen?"
SECRET = "sk-" + "a1b2c3d4" * 4


@tool
def look(query: str) -> str:
    """Look a number up."""
    return {"Oslo": "717,710", "Bergen": "291,940", "key": f"the key is {SECRET}"}[query]


@tool
def convert(amount: str, unit: str) -> str:
    """Convert an amount."""
    return f"{amount} {unit}"


def used(message: AIMessage, input_tokens: int, cached: int = 0) -> AIMessage:
    usage = {"input_tokens": input_tokens, "output_tokens": 5, "total_tokens": input_tokens + 5}
    details = {"input_token_details": {"cache_read": cached}} if cached else {}
    return message.model_copy(
        update={"usage_metadata": {**usage, **details}, "response_metadata": {"model_name": "gpt-x-1"}}
    )


def two_turns() -> Any:
    """The agent; its script: two calls side by side, an answer; one call, an answer."""
    script = [
        used(calling(call("look", id="c1", query="Oslo"), call("convert", id="c2", amount="1", unit="M")), 40, 8),
        used(AIMessage("717,710 people live in Oslo."), 60),
        used(calling(call("look", id="c3", query="Bergen")), 80),
        used(AIMessage("291,940 people live in Bergen."), 90),
    ]
    return create_agent(model(*script), [look, convert], system_prompt="Be brief.")


def converse(agent: Any, config: dict[str, Any]) -> None:
    """Both turns, the second with the first as its history."""
    first = agent.invoke({"messages": [("user", QUESTION)]}, config)
    agent.invoke({"messages": [*first["messages"], ("user", FOLLOW_UP)]}, config)


def check_two_turns(report: Any, runs: Any, name: str) -> Any:
    """What every format of importers says of `converse`; the two turns in order."""
    first, second = sorted(runs, key=lambda run: run.started_at)
    assert (report.format, report.traces, report.trajectories, report.rejected) == (name, 2, 2, 0)
    assert report.tool_calls == 3
    assert (first.question.text, first.answer) == (QUESTION, "717,710 people live in Oslo.")
    assert (second.question.text, second.answer) == (FOLLOW_UP, "291,940 people live in Bergen.")
    assert [message["type"] for message in first.history] == ["system"]
    assert [message["type"] for message in second.history] == ["system", "human", "ai", "tool", "tool", "ai"]
    assert (first.conversation, second.conversation, first.user) == ("t-1", "t-1", "u-1")
    assert first.calls[0].usage == {"input_tokens": 40, "output_tokens": 5, "total_tokens": 45, "input_cache_read": 8}
    assert [(o.call_id, o.tool, o.arguments, o.content, o.status) for o in first.outcomes] == [
        ("c1", "look", {"query": "Oslo"}, "717,710", "ok"),
        ("c2", "convert", {"amount": "1", "unit": "M"}, "1 M", "ok"),
    ]
    assert all(outcome.seconds > 0 for outcome in first.outcomes)
    assert len(steps_of(first)) == 2
    return first, second
