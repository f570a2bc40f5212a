"""From a trace to trajectories: its run is cut into turns, each with calls, outcomes, times and tokens.

Each turn that a call of the trace answers becomes one trajectory; `traces.threads` says how a conversation is
kept. Calls of other threads (a retry, a guard, a sub-agent) are kept as model calls, since their tokens were spent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metis_agent.errors import InputError
from metis_agent.traces.messages import Message
from metis_agent.traces.registry import ModelSpan, ToolSpan, Trace
from metis_agent.traces.threads import Thread, plain_text, run_of, threads_of, whole_spans
from metis_agent.traces.values import text_of, usage_of
from metis_agent.types import ModelCall, OutcomeStatus, Question, ToolOutcome, Trajectory

__all__ = ["trajectories_of"]

_BROKE_OFF = "the record ends before the run did"


def trajectories_of(trace: Trace) -> Iterator[Trajectory]:
    """Yield a trajectory for each turn that the trace records, in order.

    Raises:
        InputError: there is nothing in it to make a run of; says why.
    """
    spans = whole_spans(trace)
    threads = threads_of(spans, trace)
    if not threads:
        raise InputError("no model call and no messages in it")
    found = 0
    for number, thread in enumerate(threads if trace.every_thread else [run_of(threads, trace.tools)]):
        mine = {span.id for span in thread.written.values()}
        others = [] if trace.every_thread else [span for span in spans if span.id not in mine]
        for trajectory in _turns(trace, thread, others, number):
            found += 1
            yield trajectory
    if not found:
        raise InputError("no user's message that a model or a tool replied to")


def _turns(trace: Trace, thread: Thread, others: Sequence[ModelSpan], number: int) -> Iterator[Trajectory]:
    messages, written, runs = _with_results(trace, thread)
    begins, records = _begins(messages), list(map(_record, messages))
    if len(trace.times) != len(begins):
        trace.times = []  # a thread that was forked or resumed: which time is which turn's is not known
    for turn, begin in enumerate(begins):
        end = begins[turn + 1] if turn + 1 < len(begins) else len(messages)
        own = {position: span for position, span in written.items() if begin <= position < end}
        last = turn == len(begins) - 1
        said = any(message["type"] in ("ai", "tool") for message in messages[begin:end])
        if own or (said and (trace.every_turn or (last and not written))):
            yield _trajectory(
                trace, messages, records, (begin, end), own, others if last else (), runs, turn,
                last=last, number=number,
            )  # fmt: skip
        elif last and trace.every_turn and not said:
            trace.odd["user's message without a reply"] += 1


def _begins(messages: Sequence[Message]) -> list[int]:
    """Where turns begin: at a user's message, at the last of several in a row."""
    humans = {position: None for position, message in enumerate(messages) if message["type"] == "human"}
    return [position for position in humans if position + 1 not in humans]


def _with_results(trace: Trace, thread: Thread) -> tuple[list[Message], dict[int, ModelSpan], dict[str, ToolSpan]]:
    """The messages with a distinct id for every call, which call wrote which, and each call's tool run.

    Where no message holds a result, the tool's run gives it.
    """
    unused = list(trace.tools)
    runs: dict[str, ToolSpan] = {}
    messages: list[Message] = []
    written: dict[int, ModelSpan] = {}
    waiting: list[Message] = []
    taken: set[str] = set()
    for position, message in enumerate(thread.messages):
        if message["type"] == "tool":
            messages.append(_paired(trace, message, waiting))
            continue
        if waiting and message["type"] in ("ai", "human"):
            messages += _run_results(waiting, runs)
            waiting = []
        message = dict(message)
        if message["type"] == "ai":
            for key in ("tool_calls", "invalid_tool_calls"):
                message[key] = [_distinct(call, taken) for call in message.get(key, ())]
            waiting = [*message["tool_calls"], *message["invalid_tool_calls"]]
            for call in waiting:
                run = _run_of(call, unused)
                if run is not None:
                    unused.remove(run)
                    runs[call["id"]] = run
            if position in thread.written:
                written[len(messages)] = thread.written[position]
        messages.append(message)
    return [*messages, *_run_results(waiting, runs)], written, runs


