"""Reading messages: the latest turn of a conversation, the images in its blocks, and calls written as text.

A turn is the last human message and all that has come after it. A checkpointed thread holds many; budgets, the loop
guard, gates and trajectories each look at the latest one only, and this is the one place that says where it begins.

Llama 3 and Qwen2.5-Coder write a call as nothing but its JSON, bare or fenced. Our own chat models read such a reply
wherever tools are on offer, and a turn's rules read that of any other model where a call was required.

Images are read from content blocks, named, and written here alone. Nothing is decoded, so neither Pillow nor an HTTP
client is needed.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, cast
from uuid import uuid4

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

__all__ = [
    "A_CALL_READS",
    "bare_calls",
    "blocks_of",
    "conversation_images",
    "decoded_call",
    "image_block",
    "image_source",
    "inner_block",
    "is_first_step",
    "name_and_arguments",
    "new_call_id",
    "provider_name",
    "seconds_of",
    "text_of",
    "turn_of",
]

MessageT = TypeVar("MessageT", bound=BaseMessage)

# What may stand around a call that is nothing but its JSON: a fence, Llama's mark, or the tag in which Qwen's template
# shows the tools. Several calls may stand one after another, or in a list.
_CALL_WRAPPING = re.compile(
    r"```[\w-]*\s|```|<\|python_tag\|>|</?tools>|</?function_call>|<\|(?:eom_id|eot_id|im_end)\|>|[\s;,]"
)
_CALL_BEGUN = re.compile(r'\{{1,2}\s*"name"\s*:\s*"([^"]*)"\s*,\s*"(?:arguments|parameters)"\s*:')
# Qwen2.5-Coder's template shows a call in doubled braces; its models do as shown, and miscount those that close it.
_DOUBLED = re.compile(r'\{(?=\{\s*"name"\s*:)')
_CLOSING = re.compile(r"[\s}]*")
_CALL_KEYS = {"name", "arguments", "parameters", "type", "id", "function"}

# Not strict: small models break the lines of their code inside of a string.
_DECODER = json.JSONDecoder(strict=False)
A_CALL_READS = 'A call reads <tool_call>{"name": ..., "arguments": {...}}</tool_call>.'


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


def new_call_id() -> str:
    """An id for a call that has none."""
    return f"call_{uuid4().hex}"


def decoded_call(text: str, start: int) -> tuple[Any, int]:
    """The JSON that begins here, and where it ends."""
    doubled = _DOUBLED.match(text, start)
    value, end = _DECODER.raw_decode(text, doubled.end() if doubled else start)
    return value, _CLOSING.match(text, end).end() if doubled else end  # type: ignore[union-attr]


def bare_calls(text: str, offered: Collection[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The calls, well-formed and malformed, of a text that is nothing but JSON which names offered tools; else none."""
    valid: list[dict[str, Any]] = []
    place = 0
    while place < len(text):
        if wrapping := _CALL_WRAPPING.match(text, place):
            place = wrapping.end()
            continue
        begun = _CALL_BEGUN.match(text, place)
        try:
            value, place = decoded_call(text, place)
        except (ValueError, RecursionError) as problem:
            if begun and begun[1] in offered:
                return valid, [{"name": begun[1], "args": text[place:].strip(), "error": f"{problem} {A_CALL_READS}"}]
            return [], []
        for call in value if isinstance(value, list) else [value]:
            if not isinstance(call, dict) or not call.keys() <= _CALL_KEYS:
                return [], []
            try:
                name, arguments = name_and_arguments(call)
            except (ValueError, RecursionError):
                return [], []
            if name not in offered:
                return [], []
            valid.append({"name": name, "args": arguments})
    return valid, []


def name_and_arguments(call: object) -> tuple[str, dict[str, Any]]:
    """The two parts of a decoded call, or ValueError with what is wrong."""
    if not isinstance(call, dict):
        raise ValueError(f"The call is {type(call).__name__}, not an object.")
    function = call.get("function")
    if isinstance(function, dict):  # as OpenAI's API writes a call
        call = function
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    if not isinstance(name, str) or not name:
        raise ValueError(f'"name" is {name!r}, not a non-empty string.')
    if isinstance(arguments, str):
        # The OpenAI style: arguments as JSON in a string.
        arguments = _DECODER.decode(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f'"arguments" is {type(arguments).__name__}, not an object.')
    return name, arguments
