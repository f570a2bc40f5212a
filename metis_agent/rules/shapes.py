"""Provider shapes: how a reply holds calls, thoughts, refusals and searches in each provider's form, and how it ended.

A call is in a reply up to three times: in `tool_calls`, in a content block, and in keywords of the provider's client,
which sends some of these back. Whoever changes one has to change all; it is done here, and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.messages import AIMessage, InvalidToolCall, ToolCall

from metis_agent.messages import blocks_of, inner_block

__all__ = [
    "Ending", "ProviderCall", "ending_of", "from_provider", "has_answer", "joined", "new_answer",
    "open_calls", "provider_calls", "readable", "refusal_in", "rewritten", "shows_others",
    "without_calls", "without_last_thoughts", "without_words",
]  # fmt: skip

AnyCall = ToolCall | InvalidToolCall
Ending = Literal["", "length", "stopped", "paused", "slipped"]
"""How a reply ended: by itself, at the token limit, by the provider's safety rules, in the middle of a search, or in a
call that the provider could not read and has kept to itself."""

_CALLS = {
    "tool_use": "id", "tool_call": "id", "tool_call_chunk": "id", "invalid_tool_call": "id",
    "function_call": "call_id", "custom_tool_call": "call_id",
}  # fmt: skip
"""Types of content blocks that are calls, and where each has its id."""
_THOUGHTS = frozenset({"reasoning", "thinking", "redacted_thinking", "reasoning_content"})
_DRAWN = "image_generation_call"
"""Holds its picture, unless drawing it has failed."""
_MEDIA = frozenset({
    "image", "image_url", "audio", "input_audio", "video", "file", "document", "media", _DRAWN,
    "text-plain", "container_upload",
})  # fmt: skip
_FOR_THE_CALLER = frozenset({
    "mcp_approval_request", "computer_call", "local_shell_call", "apply_patch_call",
})  # fmt: skip
"""What a provider asks of the program that called it: to approve a call, or to act and send the result back."""
_ENDINGS: Mapping[str, Ending] = {
    "length": "length", "max_tokens": "length", "max_output_tokens": "length", "model_length": "length",
    "model_context_window_exceeded": "length", "insufficient_system_resource": "length", "abort": "length",
    "pause_turn": "paused",
    **dict.fromkeys((
        "malformed_function_call", "malformed_tool_use", "unexpected_tool_call", "malformed_response",
        "malformed_model_output",
    ), "slipped"),
    **dict.fromkeys((
        "refusal", "content_filter", "content_filtered", "guardrail_intervened", "safety", "recitation", "blocklist",
        "prohibited_content", "spii", "language", "image_safety", "image_prohibited_content", "image_recitation",
        "model_armor",
    ), "stopped"),
}  # fmt: skip
_GROUNDED_BY = {
    "web_search_queries": "google_search", "image_search_queries": "google_search", "retrieval_queries": "file_search",
}  # fmt: skip
_GROUNDED_IN = {"maps": "google_maps", "retrieved_context": "file_search"}
"""Gemini's searches: what it says of the queries, and of what it has found where it says nothing of these."""
_REPEATED = re.compile(r"(.+?)\1+")
_ENDED_BY = ("finish_reason", "stop_reason", "stopReason", "done_reason")
_KEPT_METADATA = frozenset({*_ENDED_BY, "incomplete_details", "prompt_feedback", "model_name", "model_provider"})
_ID_MAPS = ("__gemini_function_call_thought_signatures__", "__openai_function_call_ids__")
"""Keywords in which clients keep something of each call, by its id."""


@dataclass(frozen=True, kw_only=True)
class ProviderCall:
    """A call of a tool that has run at the model's provider."""

    id: str
    tool: str
    """Its name there; a tool may be offered under a longer one, such as `web_search_preview`."""
    arguments: Mapping[str, Any]
    failed: bool = False
    server: bool = False
    """It is a tool of an MCP server."""


