"""Observations that the real Langfuse client sent and read back, and the same as a blob storage export."""

from __future__ import annotations

import json
import re
import warnings
from datetime import UTC, datetime

import pytest
from langfuse import Langfuse
from langfuse.api import ObservationV2
from langfuse.langchain import CallbackHandler
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.traces.agents import check_two_turns, converse, two_turns
from tests.traces.receiver import receiver

pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.timeout(90),
]


@pytest.fixture(scope="module")
def exported():
    """What the API gives for a conversation of two turns: observations as the client reads them, and a score."""
    with receiver() as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = Langfuse(public_key="pk-lf-00000001", secret_key="sk-lf-00000001", base_url=server.url)
        handler = CallbackHandler(public_key="pk-lf-00000001")
        metadata = {"langfuse_session_id": "t-1", "langfuse_user_id": "u-1"}
        converse(two_turns(), {"callbacks": [handler], "metadata": metadata})
        client.create_score(name="thumb", value=1.0, trace_id=handler.last_trace_id, comment="good")
        client.flush()
        observations = [row for body in server.sent("/otel/v1/traces") for row in observations_of(body)]
        server.answers["/api/public/v2/observations"] = {"data": observations, "meta": {}}
        page = client.api.observations.get_many()
        (score,) = server.when(lambda: [score for body in server.sent("/scores") for score in json.loads(body)])
        client.shutdown()
    rows = [json.loads(row.model_dump_json(by_alias=True)) for row in page.data]
    assert all(isinstance(row, ObservationV2) for row in page.data)
    return rows, {**score, "dataType": "NUMERIC", "source": "API"}


def observations_of(body):
    """Spans as the server turns them into observations."""
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    for span in (span for r in request.resource_spans for s in r.scope_spans for span in s.spans):
        given = {pair.key: pair.value.string_value for pair in span.attributes}
        own = {key.rpartition("langfuse.observation.")[2]: value for key, value in given.items()}
        metadata = {
            key.partition("metadata.")[2]: json.loads(value)
            for key, value in own.items()
            if key.startswith("metadata.")
        }
        yield {
            "id": span.span_id.hex(), "traceId": span.trace_id.hex(), "projectId": "p", "name": span.name,
            "startTime": when(span.start_time_unix_nano), "endTime": when(span.end_time_unix_nano),
            "parentObservationId": span.parent_span_id.hex() or None, "type": own.get("type", "span").upper(),
            "level": own.get("level", "DEFAULT"), "input": own.get("input"), "output": own.get("output"),
            "metadata": metadata, "model": own.get("model.name"), "userId": given.get("user.id"),
            "sessionId": given.get("session.id"), "usageDetails": json.loads(own.get("usage_details", "{}")),
        }  # fmt: skip


def when(nanoseconds):
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat()


def as_lines(rows, score):
    return "".join(json.dumps(row) + "\n" for row in [*rows, score])


def as_pages(rows, score):
    return json.dumps({"data": rows, "meta": {"cursor": "x"}}) + "\n" + json.dumps({"data": [score]}) + "\n"


def as_document(rows, score):
    return json.dumps({"data": [*rows, score], "meta": {}}, indent=1)


def as_traces(rows, score):
    """`GET /api/public/traces/{id}`, a trace a line with its observations and scores in it."""
    lines = []
    for id_ in dict.fromkeys(row["traceId"] for row in rows):
        own = [row for row in rows if row["traceId"] == id_]
        inner = {"observations": own, "scores": [score] if score["traceId"] == id_ else []}
        whole = {"id": id_, "timestamp": own[0]["startTime"], "name": "LangGraph", "sessionId": "t-1", "userId": "u-1"}
        lines.append(json.dumps({**whole, "htmlPath": "/x", **inner}))
    return "\n".join(lines)


def as_blobs(rows, score):
    """Blob storage: snake case, objects as text, times without a zone."""

    def snake(row):
        named = {re.sub("([A-Z])", r"_\1", key).lower(): value for key, value in row.items()}
        for key in ("start_time", "end_time"):
            if key in named:
                named[key] = named[key].replace("T", " ").replace("+00:00", "").replace("Z", "")
        return {key: json.dumps(value) if isinstance(value, dict) else value for key, value in named.items()}

    return as_lines([snake(row) for row in rows], snake(score))


@pytest.mark.parametrize("form", [as_lines, as_pages, as_document, as_traces, as_blobs])
def test_each_turn_is_a_trajectory(exported, imported, form):
    first, second = check_two_turns(*imported(form(*exported), "export.json"), "langfuse")
    assert second.metadata["feedback"] == [{"key": "thumb", "score": 1.0, "comment": "good"}]
    assert "feedback" not in first.metadata
