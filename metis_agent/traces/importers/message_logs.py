"""Message logs as JSONL: OpenAI's, Anthropic's and LangChain's, one conversation a line or one request a line.

OpenAI: a conversation is `{"messages": [...]}`, as for fine-tuning, with `tools` and any id beside. A request is what
was sent with what came back: `{"request": {...}, "response": {...}}`, or the request's fields with `response` or
`choices` beside, of Chat Completions or Responses; lines of the batch API too, and streamed replies as their chunks.
Requests that go on from each other are joined to conversations by their messages; where the API keeps those, by the
`conversation`, or by `previous_response_id` if the response that it names stands before them in the file. Messages that
stand on lines of their own are joined by the conversation that they name.

Anthropic: as OpenAI's, in the form of the Messages API: `system` beside the messages, calls as `tool_use` blocks,
results as `tool_result` blocks of a user's message, tools with an `input_schema`.

LangChain: conversations in any of the three forms that it writes, `message_to_dict` (`type` and `data`), `dumpd` (`lc`,
`id`, `kwargs`) and `model_dump` (flat, with `type`); as a list or under `messages`, such as the state that a LangGraph
agent returns.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from metis_agent.errors import InputError
from metis_agent.traces.messages import Message, messages_of, reply_of, tool_definitions
from metis_agent.traces.reading import BadRecord, Record, records_of
from metis_agent.traces.registry import Importer, ModelSpan, Trace
from metis_agent.traces.values import as_json, elements_of, time_of, usage_of

__all__ = ["Anthropic", "LangChain", "MessageLog", "OpenAI"]

_IDS = ("conversation_id", "session_id", "thread_id", "chat_id", "conversation", "session", "id", "custom_id")
_USERS = ("user_id", "user", "safety_identifier")
_FEEDBACK = ("reward", "score", "rating", "feedback", "thumb")
_REQUEST = ("request", "body", "request_body", "input_body", "params", "kwargs")
_REPLY = ("response", "response_body", "completion", "output_message", "choices", "output")
_ENDS = tuple(f"response.{end}" for end in ("completed", "incomplete", "failed", "cancelled"))
"""Events of the Responses API that bring the whole response."""
_SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


class MessageLog(Importer):
    """What OpenAI's and Anthropic's logs have in common: conversations and requests."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        """By the id of a response in the file that is read: the key of its request."""

    def parts(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A conversation by its id or its content; a request by its conversation's id or its opening."""
        request, reply = _split(record)
        if _is_message(record) and (conversation := _first(record, _IDS[:-2])):
            yield conversation, record
            return
        if not isinstance(request.get("messages", request.get("input")), list | str):
            if "role" in record:
                raise InputError('a message by itself; a conversation is {"messages": [...]} on one line')
            raise InputError("no messages, and no request with messages")
        named = _named(record, request)
        if reply is None:
            yield named or _first(record, ("id",)) or _digest(request["messages"]), record
            return
        body = _body(reply)
        key = named or self._keys.get(_previous(request, body)) or _digest(_opening(request))
        if body.get("object") == "response" and body.get("id"):
            self._keys[str(body["id"])] = key
        yield key, record

    def traces(self, key: str, parts: Sequence[Mapping[str, Any]]) -> Iterable[Trace]:
        """A trace for each conversation; one for all requests of a key, whose threads are conversations."""
        if said := [part for part in parts if _is_message(part)]:
            yield self._of_conversation(key, {**said[0], "messages": [*_each_once(said)]})
        parts = [part for part in parts if not _is_message(part)]
        requests = [part for part in parts if _split(part)[1] is not None]
        if requests:
            yield self._of_requests(key, requests)
        seen: set[str] = {""} if said else set()
        for part in parts:
            if _split(part)[1] is not None:
                continue
            digest = _digest(part["messages"])
            if digest in seen:
                continue  # the same line twice
            trace = self._of_conversation(key if not seen else f"{key}-{digest}", part)
            seen.add(digest)
            yield trace

    def _of_conversation(self, key: str, record: Mapping[str, Any]) -> Trace:
        trace = self._trace(key, record)
        trace.every_turn = True
        trace.messages = [message for some in self._read(record, trace) for message in some]
        trace.definitions = tool_definitions(record.get("tools") or record.get("functions"))
        trace.model = str(record.get("model") or "")
        trace.start = time_of(record.get("created_at") or record.get("created") or record.get("timestamp"))
        return trace

    def _of_requests(self, key: str, records: Sequence[Mapping[str, Any]]) -> Trace:
        named = any(_named(record, _split(record)[0]) for record in records)
        trace = self._trace(key, records[0])
        trace.conversation = key if named else ""
        trace.every_thread = not named
        seen: set[str] = set()
        kept: dict[str, list[Message]] = {}  # what the API itself remembers, by response and by conversation
        for record in records:
            request, given = _split(record)
            digest = _digest([request.get("messages", request.get("input")), given])
            if digest in seen:
                trace.odd["span that came twice"] += 1
                continue
            seen.add(digest)
            body = _body(given)
            error = body.get("error") or record.get("error")
            reply = None if error else reply_of(body, trace.odd)
            previous, held = _previous(request, body), _held(request)
            if previous and previous not in kept:
                trace.odd["request that names the one before by its id alone"] += 1
            system, said = self._read(request, trace)
            said = [*kept.get(previous or held, ()), *said]
            if reply is not None:
                kept |= {id_: [*said, reply] for id_ in (str(body.get("id") or ""), held) if id_}
            start = time_of(
                record.get("start_time")
                or record.get("created_at")
                or record.get("timestamp")
                or body.get("created")
                or body.get("created_at")
            )
            duration = record.get("duration") or record.get("latency") or 0.0
            end = time_of(record.get("end_time")) or (start + float(duration) if start and duration else None)
            trace.models.append(
                ModelSpan(
                    id=digest, input=[*system, *said], output=reply,
                    model=str(body.get("model") or request.get("model") or ""),
                    usage=usage_of(body.get("usage") or record.get("usage")), error=str(error or ""),
                    tools=tool_definitions(request.get("tools") or request.get("functions")), start=start, end=end,
                    sampling={name: request[name] for name in _SAMPLING if request.get(name) is not None},
                )
            )  # fmt: skip
        return trace

    def _trace(self, key: str, record: Mapping[str, Any]) -> Trace:
        metadata = _mapping(record.get("metadata"))
        scores = [
            {"key": name, "score": float(record[name])}
            for name in _FEEDBACK
            if isinstance(record.get(name), int | float)
        ]
        kept = {name: record[name] for name in ("task_id", "trial") if name in record}
        user = _first(record, _USERS) or _first(metadata, _USERS)
        return Trace(
            id=key, source=self.name, user=user, feedback=scores, conversation=_first(record, _IDS[:-2]), metadata=kept
        )

    def _read(self, request: Mapping[str, Any], trace: Trace) -> tuple[list[Message], list[Message]]:
        """What stands beside the messages, and they."""
        system = request.get("system") or request.get("instructions")
        said = messages_of(request.get("messages", request.get("input")), trace.odd)
        return messages_of([{"role": "system", "content": system}] if system else [], trace.odd), said


