"""Reading messages: the latest turn of a conversation, and the images in its blocks.

A turn is the last human message and all that has come after it. A checkpointed thread holds many; budgets, the loop
guard, gates and trajectories each look at the latest one only, and this is the one place that says where it begins.

Images are read from content blocks, named, and written here alone. Nothing is decoded, so neither Pillow nor an HTTP
client is needed.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

__all__ = [
    "blocks_of",
    "conversation_images",
    "image_block",
    "image_source",
    "inner_block",
    "is_first_step",
    "provider_name",
    "seconds_of",
    "text_of",
    "turn_of",
]

MessageT = TypeVar("MessageT", bound=BaseMessage)


def turn_of(messages: Sequence[MessageT]) -> Sequence[MessageT]:
    """Messages from the last human one on; all of them where there is no human message."""
    # By type name: an isinstance check on a message class costs ten times as much.
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].type == "human":
            return messages[index:]
    return messages


def is_first_step(turn: Sequence[BaseMessage]) -> bool:
    """True where neither the model nor a tool has said anything in this turn yet, or it has been answered.

    An answered turn is asked again where the same message is sent twice, or where another agent has answered
    and this one goes on from there.
    """
    if turn and turn[-1].type == "ai":
        last = cast(AIMessage, turn[-1])
        return not (last.tool_calls or last.invalid_tool_calls)
    return all(message.type not in ("ai", "tool") for message in turn)


def provider_name(metadata: Mapping[str, Any]) -> str:
    """The model's name, with its version, in a reply's `response_metadata`; empty for none, or a local path."""
    name = str(metadata.get("model_name") or metadata.get("model") or "")
    return "" if name.startswith((".", "/")) or "\\" in name else name


def seconds_of(state: Mapping[str, Any]) -> float:
    """Time that the turn has been at work: gate, model and tools."""
    decided = sum(decision.seconds for decision in state.get("decisions", ()))
    return float(state.get("seconds", 0.0) + decided)


def blocks_of(message: BaseMessage) -> list[Mapping[str, Any]]:
    """The content blocks of a message, unwrapped; none where its content is text."""
    content = message.content
    return [inner_block(block) for block in content if isinstance(block, Mapping)] if isinstance(content, list) else []


def inner_block(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block itself; where LangChain has wrapped one that it does not know, that one."""
    value = block.get("value")
    return value if block.get("type") == "non_standard" and isinstance(value, Mapping) else block


def text_of(message: BaseMessage) -> str:
    """The text of a message, a result of a free-form tool too."""
    return str(message.text) or "".join(
        str(block.get("output") or "") for block in blocks_of(message) if block.get("type") == "custom_tool_call_output"
    )


def image_source(block: object) -> str | bytes | None:
    """Return what `load_image` takes of a content block (LangChain's, OpenAI's or Anthropic's); `None` of others."""
    if not isinstance(block, Mapping) or block.get("type") not in ("image", "image_url"):
        return None
    inner: Any = block.get("source") or block.get("image_url") or block
    if isinstance(inner, str):
        return inner
    if not isinstance(inner, Mapping):
        return None
    encoded = inner.get("base64") or inner.get("data")
    if isinstance(encoded, str):
        return f"data:;base64,{encoded}"
    url = inner.get("url")
    return url if isinstance(url, str) else None


def conversation_images(messages: object) -> dict[str, str | bytes]:
    """Return the images that the user sent and that tools showed, in their order, as tools and models call them.

    Returns:
        `image_1`, `image_2` and so on, each with what `load_image` takes.
    """
    found: list[str | bytes] = []
    for message in messages if isinstance(messages, Sequence) else ():
        if isinstance(message, HumanMessage | ToolMessage) and isinstance(message.content, list):
            found += [source for block in message.content if (source := image_source(block)) is not None]
    return {f"image_{number}": source for number, source in enumerate(found, start=1)}


def image_block(content: bytes, mime_type: str) -> dict[str, Any]:
    """Return the LangChain content block of a file."""
    return {"type": "image", "base64": base64.b64encode(content).decode(), "mime_type": mime_type}