def ending_of(message: AIMessage) -> Ending:
    """How a reply ended, where its provider says so."""
    # A question that was not let through to the model may have been blocked for any reason.
    return "stopped" if _blocked_for(message) else _ENDINGS.get(_reason_of(message).lower(), "")


def from_provider(message: AIMessage) -> bool:
    """Whether a provider's client has made the reply: these note what it cost, and how it ended or whose it is."""
    return bool(message.response_metadata or message.usage_metadata)


def refusal_in(message: AIMessage) -> str | None:
    """What a refusal says, or that the provider has stopped the reply; `None` for any other reply."""
    said = message.additional_kwargs.get("refusal") or ""
    for block in blocks_of(message):
        if block.get("type") == "refusal":
            said += block.get("refusal") or ""
    if said:
        return str(said)
    if ending_of(message) == "stopped":
        return f"The model's provider has stopped the answer ({_reason_of(message)})."
    return None


def has_answer(message: AIMessage) -> bool:
    """True where a reply holds text, an image, sound or file, or what is for the caller to do."""
    if message.text.strip() or "audio" in message.additional_kwargs:
        return True
    kinds = [block.get("type") for block in _items_of(message) if block.get("type") != _DRAWN or block.get("result")]
    return any(kind in _MEDIA or kind in _FOR_THE_CALLER for kind in kinds)


def open_calls(message: AIMessage, answered: Collection[str] = ()) -> list[Any]:
    """All calls of a reply that have no message yet, however malformed, in the order that `rewritten` takes them."""
    calls: list[Any] = [*message.tool_calls, *message.invalid_tool_calls]
    return [call for call in calls if _get(call, "id") not in answered] if answered else calls


def shows_others(message: AIMessage) -> bool:
    """Whether there are calls among a reply's content blocks that the reply does not have."""
    shown = [id_ for id_ in _shown(message) if id_]
    ids = [_get(call, "id") for call in open_calls(message)] if shown else []
    return any(id_ not in ids for id_ in shown)


def rewritten(message: AIMessage, calls: Sequence[AnyCall | None]) -> AIMessage:
    """The reply with other calls in place of its own, wherever they are in it.

    Args:
        message: the reply.
        calls: for each of its calls, valid and invalid ones, what stands in its place; `None` takes it out.

    Returns:
        The same object where nothing changes.
    """
    old = open_calls(message)
    if list(calls) == old and (isinstance(message.content, str) or not _is_amiss(message)):
        return message
    changes = [_Change(was, now) for was, now in zip(old, calls, strict=True)]
    left = [change.now for change in changes if change.now is not None]
    update: dict[str, Any] = {
        "tool_calls": [call for call in left if not _is_invalid(call)],
        "invalid_tool_calls": [call for call in left if _is_invalid(call)],
        "additional_kwargs": _keywords(message.additional_kwargs, changes),
    }
    if isinstance(message.content, list):
        update["content"] = _content(message.content, changes)
    if any(change.now is None or change.now["id"] != _get(change.was, "id") for change in changes):
        # OpenAI's server would go on from what it has stored: the reply as it was.
        metadata = message.response_metadata
        if str(metadata.get("id") or "").startswith("resp_"):
            update["response_metadata"] = {key: value for key, value in metadata.items() if key != "id"}
    return message.model_copy(update=update)


def without_calls(message: AIMessage, keep: Collection[str] = ()) -> AIMessage:
    """The reply with its calls taken out, but those with the ids to `keep`."""
    return rewritten(message, [call if _get(call, "id") in keep else None for call in open_calls(message)])


def readable(message: AIMessage) -> AIMessage:
    """The reply as every provider takes it back: with empty arguments where what it wrote can't be read.

    What is wrong with them is in the message that answers the call.
    """
    if not message.invalid_tool_calls:
        return message
    calls: list[AnyCall | None] = list(message.tool_calls)
    for call in message.invalid_tool_calls:
        calls.append(ToolCall(name=call["name"] or "unnamed", args={}, id=call["id"], type="tool_call"))
    return rewritten(message, calls)