class OpenAI(MessageLog):
    """Logs of OpenAI's APIs, and of all that speak like them."""

    name = "openai"
    title = "OpenAI messages, one conversation or one request a line"
    source = (
        "https://platform.openai.com/docs/api-reference/chat, https://platform.openai.com/docs/api-reference/responses"
    )
    versions = "Chat Completions v1, Responses v1, openai 1 to 3"

    def records(self, place: str, skip: int) -> Iterator[Record | BadRecord]:
        """As ever; those to be skipped are looked through for the responses that later requests go on from."""
        self._keys.clear()
        for record in records_of(place):
            if record.number > skip:
                yield record
            elif isinstance(record, Record):
                for inner in elements_of(record.value):
                    with suppress(InputError, LookupError, TypeError, ValueError, AttributeError):
                        list(self.parts(inner))
        self._keys.clear()

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """Messages with roles, in the record or in its request."""
        request, reply = _split(record)
        said = request.get("messages", request.get("input"))
        first = next((item for item in said if isinstance(item, Mapping)), {}) if isinstance(said, list) else {}
        known = "role" in first or (_is_message(record) and bool(_first(record, _IDS[:-2])))
        answered = isinstance(said, str | list) and _mapping(reply).get("object") in ("response", "chat.completion")
        return (known or answered) and not {"run_type", "traceId", "trace_id"} & set(record)


