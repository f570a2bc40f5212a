"""Anybody's chat message as LangChain writes it: OpenAI's, Anthropic's, LangChain's three forms, GenAI's parts.

Importers hand over what they find; nothing is guessed beyond its form. A message of no known kind is kept as a `chat`
message with its role, a content block of none as `non_standard`, and both are counted.
Sources: OpenAI's Chat Completions and Responses APIs, Anthropic's Messages API, `langchain_core.messages`,
OpenTelemetry's `gen-ai-input-messages.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metis_agent.traces.values import as_json, text_of

__all__ = ["Message", "Unreadable", "messages_of", "reply_of", "tool_definitions"]

Message = dict[str, Any]
"""The fields of a LangChain message, `type` among them; `{"type": type, "data": message}` is its record."""

Unreadable = Counter[str]
"""How many messages or parts of each unknown kind there were."""

_KINDS = {
    "user": "human", "human": "human", "HumanMessageChunk": "human", "HumanMessage": "human",
    "assistant": "ai", "ai": "ai", "model": "ai", "AIMessageChunk": "ai", "AIMessage": "ai",
    "system": "system", "developer": "system", "SystemMessage": "system", "SystemMessageChunk": "system",
    "tool": "tool", "ToolMessage": "tool", "ToolMessageChunk": "tool", "function": "tool", "FunctionMessage": "tool",
}  # fmt: skip
_MARKS = {"role", "type", "lc", "message", "content", "parts", "contents", "tool_calls"}
_ANTHROPIC = ("text", "tool_use", "thinking")
"""Blocks that stand for a whole reply, without a message around them."""
_COMPLETIONS = ("Generation", "GenerationChunk")
_TEXTS = ("text", "input_text", "output_text", "refusal")
_CALLS = ("tool_use", "server_tool_use", "tool_call", "function_call")
_RESULTS = ("tool_result", "tool_call_response", "function_call_output")
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_content")


def messages_of(value: Any, unread: Unreadable) -> list[Message]:
    """Return the messages in any of the forms: a list, one message, a `messages` key around them, a plain string.

    Args:
        value: what a trace gave as input, as objects or as JSON text.
        unread: gets a count for each unknown kind.
    """
    value = as_json(value)
    if isinstance(value, str):
        return [{"type": "human", "content": value}] if value.strip() else []
    if isinstance(value, Mapping):
        for key in ("messages", "input", "prompts"):
            if isinstance(value.get(key), (list, str)) and "role" not in value and "type" not in value:
                system = next((value[name] for name in ("system", "instructions") if value.get(name)), None)
                before = _message({"role": "system", "content": system}, unread) if system and key != "prompts" else []
                return [*before, *messages_of(value[key], unread)]
        return _message(value, unread) if _MARKS & set(value) else _of_fields(value, unread)
    if not isinstance(value, Sequence):
        return []
    found: list[Message] = []
    for item in value:
        if _is_pair(item):  # LangChain's ("user", "hi")
            found += _message({"role": item[0], "content": item[1]}, unread)
        elif isinstance(item, Mapping | list):
            found += messages_of(item, unread)
        elif isinstance(item, str):
            found.append({"type": "human", "content": item})
    return found


def reply_of(value: Any, unread: Unreadable) -> Message | None:
    """Return the model's reply in any of the forms: a message, a completion, LangChain's generations, a string."""
    value = as_json(value)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return {"type": "ai", "content": value}
    if isinstance(value, Mapping):
        for key in ("choices", "generations", "messages", "output", "message", "update", "content"):
            inner = value.get(key)
            if key == "content" and (value.get("role") or value.get("type")):
                break
            if inner and isinstance(inner, list | Mapping):
                reply = reply_of(_first(inner) if key in ("choices", "generations") else inner, unread)
                return None if reply is None else _with_usage(reply, value)
            if key == "output" and isinstance(inner, str):
                return {"type": "ai", "content": inner}
        if isinstance(value.get("text"), str) and value.get("type", _COMPLETIONS[0]) in _COMPLETIONS:
            return {"type": "ai", "content": value["text"]}  # of a model that completes texts
    elif isinstance(value, list) and any(
        isinstance(part, Mapping) and part.get("type") in _ANTHROPIC for part in value
    ):
        value = {"role": "assistant", "content": value}
    found = [message for message in messages_of(value, unread) if message["type"] in ("ai", "chat")]
    if len(found) < 2:
        return found[0] if found else None
    return _joined(found)  # OpenAI's Responses API: texts and calls are items of their own


def tool_definitions(value: Any) -> list[dict[str, Any]]:
    """Return tool definitions in OpenAI's form; Anthropic's and GenAI's are turned into it, bare names kept."""
    value = as_json(value)
    if isinstance(value, Mapping):
        value = [{"name": name, **item} if isinstance(item, Mapping) else item for name, item in value.items()]
    found: list[dict[str, Any]] = []
    for item in value if isinstance(value, list | tuple) else ():
        item = as_json(item)
        if isinstance(item, Mapping) and isinstance(as_json(item.get("json_schema")), Mapping):
            item = as_json(item["json_schema"])
        if isinstance(item, str):
            found.append({"type": "function", "function": {"name": item}})
        elif isinstance(item, Mapping) and isinstance(item.get("function"), Mapping):
            found.append({"type": "function", "function": dict(item["function"])})
        elif isinstance(item, Mapping) and item.get("name"):
            function = {"name": item["name"], "description": item.get("description") or ""}
            schema = item.get("parameters") or item.get("input_schema") or item.get("inputSchema")
            found.append({"type": "function", "function": function | ({"parameters": schema} if schema else {})})
    return found