def new_answer(text: str, message: AIMessage, **keywords: Any) -> AIMessage:
    """An answer in the place of a reply that holds none: new text, so a new id, and nothing of the reply's form.

    Streams show a message's id once. Of what the provider has said, it keeps why the reply ended.
    """
    metadata = {key: value for key, value in message.response_metadata.items() if key in _KEPT_METADATA}
    # Other code may look for these; with its id, one would be an item of the reply that is replaced.
    refused: list[Any] = [
        {"type": "refusal", "refusal": block.get("refusal") or ""}
        for block in blocks_of(message)
        if block.get("type") == "refusal"
    ]
    return AIMessage(
        [{"type": "text", "text": text}, *refused] if refused and "refusal" in keywords else text,
        name=message.name, usage_metadata=message.usage_metadata, response_metadata=metadata,
        additional_kwargs=keywords,
    )  # fmt: skip


def joined(first: AIMessage, second: AIMessage) -> AIMessage:
    """A reply that its provider has paused, and what has come after, as one.

    A refusal that ended it stays, but clients do not send it: a thought before it would be last, and be refused.
    """
    if not isinstance(first.content, list) or not isinstance(second.content, list):
        return second
    whole = second.model_copy(update={"content": [*first.content, *second.content]})
    refused = [block for block in blocks_of(second) if block.get("type") == "refusal"]
    if not refused:
        return whole
    said = whole.model_copy(update={"content": [block for block in whole.content if block not in refused]})
    return whole.model_copy(update={"content": [*without_last_thoughts(said).content, *refused]})


def without_last_thoughts(message: AIMessage) -> AIMessage:
    """The reply without thoughts that nothing follows: what they led to is not there any more, or never was."""
    if not isinstance(message.content, list):
        return message
    kept: list[Any] = list(message.content)
    while kept and _says_nothing(kept[-1]):
        kept.pop()
    return message if len(kept) == len(message.content) else message.model_copy(update={"content": kept})


def without_words(message: AIMessage) -> AIMessage:
    """The reply with its calls alone, and with the thoughts that led to them."""
    calls = open_calls(message)
    content: Any = ""
    if isinstance(message.content, list):
        blocks = [{"type": "text", "text": ""} if _is_text(block) else block for block in message.content]
        content = _content(blocks, [_Change(call, call) for call in calls])
    return message.model_copy(update={"content": content})


def provider_calls(message: AIMessage) -> list[ProviderCall]:
    """The calls of a reply that have run at the model's provider."""
    beside = "tool_outputs" in message.additional_kwargs or "grounding_metadata" in message.response_metadata
    if isinstance(message.content, str) and not beside:
        return []
    blocks = _items_of(message)
    failed = _failures_in(blocks)
    calls = [call for block in blocks if (call := _provider_call(block, failed)) is not None]
    grounding = message.response_metadata.get("grounding_metadata")
    for key, tool in _GROUNDED_BY.items():
        for query in _get(grounding, key) or ():
            calls.append(ProviderCall(id=f"{tool}_{len(calls)}", tool=tool, arguments={"query": query}))
    for kind, tool in _GROUNDED_IN.items():
        found = any(_get(chunk, kind) for chunk in _get(grounding, "grounding_chunks") or ())
        if found and all(call.tool != tool for call in calls):
            calls.append(ProviderCall(id=f"{tool}_{len(calls)}", tool=tool, arguments={}))
    return calls


@dataclass(slots=True)
class _Change:
    was: Any
    now: AnyCall | None
    shown: bool = False
    """A content block has been found for it."""


