"""The model calls of a trace joined to threads: conversations in which each call goes on from the last.

The calls of one agent follow from each other: what a call replied stands in the input of the next. So they are joined
by their messages, not by the order of their clocks, and calls that don't follow (a retry, a guard, a sub-agent) are
threads of their own. Between the importers' traces and `assemble`, which cuts a thread into turns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from metis_agent.traces.messages import Message
from metis_agent.traces.traced import ModelSpan, ToolSpan, Trace

__all__ = ["Thread", "plain_text", "run_of", "threads_of", "whole_spans"]


@dataclass
class Thread:
    """Calls that follow from each other: all messages, and which call wrote which."""

    messages: list[Message]
    written: dict[int, ModelSpan] = field(default_factory=dict)


def threads_of(spans: Sequence[ModelSpan], trace: Trace) -> list[Thread]:
    """Return the threads of a trace's calls (see `whole_spans`), with what only its root knows at their ends."""
    threads: list[Thread] = []
    for span in spans:
        if span.output is None:
            continue
        if not _claimed(threads, span) and not _followed(threads, span):
            threads.append(Thread([*span.input, span.output], {len(span.input): span}))
    if trace.messages and trace.models:
        _extend_by_root(threads, trace.messages)
    elif trace.messages:
        threads.append(Thread(list(trace.messages)))
    return threads


def whole_spans(trace: Trace) -> list[ModelSpan]:
    """Return the model calls by time, each once: wrappers of a call and chunks of a streamed reply are joined."""
    for span in trace.models:
        if span.start is not None and span.end is not None and span.end < span.start:
            trace.odd["clock ran backwards"] += 1
            span.end = span.start
    ids = {span.id for span in trace.models}
    spans: dict[str, ModelSpan] = {}
    by_time = sorted(trace.models, key=lambda span: (span.start is None, span.start or 0.0))
    for span in sorted(by_time, key=lambda span: sum(parent in ids for parent in span.parents)):
        outer = next((spans[id_] for id_ in reversed(span.parents) if id_ in spans), None) or _streamed(span, spans)
        if outer is None:
            spans[span.id] = span
            continue
        trace.odd["span joined to the call around it"] += 1
        if outer.output is None or outer.of_chunks:
            outer.output = _with_chunk(outer.output, span.output)
            outer.of_chunks = True
        outer.usage = outer.usage or span.usage
        outer.model = outer.model or span.model
        outer.tools = outer.tools or span.tools
        outer.input = outer.input or span.input
    return list(spans.values())


def run_of(threads: Sequence[Thread], tools: Sequence[ToolSpan]) -> Thread:
    """Return the thread that is the trace's run: outside of any tool, with most tool rounds, the longest, the last."""
    ids = {tool.id for tool in tools}

    def worth(numbered: tuple[int, Thread]) -> tuple[bool, int, int, int]:
        number, thread = numbered
        inner = any(parent in ids for span in thread.written.values() for parent in span.parents)
        rounds = sum(bool(thread.messages[position].get("tool_calls")) for position in thread.written)
        asked = any(message["type"] == "human" for message in thread.messages)
        return asked and not inner, rounds, len(thread.messages), number

    return max(enumerate(threads), key=worth)[1]


def _claimed(threads: Sequence[Thread], span: ModelSpan) -> bool:
    """True where a later call, seen first, already holds this one's reply."""
    assert span.output is not None
    for thread in threads:
        place = len(span.input)
        unclaimed = place < len(thread.messages) - 1 and place not in thread.written
        if unclaimed and _key(thread.messages[place]) == _key(span.output):
            thread.written[place] = span
            return True
    return False


def _followed(threads: Sequence[Thread], span: ModelSpan) -> bool:
    """True where the call goes on from a thread's last reply, which then holds this one too."""
    assert span.output is not None
    for thread in reversed(threads):
        last = max(thread.written, default=None)
        if last is None or last != len(thread.messages) - 1:
            continue
        place = _place_of(thread.messages[last], span.input)
        if place is None:
            continue
        # As long as before: what this call read. Shorter: it was trimmed, and the run goes on from what is known.
        before = span.input[: place + 1] if place >= last else thread.messages
        thread.written = {position + max(0, place - last): by for position, by in thread.written.items()}
        thread.messages = [*before, *span.input[place + 1 :], span.output]
        thread.written[len(thread.messages) - 1] = span
        return True
    return False


def _extend_by_root(threads: list[Thread], messages: Sequence[Message]) -> None:
    """Add what only the root knows: the last tool results, an answer that no model wrote."""
    for thread in threads:
        place = _place_of(thread.messages[-1], messages)
        if place is not None:
            thread.messages += messages[place + 1 :]


def _streamed(span: ModelSpan, spans: dict[str, ModelSpan]) -> ModelSpan | None:
    """The call that a span without input is a chunk of: the latest beside it that has no reply of its own."""
    if span.input:
        return None
    for earlier in reversed(list(spans.values())):
        if earlier.parents == span.parents and earlier.input:
            return earlier if earlier.output is None or earlier.of_chunks else None
    return None


def _with_chunk(reply: Message | None, chunk: Message | None) -> Message | None:
    if reply is None or chunk is None:
        return dict(chunk) if reply is None and chunk is not None else reply
    joined = dict(reply)
    if isinstance(reply["content"], str) and isinstance(chunk["content"], str):
        joined["content"] = reply["content"] + chunk["content"]
    for key in ("tool_calls", "invalid_tool_calls"):
        joined[key] = [*reply.get(key, ()), *chunk.get(key, ())]
    return joined


def _key(message: Message) -> Any:
    """What makes a reply the same wherever it stands: its calls' ids, else its text."""
    if message["type"] != "ai":
        return None, id(message)
    calls = [*message.get("tool_calls", ()), *message.get("invalid_tool_calls", ())]
    ids = tuple(call.get("id") for call in calls)
    if ids and all(ids):
        return "calls", ids
    return (
        "text",
        plain_text(message["content"]),
        json.dumps([[call["name"], call["args"]] for call in calls], default=str),
    )


def _place_of(reply: Message, messages: Sequence[Message]) -> int | None:
    """Where a reply stands among messages, looked for from the end."""
    key = _key(reply)
    return next((place for place in range(len(messages) - 1, -1, -1) if _key(messages[place]) == key), None)


def plain_text(content: Any) -> str:
    """Return the text of a message's content, without images and the like."""
    if isinstance(content, str):
        return content.strip()
    texts = [part.get("text", "") if isinstance(part, dict) else str(part) for part in content]
    return "".join(text for text in texts if isinstance(text, str)).strip()