def _distinct(call: Message, taken: set[str]) -> Message:
    """The call with an id of its own: some providers give none, some the same again."""
    given = call.get("id") or f"call_{len(taken)}"
    name, count = given, 2
    while name in taken:
        name, count = f"{given}#{count}", count + 1
    taken.add(name)
    return {**call, "id": name, "given": call.get("id") or ""}


def _paired(trace: Trace, result: Message, waiting: list[Message]) -> Message:
    """The result under the id of the call that it answers."""
    given, name = result.get("tool_call_id"), result.get("name")
    for same in (
        lambda call: given and call["given"] == given,
        lambda call: not given and name and call["name"] == name,
        lambda call: not given and not name,
    ):
        call = next(filter(same, waiting), None)
        if call is not None:
            waiting.remove(call)
            return {**result, "tool_call_id": call["id"], "name": name or call["name"]}
    trace.odd["tool result without a call"] += 1
    return result


def _run_results(waiting: Sequence[Message], runs: Mapping[str, ToolSpan]) -> Iterator[Message]:
    for call in waiting:
        run = runs.get(call["id"])
        if run is not None:
            result = {
                "type": "tool",
                "content": run.content or run.error,
                "tool_call_id": call["id"],
                "name": call["name"],
            }
            yield result | ({"status": "error"} if run.error else {})


def _run_of(call: Message, runs: Sequence[ToolSpan]) -> ToolSpan | None:
    """The run of a tool behind a call: by id, else by name and arguments, else by name where it ran once."""
    if call["given"]:
        for run in runs:
            if run.call_id == call["given"]:
                return run
    unnamed = [run for run in runs if run.name == call["name"] and not run.call_id]
    same = [run for run in unnamed if _same_arguments(run.arguments, call["args"])]
    return same[0] if same else unnamed[0] if len(unnamed) == 1 else None


def _same_arguments(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, dict) and len(other) == 1:
        return bool(one == next(iter(other.values())))  # LangChain traces a lone argument bare
    return json.dumps(one, sort_keys=True, default=str) == json.dumps(other, sort_keys=True, default=str)


def _trajectory(
    trace: Trace,
    messages: Sequence[Message],
    records: Sequence[Mapping[str, Any]],
    bounds: tuple[int, int],
    own: dict[int, ModelSpan],
    others: Sequence[ModelSpan],
    runs: Mapping[str, ToolSpan],
    turn: int,
    *,
    last: bool,
    number: int,
) -> Trajectory:
    begin, end = bounds
    said = messages[begin:end]
    spans = [own[position] for position in sorted(own)]
    answer, status, error = _ending(trace, said, last)
    start, seconds = _times(trace, spans, last and not trace.every_turn)
    if trace.times and turn < len(trace.times):
        start, seconds = trace.times[turn][0], max(0.0, trace.times[turn][1] - trace.times[turn][0])
    text = plain_text(messages[begin]["content"])
    conversation = trace.conversation or (trace.id if trace.every_turn else "")
    if trace.every_thread and not trace.conversation:
        conversation = f"{trace.id}-{number}"
    tools = next((span.tools for span in reversed(spans) if span.tools), trace.definitions)
    model = next((span.model for span in reversed(spans) if span.model), trace.model)
    metadata = {
        "source": trace.source, "trace": trace.id, "turn": turn, "model": model, "name": trace.name,
        "feedback": trace.feedback if last else [], "incomplete": not trace.ended, **trace.metadata,
    }  # fmt: skip
    return Trajectory(
        id=_id(trace, number, turn),
        question=Question(id=f"q-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}", text=text),
        answer=answer,
        messages=tuple(records[begin:end]),
        history=tuple(records[:begin]),
        calls=tuple(_model_calls(said, begin, own, others)),
        outcomes=tuple(_outcomes(said, runs)),
        status=status,
        error=error,
        seconds=seconds,
        started_at=start,
        tools=tuple(tools),
        conversation=conversation,
        user=trace.user,
        metadata={key: value for key, value in metadata.items() if value or key in ("source", "trace", "turn")},
    )


