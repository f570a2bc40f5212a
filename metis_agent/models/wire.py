"""The wire between messages and text: how a conversation and its tools go out, and how a model's reply is read.

The tag format of Qwen3 and Metis (arXiv:2604.08545, section 4 of its code's prompts):
`<think>…</think>` or `<reason>…</reason>`, then either `<tool_call>{"name": …, "arguments": {…}}</tool_call>`
(one or several) or `<answer>…</answer>`, or plain text. Llama 3 and Qwen2.5-Coder write a call as nothing but its JSON,
bare or fenced; that is one where it names a tool that was offered. Reading never raises: a model's malformed call is
data (an `invalid_tool_call` with the reason), not a crash. Needs no torch: the vLLM model reads it too.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from metis_agent.errors import ConfigurationError, InputError, UnknownToolError
from metis_agent.messages import A_CALL_READS, bare_calls, decoded_call, name_and_arguments

__all__ = [
    "TOOL_CALL_OPENING",
    "Reply",
    "ToolSchemas",
    "example_call",
    "names_of",
    "parse_reply",
    "resolve_tool_choice",
    "to_chat_dicts",
]


TOOL_CALL_OPENING = "<tool_call>"

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
# A chat template may have opened <think> in the prompt; then the reply holds only its end.
_THINK_TAIL = re.compile(r"\A((?:(?!<think>).)*?)</think>", re.DOTALL)
_REASON = re.compile(r"<reason>(.*?)(?:</reason>|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_TEXT_BLOCKS = ("text", "text-plain")
_IMAGE_BLOCKS = ("image", "image_url")
# Blocks of an assistant message that say nothing to the template: calls travel in `tool_calls`.
_SILENT_BLOCKS = ("tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "reasoning", "thinking")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model's text says."""

    content: str
    """The answer: the inside of `<answer>` where there is one, else the text outside of all blocks."""
    reasoning: str = ""
    """The inside of `<think>` and `<reason>`."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """`{"name", "args"}` of each well-formed call, in order."""
    invalid_tool_calls: tuple[dict[str, Any], ...] = ()
    """`{"name", "args", "error"}` of each malformed one; `args` is its raw text."""


def parse_reply(text: str, *, calls: bool = True, stop: Sequence[str] = (), offered: Collection[str] = ()) -> Reply:
    """Read a model's text.

    Args:
        text: The decoded completion, without its end-of-turn token.
        calls: Whether calls count; with `False` they are plain text, so no call comes out.
        stop: Texts at which the reply ends; they are not part of it.
        offered: Names of the tools that the model was offered. A reply that is nothing but JSON with the name of one
            and its arguments is a call; another name, or JSON beside other text, is an answer.

    Returns:
        The reply. Any string gives one; this never raises.
    """
    for mark in stop:
        text = text.split(mark, 1)[0]
    if "<" not in text and not (calls and offered and "{" in text):
        return Reply(content=text.strip())
    reasoning: list[str] = []
    for pattern in (_THINK_TAIL, _THINK, _REASON):
        text = _cut(text, pattern, reasoning)
    valid: list[dict[str, Any]] = []
    invalid: list[dict[str, Any]] = []
    if calls:
        for match in _CALL.finditer(text):
            _read_call(match[1], closed=bool(match[2]), valid=valid, invalid=invalid)
        text = _CALL.sub("", text)
        if offered and not valid and not invalid:
            valid, invalid = bare_calls(text, offered)
            text = "" if valid or invalid else text
    answer = _ANSWER.search(text)
    return Reply(
        content=(answer[1] if answer else text).strip(),
        reasoning="\n".join(part for part in reasoning if part),
        tool_calls=tuple(valid),
        invalid_tool_calls=tuple(invalid),
    )


def to_chat_dicts(
    messages: Sequence[BaseMessage], *, images: Sequence[Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """Messages as the dicts that chat templates read.

    Args:
        messages: A conversation; content blocks are flattened to text, but for those of a message with images.
        images: For a model that reads images, a name for each image of each message. They become blocks
            `{"type": "image", "image": name}`.

    Raises:
        InputError: A message holds a block that is not text (audio, a file, or an image that has no name), or its
            role is unknown.
    """
    if images is None:
        return [_to_chat_dict(message) for message in messages]
    return [_to_chat_dict(message, named) for message, named in zip(messages, images, strict=True)]


def _cut(text: str, pattern: re.Pattern[str], found: list[str]) -> str:
    found.extend(match[1].strip() for match in pattern.finditer(text))
    return pattern.sub("", text)


def _read_call(raw: str, *, closed: bool, valid: list[dict[str, Any]], invalid: list[dict[str, Any]]) -> None:
    name, error = None, ""
    try:
        call, end = decoded_call(raw, len(raw) - len(raw.lstrip()))
        if raw[end:].strip():
            raise ValueError(f"The call goes on after its JSON: {raw[end:].strip()[:40]!r}.")
        name, arguments = name_and_arguments(call)
    except (ValueError, RecursionError) as problem:
        named = re.search(r'"name"\s*:\s*"([^"]*)"', raw)
        name = named[1] if named else None
        error = f"{problem} {A_CALL_READS}"
        if not closed:
            error = f"The call breaks off before </tool_call>. {error}"
        invalid.append({"name": name, "args": raw.strip(), "error": error})
    else:
        valid.append({"name": name, "args": arguments})


def _to_chat_dict(message: BaseMessage, images: Sequence[str] = ()) -> dict[str, Any]:
    content = _content_of(message, images)
    if isinstance(message, HumanMessage):
        return {"role": "user", "content": content}
    if isinstance(message, ToolMessage):
        named = {"name": message.name} if message.name else {}
        return {"role": "tool", "content": content, **named, "tool_call_id": message.tool_call_id}
    if isinstance(message, SystemMessage):
        return {"role": "system", "content": content}
    if isinstance(message, AIMessage):
        return _assistant_dict(message, content)
    if isinstance(message, ChatMessage):
        return {"role": message.role, "content": content}
    raise InputError(
        f"A message of type {type(message).__name__!r} has no place in a chat template. Roles are system, "
        "user, assistant and tool: use SystemMessage, HumanMessage, AIMessage or ToolMessage."
    )


def _content_of(message: BaseMessage, images: Sequence[str]) -> Any:
    """The text; of a message with images its blocks, text that follows text joined."""
    if isinstance(message.content, str):
        return message.content
    if not images:
        return _flatten(message)
    names, blocks = iter(images), list[dict[str, Any]]()
    for block in message.content:
        if isinstance(block, dict) and block.get("type") in _IMAGE_BLOCKS:
            blocks.append({"type": "image", "image": next(names)})
        else:
            text = _flatten(message.model_copy(update={"content": [block]}))
            if blocks and blocks[-1]["type"] == "text":
                blocks[-1]["text"] += text
            else:
                blocks.append({"type": "text", "text": text})
    return blocks


def _assistant_dict(message: AIMessage, content: Any) -> dict[str, Any]:
    written: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning := message.additional_kwargs.get("reasoning_content"):
        written["reasoning_content"] = reasoning
    if message.tool_calls:
        written["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
    return written


def _flatten(message: BaseMessage) -> str:
    """The text of a message whose content is a list of blocks."""
    parts: list[str] = []
    for block in message.content:
        if isinstance(block, str):
            parts.append(block)
            continue
        kind = block.get("type")
        if kind in _TEXT_BLOCKS:
            parts.append(str(block.get("text", "")))
        elif not (isinstance(message, AIMessage) and kind in _SILENT_BLOCKS):
            raise InputError(
                f"A {message.type} message holds a block of type {kind!r}, which can't be read here. A "
                "text model reads text alone, one with a processor also the images of human and tool messages. Leave "
                "it out, or describe it in words."
            )
    return "".join(parts)


class ToolSchemas:
    """Converts tools, remembering each tool object's schema: agents bind the same tools on every call."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[BaseTool], tuple[str, str], dict[str, Any]]] = {}

    def convert(self, tools: Sequence[Any]) -> list[dict[str, Any]]:
        """OpenAI-style schemas of LangChain tools, functions, pydantic classes or ready schemas."""
        return [self._convert(tool) for tool in tools]

    def _convert(self, tool: Any) -> dict[str, Any]:
        if not isinstance(tool, BaseTool):
            return convert_to_openai_tool(tool)
        label = (tool.name, tool.description)
        known = self._known.get(id(tool))
        # An id can be used again once its tool is gone, hence the look through the weak reference.
        if known is not None and known[0]() is tool and known[1] == label:
            return known[2]
        schema = convert_to_openai_tool(tool)
        key = id(tool)
        self._known[key] = (weakref.ref(tool, lambda _: self._known.pop(key, None)), label, schema)
        return schema


