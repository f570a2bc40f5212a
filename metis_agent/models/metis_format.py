"""The conversation as the published Metis models were trained on it, which is not what their chat template makes of it.

Beside `wire`, which reads what such a model writes: `<reason>…</reason>`, then either
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, where it stops, or `<answer>…</answer>`. Here is the way to the
model: the tools stand in the system prompt, a reply goes back as it was written, and an observation is a user's turn,
its images after its text or where the tool put them. `ServedChatModel(wire="metis")` uses it.

Source: the prompts of the data set Accio-Lab/Metis-RL, and the tool server and agent loop of Accio-Lab/Metis at 84fd45e
(arXiv:2604.08545). The words of the prompt are ours; where the system message names `<tool_call>` itself, as the
published prompt does, it is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage

from metis_agent.models.wire import TOOL_CALL_OPENING, names_of, parse_reply

__all__ = ["AS_WRITTEN", "CALL_ENDING", "metis_prompt", "to_metis_turns", "up_to_call"]

CALL_ENDING = "</tool_call>"
"""A reply ends here, and the tool's turn begins."""
AS_WRITTEN = "as_written"
"""Key of `AIMessage.additional_kwargs` for the reply's own text, so that it goes back token for token."""

_HEAD = """\
You answer questions about texts and images, rightly and with as few tool calls as that takes.

# Tools
Call one only where it tells you what you can't see, work out or recall with confidence yourself."""
_FOOT = """\
# Replies
Begin with <reason>...</reason>: what you know, and what is missing. Then exactly one of
- a call, as above, after which you wait for its result; or
- <answer>...</answer>, the answer alone, as soon as you are confident of it."""


def metis_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system prompt for these tools.

    Args:
        tools: OpenAI-style schemas. A call is shown with the arguments that it needs, so that a search by the
            question's own image is `image_search` with none.
    """
    return "\n\n".join([_HEAD, *map(_described, tools), _FOOT])


def to_metis_turns(messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]] = ()) -> list[BaseMessage]:
    """The conversation as system, user and assistant turns alone.

    Args:
        messages: The conversation.
        tools: What is offered; described in front of the system message, unless that names `<tool_call>` already.
    """
    system = [message for message in messages if isinstance(message, SystemMessage)]
    turns: list[BaseMessage] = [*system]
    if tools and not any(TOOL_CALL_OPENING in str(message.text) for message in system):
        own = "\n\n".join(str(message.text) for message in system)
        turns = [SystemMessage("\n\n".join(part for part in (metis_prompt(tools), own) if part))]
    observed: list[Any] = []
    for message in messages:
        if isinstance(message, ToolMessage):
            # Several results of one reply are one turn.
            if observed:
                turns.pop()
            observed = [*observed, *_blocks(message.content)]
            turns.append(HumanMessage(observed))
            continue
        observed = []
        if isinstance(message, AIMessage):
            turns.append(AIMessage(_written(message, names_of(tools))))
        elif not isinstance(message, SystemMessage):
            turns.append(message)
    return [_plain(turn) for turn in turns]


def up_to_call(text: str) -> str:
    """The reply without what stands after its first call: the model can't know the result, whatever it says of it."""
    head, ending, _ = text.partition(CALL_ENDING)
    return head + ending


def _described(tool: Mapping[str, Any]) -> str:
    function = tool["function"]
    parameters = function.get("parameters") or {}
    needed = {name: "..." for name in parameters.get("properties", {}) if name in parameters.get("required", ())}
    call = json.dumps({"name": function["name"], "arguments": needed}, ensure_ascii=False)
    said = str(function.get("description") or "").strip()
    return f"## {function['name']}\n{said}\n{TOOL_CALL_OPENING}{call}{CALL_ENDING}"


def _written(message: AIMessage, offered: frozenset[str]) -> str:
    """The reply's own text; what was made otherwise, or changed since, is written anew from its parts."""
    text = message.additional_kwargs.get(AS_WRITTEN)
    calls = [(call["name"], call["args"]) for call in message.tool_calls]
    if isinstance(text, str):
        read = parse_reply(text, offered=offered).tool_calls
        if [(call["name"], call["args"]) for call in read] == calls:
            return text
    reasoning, content = message.additional_kwargs.get("reasoning_content"), str(message.text)
    parts = [f"<reason>{reasoning}</reason>"] if reasoning else []
    if calls:
        parts += [content] if content else []
        parts += [
            TOOL_CALL_OPENING + json.dumps({"name": name, "arguments": args}, ensure_ascii=False) + CALL_ENDING
            for name, args in calls
        ]
    else:
        parts.append(f"<answer>{content}</answer>")
    return "\n".join(parts)


def _blocks(content: str | list[Any]) -> list[Any]:
    blocks = [content] if isinstance(content, str) else content
    return [{"type": "text", "text": block} if isinstance(block, str) else block for block in blocks]


def _plain(turn: BaseMessage) -> BaseMessage:
    """Blocks of text alone as one text: every server takes that."""
    if not isinstance(turn, HumanMessage) or isinstance(turn.content, str):
        return turn
    if any(not isinstance(block, str) and block.get("type") != "text" for block in turn.content):
        return turn
    texts = [block if isinstance(block, str) else str(block["text"]) for block in turn.content]
    return HumanMessage("\n".join(texts))
