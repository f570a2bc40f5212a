"""Spans from OpenTelemetry's own exporter and OpenInference's instrumentor, in all the shapes they are exported in."""

from __future__ import annotations

import base64
import json

import pytest
from google.protobuf.json_format import MessageToDict
from openinference.instrumentation import using_attributes
from openinference.instrumentation.langchain import LangChainInstrumentor
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.trace import Status, StatusCode

from metis_agent.traces import steps_of
from tests.traces.agents import QUESTION, check_two_turns, converse, two_turns
from tests.traces.exports import lines
from tests.traces.receiver import receiver

pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.timeout(90),
]


@pytest.fixture
def provider():
    """A tracer provider that exports over HTTP, and keeps the spans as objects too."""
    with receiver() as server:
        memory = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"{server.url}/v1/traces")))
        provider.add_span_processor(SimpleSpanProcessor(memory))
        provider.received = server
        provider.memory = memory
        yield provider
        provider.shutdown()


def otlp_lines(provider):
    """What the collector's file exporter writes: a batch a line, ids in hex."""
    provider.force_flush()
    for body in provider.received.sent("/v1/traces"):
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        record = MessageToDict(request)
        for resource in record["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    for key in ("traceId", "spanId", "parentSpanId"):
                        if key in span:
                            span[key] = base64.b64decode(span[key]).hex()
        yield json.dumps(record)


def protobuf_lines(provider):
    """As Protobuf itself writes JSON where it keeps the names of fields, in the envelope of Tempo's API."""
    provider.force_flush()
    for body in provider.received.sent("/v1/traces"):
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        kept = MessageToDict(request, preserving_proto_field_name=True)
        yield json.dumps({"trace": {"batches": kept["resource_spans"]}})


def span_lines(provider):
    """`ReadableSpan.to_json`, a span a line."""
    return [json.dumps(json.loads(span.to_json())) for span in provider.memory.get_finished_spans()]


def phoenix_lines(provider):
    """Spans as Phoenix's client gives them: nested attributes, its own kind and status."""
    for span in map(json.loads, span_lines(provider)):
        attributes = span["attributes"]
        nested = {}
        for key, value in attributes.items():
            place = nested
            *path, last = key.split(".")
            for name in path:
                place = place.setdefault(name, {})
            place[last] = value
        yield json.dumps(
            {
                "name": span["name"], "context": span["context"], "parent_id": span["parent_id"],
                "span_kind": attributes.get("openinference.span.kind", "UNKNOWN"), "start_time": span["start_time"],
                "end_time": span["end_time"], "status_code": span["status"]["status_code"], "status_message": "",
                "attributes": nested, "events": span["events"],
            }
        )  # fmt: skip


@pytest.mark.parametrize("export", [otlp_lines, protobuf_lines, span_lines, phoenix_lines])
def test_openinference(provider, imported, export):
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        with using_attributes(session_id="t-1", user_id="u-1"):
            converse(two_turns(), {})
    finally:
        instrumentor.uninstrument()
    first, _ = check_two_turns(*imported("\n".join(export(provider))), "opentelemetry")
    assert all(step.model_call for step in steps_of(first))


def spoken(style, tracer, *, fails=False):
    """A run of one tool call, recorded by hand under the GenAI conventions of 2025 or of 2024."""
    said = [
        {"role": "user", "parts": [{"type": "text", "content": QUESTION}]},
        {"role": "assistant", "parts": [{"type": "tool_call", "id": "c1", "name": "look", "arguments": {"q": "Oslo"}}]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "717,710"}]},
        {"role": "assistant", "parts": [{"type": "text", "content": "717,710."}], "finish_reason": "stop"},
    ]
    asked = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": "Oslo"}'}}
    events = [
        ("gen_ai.system.message", {"content": "Be brief."}),
        ("gen_ai.user.message", {"content": QUESTION}),
        ("gen_ai.choice", {"index": 0, "message": json.dumps({"role": "assistant", "tool_calls": [asked]})}),
        ("gen_ai.assistant.message", {"tool_calls": json.dumps([asked])}),
        ("gen_ai.tool.message", {"id": "c1", "content": "717,710"}),
        ("gen_ai.choice", {"index": 0, "message": json.dumps({"content": "717,710."})}),
    ]
    with tracer.start_as_current_span("invoke_agent", attributes={gen_ai.GEN_AI_CONVERSATION_ID: "t-9"}) as root:
        for number, end in enumerate((1, 3)):
            attributes = {
                gen_ai.GEN_AI_OPERATION_NAME: "chat", gen_ai.GEN_AI_REQUEST_MODEL: "gpt-x",
                gen_ai.GEN_AI_RESPONSE_MODEL: "gpt-x-1", gen_ai.GEN_AI_USAGE_INPUT_TOKENS: 30 + number,
                gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: 4, gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 10,
            }  # fmt: skip
            if style == "messages":
                attributes |= {
                    gen_ai.GEN_AI_SYSTEM_INSTRUCTIONS: json.dumps([{"type": "text", "content": "Be brief."}]),
                    gen_ai.GEN_AI_INPUT_MESSAGES: json.dumps(said[:end]),
                    gen_ai.GEN_AI_OUTPUT_MESSAGES: json.dumps(said[end : end + 1]),
                    gen_ai.GEN_AI_TOOL_DEFINITIONS: json.dumps([{"type": "function", "name": "look"}]),
                }
            with tracer.start_as_current_span("chat gpt-x", attributes=attributes) as span:
                for name, given in () if style == "messages" else [*events[:2], *(events[2:3], events[3:])[number]]:
                    span.add_event(name, given)
            if not number:
                tool = {
                    gen_ai.GEN_AI_OPERATION_NAME: "execute_tool", gen_ai.GEN_AI_TOOL_NAME: "look",
                    gen_ai.GEN_AI_TOOL_CALL_ID: "c1",
                }  # fmt: skip
                with tracer.start_as_current_span("execute_tool look", attributes=tool) as span:
                    if fails:
                        span.set_status(Status(StatusCode.ERROR, "no connection"))
        root.add_event(
            "gen_ai.evaluation.result", {"gen_ai.evaluation.name": "right", "gen_ai.evaluation.score.value": 1.0}
        )


