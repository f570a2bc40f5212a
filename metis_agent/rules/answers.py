"""The conversation as model and user read it: what is an answer, what stands in for one, and no call without a result.

A turn always ends in an answer that says something: a reply without text is asked for once more, and if that
brings nothing either, the turn's own record speaks. Sources: langchain#40444, langchainjs#10090, langchain#34159.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage

from metis_agent.messages import blocks_of
from metis_agent.rules.shapes import (
    new_answer,
    open_calls,
    readable,
    rewritten,
    shows_others,
)  # fmt: skip
from metis_agent.types import ToolOutcome

__all__ = ["ask_again", "call_again", "fallback_answer", "sendable", "with_all_results", "with_free_results"]

_LOST = "This call has no result: the run that made it broke off."
_SHOWN_RESULTS = 3
_SHOWN_CHARACTERS = 2000


def ask_again(*, structured: bool = False) -> HumanMessage:
    """What the model is told after a reply without text; it does not stay in the conversation."""
    if structured:
        return HumanMessage(
            "You have not answered yet, and no other tool can be called any more. Answer my question now, in the "
            "format that is asked for, with what you know."
        )
    return HumanMessage(
        "You have not answered yet, and no tool can be called any more. Answer my question now, in plain text, "
        "with what you know. If something is missing, say what."
    )


def call_again() -> HumanMessage:
    """What the model is told after a call that its provider could not read; it does not stay in the conversation."""
    return HumanMessage(
        "Your last tool call could not be read. Make it again, with arguments that fit the tool, or answer."
    )


def fallback_answer(message: AIMessage, reason: str, outcomes: Iterable[ToolOutcome]) -> AIMessage:
    """An answer in the model's stead: that there is none, why, and what the tools had found.

    Args:
        message: the model's last reply.
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
    return new_answer("\n".join(parts), message)


def sendable(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    """The conversation as every provider takes it; the same object where nothing is amiss.

    The state keeps what happened; only the prompt is changed.
    """
    messages = _with_own_ids(messages)
    if not any(message.type == "tool" or (message.type == "ai" and open_calls(message)) for message in messages):
        return messages
    messages = with_all_results(messages)
    if any(message.type == "ai" and message.invalid_tool_calls for message in messages):
        messages = [readable(message) if isinstance(message, AIMessage) else message for message in messages]
    return with_free_results(messages)


def _with_own_ids(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    """The conversation with an id for each call that no other call has; the same object where it is so already.

    A thread may have begun without a gate, with a model that gives no ids, or the same ones in every reply; and other
    code may have taken a call out of a reply, and have left its content block.
    """
    seen: set[str] = set()
    for message in messages:
        if message.type == "ai":
            ids = [call["id"] for call in open_calls(message)]
            if not all(ids) or not seen.isdisjoint(ids) or len(set(ids)) < len(ids) or shows_others(message):
                return _numbered(messages)
            seen.update(ids)
    return messages


def _numbered(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    """The same ids in the same place each time: providers keep the prompts that they have read."""
    numbered: list[AnyMessage] = []
    given = {call["id"] for message in messages if message.type == "ai" for call in open_calls(message)}
    seen: set[str] = set()
    waiting: dict[str, list[str]] = {}
    """New ids by old ones, in the order of the calls and of their results."""
    for place, message in enumerate(messages):
        if isinstance(message, AIMessage):
            calls: list[Any] = []
            renamed: dict[str, list[str]] = {}
            for number, call in enumerate(open_calls(message)):
                if call["id"] is None and call in message.invalid_tool_calls:
                    # It could not be read, and no message can answer it.
                    calls.append(None)
                    continue
                old = call["id"] or ""
                new = old if old and old not in seen else f"call_{place}_{number}"
                while new in seen or (new != old and new in given):
                    new += "_"
                seen.add(new)
                renamed.setdefault(old, []).append(new)
                calls.append({**call, "id": new})
            waiting |= renamed
            message = rewritten(message, calls)
            if calls and not any(calls) and not message.content:
                continue  # There is nothing left of it.
        elif isinstance(message, ToolMessage) and (new_ids := waiting.get(message.tool_call_id)):
            message = message.model_copy(update={"tool_call_id": new_ids.pop(0)})
        numbered.append(message)
    return numbered


def with_all_results(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    """The conversation with each call's result right after it; the same object where it is so already.

    Providers refuse a conversation that holds a call without a result, or a result without a call, so a checkpointed
    thread in which a run broke off would be stuck. The state keeps what happened; only the prompt is completed. Some
    models number their calls anew in every message: what follows a call is its result, not whatever has its id.
    """
    waiting: list[Any] = []
    for message in messages:
        kind = message.type
        if kind == "tool":
            if message.tool_call_id not in waiting:  # type: ignore[union-attr]
                return _completed(messages)
            waiting.remove(message.tool_call_id)  # type: ignore[union-attr]
        elif waiting:
            return _completed(messages)
        elif kind == "ai":
            calls = [*message.tool_calls, *message.invalid_tool_calls]  # type: ignore[union-attr]
            waiting = [call["id"] for call in calls if call["id"] is not None]
    return _completed(messages) if waiting else messages


def _completed(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    results = {index: message for index, message in enumerate(messages) if isinstance(message, ToolMessage)}
    completed: list[AnyMessage] = []
    for index, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            continue
        completed.append(message)
        if not isinstance(message, AIMessage):
            continue
        ids = [call["id"] for call in open_calls(message) if call["id"] is not None]
        # Up to the next message that numbers a call alike.
        for later in range(index + 1, len(messages)):
            other = messages[later]
            if isinstance(other, AIMessage) and any(call["id"] in ids for call in open_calls(other)):
                break
            if later in results and results[later].tool_call_id in ids:
                ids.remove(results[later].tool_call_id)
                completed.append(results.pop(later))
        names = {call["id"]: call["name"] or "unnamed" for call in open_calls(message)}
        completed += [ToolMessage(_LOST, name=names[id_], tool_call_id=id_, status="error") for id_ in ids]
    return completed


def with_free_results(messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
    """The conversation with the results of OpenAI's free-form tools in the form that these demand.

    What is said in a tool's place, and what other code says there, is text; OpenAI takes a block of a type of its own.
    """
    free: set[str] = set()
    result: list[AnyMessage] | None = None
    for place, message in enumerate(messages):
        if isinstance(message, AIMessage):
            free |= {
                str(block.get("call_id")) for block in blocks_of(message) if block.get("type") == "custom_tool_call"
            }
        elif isinstance(message, ToolMessage) and message.tool_call_id in free:
            if any(block.get("type") == "custom_tool_call_output" for block in blocks_of(message)):
                continue
            result = list(messages) if result is None else result
            content: list[Any] = [{"type": "custom_tool_call_output", "output": str(message.text)}]
            result[place] = message.model_copy(update={"content": content})
    return messages if result is None else result
