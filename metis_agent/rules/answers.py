"""What counts as an answer, and what to do with a reply that holds none.

A turn always ends in an answer that says something: a reply without text is asked for once more, and if that
brings nothing either, the turn's own record speaks. Sources: langchain#40444, langchainjs#10090.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage

from metis_agent.types import ToolOutcome

__all__ = ["ask_again", "fallback_answer", "has_answer", "without_calls"]

_CALL_BLOCKS = frozenset({"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call"})
_SILENT_BLOCKS = _CALL_BLOCKS | {"text", "reasoning", "thinking", "redacted_thinking"}
_SHOWN_RESULTS = 3
_SHOWN_CHARACTERS = 2000


def has_answer(message: AIMessage) -> bool:
    """True where a reply holds text, or an image, sound or file."""
    if isinstance(message.content, str):
        return bool(message.content.strip())
    return bool(message.text.strip()) or any(
        isinstance(block, dict) and block.get("type") not in _SILENT_BLOCKS for block in message.content
    )


def without_calls(message: AIMessage) -> AIMessage:
    """The reply with its tool calls taken out, wherever the provider has put them."""
    content: Any = message.content
    if isinstance(content, list):
        content = [block for block in content if not (isinstance(block, dict) and block.get("type") in _CALL_BLOCKS)]
    extra = {
        key: value for key, value in message.additional_kwargs.items() if key not in ("tool_calls", "function_call")
    }
    return message.model_copy(
        update={"content": content, "additional_kwargs": extra, "tool_calls": [], "invalid_tool_calls": []}
    )


def ask_again() -> HumanMessage:
    """What the model is told after a reply without text; it does not stay in the conversation."""
    return HumanMessage(
        "You have not answered yet, and no tool can be called any more. Answer my question now, in plain text, "
        "with what you know. If something is missing, say what."
    )


def fallback_answer(message: AIMessage, reason: str, outcomes: Iterable[ToolOutcome]) -> AIMessage:
    """An answer in the model's stead: that there is none, why, and what the tools had found.

    Args:
        message: the model's last reply; its id and metadata are kept.
        reason: why the turn ended without tools, or an empty string.
        outcomes: the turn's outcomes.
    """
    parts = ["The model gave no answer" + (f" ({reason})." if reason else ".")]
    results = [outcome for outcome in outcomes if outcome.executed][-_SHOWN_RESULTS:]
    if results:
        parts.append("The last tool results were:")
    for outcome in results:
        text = outcome.content
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."
        parts.append(f"- {outcome.tool} ({outcome.status}): {shown}")
    return message.model_copy(update={"content": "\n".join(parts)})
