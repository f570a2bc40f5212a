"""An agent with tools that takes two turns and fails a call: what all clients trace."""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.tools import tool

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
