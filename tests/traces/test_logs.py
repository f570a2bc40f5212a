"""Message logs of OpenAI, Anthropic and LangChain: conversations and requests, one a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from langchain_core.load import dumpd
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, message_to_dict

from metis_agent.recording.store import TrajectoryStore
from metis_agent.tools import redaction
from metis_agent.traces import import_traces, steps_of
from metis_agent.traces.importers.message_logs import OpenAI
from tests.traces.exports import lines

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"query": "Oslo"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}]
SPOKEN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many live in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "717,710"},
    {"role": "assistant", "content": "717,710."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "You are welcome."},
]


@pytest.fixture
def imported(imported):
    return lambda *records, **options: imported(lines(*records), **options)


def test_a_conversation_is_a_trajectory_for_each_turn(imported):
    record = {"id": "talk-7", "messages": SPOKEN, "tools": TOOLS, "user": "ann", "reward": 1.0}
    report, (first, second) = imported(record, record)
    assert (report.format, report.trajectories, report.duplicates, report.tool_calls) == ("openai", 2, 0, 1)
    assert (first.id, second.id) == ("openai/talk-7/0", "openai/talk-7/1")
    assert (first.answer, second.answer) == ("717,710.", "You are welcome.")
    assert [len(run.history) for run in (first, second)] == [1, 5]
    assert first.outcomes[0].arguments == {"query": "Oslo"}
    assert first.outcomes[0].content == "717,710"
    assert (first.conversation, first.user, first.tools) == ("talk-7", "ann", tuple(TOOLS))
    assert "feedback" not in first.metadata
    assert second.metadata["feedback"] == [{"key": "reward", "score": 1.0}]


def test_a_user_who_gets_no_reply_is_counted(imported):
    report, runs = imported({"messages": [*SPOKEN, {"role": "user", "content": "###STOP###"}]})
    assert len(runs) == 2
    assert report.handled == {"user's message without a reply": 1}


def test_requests_that_go_on_from_each_other_are_one_conversation(imported):
    replies = [SPOKEN[2], SPOKEN[4], SPOKEN[6]]
    ends = [2, 4, 6]
    records = [
        {
            "request": {"model": "gpt-x", "messages": SPOKEN[:end], "tools": TOOLS, "temperature": 0.5},
            "response": {
                "model": "gpt-x-2026", "created": 1_790_000_000 + end, "choices": [{"index": 0, "message": reply}],
                "usage": {
                    "prompt_tokens": 100 + end, "completion_tokens": 7, "total_tokens": 107 + end,
                    "prompt_tokens_details": {"cached_tokens": 64},
                },
            },
        }
        for end, reply in zip(ends, replies, strict=True)
    ]  # fmt: skip
    report, (first, second) = imported(records[2], records[0], records[1], records[1])
    assert report.handled == {"span that came twice": 1}
    assert [call.usage["input_tokens"] for call in first.calls] == [102, 104]
    assert first.calls[0].usage["input_cache_read"] == 64
    assert first.calls[0].model == "gpt-x-2026"
    assert first.calls[0].sampling == {"temperature": 0.5}
    assert [call.usage["input_tokens"] for call in second.calls] == [106]
    assert first.conversation == second.conversation != ""
    assert first.tools == tuple(TOOLS)


def test_the_responses_api(imported):
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How many live in Oslo?"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"query": "Oslo"}', "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c1", "output": "717,710"},
    ]
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "717,710."}]}
    usage = {"input_tokens": 9, "output_tokens": 3, "output_tokens_details": {"reasoning_tokens": 2}}
    records = [
        {
            "request": {"model": "gpt-x", "instructions": "Be brief.", "input": given},
            "response": {"object": "response", "model": "gpt-x", "created_at": 1.79e9, "output": out, "usage": usage},
        }
        for given, out in ((items[:1], items[1:2]), (items, [said]))
    ]
    _, (run,) = imported(*records)
    assert run.answer == "717,710."
    assert [message["type"] for message in run.history] == ["system"]
    assert (run.outcomes[0].tool, run.outcomes[0].content) == ("look", "717,710")
    assert run.calls[1].usage == {"input_tokens": 9, "output_tokens": 3, "output_reasoning": 2, "total_tokens": 12}


def kept_by_the_api(**beside):
    """Two turns of the Responses API, whose requests send only what is new; `beside` is of the later two."""
    called = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"query": "Oslo"}'}
    brought = {"type": "function_call_output", "call_id": "c1", "output": "717,710"}

    def said(text):
        return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}

    for number, (given, out) in enumerate(
        [("How many live in Oslo?", called), ([brought], said("717,710.")), ("And in Bergen?", said("291,940."))]
    ):
        request = {"model": "gpt-x", "instructions": "Be brief.", "input": given}
        before = {name: value.format(number - 1) for name, value in beside.items() if number or name == "conversation"}
        response = {"id": f"resp_{number}", "object": "response", "model": "gpt-x", "output": [out]}
        yield {"request": request | before, "response": response}


@pytest.mark.parametrize("beside", [{"previous_response_id": "resp_{}"}, {"conversation": "conv_1"}])
def test_requests_that_send_only_what_is_new(imported, tmp_path, beside):
    report, (first, second) = imported(*kept_by_the_api(**beside))
    assert (report.handled, report.rejected) == ({}, 0)
    assert (first.question.text, first.answer, first.tool_calls) == ("How many live in Oslo?", "717,710.", 1)
    assert (second.question.text, second.answer) == ("And in Bergen?", "291,940.")
    assert [message["type"] for message in second.history] == ["system", "human", "ai", "tool", "ai"]
    assert first.conversation == second.conversation != ""
    # An import that was stopped after the first record knows of which conversation it was.
    reader = OpenAI()
    keys = [key for it in reader.records(str(tmp_path / "export.jsonl"), 1) for key, _ in reader.parts(it.value)]
    assert len(keys) == 2
    assert {run.id.split("/")[1] for run in (first, second)} == set(keys)


def test_a_response_that_is_not_in_the_log_is_counted(imported):
    _, *later = kept_by_the_api(previous_response_id="resp_{}")
    report, runs = imported(*later)
    assert report.handled["request that names the one before by its id alone"] == 1
    assert [run.answer for run in runs] == ["291,940."]


def asking(said, reply, **request):
    return {"request": {"messages": said, **request}, "response": reply}


def replied(message):
    return {"object": "chat.completion", "choices": [{"message": message}]}


def test_requests_are_joined_however_each_writes_what_they_share(imported):
    """Where the mark of a cache stands moves from request to request; the input of the first may be a bare string."""
    asked, use = [{"role": "user", "content": "Oslo?"}], {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    marked = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    results = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "717,710"}]}]
    report, (run,) = imported(
        asking([{"role": "user", "content": [{**marked[0], "text": "Oslo?"}]}],
               {"type": "message", "role": "assistant", "content": [use]}, system="Be brief."),
        asking([*asked, {"role": "assistant", "content": [use]}, *results],
               {"type": "message", "role": "assistant", "content": "717,710."}, system=marked),
    )  # fmt: skip
    assert (report.format, run.answer, run.tool_calls) == ("anthropic", "717,710.", 1)
    called = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    brought = {"type": "function_call_output", "call_id": "c", "output": "717,710"}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So many."}]}
    report, runs = imported(
        {"request": {"input": "Oslo?"}, "response": {"object": "response", "output": [called]}},
        {"request": {"input": [*asked, called, brought]}, "response": {"object": "response", "output": [said]}},
    )
    assert report.format == "openai"
    assert [(run.answer, run.tool_calls) for run in runs if run.id.startswith("openai")] == [("So many.", 1)]


@pytest.mark.parametrize("as_text", [False, True])
def test_a_reply_logged_as_the_chunks_of_its_stream(imported, as_text):
    first = {"index": 0, "id": "c1", "function": {"name": "look", "arguments": '{"que'}}
    deltas = [
        {"role": "assistant", "content": "I look"}, {"tool_calls": [first]}, {"content": "."},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ry": "Oslo"}'}}]},
    ]  # fmt: skip
    chunks = [{"object": "chat.completion.chunk", "model": "m-1", "choices": [{"delta": it}]} for it in deltas]
    chunks.append({"object": "chat.completion.chunk", "choices": [], "usage": {"prompt_tokens": 7}})
    text = "\n\n".join(f"data: {json.dumps(chunk)}" for chunk in chunks) + "\n\ndata: [DONE]\n"
    _, (run,) = imported(
        asking(SPOKEN[:2], text if as_text else chunks),
        asking(SPOKEN[:4], replied(SPOKEN[4])),
    )
    assert (run.answer, run.outcomes[0].arguments) == ("717,710.", {"query": "Oslo"})
    assert (run.calls[0].usage["input_tokens"], run.calls[0].model) == (7, "m-1")


@pytest.mark.parametrize("as_text", [False, True])
def test_replies_logged_as_the_events_of_their_streams(imported, as_text):
    """Anthropic's, block by block, and the Responses API's, which end with the whole."""
    use = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    anthropic = [
        {"type": "message_start", "message": {"type": "message", "role": "assistant", "model": "claude-x",
                                              "content": [], "usage": {"input_tokens": 9, "output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "I "}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "look."}},
        {"type": "content_block_start", "index": 1, "content_block": use},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"query"'}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": ': "Oslo"}'}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 7}},
    ]  # fmt: skip
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "717,710"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "I look."}, {**use, "input": {"query": "Oslo"}}]}

    def logged(events):
        return "".join(f"event: {it['type']}\ndata: {json.dumps(it)}\n\n" for it in events) if as_text else events

    asked = [{"role": "user", "content": "Oslo?"}]
    _, (run,) = imported(
        asking(asked, logged(anthropic), system="Be brief."),
        asking(
            [*asked, said, result], {"type": "message", "role": "assistant", "content": "Many."}, system="Be brief."
        ),
    )
    assert (run.answer, run.outcomes[0].arguments, run.calls[0].model) == ("Many.", {"query": "Oslo"}, "claude-x")
    assert run.calls[0].usage == {"input_tokens": 9, "output_tokens": 7, "total_tokens": 16}
    whole = {"object": "response", "id": "r", "output": [{"type": "message", "role": "assistant", "content": "Hi."}]}
    events = [{"type": "response.created", "response": {}}, {"type": "response.completed", "response": whole}]
    _, runs = imported({"request": {"input": asked}, "response": logged(events)}, format="openai")
    assert [run.answer for run in runs if run.id.startswith("openai")] == ["Hi."]


@pytest.mark.parametrize(
    "events",
    [
        [{"type": "response.created", "response": {}},
         {"type": "response.failed", "response": {"object": "response", "status": "failed", "output": [],
                                                  "error": {"code": "server_error"}}}],
        [{"type": "response.created", "response": {}}, {"type": "response.output_text.delta", "delta": "Ma"}],
        [{"type": "message_start", "message": {"type": "message", "role": "assistant", "content": []}},
         {"type": "content_block_start", "index": 0,
          "content_block": {"type": "tool_use", "id": "t", "name": "look", "input": {}}},
         {"type": "error", "error": {"type": "overloaded_error"}}],
    ],
    ids=["failed", "broken off", "overloaded"],
)  # fmt: skip
def test_a_stream_that_failed_is_no_answer(imported, events):
    asked = [{"role": "user", "content": "Oslo?"}]
    report, runs = imported({"request": {"input": asked, "messages": asked}, "response": events})
    assert (runs, report.rejected, report.tool_calls) == ([], 1, 0)


def test_messages_on_lines_of_their_own_and_lists_of_messages(imported):
    lines = [{"conversation_id": "k", "created_at": n, **message} for n, message in enumerate(SPOKEN)]
    report, runs = imported(*lines, lines[3])
    assert [run.answer for run in runs] == ["717,710.", "You are welcome."]
    assert {run.conversation for run in runs} == {"k"}
    for conversations in ([SPOKEN], [SPOKEN, SPOKEN[:2] + SPOKEN[4:5]]):
        report, _ = imported(*conversations)
        assert (report.rejected, report.records) == (0, len(conversations))


def test_anthropic_conversations_and_requests(imported):
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    asked = {"role": "user", "content": [{"type": "text", "text": "How many live here?"}, image]}
    use = {"type": "tool_use", "id": "tu_1", "name": "look", "input": {"query": "Oslo"}}
    thought = {"type": "thinking", "thinking": "Oslo.", "signature": "x"}
    result = {"type": "tool_result", "tool_use_id": "tu_1", "content": [{"type": "text", "text": "717,710"}]}
    first = {"role": "assistant", "content": [thought, {"type": "text", "text": "Let me see."}, use]}
    back = {"role": "user", "content": [result, {"type": "text", "text": "(a reminder)"}]}
    tools = [{"name": "look", "description": "Look.", "input_schema": {"type": "object"}}]
    usage = {"input_tokens": 10, "output_tokens": 4, "cache_read_input_tokens": 90}
    requests = [
        {
            "request": {"model": "claude-x", "system": "Be brief.", "messages": said, "tools": tools},
            "response": {"type": "message", "role": "assistant", "model": "claude-x", "content": out, "usage": usage},
        }
        for said, out in (
            ([asked], first["content"]),
            ([asked, first, back], [{"type": "text", "text": "717,710."}]),
        )
    ]
    report, (run,) = imported(*requests)
    assert report.format == "anthropic"
    assert (run.question.text, run.answer) == ("How many live here?", "717,710.")
    assert run.calls[0].usage["input_tokens"] == 100
    assert (run.outcomes[0].tool, run.outcomes[0].arguments) == ("look", {"query": "Oslo"})
    assert "717,710" in run.outcomes[0].content
    assert "(a reminder)" in run.outcomes[0].content
    assert run.tools[0]["function"]["parameters"] == {"type": "object"}
    first, second = steps_of(run)
    assert first.messages[1].content[1] == {"type": "image", "base64": "aGk=", "mime_type": "image/png"}
    assert second.answered


@pytest.mark.parametrize("form", [message_to_dict, dumpd, lambda message: message.model_dump()])
def test_langchain_messages_in_three_forms(imported, form):
    said = [
        SystemMessage("Be brief."),
        HumanMessage("How many live in Oslo?"),
        AIMessage("", tool_calls=[{"name": "look", "args": {"query": "Oslo"}, "id": "c1"}]),
        ToolMessage("no such place", tool_call_id="c1", name="look", status="error"),
        AIMessage("I can't say.", usage_metadata={"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}),
    ]
    report, (run,) = imported({"thread_id": "t", "messages": [form(message) for message in said]})
    assert report.format == "langchain"
    assert run.answer == "I can't say."
    assert [outcome.status for outcome in run.outcomes] == ["error"]
    assert run.calls[1].usage["total_tokens"] == 7
    assert [message.type for message in steps_of(run)[1].messages] == ["system", "human", "ai", "tool"]


def test_calls_without_ids_and_with_the_same_id_again(imported):
    again = [
        {"role": "user", "content": "And Bergen?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "291,940"},
        {"role": "assistant", "function_call": {"name": "look", "arguments": "not json"}},
        {"role": "function", "name": "look", "content": "what?"},
        {"role": "assistant", "content": "291,940."},
    ]
    _, (_, second, third) = imported({"messages": [*SPOKEN, *again]})
    assert second.outcomes == ()
    assert [(outcome.content, outcome.arguments) for outcome in third.outcomes] == [
        ("291,940", {"query": "Oslo"}), ("what?", {}),
    ]  # fmt: skip
    assert len({outcome.call_id for outcome in third.outcomes}) == 2
    assert [step.round.outcomes[0].content for step in steps_of(third)[:-1]] == ["291,940", "what?"]


def test_what_is_unusual_is_handled_and_counted(imported):
    odd = [
        SPOKEN[1],
        {"role": "tool", "tool_call_id": "nobody", "content": "a result without a call"},
        {"role": "moderator", "content": "fine"},
        {"role": "assistant", "content": [{"type": "hologram", "data": 1}, {"type": "text", "text": "Done."}]},
    ]
    report, (run,) = imported({"messages": odd})
    assert report.handled == {"message 'moderator'": 1, "part 'hologram'": 1, "tool result without a call": 1}
    assert run.answer == "Done."
    assert [message.type for message in steps_of(run)[0].messages] == ["human", "chat"]


def test_what_turns_share_is_looked_through_for_secrets_once(tmp_path):
    looked = []

    walk = redaction._Walk._mapping
    with TrajectoryStore(tmp_path / "store") as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(redaction._Walk, "_mapping", lambda *given: looked.append(given) or walk(*given))
        (tmp_path / "log.jsonl").write_text(json.dumps({"id": "t", "messages": SPOKEN[1:5] * 40}))
        import_traces([tmp_path / "log.jsonl"], store)
        assert max(len(run.history) for run in store.read()) == 156
    assert len(looked) < 40 * 25  # not 40 * 40 * 4 / 2


def test_what_is_no_conversation_is_rejected_with_the_reason(imported, tmp_path):
    report, runs = imported(
        {"messages": SPOKEN}, {"role": "user", "content": "alone"}, {"foo": 1}, {"messages": []},
        {"messages": [{"role": "user", "content": "nobody replied"}]},
    )  # fmt: skip
    assert len(runs) == 2
    assert report.rejected == 4
    kept = [json.loads(line) for line in Path(report.rejects).read_text().splitlines()]
    assert [line["reason"].partition(":")[0].partition(";")[0] for line in kept][:2] == [
        "a message by itself", "no messages, and no request with messages",
    ]  # fmt: skip
    assert sum(report.reasons.values()) == 4
