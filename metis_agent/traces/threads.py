"""The model calls of a trace joined to conversations, and a recorded run as the states that it visited.

The calls of one agent follow from each other: what a call replied stands in the input of the next. So they are joined
by their messages, not by the order of their clocks, to *threads*; calls that don't follow (a retry, a guard, a
sub-agent) are threads of their own. `assemble` cuts a thread into turns.

Each turn is a trajectory of its own. Its `messages` are the turn (from the user's message on), its `history` is what
the model had read before them: the system prompt and the earlier turns, as it saw them, so trimmed or summarised where
the agent did that. The record stands alone: `history + messages` is the whole prompt. `conversation` names what its
turns have in common and `metadata["turn"]` counts them from 0; `tools` holds the definitions that were offered.

A run's *steps* are what the model had read each time it answered or went on. The audit and training on decision points
read them; nobody writes them, since they follow from a `Trajectory`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, ToolMessage, messages_from_dict

from metis_agent.errors import InputError
from metis_agent.messages import text_of
from metis_agent.rules.answers import with_all_results
from metis_agent.traces.messages import Message
from metis_agent.traces.registry import ModelSpan, ToolSpan, Trace
from metis_agent.types import ModelCall, OutcomeStatus, ToolOutcome, Trajectory

__all__ = ["Step", "Thread", "ToolRound", "plain_text", "run_of", "steps_of", "threads_of", "whole_spans"]


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


@dataclass(frozen=True, kw_only=True)
class ToolRound:
    """The tool calls that one reply of the model asked for, each with what came back."""

    outcomes: tuple[ToolOutcome, ...]

    @property
    def executed(self) -> int:
        """Calls that really ran: blocked and repeated ones don't count."""
        return sum(outcome.executed for outcome in self.outcomes)

    @property
    def cost(self) -> float:
        """Declared cost of the calls that ran."""
        return sum(outcome.cost for outcome in self.outcomes if outcome.executed)

    @property
    def seconds(self) -> float:
        """Time until the last result was there; calls of one reply run side by side."""
        return max((outcome.seconds for outcome in self.outcomes), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Step:
    """State s_k of a run, and what the run did there: it called tools, or it answered."""

    index: int
    """k: how many tool rounds came before."""
    messages: tuple[BaseMessage, ...]
    """What the model had read: history, question, and the first k rounds. Any provider accepts them: a call whose
    result is missing has one that says so, and a result that no call asked for is left out."""
    reply: AIMessage | None
    """What the model said here; `None` where the record ends before."""
    round: ToolRound | None
    """The tool round that followed; `None` at the last step."""
    model_call: ModelCall | None = None
    """The record of the reply: tokens, seconds, model; `None` where there is none."""

    @property
    def answered(self) -> bool:
        """True where the run answered here, so at most at the last step."""
        return self.reply is not None and not _calls_of(self.reply)


def steps_of(trajectory: Trajectory) -> tuple[Step, ...]:
    """Return s_0 .. s_K of a run with K tool rounds: all but the last have a round, the last alone can be an answer.

    A run without tools has one step. Where the run broke off, the last step has no reply, or one that asks for tools
    and got nothing. Source: the unit of optimal stopping (Longstaff and Schwartz, 2001) on an agent's run.

    Raises:
        InputError: a message is not as LangChain writes it.
    """
    turn = _messages(trajectory, trajectory.messages)
    seen: list[BaseMessage] = list(with_all_results(_messages(trajectory, trajectory.history)))
    whole = list(with_all_results(turn))
    given = set(map(id, turn))
    outcomes: dict[str, list[ToolOutcome]] = {}
    for outcome in trajectory.outcomes:  # some models number their calls anew in every message
        outcomes.setdefault(outcome.call_id, []).append(outcome)
    records = _records(whole, trajectory.calls)
    steps: list[Step] = []
    ended = False
    for position, message in enumerate(whole):
        if isinstance(message, AIMessage):
            asked = _calls_of(message)
            after = itertools.takewhile(lambda it: isinstance(it, ToolMessage), whole[position + 1 :])
            results = {it.tool_call_id: it for it in after if isinstance(it, ToolMessage) and id(it) in given}
            found = [results.get(call["id"]) for call in asked]
            last = not any(isinstance(later, AIMessage) for later in whole[position + 1 :])
            ended = last and not any(found)
            if ended or any(found):
                steps.append(
                    Step(
                        index=len(steps),
                        messages=tuple(seen),
                        reply=message,
                        round=None if ended else _round(asked, found, outcomes),
                        model_call=records.get(position),
                    )
                )
        seen.append(message)
    if not ended:
        steps.append(Step(index=len(steps), messages=tuple(seen), reply=None, round=None))
    return tuple(steps)


def _messages(trajectory: Trajectory, records: Sequence[Mapping[str, Any]]) -> list[AnyMessage]:
    try:
        return cast("list[AnyMessage]", messages_from_dict([dict(record) for record in records]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"trajectory {trajectory.id!r} holds a message that LangChain can't read: {error}. "
            "Messages are written as message_to_dict does."
        ) from error


def _calls_of(message: AIMessage) -> list[dict[str, Any]]:
    return [dict(call) for call in (*message.tool_calls, *message.invalid_tool_calls)]


def _round(
    asked: Sequence[Mapping[str, Any]], found: Sequence[ToolMessage | None], outcomes: Mapping[str, list[ToolOutcome]]
) -> ToolRound:
    return ToolRound(
        outcomes=tuple(
            outcomes[call["id"]].pop(0) if outcomes.get(call["id"] or "") else _outcome(call, result)
            for call, result in zip(asked, found, strict=True)
        )
    )


def _outcome(call: Mapping[str, Any], result: ToolMessage | None) -> ToolOutcome:
    """What the messages say of a call that has no outcome on record."""
    status: OutcomeStatus = "ok" if result is not None and result.status == "success" else "error"
    arguments = call["args"] if isinstance(call["args"], Mapping) else {}
    content = "" if result is None else text_of(result)
    return ToolOutcome(
        call_id=call["id"] or "", tool=call["name"] or "", arguments=arguments, status=status, content=content
    )


def _records(turn: Sequence[BaseMessage], calls: Sequence[ModelCall]) -> dict[int, ModelCall]:
    """The model call behind each reply, by its position; drafts and calls of sub-agents are passed over."""
    found: dict[int, ModelCall] = {}
    begin = 0
    for position, message in enumerate(turn):
        if not isinstance(message, AIMessage):
            continue
        ids = [call["id"] for call in _calls_of(message)]
        for place in range(begin, len(calls)):
            call = calls[place]
            if [asked.get("id") for asked in call.tool_calls] == ids and (ids or call.text == str(message.text)):
                found[position] = call
                begin = place + 1
                break
    return found