def _of_fields(value: Mapping[str, Any], unread: Unreadable) -> list[Message]:
    """The arguments of a function that asks a model: its only text is what the user asked."""
    texts = [text for text in value.values() if isinstance(text, str) and text.strip()]
    if len(texts) == 1:
        return [{"type": "human", "content": texts[0]}]
    if value:
        unread["input of no known form"] += 1
    return []


def _message(item: Mapping[str, Any], unread: Unreadable) -> list[Message]:
    """One message; several where tool results stand in one."""
    if item.get("lc") == 1 and isinstance(item.get("kwargs"), Mapping):
        item = {"type": str((item.get("id") or [""])[-1]), **item["kwargs"]}
    elif isinstance(item.get("data"), Mapping) and isinstance(item.get("type"), str):
        item = {"type": item["type"], **item["data"]}
    elif isinstance(item.get("message"), Mapping) and "role" not in item:
        item = item["message"]
    kind = item.get("type")
    if kind in _CALLS and "role" not in item:
        call = _call(item)
        return [_ai("", [call])]
    if kind in _RESULTS and "role" not in item:
        return [_result(item, unread)]
    if kind in _THOUGHTS and "role" not in item:
        return [_ai([_block(item, unread)], [])]
    role = item.get("role") or kind
    name = _KINDS.get(str(role))
    if name is None:
        unread[f"message {role!r}"] += 1
        return [{"type": "chat", "role": str(role), "content": _text_or_json(item.get("content"))}]
    parts = item.get("content", item.get("parts"))
    if parts is None and "contents" in item:
        parts = [part.get("message_content", part) if isinstance(part, Mapping) else part for part in item["contents"]]
    content, calls, results = _content(parts, unread)
    if name == "tool" and not (results and not content):
        call_id = str(item.get("tool_call_id") or item.get("id") or "")
        failed = "error" if item.get("status") == "error" else None
        answer = {"type": "tool", "content": content, "tool_call_id": call_id}
        return [_filled(answer, name=item.get("name"), status=failed)]
    if results and content:  # said with results: no turn of its own
        results[-1]["content"] = [*_blocks(results[-1]["content"]), *_blocks(content)]
        content = ""
    if results:
        return results
    if name != "ai":
        return [_filled({"type": name, "content": content}, name=item.get("name"), id=item.get("id"))]
    written = item.get("tool_calls") or [*calls, *_legacy(item)]
    return [_with_usage(_ai(content, [_call(call) for call in written], item), item)]


def _ai(content: Any, calls: Iterable[Message], item: Mapping[str, Any] | None = None) -> Message:
    item = item or {}
    calls = [
        *calls,
        *({**dict(bad), "error": bad.get("error") or "invalid"} for bad in item.get("invalid_tool_calls") or ()),
    ]
    message: Message = {"type": "ai", "content": content}
    message["tool_calls"] = [call for call in calls if "error" not in call]
    message["invalid_tool_calls"] = [call for call in calls if "error" in call]
    usage = item.get("usage_metadata")
    return _filled(
        message, name=item.get("name"), id=item.get("id"), usage_metadata=usage if _is_usage(usage) else None
    )


def _is_usage(usage: Any) -> bool:
    """True for token counts as LangChain takes them; others are read by `usage_of`, but are not part of a message."""
    if not isinstance(usage, Mapping):
        return False
    details = [usage.get(f"{side}_token_details") or {} for side in ("input", "output")]
    counts = [usage.get(f"{side}_tokens") for side in ("input", "output", "total")]
    whole = all(isinstance(detail, Mapping) for detail in details)
    return whole and all(type(count) is int for count in (*counts, *(n for detail in details for n in detail.values())))


def _call(item: Mapping[str, Any]) -> Message:
    """A tool call as LangChain has it; arguments that are no JSON object make it an invalid one."""
    function = next((item[key] for key in ("function", "tool_call") if isinstance(item.get(key), Mapping)), item)
    if isinstance(function.get("function"), Mapping):
        item, function = {**item, "id": function.get("id") or item.get("id")}, function["function"]
    given: Any = next((function[key] for key in ("args", "arguments", "input") if function.get(key) is not None), {})
    arguments = as_json(given) if isinstance(given, str) and given.strip() else given or {}
    id_ = item.get("call_id") or item.get("id") or None
    call = {"name": str(function.get("name") or ""), "id": None if id_ is None else str(id_)}
    if isinstance(arguments, Mapping):
        return {**call, "args": dict(arguments), "type": "tool_call"}
    error = "the arguments are no JSON object"
    return {**call, "args": _text_or_json(given), "type": "invalid_tool_call", "error": error}


