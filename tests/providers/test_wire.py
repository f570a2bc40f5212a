"""The rules of the loopback server: what the providers refuse is refused, and what they take is taken."""

import copy

import pytest

from tests.providers.claude_wire import Converse, Messages
from tests.providers.gemini_wire import GenerateContent
from tests.providers.openai_wire import Chat, ClaudeChat, Responses
from tests.providers.server import Refused

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CHAT = {
    "model": "gpt-4o", "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "found"}]},
    ],
}  # fmt: skip
RESPONSES = {
    "model": "gpt-5", "tools": TOOLS,
    "input": [
        {"type": "message", "role": "user", "content": "q"}, {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "found"},
    ],
}  # fmt: skip
MESSAGES = {
    "model": "claude", "tools": [{"name": "look", "input_schema": {}}],
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "found"}]},
    ],
}  # fmt: skip
CONVERSE = {
    "toolConfig": {"tools": [{"toolSpec": {"name": "look"}}]},
    "messages": [
        {"role": "user", "content": [{"text": "q"}]},
        {"role": "assistant", "content": [{"toolUse": {"toolUseId": "c1", "name": "look", "input": {}}}]},
        {"role": "user", "content": [{"toolResult": {"toolUseId": "c1", "content": [{"text": "found"}]}}]},
    ],
}  # fmt: skip
GEMINI = {
    "tools": [{"functionDeclarations": [{"name": "look"}]}],
    "contents": [
        {"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]},
        {"role": "user", "parts": [{"text": "q"}]},
    ],
}  # fmt: skip
THOUGHT = {"type": "thinking", "thinking": "hmm", "signature": "none"}
LOOKED = {"functionCall": {"name": "look", "args": {}}}
FOUND = {"functionResponse": {"name": "look", "response": {"output": "x"}}}


def put(body, path, value):
    """The body with a value elsewhere; `...` takes the place out, and a place past the end of a list adds one."""
    body = copy.deepcopy(body)
    *way, last = path
    inner = body
    for step in way:
        inner = inner[step]
    if value is ...:
        del inner[last]
    elif isinstance(inner, list) and last == len(inner):
        inner.append(value)
    else:
        inner[last] = value
    return body


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (Chat, CHAT), (ClaudeChat, CHAT), (Responses, RESPONSES), (Messages, MESSAGES), (Converse, CONVERSE),
        (GenerateContent, GEMINI),
    ],
)  # fmt: skip
def test_sound_requests_are_taken(dialect, body):
    dialect().check(copy.deepcopy(body))


