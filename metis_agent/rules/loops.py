"""Loop detection: when is a call the same call again, and what is it answered with.

Sources: langgraph#4231, langgraph#6731, deepagents#3583 (models that repeat one call until the recursion
limit), deer-flow#2511 (legitimate repeats must stay possible, tool by tool).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.messages import ToolCall, ToolMessage

from metis_agent.types import ToolOutcome

__all__ = ["CallKey", "call_key", "duplicate_of", "earlier_result", "echo_of"]

CallKey = tuple[str, str]
"""Tool name and canonical arguments."""

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=repr).encode
_REPEATED = "This exact call was already made in this turn and was not run again. Its result was:\n"
_DUPLICATE = "An identical call in the same message, {id}, runs in place of this one; its result counts for both."


def call_key(tool: str, arguments: Mapping[str, Any]) -> CallKey:
    """Two calls are the same where tool and arguments agree, whatever the order of the keys."""
    return tool, _canonical(arguments)


def earlier_result(key: CallKey, outcomes: Iterable[ToolOutcome]) -> ToolOutcome | None:
    """The first executed call of the turn with this key."""
    for outcome in outcomes:
        if outcome.executed and outcome.tool == key[0] and call_key(outcome.tool, outcome.arguments) == key:
            return outcome
    return None


def echo_of(result: ToolMessage, call_id: str) -> ToolMessage:
    """An earlier result as the answer to a repeated call, saying that it is one."""
    content: Any = result.content
    content = _REPEATED + content if isinstance(content, str) else [_REPEATED, *content]
    return ToolMessage(content=content, name=result.name, tool_call_id=call_id, status=result.status)


def duplicate_of(call: ToolCall, call_id: str) -> ToolMessage:
    """The answer to an identical call beside one that runs."""
    return ToolMessage(_DUPLICATE.format(id=call["id"]), name=call["name"], tool_call_id=call_id)