def _id(trace: Trace, number: int, turn: int) -> str:
    return f"{trace.source}/{trace.id}/{turn}" if not number else f"{trace.source}/{trace.id}/{number}/{turn}"


def _ending(trace: Trace, said: Sequence[Message], last: bool) -> tuple[str, Any, str]:
    """Answer, status and error of a turn: as the recorder has it, a tool that ends a turn has given the answer."""
    final = said[-1]
    calls = [*final.get("tool_calls", ()), *final.get("invalid_tool_calls", ())]
    if final["type"] == "ai" and not calls:
        return plain_text(final["content"]), "finished", ""
    failed = trace.error if last else ""
    if failed or calls or (last and not trace.ended):
        return "", "failed", failed or _BROKE_OFF
    return plain_text(final["content"]), "finished", ""


def _times(trace: Trace, spans: Sequence[ModelSpan], whole: bool) -> tuple[float, float]:
    """Begin and duration: the trace's where it is one run, else from the first call to the end of the last."""
    starts = [span.start for span in spans if span.start is not None]
    ends = [span.end for span in spans if span.end is not None]
    start = trace.start if whole and trace.start is not None else min(starts, default=trace.start or 0.0)
    end = trace.end if whole and trace.end is not None else max(ends, default=trace.end or start)
    if end < start:
        trace.odd["clock ran backwards"] += 1
    return start, max(0.0, end - start)


def _model_calls(
    said: Sequence[Message], begin: int, own: dict[int, ModelSpan], others: Sequence[ModelSpan]
) -> Iterator[ModelCall]:
    """The turn's model calls in order; then those of other threads, whose tokens were spent too."""
    step = 0
    for position, message in enumerate(said, start=begin):
        if message["type"] != "ai":
            continue
        span = own.get(position)
        usage, model = message.get("usage_metadata") or message.get("usage"), message.get("model", "")
        yield _call(span, message, step, usage_of(usage), model)
        step += 1
    for span in others:
        yield _call(span, span.output or {"content": ""}, step, {}, "")
        step += 1


def _call(span: ModelSpan | None, reply: Message, step: int, usage: dict[str, int], model: str) -> ModelCall:
    calls = [*reply.get("tool_calls", ()), *reply.get("invalid_tool_calls", ())]
    return ModelCall(
        node=span.name if span else "",
        step=step,
        text=plain_text(reply["content"]),
        tool_calls=tuple({key: call.get(key) for key in ("name", "args", "id", "type")} for call in calls),
        sampling=span.sampling if span else {},
        usage=(span.usage if span else {}) or usage,
        model=(span.model if span else "") or model,
        seconds=max(0.0, span.end - span.start) if span and span.start is not None and span.end is not None else 0.0,
    )


def _outcomes(said: Sequence[Message], runs: Mapping[str, ToolSpan]) -> Iterator[ToolOutcome]:
    results = {message["tool_call_id"]: message for message in said if message["type"] == "tool"}
    for message in said:
        for call in (*message.get("tool_calls", ()), *message.get("invalid_tool_calls", ())):
            result = results.get(call["id"])
            if result is None:
                continue
            run = runs.get(call["id"])
            failed = result.get("status") == "error" or (run is not None and bool(run.error))
            status: OutcomeStatus = "error" if failed else "ok"
            if failed and run is not None and "timeout" in run.error.lower():
                status = "timeout"
            timed = run is not None and run.start is not None and run.end is not None
            yield ToolOutcome(
                call_id=call["id"],
                tool=call["name"],
                arguments=call["args"] if isinstance(call["args"], dict) else {},
                status=status,
                content=text_of(result["content"]),
                seconds=max(0.0, run.end - run.start) if timed else 0.0,  # type: ignore[union-attr, operator]
                cost=run.cost if run is not None else 0.0,
            )


def _record(message: Message) -> dict[str, Any]:
    """The message as `message_to_dict` writes it."""
    data = {key: value for key, value in message.items() if key not in ("type", "usage", "model")}
    for key in ("tool_calls", "invalid_tool_calls"):
        if key in data:
            data[key] = [{name: value for name, value in call.items() if name != "given"} for call in data[key]]
    return {"type": message["type"], "data": data | {"type": message["type"]}}