@pytest.mark.parametrize("export", [otlp_lines, span_lines])
@pytest.mark.parametrize("style", ["messages", "events"])
def test_genai_conventions_new_and_old(provider, imported, style, export):
    spoken(style, provider.get_tracer("x"), fails=style == "events")
    report, (run,) = imported("\n".join(export(provider)))
    assert (report.traces, report.rejected, report.handled) == (1, 0, {})
    assert (run.question.text, run.answer, run.conversation) == (QUESTION, "717,710.", "t-9")
    assert [message["type"] for message in run.history] == ["system"]
    assert run.history[0]["data"]["content"] == "Be brief."
    assert [call.usage["input_tokens"] for call in run.calls] == [30, 31]
    assert run.calls[0].usage["input_cache_read"] == 10
    assert run.metadata["model"] == "gpt-x-1"
    assert run.metadata["feedback"] == [{"key": "right", "score": 1.0}]
    (outcome,) = run.outcomes
    assert (outcome.tool, outcome.arguments, outcome.content) == ("look", {"q": "Oslo"}, "717,710")
    assert outcome.status == ("ok" if style == "messages" else "error")
    assert outcome.seconds > 0
    assert len(steps_of(run)) == 2
    if style == "messages":
        assert run.tools[0]["function"]["name"] == "look"


def test_a_document_over_several_lines(provider, imported):
    spoken("messages", provider.get_tracer("x"))
    merged = {"resourceSpans": [entry for line in otlp_lines(provider) for entry in json.loads(line)["resourceSpans"]]}
    report, (run,) = imported(json.dumps(merged, indent=2))
    assert (report.records, report.trajectories, run.answer) == (4, 1, "717,710.")


def test_a_dataframe_of_phoenix(imported):
    """Columns for attributes, lists of messages with dotted keys; there is no client of Phoenix's to make it."""
    call = {"tool_call.id": "c1", "tool_call.function.name": "look", "tool_call.function.arguments": '{"q": "Oslo"}'}
    asked = {"message.role": "user", "message.content": QUESTION}
    calls = {"message.role": "assistant", "message.tool_calls": [call]}
    result = {"message.role": "tool", "message.content": "717,710", "message.tool_call_id": "c1"}
    rows = [
        {
            "name": "llm", "span_kind": "LLM", "parent_id": None, "context.span_id": f"s{number}",
            "context.trace_id": "t",
            "start_time": f"2026-01-01T00:00:0{number}Z", "end_time": f"2026-01-01T00:00:0{number}.5Z",
            "status_code": "OK", "attributes.llm.input_messages": read, "attributes.llm.output_messages": [reply],
            "attributes.llm.token_count.prompt": 9.0, "attributes.llm.model_name": "gpt-x",
            "attributes.session.id": "c",
        }
        for number, (read, reply) in enumerate(
            [([asked], calls), ([asked, calls, result], {"message.role": "assistant", "message.content": "717,710."})]
        )
    ]  # fmt: skip
    report, (run,) = imported(lines(*rows))
    assert (run.answer, run.outcomes[0].arguments, run.conversation) == ("717,710.", {"q": "Oslo"}, "c")
    assert run.calls[1].usage == {"input_tokens": 9, "total_tokens": 9}
    assert report.handled == {}


def test_a_span_that_is_none_costs_no_other(provider, imported):
    spoken("messages", provider.get_tracer("x"))
    (batch,) = map(json.loads, list(otlp_lines(provider))[-1:])
    scope = batch["resourceSpans"][0]["scopeSpans"][0]
    scope["spans"] = [None, *scope["spans"], "torn"]
    scope["spans"][1]["attributes"].append({"key": "mine", "value": {"intValue": "many"}})
    whole = list(otlp_lines(provider))[:-1]
    report, (run,) = imported("\n".join([*whole, json.dumps(batch)]))
    assert run.answer == "717,710."
    assert report.reasons == {"2 of its spans or log records are no objects; the others were read": 1}


def test_a_schema_of_a_later_major_version_is_refused(imported):
    record = {"resourceSpans": [{"schemaUrl": "https://opentelemetry.io/schemas/2.0.0", "scopeSpans": []}]}
    report, runs = imported(lines(record))
    assert runs == []
    assert list(report.reasons) == ["OpenTelemetry schema 2, which is newer than this importer: it reads 1"]
