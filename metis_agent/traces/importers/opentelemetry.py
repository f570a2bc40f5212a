"""OpenTelemetry: spans as OTLP JSON or one a line, with the GenAI conventions or OpenInference's attributes.

OTLP JSON is what the collector's file exporter writes (`resourceSpans`, and `resourceLogs` for message events); a span
a line is `ReadableSpan.to_json()`, or Phoenix's export, as JSON or as the columns of its dataframe. Messages are read
from, in this order: `gen_ai.input.messages` and `gen_ai.output.messages` (on the span or on the event
`gen_ai.client.inference.operation.details`), the older `gen_ai.*.message` and `gen_ai.choice` events, OpenInference's
`llm.input_messages`, the oldest `gen_ai.prompt` and `gen_ai.completion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from metis_agent.errors import InputError
from metis_agent.traces.messages import Message, messages_of, reply_of, tool_definitions
from metis_agent.traces.registry import Importer, ModelSpan, ToolSpan, Trace
from metis_agent.traces.values import as_json, ids_above, text_of, time_of, usage_of

__all__ = ["OpenTelemetry"]

_ROLES = re.compile(r"gen_ai\.(system|user|assistant|tool)\.message")
_SNAKE = re.compile(r"_([a-z])")
_DETAILS = "gen_ai.client.inference.operation.details"
_THREADS = ("gen_ai.conversation.id", "session.id", "traceloop.association.properties.session_id")
_USERS = ("user.id", "enduser.id", "traceloop.association.properties.user_id")
_SAMPLING = {
    "gen_ai.request.temperature": "temperature",
    "gen_ai.request.top_p": "top_p",
    "gen_ai.request.seed": "seed",
}
_VALUES = ("stringValue", "intValue", "doubleValue", "boolValue", "bytesValue")
_CHATS = {"chat", "text_completion", "generate_content", "completion", "LLM"}
_TOOLS = {"execute_tool", "TOOL", "tool"}


class OpenTelemetry(Importer):
    """Spans of OpenTelemetry."""

    name = "opentelemetry"
    title = "OpenTelemetry: OTLP JSON or spans as JSONL, GenAI and OpenInference (Phoenix) conventions"
    source = (
        "https://opentelemetry.io/docs/specs/semconv/gen-ai/, https://opentelemetry.io/docs/specs/otlp/, "
        "https://arize-ai.github.io/openinference/spec/"
    )
    versions = "OTLP 1.0 to 1.9, semantic conventions 1.28 to 1.42, OpenInference 0.1"

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """OTLP's envelopes, or a span with a context."""
        record = _otlp(record)
        if "resourceSpans" in record or "resourceLogs" in record or "context.span_id" in record:
            return True
        if {"traceId", "spanId"} <= set(record):
            return True
        context = record.get("context")
        return isinstance(context, Mapping) and "span_id" in context

    def parts(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each span of a batch, and each log record that belongs to one."""
        found, odd, record = False, 0, _otlp(record)
        for envelope, scope, entries in (
            ("resourceSpans", "scopeSpans", "spans"),
            ("resourceLogs", "scopeLogs", "logRecords"),
        ):
            for resource in record.get(envelope) or ():
                found = True
                _check_version(resource)
                for scoped in resource.get(scope) or resource.get("instrumentationLibrarySpans") or ():
                    for entry in scoped.get(entries) or ():
                        if not isinstance(entry, Mapping):
                            odd += 1
                        elif entry.get("traceId"):
                            yield str(entry["traceId"]), entry
        if odd:
            raise InputError(f"{odd} of its spans or log records are no objects; the others were read")
        if found:
            return
        trace = _trace_id(record)
        if not trace:
            raise InputError("neither OTLP (no resourceSpans) nor a span (no trace id)")
        yield trace, record

    def traces(self, key: str, parts: Sequence[Mapping[str, Any]]) -> Iterable[Trace]:
        """One trace: its model calls, tool runs and root."""
        trace = Trace(id=key.removeprefix("0x"), source=self.name)
        spans: dict[str, dict[str, Any]] = {}
        logs: list[Mapping[str, Any]] = []
        for part in parts:
            if "body" in part or "timeUnixNano" in part:
                logs.append(part)
                continue
            span = _span(part)
            if span["id"] in spans:
                trace.odd["span that came twice"] += 1
                if (spans[span["id"]]["end"] is not None) >= (span["end"] is not None):
                    continue
            spans[span["id"]] = span
        if not spans:
            raise InputError("log records of a trace whose spans are not in the export")
        for log in logs:
            owner = spans.get(str(log.get("spanId") or ""))
            if owner is None:
                trace.odd["event without its span"] += 1
            else:
                owner["events"].append(_log_event(log))
        for span in spans.values():
            self._add(trace, span, ids_above(span["id"], lambda each: spans[each]["parent"] if each in spans else ""))
        _root(trace, spans)
        return [trace]

    def _add(self, trace: Trace, span: Mapping[str, Any], parents: tuple[str, ...]) -> None:
        given = span["attributes"]
        more = _mapping(given.get("metadata"))
        trace.conversation = trace.conversation or _first(given, _THREADS) or _first(more, ("thread_id", "session_id"))
        trace.user = trace.user or _first(given, _USERS) or _first(more, ("user_id",))
        times = {"start": span["start"], "end": span["end"], "error": span["error"], "parents": parents}
        if _kind(given) == "model":
            read, reply = _messages(span, trace)
            trace.models.append(
                ModelSpan(
                    id=span["id"], input=read, output=reply, usage=_usage(given), tools=_definitions(given),
                    name=str(given.get("gen_ai.agent.name") or more.get("langgraph_node") or span["name"]),
                    model=_first(given, ("gen_ai.response.model", "llm.model_name", "gen_ai.request.model")),
                    sampling={to: given[of] for of, to in _SAMPLING.items() if given.get(of) is not None}, **times,
                )
            )  # fmt: skip
        elif _kind(given) == "tool":
            trace.tools.append(_tool(span, times, trace))


def _otlp(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """OTLP under its own names, also where a backend wraps it (Tempo), or Protobuf has kept the names of its fields."""
    inner = record.get("trace")
    if isinstance(inner, Mapping) and {"resourceSpans", "batches"} & set(inner):
        record = inner
    if isinstance(record.get("batches"), list):
        record = {"resource_spans": record["batches"]}
    return _camel(record) if {"resource_spans", "resource_logs"} & set(record) else record


def _camel(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_SNAKE.sub(lambda found: found[1].upper(), key): _camel(item) for key, item in value.items()}
    return [_camel(item) for item in value] if isinstance(value, list) else value


def _check_version(resource: Mapping[str, Any]) -> None:
    """Schemas of OpenTelemetry promise to stay readable until their major version changes."""
    version = str(resource.get("schemaUrl") or "").rpartition("/")[2].partition(".")[0]
    if version.isdigit() and int(version) > 1:
        raise InputError(f"OpenTelemetry schema {version}, which is newer than this importer: it reads 1")


def _tool(span: Mapping[str, Any], times: dict[str, Any], trace: Trace) -> ToolSpan:
    given = span["attributes"]
    output = _given(given, "gen_ai.tool.call.result", "output.value", "traceloop.entity.output")
    results = (
        [message for message in messages_of(output, trace.odd) if message["type"] == "tool"]
        if _is_message(output)
        else []
    )
    call_id = _first(given, ("gen_ai.tool.call.id", "tool_call.id", "tool.id"))
    name = _first(given, ("gen_ai.tool.name", "tool.name", "traceloop.entity.name")) or span["name"]
    arguments = as_json(
        _given(given, "gen_ai.tool.call.arguments", "input.value", "tool.parameters", "traceloop.entity.input")
    )
    failed = results and results[0].get("status") == "error"
    return ToolSpan(
        id=span["id"], name=name, call_id=call_id or (results[0]["tool_call_id"] if results else ""),
        content=results[0]["content"] if results else text_of(output),
        arguments=arguments, **{**times, "error": times["error"] or (text_of(results[0]["content"]) if failed else "")},
    )  # fmt: skip


def _messages(span: Mapping[str, Any], trace: Trace) -> tuple[list[Message], Message | None]:
    """What the model read and what it replied, under whichever convention they were recorded."""
    given = dict(span["attributes"])
    for event in span["events"]:
        if event["name"] in (_DETAILS, "gen_ai.content.prompt", "gen_ai.content.completion"):
            given |= event["attributes"]
    system = messages_of(_system(given.get("gen_ai.system_instructions")), trace.odd)
    if "gen_ai.input.messages" in given or "gen_ai.output.messages" in given:
        read = messages_of(given.get("gen_ai.input.messages"), trace.odd)
        return [*system, *read], reply_of(given.get("gen_ai.output.messages"), trace.odd)
    said = as_json(given.get("events"))  # as Pydantic AI keeps them
    told = [it for it in said if isinstance(it, Mapping)] if isinstance(said, list) else []
    events = [*span["events"], *({"name": str(it.get("event.name")), "attributes": it} for it in told)]
    events = [event for event in events if _ROLES.fullmatch(event["name"]) or event["name"] == "gen_ai.choice"]
    if events:
        return _of_events(events, trace)
    flat = _nested(given)
    llm, gen_ai = _mapping(flat.get("llm")), _mapping(flat.get("gen_ai"))
    if llm.get("input_messages") or llm.get("output_messages"):
        read = messages_of(_listed(llm.get("input_messages")), trace.odd)
        return read, reply_of(_listed(llm.get("output_messages")), trace.odd)
    prompt = given.get("gen_ai.prompt", given.get("input.value"))
    completion = given.get("gen_ai.completion", given.get("output.value"))
    read = messages_of(_listed(gen_ai.get("prompt")) if prompt is None else prompt, trace.odd)
    return read, reply_of(_listed(gen_ai.get("completion")) if completion is None else completion, trace.odd)


def _of_events(events: Sequence[Mapping[str, Any]], trace: Trace) -> tuple[list[Message], Message | None]:
    read: list[Message] = []
    reply = None
    for event in events:
        body = {key.removeprefix("gen_ai.event."): as_json(value) for key, value in event["attributes"].items()}
        role = _ROLES.fullmatch(event["name"])
        if role is not None:
            read += messages_of([{"role": role[1], **body}], trace.odd)
        elif reply is None:
            said = _mapping(body.get("message")) or body
            calls = body.get("tool_calls") or ()
            reply = reply_of({"role": "assistant", **({"tool_calls": calls} if calls else {}), **dict(said)}, trace.odd)
    return read, reply


def _system(value: Any) -> Any:
    """GenAI's system instructions are parts without a message around them."""
    value = as_json(value)
    return [{"role": "system", "parts": value if isinstance(value, list) else [text_of(value)]}] if value else []


def _usage(given: Mapping[str, Any]) -> dict[str, int]:
    llm = _mapping(_mapping(_nested(given).get("llm")).get("token_count"))
    if llm:
        return usage_of(llm)
    gen_ai = {
        key.removeprefix("gen_ai.usage."): value for key, value in given.items() if key.startswith("gen_ai.usage.")
    }
    cached = {
        name: gen_ai.pop(f"{name}.input_tokens", gen_ai.pop(f"{name}_input_tokens", None))
        for name in ("cache_read", "cache_creation")
    }
    reasoning = {"reasoning": gen_ai.pop("reasoning.output_tokens", None)}
    return usage_of({**gen_ai, "input_token_details": cached, "output_token_details": reasoning})


def _definitions(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    if given.get("gen_ai.tool.definitions"):
        return tool_definitions(given["gen_ai.tool.definitions"])
    llm = _mapping(_nested(given).get("llm"))
    tools = [_mapping(entry).get("tool", entry) for entry in _listed(llm.get("tools"))]
    return tool_definitions(tools or _listed(_mapping(llm.get("request")).get("functions")))


def _kind(given: Mapping[str, Any]) -> str:
    kind = given.get("openinference.span.kind") or given.get("span_kind") or given.get("gen_ai.operation.name")
    kind = kind or given.get("traceloop.span.kind") or given.get("llm.request.type")
    if kind in _TOOLS:
        return "tool"
    if kind in _CHATS:
        return "model"
    marks = ("gen_ai.input.messages", "gen_ai.prompt", "gen_ai.prompt.0.role", "gen_ai.request.model")
    return "model" if kind is None and any(mark in given for mark in marks) else ""


def _root(trace: Trace, spans: Mapping[str, Mapping[str, Any]]) -> None:
    roots = [span for span in spans.values() if not span["parent"]]
    trace.ended = bool(roots) and roots[0]["end"] is not None
    if not roots:
        trace.odd["trace without a root"] += 1
        return
    root = min(roots, key=lambda span: span["start"] or 0.0)
    trace.name, trace.error, trace.start, trace.end = root["name"], root["error"], root["start"], root["end"]
    if _kind(root["attributes"]) == "":
        output = as_json(root["attributes"].get("output.value"))
        said = as_json(root["attributes"].get("pydantic_ai.all_messages"))
        said = output.get("messages") if isinstance(output, Mapping) else said
        trace.messages = messages_of(said, trace.odd) if isinstance(said, list) else []
    for span in spans.values():
        trace.feedback += _evaluations(span)


def _evaluations(span: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """GenAI's evaluation events, and Phoenix's annotations."""
    for event in span["events"]:
        given = event["attributes"]
        if event["name"] == "gen_ai.evaluation.result":
            found = {
                "key": given.get("gen_ai.evaluation.name"),
                "score": given.get("gen_ai.evaluation.score.value"),
                "value": given.get("gen_ai.evaluation.score.label"),
                "comment": given.get("gen_ai.evaluation.explanation"),
            }
            yield {key: value for key, value in found.items() if value is not None}
    for note in as_json(span["attributes"].get("annotations")) or ():
        if isinstance(note, Mapping) and note.get("name"):
            result = _mapping(note.get("result"))
            found = {"key": note["name"], "score": result.get("score"), "value": result.get("label")}
            yield {key: value for key, value in found.items() if value is not None}


def _span(part: Mapping[str, Any]) -> dict[str, Any]:
    """A span of any export as one thing: id, parent, name, start, end, error, attributes, events."""
    context = _mapping(part.get("context"))
    attributes = _attributes(part)
    status = _mapping(part.get("status"))
    code = str(part.get("status_code") or status.get("status_code") or status.get("code") or "")
    message = (
        part.get("status_message") or status.get("message") or status.get("description") or attributes.get("error.type")
    )
    if "span_kind" in part and str(part["span_kind"]) not in ("UNKNOWN", "INTERNAL"):
        attributes.setdefault("openinference.span.kind", part["span_kind"])
    events: list[dict[str, Any]] = [
        {"name": str(event.get("name") or ""), "attributes": _attributes(event)}
        for event in as_json(part.get("events")) or ()
        if isinstance(event, Mapping)
    ]
    failed = code.upper().endswith("ERROR") or code == "2"
    thrown = next((e["attributes"].get("exception.message") for e in events if e["name"] == "exception"), None)
    return {
        "id": str(part.get("spanId") or context.get("span_id") or part.get("context.span_id") or part.get("id")),
        "parent": str(part.get("parentSpanId") or part.get("parent_id") or ""),
        "name": str(part.get("name") or ""),
        "start": time_of(part.get("startTimeUnixNano") or part.get("start_time")),
        "end": time_of(part.get("endTimeUnixNano") or part.get("end_time")),
        "error": str(message or thrown or "error") if failed else "",
        "attributes": attributes,
        "events": events,
    }


def _trace_id(record: Mapping[str, Any]) -> str:
    context = _mapping(record.get("context"))
    return str(record.get("traceId") or context.get("trace_id") or record.get("context.trace_id") or "")


def _attributes(part: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as a flat mapping: from OTLP's list of typed values, an object, or a dataframe's columns."""
    given = as_json(part.get("attributes"))
    if isinstance(given, list):
        return {str(entry.get("key")): _plain(entry.get("value")) for entry in given if isinstance(entry, Mapping)}
    found: dict[str, Any] = {}
    for key, value in given.items() if isinstance(given, Mapping) else ():
        _flatten(str(key), value, found)
    for key, value in part.items():
        if key.startswith("attributes.") and value is not None:
            _flatten(key.removeprefix("attributes."), value, found)
    return found


def _flatten(key: str, value: Any, found: dict[str, Any]) -> None:
    """Nested objects become dotted keys, as they were set; lists stay, where a convention nests them."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _flatten(f"{key}.{inner}", item, found)
    elif value is not None:
        found[key] = value


def _plain(value: Any) -> Any:
    """An OTLP value without its type."""
    if not isinstance(value, Mapping):
        return value
    for kind in _VALUES:
        if kind in value:
            with suppress(TypeError, ValueError):
                return int(value[kind]) if kind == "intValue" else value[kind]
            return value[kind]
    if "arrayValue" in value:
        return [_plain(item) for item in _mapping(value["arrayValue"]).get("values") or ()]
    if "kvlistValue" in value:
        entries = _mapping(value["kvlistValue"]).get("values") or ()
        return {entry["key"]: _plain(entry.get("value")) for entry in entries}
    return None


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as objects, those of messages and tools alone: the rest stays out."""
    kept = ("llm.", "gen_ai.prompt.", "gen_ai.completion.")
    return _tree({key: value for key, value in given.items() if key.startswith(kept)})


def _tree(given: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as objects within each other."""
    root: dict[str, Any] = {}
    for key, value in given.items():
        place = root
        *path, last = key.split(".")
        for name in path:
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                break
            place = inner
        else:
            place[last] = value
    return root


def _listed(value: Any) -> list[Any]:
    """Objects with numbers as keys, which is how attributes spell a list, as lists; within them too."""
    value = as_json(value)
    if isinstance(value, Mapping) and value and all(str(key).isdigit() for key in value):
        return [_relisted(value[key]) for key in sorted(value, key=int)]
    return [_relisted(item) for item in value] if isinstance(value, list) else []


def _relisted(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value and all(str(key).isdigit() for key in value):
            return _listed(value)
        if any("." in str(key) for key in value):  # Phoenix's dataframes keep the dots within a list's items
            value = _tree(value)
        return {key: _relisted(item) for key, item in value.items()}
    return [_relisted(item) for item in value] if isinstance(value, list) else value


def _log_event(log: Mapping[str, Any]) -> dict[str, Any]:
    """A log record as the span event that it stands for."""
    attributes = _attributes(log)
    body = _plain(log.get("body"))
    name = log.get("eventName") or attributes.get("event.name") or ""
    return {"name": str(name), "attributes": {**attributes, **(body if isinstance(body, Mapping) else {})}}


def _is_message(value: Any) -> bool:
    value = as_json(value)
    return isinstance(value, Mapping) and "tool_call_id" in {**value, **_mapping(value.get("data"))}


def _given(given: Mapping[str, Any], *keys: str) -> Any:
    return next((given[key] for key in keys if given.get(key) is not None), None)


def _mapping(value: Any) -> Mapping[str, Any]:
    value = as_json(value)
    return value if isinstance(value, Mapping) else {}


def _first(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((str(values[key]) for key in keys if values.get(key)), "")