def _content(content: Sequence[Any], changes: Sequence[_Change]) -> list[Any]:
    """The content blocks with other calls, and without thoughts that only led to calls that are gone."""
    kept: list[Any] = []
    thoughts: list[Any] = []
    """Those that nothing has followed yet."""
    led_nowhere = False
    for block in content:
        if isinstance(block, str):
            block = {"type": "text", "text": block}
        kind = inner_block(block).get("type")
        if kind in _THOUGHTS:
            thoughts = [block] if led_nowhere else [*thoughts, block]
            led_nowhere = False
            continue
        if kind == "text" and "args" in block:
            # LangChain's merging of streamed chunks has put a call into the text's block.
            block = {"type": "text", "text": block.get("text") or ""}
        if kind in _CALLS:
            block = _changed(block, changes)
        if block is None or (kind == "text" and not str(block.get("text") or "").strip()):
            # A call that is gone; or blank text, which some providers refuse.
            led_nowhere = True
            continue
        kept += [*thoughts, block]
        thoughts, led_nowhere = [], False
    return kept if led_nowhere else kept + thoughts


def _changed(block: Any, changes: Sequence[_Change]) -> Any:
    """A call's block as its call is now; `None` where that is gone."""
    inner = inner_block(block)
    kind = inner["type"]
    id_, name = inner.get(_CALLS[kind]), inner.get("name")
    same = [change for change in changes if not change.shown and (_get(change.was, "id") or "") == (id_ or "")]
    change = next((change for change in same if _get(change.was, "name") == name), same[0] if same else None)
    if change is None or change.now is None:
        return None
    change.shown = True
    call = change.now
    new: dict[str, Any] = {**inner, _CALLS[kind]: call["id"], "name": call["name"]}
    if call["id"] != id_:
        # A call of another id is another item: under the old item's name a provider would have it twice.
        if kind == "function_call":
            new.pop("id", None)
        if isinstance(inner.get("extras"), Mapping):
            new["extras"] = {key: value for key, value in inner["extras"].items() if key != "item_id"}
    if kind == "custom_tool_call" or _is_invalid(call):
        pass
    elif kind == "function_call":
        if not _parses_to(inner.get("arguments"), call["args"]):
            new["arguments"] = _json(call["args"])
    elif kind == "tool_use":
        new["input"] = call["args"]
        new.pop("partial_json", None)
    else:
        new |= {"type": "tool_call", "args": call["args"]}
        new.pop("error", None)
    return new if inner is block else {**block, "value": new}


def _keywords(keywords: Mapping[str, Any], changes: Sequence[_Change]) -> dict[str, Any]:
    """The client's keywords with other calls."""
    kept = {key: value for key, value in keywords.items() if key not in ("tool_calls", "function_call")}
    now = {_get(change.was, "id"): change.now for change in changes}
    if isinstance(keywords.get("tool_calls"), list):
        calls, left = [], list(changes)
        for raw in keywords["tool_calls"]:
            change = next((it for it in left if (_get(it.was, "id") or "") == (_get(raw, "id") or "")), None)
            if change is not None:
                # Two may have the same id.
                left.remove(change)
            if change is not None and (new := change.now) is not None:
                arguments = new["args"] if _is_invalid(new) else _json(new["args"])
                calls.append({**raw, "id": new["id"], "function": {"name": new["name"], "arguments": arguments}})
        if calls:
            kept["tool_calls"] = calls
    for key in _ID_MAPS:
        if isinstance(keywords.get(key), Mapping):
            kept[key] = {new["id"]: value for id_, value in keywords[key].items() if (new := now.get(id_)) is not None}
    return kept


def _items_of(message: AIMessage) -> list[Mapping[str, Any]]:
    """The content blocks of a reply, and what the old form of OpenAI's Responses has beside them."""
    outputs = message.additional_kwargs.get("tool_outputs")
    beside = [output for output in outputs if isinstance(output, Mapping)] if isinstance(outputs, list) else []
    return [*blocks_of(message), *beside]


