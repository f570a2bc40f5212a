"""The loop guard: when is a call the same call again, and when has a turn stopped getting anywhere.

Sources: langgraph#4231, langgraph#6731, deepagents#3583 (models that repeat one call until the recursion
limit), deer-flow#2511 (legitimate repeats must stay possible, tool by tool).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from metis_agent.types import ToolOutcome

__all__ = ["CallKey", "call_key", "earlier_result", "echo_of", "stuck"]

CallKey = tuple[str, str]
"""Tool name and canonical arguments."""

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=repr).encode
_REPEATED = "This exact call was already made in this turn and was not run again. Its result was:\n"


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


def stuck(turn: Sequence[BaseMessage], outcomes: Iterable[ToolOutcome]) -> str | None:
    """Why the turn has to end now, where its calls lead nowhere; `None` where they still may.

    One message whose calls were all blocked ends it; so does the second one of which no call was run.
    """
    status = {outcome.call_id: outcome.status for outcome in outcomes}
    fruitless = 0
    for message in turn:
        if not isinstance(message, AIMessage):
            continue
        calls = [*message.tool_calls, *message.invalid_tool_calls]
        # A message of another agent, before it handed over, has calls that are none of ours.
        statuses = [status[call["id"]] for call in calls if call["id"] in status]
        if statuses and all(value == "blocked" for value in statuses):
            return "all tool calls of the last message were blocked"
        fruitless += bool(statuses) and all(value in ("blocked", "repeated") for value in statuses)
    return "the same tool calls were only repeated" if fruitless >= 2 else None
