"""What a model writes is read whatever it is, and conversations and tools go out as templates want them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel

from metis_agent.errors import ConfigurationError, InputError, UnknownToolError
from metis_agent.models import wire
from metis_agent.models.wire import Reply, ToolSchemas, parse_reply, resolve_tool_choice, to_chat_dicts

CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "1 + 1"}}\n</tool_call>'


def test_the_wire_needs_neither_torch_nor_transformers() -> None:
    program = "import sys, metis_agent.models.wire; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_plain_text_is_the_content() -> None:
    assert parse_reply(" Paris ") == Reply(content="Paris")


def test_metis_answer() -> None:
    reply = parse_reply("<reason>It is well known.</reason>\n<answer>Paris</answer>")
    assert reply == Reply(content="Paris", reasoning="It is well known.")


def test_tag_in_reasoning_is_no_answer_and_no_call() -> None:
    reply = parse_reply(f"<reason>not <answer>Rome</answer>, nor {CALL}</reason><answer>Paris</answer>")
    assert reply.content == "Paris"
    assert reply.tool_calls == ()


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think>a</think>b", "a"),
        ("a</think>b", "a"),  # the template opened the block in the prompt
        ("a</think><think>c</think>b", "a\nc"),
    ],
)
def test_thinking(text: str, reasoning: str) -> None:
    assert parse_reply(text) == Reply(content="b", reasoning=reasoning)


def test_unfinished_blocks_run_to_the_end() -> None:
    assert parse_reply("<think>so far") == Reply(content="", reasoning="so far")
    assert parse_reply("<answer>Par") == Reply(content="Par")


def test_one_call() -> None:
    reply = parse_reply(f"<reason>Compute.</reason>{CALL}")
    assert reply == Reply(content="", reasoning="Compute.", tool_calls=({"name": "python", "args": {"code": "1 + 1"}},))


def test_several_calls_with_text_between() -> None:
    reply = parse_reply(f"First {CALL} then {CALL}")
    assert len(reply.tool_calls) == 2
    assert reply.content == "First  then"


def test_whole_call_without_its_end_tag_counts() -> None:
    assert parse_reply(CALL.removesuffix("</tool_call>")).tool_calls[0]["name"] == "python"


def test_arguments_as_a_json_string() -> None:
    reply = parse_reply('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>')
    assert reply.tool_calls == ({"name": "f", "args": {"x": 1}},)


def test_calls_are_text_where_they_do_not_count() -> None:
    assert parse_reply(CALL, calls=False) == Reply(content=CALL)


BARE = '{"name": "python", "arguments": {"code": "1 + 1"}}'


@pytest.mark.parametrize(
    "text",
    [
        BARE,
        f"```json\n{BARE}\n```",
        f"```\n{BARE}```",
        f"<think>Compute.</think>\n{BARE}",
        f"<tools>\n{BARE}\n</tools>",
        f"[{BARE}]",
        "<|python_tag|>" + BARE.replace("arguments", "parameters"),
        f'{{"type": "function", "function": {BARE}}}',
        BARE.replace('{"code": "1 + 1"}', '"{\\"code\\": \\"1 + 1\\"}"'),
        # As Qwen2.5-Coder's template shows it, closed as often as it was opened, once more, or once less.
        *(f"{{{BARE}{more}" for more in ("}", "}}", "", "}\n```")),
    ],
)
def test_a_reply_that_is_nothing_but_the_json_of_an_offered_tool_is_a_call(text: str) -> None:
    reply = parse_reply(text, offered={"python", "search"})
    assert (reply.tool_calls, reply.content) == (({"name": "python", "args": {"code": "1 + 1"}},), "")
    assert parse_reply(text).tool_calls == parse_reply(text, calls=False, offered={"python"}).tool_calls == ()


@pytest.mark.parametrize(
    "text",
    [
        f"I would call {BARE}",
        f"{BARE}\nThat is how.",
        f"```python\nprint(2)\n```\n{BARE}",
        BARE.replace("python", "web"),
        f"{BARE} {BARE.replace('python', 'web')}",
        f"{{{BARE}}} {BARE.replace('python', 'web')}",
        f"{{{BARE}}} That is how.",
        '{"name": "python", "version": 3}',
        '{"name": "python"}',
        '{"name": "python", "arguments": [1]}',
        "[1, 2]",
        "[" * 100_000,
        "",
    ],
)
def test_other_json_and_json_beside_text_is_an_answer(text: str) -> None:
    reply = parse_reply(text, offered={"python"})
    assert (reply.tool_calls, reply.invalid_tool_calls, reply.content) == ((), (), text.strip())


def test_several_bare_calls_broken_lines_and_a_broken_call() -> None:
    two = parse_reply(f"{BARE}\n" + BARE.replace("1 + 1", "print(1)\n2"), offered={"python"})
    assert [call["args"]["code"] for call in two.tool_calls] == ["1 + 1", "print(1)\n2"]
    for doubled in ("", "{"):
        text = doubled + '{"name": "python", "arguments": {"code": "print("a")"}}'
        (invalid,) = parse_reply(text, offered={"python"}).invalid_tool_calls
        assert (invalid["name"], "Expecting" in invalid["error"]) == ("python", True)


def test_a_tagged_call_in_doubled_braces() -> None:
    (call,) = parse_reply(f"<tool_call>\n{{{BARE}}}\n</tool_call>").tool_calls
    assert call["args"] == {"code": "1 + 1"}
    (invalid,) = parse_reply(f"<tool_call>{{{BARE}}} so</tool_call>").invalid_tool_calls
    assert "goes on after its JSON: 'so'" in invalid["error"]


@pytest.mark.parametrize(
    ("raw", "name", "says"),
    [
        ('{"name": "python", "arguments": {"code"', "python", "Expecting"),
        ("[1]", None, "list"),
        ('{"arguments": {}}', None, '"name" is None'),
        ('{"name": "", "arguments": {}}', "", "non-empty"),
        ('{"name": "f"}', "f", "NoneType"),
        ('{"name": "f", "arguments": [1]}', "f", "list"),
        ('{"name": "f", "arguments": "x"}', "f", "Expecting"),
        ("[" * 100_000, None, "recursion"),
        ('{"name": "f", "arguments": {"x": ' + "1" * 5000 + "}}", "f", "digits"),
    ],
)
def test_malformed_call_is_data_with_the_reason(raw: str, name: str | None, says: str) -> None:
    reply = parse_reply(f"<tool_call>{raw}</tool_call>")
    assert reply.tool_calls == ()
    (invalid,) = reply.invalid_tool_calls
    assert invalid["name"] == name
    assert invalid["args"] == raw
    assert says in invalid["error"]


def test_broken_off_call_says_so() -> None:
    (invalid,) = parse_reply('<tool_call>{"name": "py').invalid_tool_calls
    assert "breaks off" in invalid["error"]


TAGS = ("think", "reason", "answer", "tool_call")
PIECES = st.sampled_from([f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS] + ['{"name":', "}", '"', "["])


@given(st.lists(PIECES | st.text(max_size=8)), st.booleans())
def test_parsing_never_raises_and_never_invents_calls(parts: list[str], calls: bool) -> None:
    text = "".join(parts)
    reply = parse_reply(text, calls=calls)
    found = len(reply.tool_calls) + len(reply.invalid_tool_calls)
    assert found <= (text.count("<tool_call>") if calls else 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.text(min_size=1), st.dictionaries(st.text(), JSON, max_size=3))
def test_calls_round_trip(name: str, arguments: dict[str, Any]) -> None:
    # Spelled as JSON with escapes, no text in a call can look like a tag.
    written = json.dumps({"name": name, "arguments": arguments}).replace("<", "\\u003c")
    assert parse_reply(f"<tool_call>{written}</tool_call>").tool_calls == ({"name": name, "args": arguments},)


def test_messages_become_template_dicts() -> None:
    messages = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "1 + "}, "1?"]),
        AIMessage(
            [{"type": "text", "text": "Hm."}, {"type": "reasoning", "reasoning": "r"}],
            additional_kwargs={"reasoning_content": "r"},
            tool_calls=[{"name": "python", "args": {"code": "1+1"}, "id": "c1"}],
        ),
        ToolMessage("2", tool_call_id="c1", name="python"),
        ChatMessage(content="x", role="developer"),
    ]
    assert to_chat_dicts(messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "content": "Hm.",
            "reasoning_content": "r",
            "tool_calls": [{"type": "function", "function": {"name": "python", "arguments": {"code": "1+1"}}}],
        },
        {"role": "tool", "content": "2", "name": "python", "tool_call_id": "c1"},
        {"role": "developer", "content": "x"},
    ]


def test_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"'image'.*text model"):
        to_chat_dicts([HumanMessage([{"type": "image", "url": "https://example.com/a.png"}])])


def test_unknown_message_type_is_refused() -> None:
    with pytest.raises(InputError, match="FunctionMessage"):
        to_chat_dicts([FunctionMessage(content="x", name="f")])


@tool
def python(code: str) -> str:
    """Run code."""
    return code


class Search(BaseModel):
    """Search the web."""

    query: str


def plain(x: int) -> int:
    """A function.

    Args:
        x: A number.
    """
    return x


def test_all_kinds_of_tools_become_schemas() -> None:
    ready = convert_to_openai_tool(python)
    schemas = ToolSchemas().convert([python, Search, plain, ready])
    assert [schema["function"]["name"] for schema in schemas] == ["python", "Search", "plain", "python"]
    assert schemas[0] == schemas[3] == ready


def test_a_tool_is_converted_once_until_its_description_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[str] = []

    def counting(tool: Any) -> dict[str, Any]:
        converted.append(tool.description)
        return convert_to_openai_tool(tool)

    monkeypatch.setattr(wire, "convert_to_openai_tool", counting)
    schemas = ToolSchemas()
    mine = python.model_copy()
    schemas.convert([mine, mine])
    mine.description = "Run more code."
    (schema,) = schemas.convert([mine])
    assert converted == ["Run code.", "Run more code."]
    assert schema["function"]["description"] == "Run more code."


def test_forgotten_tools_are_not_kept() -> None:
    schemas = ToolSchemas()
    schemas.convert([python.model_copy()])
    gc.collect()
    assert schemas._known == {}


OFFERED = [{"function": {"name": "python"}}, {"function": {"name": "search"}}]


@pytest.mark.parametrize(
    ("choice", "resolved"),
    [
        (None, "auto"), (False, "auto"), ("auto", "auto"), ("none", "none"), (True, "any"), ("any", "any"),
        ("required", "any"), ("search", "search"),
        ({"type": "function", "function": {"name": "python"}}, "python"),
        ({"type": "tool", "name": "python"}, "python"),
    ],
)  # fmt: skip
def test_choices(choice: object, resolved: str) -> None:
    assert resolve_tool_choice(choice, OFFERED) == resolved


def test_unknown_tool_name_is_refused() -> None:
    with pytest.raises(UnknownToolError, match=r"'web'.*\['python', 'search'\]"):
        resolve_tool_choice("web", OFFERED)


def test_a_required_call_without_tools_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no tool is offered"):
        resolve_tool_choice("any", [])
