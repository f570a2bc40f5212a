"""Calls that never got a result, because a run broke off between the two.

Providers refuse a conversation that holds one, so a checkpointed thread would be stuck for good. The state
keeps what happened; only the prompt is mended. Source: langchain#34159.
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage

__all__ = ["with_all_results"]

_LOST = "This call has no result: the run that made it broke off."


def with_all_results(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    """The conversation, with a message for every call that has none; the same object where nothing is missing."""
    asked = sum(
        [len(message.tool_calls) + len(message.invalid_tool_calls) for message in messages if message.type == "ai"]
    )
    if not asked:
        return messages
    answered = {message.tool_call_id for message in messages if message.type == "tool"}
    if len(answered) >= asked:
        return messages
    mended: list[AnyMessage] = []
    for message in messages:
        mended.append(message)
        if isinstance(message, AIMessage):
            for call in [*message.tool_calls, *message.invalid_tool_calls]:
                if call["id"] and call["id"] not in answered:
                    name = call["name"] or "unnamed"
                    mended.append(ToolMessage(_LOST, name=name, tool_call_id=call["id"], status="error"))
                    answered.add(call["id"])
    return mended