def _failures_in(blocks: Sequence[Mapping[str, Any]]) -> set[str]:
    """The ids of the calls whose results are errors; a result that names no call is that of the one before it."""
    failed, latest = set(), ""
    for block in blocks:
        latest = str(block.get("id") or latest)
        is_one = block.get("status") == "error" or block.get("is_error") is True or block.get("outcome") in (2, 3)
        if is_one or str(_get(block.get("content"), "type") or "").endswith("_error"):
            failed.add(str(block.get("tool_use_id") or block.get("tool_call_id") or latest))
    return failed


def _provider_call(block: Mapping[str, Any], failed: Iterable[Any]) -> ProviderCall | None:
    kind, id_ = str(block.get("type") or ""), str(block.get("id") or "")
    if block.get("name") == "mcp_list_tools":
        return None
    if kind in ("server_tool_use", "server_tool_call", "mcp_tool_use"):
        name, arguments = block.get("name"), block.get("args") or block.get("input") or block.get("partial_json")
    elif kind == "executable_code":
        name, arguments = "code_execution", {"code": block.get("executable_code")}
    elif kind == "image" and id_.startswith("ig_"):
        # One that was drawn, in LangChain's form.
        name, arguments = "image_generation", None
    elif kind.endswith("_call") and kind not in _CALLS and kind not in _FOR_THE_CALLER:
        name = block.get("name") or kind.removesuffix("_call")
        key = next((key for key in ("action", "arguments", "queries", "code") if block.get(key)), "")
        arguments = block.get(key) if key in ("action", "arguments", "") else {key: block[key]}
    else:
        return None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {"input": arguments}
    if not isinstance(arguments, Mapping):
        arguments = {} if arguments is None else {"input": arguments}
    broken = id_ in failed or block.get("status") in ("failed", "error")
    server = kind.startswith("mcp_") or name == "remote_mcp"
    return ProviderCall(
        id=id_, tool=str(name or "unnamed"), arguments=dict(arguments), failed=broken, server=server
    )  # fmt: skip


def _blocked_for(message: AIMessage) -> str:
    """Why Gemini has not let a question through to the model."""
    reason = _get(message.response_metadata.get("prompt_feedback"), "block_reason") or ""
    text = str(getattr(reason, "name", reason))
    return "" if text.endswith("UNSPECIFIED") else text


def _reason_of(message: AIMessage) -> str:
    """What the provider says of a reply's end, in its own words."""
    metadata = message.response_metadata
    reasons = [_get(metadata.get("incomplete_details"), "reason"), _blocked_for(message)]
    reasons += [metadata.get(key) for key in _ENDED_BY]
    reason = next((reason for reason in reasons if reason), "")
    text = str(getattr(reason, "name", reason))
    # Where a server says it in several chunks of a stream, LangChain strings them together.
    once = _REPEATED.fullmatch(text)
    return once[1] if once else text


def _is_invalid(call: AnyCall) -> bool:
    return call.get("type") == "invalid_tool_call"


def _is_amiss(message: AIMessage) -> bool:
    """Whether its content holds bare strings, or calls that it does not have, or has once."""
    bare = any(isinstance(block, str) for block in message.content)
    return bare or len(_shown(message)) > len(open_calls(message)) or shows_others(message)


def _shown(message: AIMessage) -> list[Any]:
    """The ids of the calls among its content blocks."""
    return [block.get(_CALLS[block["type"]]) for block in blocks_of(message) if block.get("type") in _CALLS]


def _is_text(block: Any) -> bool:
    return isinstance(block, str) or inner_block(block).get("type") == "text"


def _says_nothing(block: Any) -> bool:
    """A thought, or a blank text, which clients leave out."""
    if isinstance(block, str):
        return not block.strip()
    kind = inner_block(block).get("type")
    return kind in _THOUGHTS or (kind == "text" and not str(block.get("text") or "").strip())


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _parses_to(text: Any, value: Any) -> bool:
    try:
        return bool(json.loads(text) == value)
    except (TypeError, ValueError):
        return False
