"""Langfuse: observations, traces and scores, as its API gives them or as blob storage exports write them.

A line or an element is an observation (`GET /api/public/v2/observations`), a trace, with its observations in it or not,
or a score; a page of the API (`{"data": [...], "meta": ...}`) may stand on a line. Blob exports have the same fields in
snake case, inputs and outputs as JSON text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from metis_agent.errors import InputError
from metis_agent.traces.messages import messages_of, reply_of, tool_definitions
from metis_agent.traces.registry import Importer, ModelSpan, ToolSpan, Trace
from metis_agent.traces.values import as_json, ids_above, text_of, time_of, usage_of

__all__ = ["Langfuse"]

_SNAKE = re.compile(r"(?<=[a-z0-9])([A-Z])")
_MODELS = {"GENERATION"}
_SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


class Langfuse(Importer):
    """Observations, traces and scores of Langfuse."""

    name = "langfuse"
    title = "Langfuse observations, traces and scores, JSON, JSONL or Parquet, of the API or a blob storage export"
    source = (
        "https://langfuse.com/docs/api-and-data-platform/features/observations-api, "
        "https://langfuse.com/docs/api-and-data-platform/features/blob-storage-export-fields"
    )
    versions = "public API v1 and v2, langfuse 3 to 5, blob storage exports of 2026"

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """An observation, a trace or a score has fields that only Langfuse's have."""
        keys = {_snake(key) for key in record}
        observation = {"trace_id", "type", "start_time"} <= keys and bool({"parent_observation_id", "level"} & keys)
        score = {"trace_id", "name", "value"} <= keys and bool({"data_type", "config_id"} & keys)
        trace = {"id", "timestamp", "name"} <= keys and bool({"session_id", "html_path", "bookmarked"} & keys)
        return observation or score or trace

    def parts(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each observation, trace and score, by trace."""
        kind = _kind(record)
        trace = str(
            record.get("traceId") or record.get("trace_id") or (record.get("id") if kind == "trace" else "") or ""
        )
        if not trace:
            raise InputError("neither a Langfuse observation nor a trace nor a score: it has no trace id")
        inner = [
            item for name in ("observations", "scores") for item in record.get(name) or () if isinstance(item, Mapping)
        ]
        yield trace, {**record, "observations": None, "scores": None} if inner else record
        for item in inner:
            yield from self.parts({"traceId": trace, **item})

    def traces(self, key: str, parts: Sequence[Mapping[str, Any]]) -> Iterable[Trace]:
        """One trace: its generations, tools and scores."""
        trace = Trace(id=key, source=self.name)
        spans: dict[str, dict[str, Any]] = {}
        whole: dict[str, Any] = {}
        scores: dict[str, dict[str, Any]] = {}
        for part in parts:
            kind = _kind(part)
            item = {_snake(name): value for name, value in part.items()}
            if kind == "trace":
                whole = item
            elif kind == "score":
                given = {"key": item["name"], "score": item.get("value"), "comment": item.get("comment")}
                given["value"] = item.get("string_value")
                scores[str(item.get("id"))] = {name: value for name, value in given.items() if value is not None}
            else:
                id_ = str(item["id"])
                if id_ in spans:
                    trace.odd["span that came twice"] += 1
                if id_ not in spans or item.get("end_time") is not None:
                    spans[id_] = item
        if not spans and not whole:
            raise InputError("scores of a trace that is not in the export")
        trace.feedback = list(scores.values())
        for id_, span in spans.items():
            self._add(
                trace,
                id_,
                span,
                ids_above(id_, lambda each: str(spans.get(each, {}).get("parent_observation_id") or "")),
            )
        _root(trace, spans, whole)
        return [trace]

    def _add(self, trace: Trace, id_: str, span: Mapping[str, Any], parents: tuple[str, ...]) -> None:
        metadata = _mapping(span.get("metadata"))
        trace.conversation = trace.conversation or str(span.get("session_id") or "")
        trace.user = trace.user or str(span.get("user_id") or "")
        error = str(span.get("status_message") or "error") if span.get("level") == "ERROR" else ""
        times: dict[str, Any] = {
            "id": id_, "parents": parents, "error": error, "start": time_of(span.get("start_time")),
            "end": time_of(span.get("end_time")),
        }  # fmt: skip
        kind = str(span.get("type") or "").upper()
        if kind in _MODELS:
            given, parameters = as_json(span.get("input")), _mapping(span.get("model_parameters"))
            tools = given.get("tools") if isinstance(given, Mapping) else None
            usage = usage_of(span.get("usage_details")) or usage_of(span.get("usage"))
            reply = reply_of(span.get("output"), trace.odd)
            model = span.get("model") or span.get("provided_model_name") or ""
            trace.models.append(
                ModelSpan(
                    input=messages_of(given, trace.odd), output=reply, model=str(model), usage=usage,
                    name=str(metadata.get("langgraph_node") or span.get("name") or ""),
                    tools=tool_definitions(tools or span.get("tool_definitions")),
                    sampling={name: parameters[name] for name in _SAMPLING if parameters.get(name) is not None},
                    **times,
                )
            )  # fmt: skip
        elif kind == "TOOL":
            output = as_json(span.get("output"))
            message = output if isinstance(output, Mapping) and "tool_call_id" in output else {}
            results = messages_of(message, trace.odd) if message else []
            if results and results[0].get("status") == "error":
                times["error"] = error or text_of(results[0]["content"])
            trace.tools.append(
                ToolSpan(
                    name=str(span.get("name") or ""), arguments=as_json(span.get("input")),
                    call_id=str(message.get("tool_call_id") or metadata.get("tool_call_id") or "").strip('"'),
                    content=results[0]["content"] if results else text_of(output), **times,
                )
            )  # fmt: skip


def _root(trace: Trace, spans: Mapping[str, Mapping[str, Any]], whole: Mapping[str, Any]) -> None:
    """What the trace, or its root observation, says of the whole."""
    roots = [span for id_, span in spans.items() if not span.get("parent_observation_id")]
    root = roots[0] if roots else {}
    trace.ended = bool(roots) and root.get("end_time") is not None
    if not roots and spans:
        trace.odd["trace without a root"] += 1
    trace.name = str(whole.get("name") or root.get("trace_name") or root.get("name") or "")
    trace.conversation = trace.conversation or str(whole.get("session_id") or "")
    trace.user = trace.user or str(whole.get("user_id") or "")
    tags = whole.get("tags") or root.get("tags")
    trace.metadata = {"tags": tags} if tags else {}
    trace.start, trace.end = time_of(root.get("start_time")), time_of(root.get("end_time"))
    if root.get("level") == "ERROR":
        trace.error = str(root.get("status_message") or "error")
    if str(root.get("type") or "").upper() not in _MODELS:
        for output in (as_json(whole.get("output")), as_json(root.get("output"))):
            if isinstance(output, Mapping) and isinstance(output.get("messages"), list):
                trace.messages = messages_of(output["messages"], trace.odd)
                break


def _kind(record: Mapping[str, Any]) -> str:
    if "startTime" in record or "start_time" in record:
        return "observation"
    return "score" if {"dataType", "data_type", "value"} & set(record) and "name" in record else "trace"


def _snake(name: str) -> str:
    return _SNAKE.sub(r"_\1", name).lower()


def _mapping(value: Any) -> Mapping[str, Any]:
    value = as_json(value)
    return value if isinstance(value, Mapping) else {}