def names_of(tools: Sequence[Mapping[str, Any]] | None) -> frozenset[str]:
    """Names in OpenAI-style schemas."""
    return frozenset([tool["function"]["name"] for tool in tools or ()])


def example_call(schema: Mapping[str, Any], value: str) -> list[dict[str, Any]]:
    """A conversation, as templates read it, that ends in a call of this tool with this value for its arguments."""
    function = schema["function"]
    parameters = function.get("parameters", {})
    required = parameters.get("required") or list(parameters.get("properties", {}))[:1]
    call = {"name": function["name"], "arguments": dict.fromkeys(required, value)}
    return [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
    ]


def resolve_tool_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> str:
    """The choice in one of four forms: "auto", "none", "any", or the name of a tool.

    Args:
        choice: `None`, "auto", "any", "required", "none", a tool's name, a bool (`True` is "any"), or the
            OpenAI form `{"type": "function", "function": {"name": ...}}`.
        tools: The offered schemas.

    Raises:
        UnknownToolError: A name that is not among the tools.
        ConfigurationError: A call is required where no tool is offered.
    """
    if isinstance(choice, Mapping):
        choice = choice.get("function", {}).get("name", choice.get("name"))
    if choice is None or choice is False or choice == "auto":
        return "auto"
    if choice == "none":
        return "none"
    names = [tool["function"]["name"] for tool in tools]
    if choice is True or choice in ("any", "required"):
        if not names:
            raise ConfigurationError(
                f"tool_choice={choice!r} requires a tool call, but no tool is offered. Bind tools, or leave "
                "tool_choice out."
            )
        return "any"
    if choice not in names:
        raise UnknownToolError(
            f'tool_choice={choice!r} is not the name of an offered tool. Use one of {names!r}, "auto", "any" or "none".'
        )
    return str(choice)