def _legacy(item: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """OpenAI's `function_call` of 2023, which had no id."""
    call = item.get("function_call") or (item.get("additional_kwargs") or {}).get("function_call")
    return [call] if isinstance(call, Mapping) else list((item.get("additional_kwargs") or {}).get("tool_calls") or ())


def _content(value: Any, unread: Unreadable) -> tuple[str | list[Any], list[Mapping[str, Any]], list[Message]]:
    """Content without calls and results, which are given apart; text alone is a string."""
    if value is None or isinstance(value, str):
        return value or "", [], []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence):
        return text_of(value), [], []
    blocks: list[Any] = []
    calls: list[Mapping[str, Any]] = []
    results: list[Message] = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _CALLS:
            calls.append(part)
        elif kind in _RESULTS:
            results.append(_result(part, unread))
        elif kind != "input_json_delta":  # what streaming leaves of a call
            blocks.append(_block(part, unread))
    if all(isinstance(block, str) or block.get("type") == "text" for block in blocks):
        return "".join(block if isinstance(block, str) else str(block["text"]) for block in blocks), calls, results
    return blocks, calls, results


def _block(part: Any, unread: Unreadable) -> Any:
    """A content block in LangChain's form."""
    if not isinstance(part, Mapping):
        return {"type": "text", "text": text_of(part)}
    kind = part.get("type")
    if kind in _TEXTS or (kind is None and ("text" in part or "content" in part)):
        text = next((part[key] for key in ("text", "content", "refusal") if part.get(key) is not None), "")
        return {"type": "text", "text": text_of(text)}
    if kind in _THOUGHTS:
        thought = part.get("thinking") or part.get("content") or part.get("reasoning") or part.get("summary") or ""
        return {"type": "reasoning", "reasoning": thought if isinstance(thought, str) else _text_or_json(thought)}
    if kind in ("image_url", "input_image") or (kind == "image" and isinstance(part.get("image"), Mapping)):
        place = part.get("image_url") or part.get("image") or {}
        url = place if isinstance(place, str) else (place.get("url") or (place.get("image") or {}).get("url") or "")
        return {"type": "image_url", "image_url": {"url": str(url)}}
    if kind in ("image", "document") and isinstance(part.get("source"), Mapping):
        source = part["source"]
        if source.get("type") == "base64":
            place = {"base64": source.get("data"), "mime_type": source.get("media_type")}
        else:
            place = {"url": source.get("url")} if source.get("url") else {"text": _text_or_json(source.get("data"))}
        return {"type": "image" if kind == "image" else "file", **place}
    if kind in ("blob", "binary"):
        mime = str(part.get("mime_type") or part.get("media_type") or "")
        modality = part.get("modality") or mime.partition("/")[0]
        kind = modality if modality in ("image", "audio", "video") else "file"
        return {"type": kind, "base64": part.get("content"), "mime_type": mime}
    if kind in ("uri", "image-url"):
        return {"type": str(part.get("modality") or "image"), "url": part.get("uri") or part.get("url")}
    if kind in ("image", "audio", "video", "file", "input_audio", "input_file", "document", "non_standard"):
        return dict(part)
    unread[f"part {kind!r}"] += 1
    return {"type": "non_standard", "value": dict(part)}


def _result(part: Mapping[str, Any], unread: Unreadable) -> Message:
    given = next((part[key] for key in ("content", "response", "result", "output") if part.get(key) is not None), "")
    plain = isinstance(given, list) and all(isinstance(block, Mapping) and "type" in block for block in given)
    content = _content(given, unread)[0] if plain else text_of(given)
    call_id = part.get("tool_use_id") or part.get("call_id") or part.get("id") or ""
    failed = part.get("is_error") or part.get("status") == "error"
    message = {"type": "tool", "content": content, "tool_call_id": str(call_id)}
    return _filled(message, name=part.get("name"), status="error" if failed else None)


def _with_usage(message: Message, around: Mapping[str, Any]) -> Message:
    """The reply, with the usage that stands beside it in a completion."""
    usage = around.get("usage") or around.get("usage_metadata")
    if isinstance(usage, Mapping) and "usage" not in message:
        message = {**message, "usage": dict(usage)}
    model = around.get("model") or (around.get("response_metadata") or {}).get("model_name")
    return {**message, "model": model} if isinstance(model, str) and "model" not in message else message


def _joined(replies: Sequence[Message]) -> Message:
    blocks = [block for reply in replies for block in _blocks(reply["content"])]
    joined = _ai(_content(blocks, Counter())[0], ())
    for key in ("tool_calls", "invalid_tool_calls"):
        joined[key] = [call for reply in replies for call in reply.get(key, ())]
    return joined


def _blocks(content: Any) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content)


def _first(value: Any) -> Any:
    while isinstance(value, list) and value:
        value = value[0]
    return value


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str) and item[0] in _KINDS


def _filled(message: Message, **fields: Any) -> Message:
    named = {key: str(value) if key in ("id", "name") else value for key, value in fields.items() if value is not None}
    return {**message, **named}


def _text_or_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