def _split(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
    """Request and reply; the reply is `None` where the record is a conversation."""
    request = next((_mapping(record[name]) for name in _REQUEST if _mapping(record.get(name))), record)
    reply = next((record[name] for name in _REPLY if record.get(name)), None)
    return request, reply


def _named(record: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """The conversation that a request says it is of; empty where it says none."""
    return _first(record, _IDS[:-2]) or _first(_mapping(request.get("metadata")), _IDS[:-2]) or _held(request)


def _held(request: Mapping[str, Any]) -> str:
    """The conversation that the Responses API keeps, and reads before the input."""
    held = request.get("conversation") if "input" in request else None
    return str(held.get("id") or "") if isinstance(held, Mapping) else str(held or "")


def _previous(request: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """The response that a request goes on from, where the Responses API keeps it."""
    return str(request.get("previous_response_id") or body.get("previous_response_id") or "")


def _body(reply: Any) -> Mapping[str, Any]:
    """A reply as one completion or message, however it was logged."""
    given = as_json(reply)
    body = _whole(_mapping(given).get("body") or given)
    if isinstance(body, Mapping):
        return body
    return {"choices": body} if _is_choices(body) else {"output": body}


def _is_message(record: Mapping[str, Any]) -> bool:
    """A message on a line of its own."""
    return isinstance(record.get("role"), str) and not {"messages", "request", "response"} & set(record)


def _each_once(said: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Lines that stand twice, once; known by an id or a time of their own, since people do say things twice."""
    seen: set[str] = set()
    for message in said:
        mark = (
            _digest(message) if {"id", "message_id", "created_at", "timestamp", "tool_call_id"} & set(message) else ""
        )
        if not mark or mark not in seen:
            yield message
        seen.add(mark)


def _is_choices(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and "message" in _mapping(value[0])


def _whole(body: Any) -> Any:
    """A reply that was logged as the chunks of its stream, or as the lines of it, as one completion."""
    if isinstance(body, str) and body.lstrip().startswith(("data:", "event:")):
        body = [as_json(line.removeprefix("data:").strip()) for line in body.splitlines() if line.startswith("data:")]
    chunks = [chunk for chunk in body if isinstance(chunk, Mapping)] if isinstance(body, list) else []
    for chunk in chunks:
        if chunk.get("type") in _ENDS:
            return chunk.get("response")
    if chunks and all(str(chunk.get("type")).startswith("response.") for chunk in chunks):
        return {"error": "the stream broke off"}
    if any(chunk.get("type") == "message_start" for chunk in chunks):
        return _of_events(chunks)
    if not any("delta" in _mapping(choice) for chunk in chunks for choice in chunk.get("choices") or ()):
        return body
    text, calls = "", dict[int, dict[str, Any]]()
    whole: dict[str, Any] = {}
    for chunk in chunks:
        whole |= {name: chunk[name] for name in ("id", "model", "created", "usage") if chunk.get(name) is not None}
        for delta in (_mapping(_mapping(choice).get("delta")) for choice in (chunk.get("choices") or ())[:1]):
            text += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                kept = calls.setdefault(call.get("index", 0), {"id": None, "function": {"name": "", "arguments": ""}})
                kept["id"] = call.get("id") or kept["id"]
                for name in ("name", "arguments"):
                    kept["function"][name] += _mapping(call.get("function")).get(name) or ""
    said = {"role": "assistant", "content": text, "tool_calls": [calls[index] for index in sorted(calls)]}
    return {**whole, "choices": [{"message": said}]}


def _of_events(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The message that Anthropic's stream builds up, block by block."""
    message: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    for event in events:
        delta = _mapping(event.get("delta"))
        message |= _mapping(event.get("message"))
        if event.get("type") == "error":
            message["error"] = event.get("error") or "the stream broke off"
        if event.get("usage"):
            message["usage"] = {**_mapping(message.get("usage")), **_mapping(event["usage"])}
        if event.get("type") == "content_block_start":
            blocks[event.get("index", 0)] = dict(_mapping(event.get("content_block")))
        elif event.get("type") == "content_block_delta":
            block = blocks.setdefault(event.get("index", 0), {"type": "text"})
            for name in {"text", "thinking", "partial_json"} & set(delta):
                block[name] = (block.get(name) or "") + delta[name]
    written = [blocks[index] for index in sorted(blocks)]
    for block in written:
        if block.get("partial_json"):
            block["input"] = block.pop("partial_json")
    return {**message, "content": written}


def _opening(request: Mapping[str, Any]) -> Any:
    """What requests of one conversation share, however they write it: the messages up to the first user's."""
    system = [request.get(name) or "" for name in ("system", "instructions")]
    said = messages_of(request.get("messages", request.get("input")), Counter())
    asked = next((place for place, message in enumerate(said) if message["type"] == "human"), 0)
    before = [*(messages_of({"role": "system", "content": it}, Counter())[0] for it in system), *said[: asked + 1]]
    return [(message["type"], message["content"]) for message in before]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _mapping(value: Any) -> Mapping[str, Any]:
    value = as_json(value)
    return value if isinstance(value, Mapping) else {}


def _first(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((str(values[key]) for key in keys if isinstance(values.get(key), str | int)), "")


_BLOCKS = {"tool_use", "tool_result", "thinking"}


class Anthropic(MessageLog):
    """Logs of Anthropic's Messages API."""

    name = "anthropic"
    title = "Anthropic messages, one conversation or one request a line"
    source = "https://docs.anthropic.com/en/api/messages"
    versions = "anthropic-version 2023-06-01, anthropic 0.40 to 2"

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """A `system` beside the messages, tools with an `input_schema`, or content blocks that only it has."""
        for body in (record, record.get("request"), record.get("body"), record.get("params")):
            if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list):
                continue
            tools = body.get("tools") or ()
            blocks = [
                block.get("type")
                for message in body["messages"]
                if isinstance(message, Mapping) and isinstance(message.get("content"), list) and "role" in message
                for block in message["content"]
                if isinstance(block, Mapping)
            ]
            if (
                "system" in body
                or _BLOCKS & set(blocks)
                or any("input_schema" in tool for tool in tools if isinstance(tool, Mapping))
            ):
                return True
        response = record.get("response")
        return isinstance(response, Mapping) and response.get("type") == "message"


_TYPES = {"human", "ai", "system", "tool", "AIMessageChunk"}


class LangChain(MessageLog):
    """Conversations of LangChain messages."""

    name = "langchain"
    title = "LangChain messages, one conversation a line"
    source = "https://reference.langchain.com/python/langchain_core/messages"
    versions = "langchain-core 0.3 to 1.8"

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """Messages that have a type, or are constructors."""
        said = record.get("messages")
        first = next((item for item in said if isinstance(item, Mapping)), {}) if isinstance(said, list) else {}
        return "role" not in first and (first.get("lc") == 1 or first.get("type") in _TYPES)