@pytest.mark.parametrize(
    ("dialect", "body", "path", "value", "reason"),
    [
        (Chat, CHAT, ["tools"], [], "too short"),
        (Chat, put(CHAT, ["tools"], ...), ["parallel_tool_calls"], False, "only allowed"),
        (Chat, put(CHAT, ["tools"], ...), ["tool_choice"], "none", "only allowed"),
        (Chat, CHAT, ["top_logprobs"], 2, "logprobs"),
        (Chat, put(CHAT, ["model"], "gpt-5"), ["logprobs"], True, "not supported"),
        (Chat, CHAT, ["messages", 2], ..., "must be followed"),
        (Chat, CHAT, ["messages", 1], ..., "preceding message"),
        (Chat, CHAT, ["messages", 3], {"role": "tool", "tool_call_id": "c1", "content": "x"}, "preceding message"),
        (Chat, CHAT, ["messages", 2, "content"], ["found"], "expected an object"),
        (Chat, CHAT, ["messages", 2, "content", 0, "type"], "image_url", "Invalid value"),
        (Chat, CHAT, ["messages", 2, "content"], [], "empty array"),
        (Chat, CHAT, ["messages", 1, "tool_calls"], ..., "must have content"),
        (Chat, CHAT, ["messages", 1, "tool_calls"], [CALL, CALL], "Duplicate"),
        (Chat, CHAT, ["messages", 1, "tool_calls", 0, "id"], "", "empty string"),
        (Chat, CHAT, ["messages", 1, "tool_calls", 0, "function", "name"], "look up", "name"),
        (Chat, CHAT, ["messages", 1, "status"], "x", "Unknown parameter"),
        (ClaudeChat, CHAT, ["tools"], ..., "without `tools=`"),
        (ClaudeChat, CHAT, ["messages", 1, "tool_calls", 0, "function", "arguments"], '{"x": ', "no JSON"),
        (ClaudeChat, CHAT, ["messages", 1, "tool_calls", 0, "function", "arguments"], "[]", "dictionary"),
        (ClaudeChat, CHAT, ["messages", 3], {"role": "assistant", "content": " "}, "non-whitespace"),
        (Responses, RESPONSES, ["logprobs"], True, "Unknown parameter"),
        (Responses, put(RESPONSES, ["tools"], ...), ["tool_choice"], "auto", "must be specified"),
        (Responses, RESPONSES, ["previous_response_id"], "resp_9", "not found"),
        (Responses, RESPONSES, ["input", 3], ..., "No tool output"),
        (Responses, RESPONSES, ["input", 2], ..., "without its following item"),
        (Responses, RESPONSES, ["input", 3, "type"], "custom_tool_call_output", "No tool call found"),
        (Responses, RESPONSES, ["input", 3, "output"], ["found"], "expected an object"),
        (Responses, RESPONSES, ["input", 3, "output"], [{"type": "text"}], "Invalid value"),
        (Responses, RESPONSES, ["input", 4], RESPONSES["input"][2], "Duplicate item"),
        (Responses, RESPONSES, ["input", 4], {**RESPONSES["input"][2], "id": "fc_2"}, "Duplicate call_id"),
        (Messages, MESSAGES, ["tools"], [], "at least 1 item"),
        (Messages, MESSAGES, ["tools"], ..., "must define tools"),
        (Messages, put(MESSAGES, ["tools"], ...), ["tool_choice"], {"type": "none"}, "only be specified"),
        (Messages, MESSAGES, ["messages", 2], {"role": "user", "content": "well"}, "without `tool_result`"),
        (Messages, MESSAGES, ["messages", 1, "content"], "a", "unexpected `tool_use_id`"),
        (Messages, MESSAGES, ["messages", 1, "content", 0, "input"], "{", "dictionary"),
        (Messages, MESSAGES, ["messages", 1, "content", 0, "index"], 1, "Extra inputs"),
        (Messages, MESSAGES, ["messages", 1, "content", 1], {"type": "text", "text": " "}, "non-whitespace"),
        (Messages, MESSAGES, ["messages", 1, "content", 1], THOUGHT, "signature"),
        (Messages, MESSAGES, ["messages", 2, "content", 0, "content"], ["found"], "valid content block"),
        (Messages, MESSAGES, ["messages", 2], ..., "begin and end"),
        (Messages, MESSAGES, ["messages", 0, "content"], [], "non-empty"),
        (Messages, MESSAGES, ["thinking"], {"type": "enabled"}, "Expected `thinking`"),
        (Converse, CONVERSE, ["toolConfig"], ..., "must be defined"),
        (Converse, CONVERSE, ["messages", 2], ..., "alternate"),
        (Converse, CONVERSE, ["messages", 2, "content", 0], {"text": "well"}, "Expected toolResult"),
        (Converse, CONVERSE, ["messages", 0, "content", 0, "text"], "", "blank"),
        (Converse, CONVERSE, ["messages", 1, "content", 0, "toolUse", "toolUseId"], "", "must satisfy"),
        (Converse, CONVERSE, ["messages", 1, "content", 0, "toolUse", "input"], "x", "json object"),
        (Converse, CONVERSE, ["additionalModelRequestFields"], {"thinking": {}}, "Expected `thinking`"),
        (GenerateContent, GEMINI, ["tools", 0, "functionDeclarations"], [], "should not be empty"),
        (GenerateContent, GEMINI, ["contents", 1, "parts"], [], "must not be empty"),
        (GenerateContent, GEMINI, ["contents", 1, "parts", 0], {"thought": True}, "oneof field"),
        (GenerateContent, GEMINI, ["contents", 1, "parts", 0], LOOKED, "must equal"),
        (GenerateContent, GEMINI, ["contents", 2, "parts", 0], FOUND, "immediately after"),
        (GenerateContent, put(GEMINI, ["contents", 1, "parts", 0], LOOKED), ["contents", 2, "parts", 0], FOUND,
         "thought_signature"),
        (GenerateContent, GEMINI, ["contents", 2], ..., "end with a user role"),
    ],
)  # fmt: skip
def test_what_providers_refuse_is_refused(dialect, body, path, value, reason):
    with pytest.raises(Refused, match=reason):
        dialect().check(put(body, path, value))
