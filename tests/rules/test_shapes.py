"""Each provider's shape of a reply, as its client gives it: reading it, and changing it everywhere at once."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from metis_agent import Budget, ModelGate, create_metis_agent
from metis_agent.messages import text_of
from metis_agent.rules.answers import with_free_results
from metis_agent.rules.asking import AskedGate, no_tools_choice
from metis_agent.rules.rules import Offer, Rules, spec_of
from metis_agent.rules.shapes import (
    ending_of,
    has_answer,
    joined,
    new_answer,
    provider_calls,
    refusal_in,
    rewritten,
    without_calls,
    without_last_thoughts,
)
from tests.fakes import model


@pytest.mark.parametrize(
    ("called", "server", "named"),
    [("web_search", False, "web_search_preview"), ("search", False, "search"), ("search", True, "mcp"),
     ("github_search", True, "mcp"), ("bash_code_execution", False, "code_execution"), ("look", False, "look")],
)  # fmt: skip
def test_a_call_at_the_provider_has_the_name_of_its_tool_there(called, server, named):
    @tool
    def search(query: str) -> str:
        """Search here."""
        return query

    tools = [search, *({"type": kind} for kind in ("web_search_preview", "mcp", "code_execution"))]
    rules = Rules(gate=AskedGate(ModelGate()), budget=Budget())
    assert Offer([spec_of(it) for it in tools], {}, rules, tools=tools).named(called, server) == named


THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": []}


def a_call(id="c1", name="look", **arguments):
    return {"name": name, "args": arguments or {"x": 1}, "id": id, "type": "tool_call"}


SHAPES = {
    "Anthropic": [
        {"type": "thinking", "thinking": "hmm", "signature": "s"},
        {"type": "tool_use", "id": "c1", "name": "look", "input": {"x": 1}},
    ],
    "Anthropic, streamed": [
        {"type": "thinking", "thinking": "hmm", "signature": "s", "index": 0},
        {"type": "tool_use", "id": "c1", "name": "look", "input": {}, "partial_json": '{"x": 1}', "index": 1},
    ],
    "OpenAI Responses": [
        THOUGHT, {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": '{"x":1}'},
    ],
    "OpenAI Responses, free-form": [
        THOUGHT, {"type": "custom_tool_call", "id": "ctc_1", "call_id": "c1", "name": "look", "input": "1"},
    ],
    "standard": [
        {"type": "reasoning", "reasoning": "hmm"}, {"type": "tool_call", "id": "c1", "name": "look", "args": {"x": 1}},
    ],
    "standard, free-form": [
        {"type": "reasoning", "reasoning": "hmm"},
        {"type": "non_standard", "value": {"type": "custom_tool_call", "call_id": "c1", "name": "look", "input": "1"}},
    ],
    "Bedrock": [
        {"type": "reasoning_content", "reasoning_content": {"text": "hmm", "signature": "s"}},
        {"type": "tool_use", "id": "c1", "name": "look", "input": {"x": 1}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_call_taken_out_takes_its_thoughts_along(name):
    thought, block = SHAPES[name]
    text = {"type": "text", "text": "well"}
    both = AIMessage([thought, text, block], tool_calls=[a_call()])
    assert rewritten(AIMessage([thought, block], tool_calls=[a_call()]), [None]).content == []
    assert rewritten(both, [None]).content == [thought, text]
    second = {key: {"call_id": "c2", "id": "c2"}.get(key, value) for key, value in block.items()}
    if "value" in second:
        second["value"] = {**block["value"], "call_id": "c2"}
    two = AIMessage([thought, block, thought, second], tool_calls=[a_call(), a_call("c2")])
    assert rewritten(two, [None, a_call("c2")]).content[0] == thought
    assert len(rewritten(two, [None, a_call("c2")]).content) == 2


@pytest.mark.parametrize("name", SHAPES)
def test_a_renamed_call_is_renamed_in_its_block(name):
    changed = rewritten(AIMessage(SHAPES[name], tool_calls=[a_call()]), [a_call("c9")])
    thought, block = changed.content
    inner = block.get("value", block)
    assert "c9" in (inner.get("call_id"), inner.get("id"))
    assert "c1" not in (inner.get("call_id"), inner.get("id"))
    assert thought == SHAPES[name][0]
    assert changed.tool_calls == [a_call("c9")]


def test_what_does_not_change_is_the_same_object():
    message = AIMessage(SHAPES["Anthropic"], tool_calls=[a_call()])
    assert rewritten(message, [a_call()]) is message


def test_blocks_with_one_id_belong_to_their_calls_in_order():
    blocks = [{"type": "tool_use", "id": "", "name": name, "input": {}} for name in ("look", "pay", "look")]
    calls = [a_call("", "look"), a_call("", "pay"), a_call("", "look")]
    new = [a_call("a", "look"), a_call("b", "pay"), a_call("c", "look")]
    changed = rewritten(AIMessage(blocks, tool_calls=calls), new)
    assert [(block["id"], block["name"]) for block in changed.content] == [("a", "look"), ("b", "pay"), ("c", "look")]


def test_an_invalid_call_becomes_one_that_every_provider_takes():
    broken = {"name": "look", "args": '{"x": ', "id": "c1", "error": None, "type": "invalid_tool_call"}
    blocks = [{"type": "tool_use", "id": "c1", "name": "look", "input": {}, "partial_json": '{"x": '}]
    raw = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x": '}}]
    message = AIMessage(blocks, invalid_tool_calls=[broken], additional_kwargs={"tool_calls": raw})
    empty = {"name": "look", "args": {}, "id": "c1", "type": "tool_call"}
    changed = rewritten(message, [empty])
    assert (changed.tool_calls, changed.invalid_tool_calls) == ([empty], [])
    assert changed.content == [{"type": "tool_use", "id": "c1", "name": "look", "input": {}}]
    assert changed.additional_kwargs["tool_calls"][0]["function"]["arguments"] == "{}"


def test_keywords_by_call_follow_the_calls():
    signatures = "__gemini_function_call_thought_signatures__"
    keywords = {signatures: {"c1": "s1", "c2": "s2"}, "function_call": {"name": "look"}}
    message = AIMessage("", tool_calls=[a_call(), a_call("c2")], additional_kwargs=keywords)
    assert rewritten(message, [a_call("c9"), None]).additional_kwargs == {signatures: {"c9": "s1"}}


def test_a_stored_response_is_not_gone_on_from_once_it_was_changed():
    message = AIMessage("well", tool_calls=[a_call()], response_metadata={"id": "resp_1", "model": "m"})
    assert rewritten(message, [None]).response_metadata == {"model": "m"}
    assert rewritten(message, [a_call(x=2)]).response_metadata == {"id": "resp_1", "model": "m"}


def test_list_content_is_a_list_of_blocks():
    assert rewritten(AIMessage(["well"]), []).content == [{"type": "text", "text": "well"}]
    merged = [{"type": "text", "text": "well", "index": 0, "name": "look", "args": "{}", "id": "c1"}]
    assert rewritten(AIMessage(merged, tool_calls=[a_call()]), [None]).content == [{"type": "text", "text": "well"}]


@pytest.mark.parametrize(
    ("metadata", "ending"),
    [
        ({"finish_reason": "length"}, "length"), ({"stop_reason": "max_tokens"}, "length"),
        ({"stopReason": "max_tokens"}, "length"), ({"finish_reason": "MAX_TOKENS"}, "length"),
        ({"incomplete_details": {"reason": "max_output_tokens"}}, "length"), ({"done_reason": "length"}, "length"),
        ({"finish_reason": "content_filter"}, "stopped"), ({"stop_reason": "refusal"}, "stopped"),
        ({"stopReason": "guardrail_intervened"}, "stopped"), ({"finish_reason": "SAFETY"}, "stopped"),
        ({"incomplete_details": {"reason": "content_filter"}}, "stopped"), ({"stop_reason": "pause_turn"}, "paused"),
        ({"prompt_feedback": {"block_reason": "SAFETY"}}, "stopped"), ({"finish_reason": "stop"}, ""), ({}, ""),
        ({"prompt_feedback": {"block_reason": "OTHER"}}, "stopped"), ({"finish_reason": "OTHER"}, ""),
        ({"prompt_feedback": {"block_reason": "BLOCKED_REASON_UNSPECIFIED"}, "finish_reason": "STOP"}, ""),
        ({"finish_reason": "insufficient_system_resource"}, "length"), ({"finish_reason": "abort"}, "length"),
        ({"finish_reason": "MODEL_ARMOR"}, "stopped"), ({"stopReason": "malformed_model_output"}, "slipped"),
        # Said in two chunks of a stream.
        ({"finish_reason": "lengthlength"}, "length"), ({"finish_reason": "stopstop"}, ""),
        ({"finish_reason": "MALFORMED_FUNCTION_CALL"}, "slipped"), ({"stopReason": "malformed_tool_use"}, "slipped"),
    ],
)  # fmt: skip
def test_how_a_reply_ended(metadata, ending):
    assert ending_of(AIMessage("", response_metadata=metadata)) == ending


def test_refusals():
    assert refusal_in(AIMessage("", additional_kwargs={"refusal": "no"})) == "no"
    assert refusal_in(AIMessage([{"type": "refusal", "refusal": "no"}])) == "no"
    assert "SAFETY" in (refusal_in(AIMessage("", response_metadata={"finish_reason": "SAFETY"})) or "")
    assert refusal_in(AIMessage("", additional_kwargs={"refusal": None})) is None
    assert refusal_in(AIMessage("", response_metadata={"finish_reason": "length"})) is None


@pytest.mark.parametrize(
    ("content", "answers"),
    [
        ("text", True),
        ("", False),
        (" \n", False),
        ([], False),
        ([{"type": "text", "text": " "}], False),
        ([{"type": "text", "text": "x"}], True),
        ([{"type": "reasoning", "reasoning": "hm"}], False),
        ([{"type": "tool_use", "id": "1", "name": "a", "input": {}}], False),
        ([{"type": "image", "url": "https://example.org/x.png"}], True),
        ([{"type": "container_upload", "file_id": "f"}], True),
        # For the caller to approve, or to do.
        ([{"type": "mcp_approval_request", "id": "m", "name": "roll", "arguments": "{}", "server_label": "d"}], True),
        ([THOUGHT, {"type": "computer_call", "call_id": "c", "action": {"type": "screenshot"}}], True),
        ([{"type": "non_standard", "value": {"type": "local_shell_call", "call_id": "c", "action": {}}}], True),
    ],
)
def test_what_counts_as_an_answer(content, answers):
    assert has_answer(AIMessage(content)) is answers


def test_calls_are_taken_out_wherever_they_are():
    message = AIMessage(
        [{"type": "text", "text": "so"}, {"type": "tool_use", "id": "1", "name": "a", "input": {}}],
        tool_calls=[a_call("1", "a")],
        invalid_tool_calls=[{"name": "b", "args": "{", "id": "2", "error": None}],
        additional_kwargs={"tool_calls": [{"id": "1"}], "refusal": None},
        id="m",
    )
    bare = without_calls(message)
    assert (bare.tool_calls, bare.invalid_tool_calls, bare.id) == ([], [], "m")
    assert bare.content == [{"type": "text", "text": "so"}]
    assert bare.additional_kwargs == {"refusal": None}
    assert message.tool_calls  # the reply itself is left alone


def test_what_is_no_answer():
    assert has_answer(AIMessage("well"))
    assert has_answer(AIMessage([{"type": "image", "url": "https://example.org"}]))
    for silent in (
        " ", [], [THOUGHT], SHAPES["Bedrock"], [{"type": "refusal", "refusal": "no"}], [{"type": "web_search_call"}],
    ):  # fmt: skip
        assert not has_answer(AIMessage(silent))


def test_a_picture_is_an_answer_only_if_it_was_drawn():
    drawn = {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "iVBO"}
    failed = {**drawn, "status": "failed", "result": None}
    assert has_answer(AIMessage([drawn]))
    assert not has_answer(AIMessage([failed]))
    assert not has_answer(AIMessage([{"type": "non_standard", "value": failed}]))


@pytest.mark.parametrize("kind", ["image_generation_call", "mcp_approval_request", "computer_call"])
def test_an_answer_beside_the_content_is_one(kind):
    # Where the old form of OpenAI's Responses has it; Gemini's client has sound there, too.
    assert has_answer(AIMessage([], additional_kwargs={"tool_outputs": [{"type": kind, "result": "iVBO"}]}))
    assert has_answer(AIMessage([], additional_kwargs={"audio": b"RIFF"}))
    assert not has_answer(AIMessage([], additional_kwargs={"tool_outputs": [{"type": "web_search_call"}]}))


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (AIMessage([
            {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "q"}},
            {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
         ]), ("web_search", {"query": "q"}, False)),
        (AIMessage([
            {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {},
             "partial_json": '{"query": "q"}'},
            {"type": "web_search_tool_result", "tool_use_id": "s1",
             "content": {"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"}},
         ]), ("web_search", {"query": "q"}, True)),
        (AIMessage([{"type": "web_search_call", "id": "w1", "status": "completed", "action": {"query": "q"}}]),
         ("web_search", {"query": "q"}, False)),
        (AIMessage("", additional_kwargs={
            "tool_outputs": [{"type": "file_search_call", "id": "f", "status": "failed"}],
         }), ("file_search", {}, True)),
        (AIMessage([
            {"type": "server_tool_call", "id": "s1", "name": "web_search", "args": {"query": "q"}},
            {"type": "server_tool_result", "tool_call_id": "s1", "status": "success"},
         ]), ("web_search", {"query": "q"}, False)),
        (AIMessage("", response_metadata={"grounding_metadata": {"web_search_queries": ["q"]}}),
         ("google_search", {"query": "q"}, False)),
        (AIMessage([{"type": "executable_code", "executable_code": "1", "language": "python"}]),
         ("code_execution", {"code": "1"}, False)),
        (AIMessage([{"type": "mcp_call", "id": "m", "name": "roll", "arguments": '{"dice": 6}', "output": "4"}]),
         ("roll", {"dice": 6}, False)),
        (AIMessage([{"type": "code_interpreter_call", "id": "c", "code": "1", "container_id": "x"}]),
         ("code_interpreter", {"code": "1"}, False)),
        (AIMessage([
            {"type": "mcp_tool_use", "id": "m", "name": "roll", "input": {"dice": 6}, "server_name": "d"},
            {"type": "mcp_tool_result", "tool_use_id": "m", "is_error": True, "content": []},
         ]), ("roll", {"dice": 6}, True)),
        (AIMessage([{"type": "non_standard", "value": {"type": "web_search_call", "id": "w", "action": {"a": "b"}}}]),
         ("web_search", {"a": "b"}, False)),
        (AIMessage([
            {"type": "executable_code", "executable_code": "1", "id": "x"},
            {"type": "code_execution_result", "code_execution_result": "no", "outcome": 2, "tool_call_id": ""},
         ]), ("code_execution", {"code": "1"}, True)),
        (AIMessage([{"type": "image", "id": "ig_1", "base64": "iVBO"}]), ("image_generation", {}, False)),
        (AIMessage([
            {"type": "server_tool_call", "id": "l", "name": "mcp_list_tools", "args": {}},
            {"type": "server_tool_result", "tool_call_id": "l", "status": "success"},
            {"type": "server_tool_call", "id": "m", "name": "remote_mcp", "args": {"dice": 6}},
         ]), ("remote_mcp", {"dice": 6}, False)),
        (AIMessage("", response_metadata={"grounding_metadata": {
            "web_search_queries": [], "grounding_chunks": [{"maps": {"uri": "u"}, "web": None}] * 2,
         }}), ("google_maps", {}, False)),
        (AIMessage("", response_metadata={"grounding_metadata": {
            "retrieval_queries": ["q"], "grounding_chunks": [{"retrieved_context": {"text": "x"}}],
         }}), ("file_search", {"query": "q"}, False)),
        (AIMessage("", response_metadata={"grounding_metadata": {
            "retrieval_queries": None, "grounding_chunks": [{"retrieved_context": {"text": "x"}}],
         }}), ("file_search", {}, False)),
    ],
)  # fmt: skip
def test_calls_that_have_run_at_the_provider(message, found):
    assert [(call.tool, call.arguments, call.failed) for call in provider_calls(message)] == [found]


def test_calls_of_our_own_tools_have_not():
    for content in SHAPES.values():
        assert provider_calls(AIMessage(content)) == []


def test_a_refusal_is_found_where_langchain_has_wrapped_it():
    assert refusal_in(AIMessage([{"type": "non_standard", "value": {"type": "refusal", "refusal": "no"}}])) == "no"


def test_what_is_for_the_caller_is_no_call_of_the_providers():
    for kind in ("mcp_approval_request", "computer_call", "local_shell_call", "apply_patch_call"):
        assert provider_calls(AIMessage([{"type": kind, "id": "1", "action": {}}])) == []


def test_a_new_answer_has_nothing_of_the_reply_but_why_it_ended():
    reply = AIMessage(
        [THOUGHT], id="1", name="us",
        response_metadata={"output_version": "v1", "id": "resp_1", "stop_reason": "refusal"},
    )  # fmt: skip
    answer = new_answer("no", reply, refusal="no")
    assert (answer.content, answer.id, answer.name) == ("no", None, "us")
    assert answer.response_metadata == {"stop_reason": "refusal"}
    assert answer.additional_kwargs == {"refusal": "no"}


def test_a_paused_reply_and_its_end_are_one():
    assert joined(AIMessage([{"type": "web_search_call"}]), AIMessage([THOUGHT], id="2")).content[1] == THOUGHT
    assert joined(AIMessage([THOUGHT]), AIMessage("well")).content == "well"
    refused = {"type": "refusal", "refusal": ""}
    assert joined(AIMessage(["hm"]), AIMessage([THOUGHT, refused])).content == ["hm", refused]


def test_results_of_free_form_tools():
    for content in (SHAPES["OpenAI Responses, free-form"], SHAPES["standard, free-form"]):
        result = ToolMessage("blocked", tool_call_id="c1")
        messages = [HumanMessage("q"), AIMessage(content, tool_calls=[a_call()]), result]
        changed = with_free_results(messages)[2]
        assert changed.content == [{"type": "custom_tool_call_output", "output": "blocked"}]
        assert text_of(changed) == "blocked"
        assert with_free_results([*messages[:2], changed])[2] is changed
    messages = [AIMessage(SHAPES["Anthropic"], tool_calls=[a_call()]), result]
    assert with_free_results(messages) is messages


def test_which_clients_can_forbid_tools():
    class BaseChatOpenAI: ...

    class ChatDeepSeek(BaseChatOpenAI): ...

    class ChatAnthropic: ...

    assert no_tools_choice(ChatDeepSeek()) == "none"
    assert no_tools_choice(ChatAnthropic()) == {"type": "none"}
    assert no_tools_choice(object()) is None


def test_thoughts_that_nothing_follows_are_taken_out():
    thought, found = {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "web_search_tool_result"}
    wrapped = {"type": "non_standard", "value": {"type": "redacted_thinking", "data": "x"}}
    for last in ([thought], [thought, {"type": "text", "text": " "}], [wrapped, thought, ""]):
        assert without_last_thoughts(AIMessage([thought, found, *last])).content == [thought, found]
    for kept in ("text", [thought, found], [thought, {"type": "text", "text": "so"}]):
        message = AIMessage(kept)
        assert without_last_thoughts(message) is message


@pytest.mark.parametrize(
    ("offered", "block", "name"),
    [
        ({"type": "mcp", "server_label": "d"}, {"type": "mcp_call", "id": "m", "name": "roll"}, "mcp"),
        ({"type": "mcp_toolset", "mcp_server_name": "d"},
         {"type": "mcp_tool_use", "id": "m", "name": "roll"}, "mcp_toolset"),
        ({"type": "mcp", "server_label": "d"}, {"type": "server_tool_call", "id": "m", "name": "remote_mcp"}, "mcp"),
        ({"type": "code_execution_20250825", "name": "code_execution"},
         {"type": "server_tool_use", "id": "m", "name": "bash_code_execution"}, "code_execution"),
        ({"systemTool": {"name": "nova_grounding"}},
         {"type": "server_tool_use", "id": "m", "name": "nova_grounding"}, "nova_grounding"),
    ],
)  # fmt: skip
def test_a_call_at_the_provider_has_the_name_of_its_tool_on_offer(offered, block, name):
    said = AIMessage([block, {"type": "text", "text": "done"}])
    state = create_metis_agent(model(said), [offered, {"type": "web_search"}]).invoke({"messages": [("user", "q")]})
    assert [outcome.tool for outcome in state["outcomes"]] == [name]
    assert state["messages"][-1].text == "done"


def test_several_servers_may_have_one_name():
    servers = [{"type": "mcp", "server_label": label} for label in "ab"]
    chat = model("done")
    create_metis_agent(chat, servers).invoke({"messages": [("user", "q")]})
    assert len(chat.asked[0].tools) == 2
