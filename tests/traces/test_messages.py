"""Anything at all as messages: what comes out, LangChain can read, and whatever is unknown is counted."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import messages_from_dict

from metis_agent.errors import InputError
from metis_agent.traces import (
    ModelSpan,
    Trace,
    importer_names,
    messages_of,
    registry,
    reply_of,
    steps_of,
    tool_definitions,
)
from metis_agent.traces.assemble import trajectories_of
from metis_agent.traces.values import time_of, usage_of

NAMES = ("user", "assistant", "tool", "system", "human", "ai", "nobody", "")
KINDS = (
    "text",
    "tool_use",
    "tool_result",
    "tool_call",
    "image_url",
    "image",
    "thinking",
    "blob",
    "hologram",
    "function_call",
)
texts = st.sampled_from(["", "hi", "{", '{"a": 1}', "[1]", "\ud83d"])
leaves = st.none() | st.booleans() | st.integers(-1, 3) | st.floats(allow_nan=False) | texts
keys = (
    "role", "type", "content", "parts", "tool_calls", "id", "name", "args", "arguments", "input", "function", "text",
    "tool_call_id", "usage_metadata", "input_tokens", "messages", "lc", "kwargs", "data", "image_url", "source",
    "response", "invalid_tool_calls", "additional_kwargs", "message", "choices", "status", "tool_call",
)  # fmt: skip
values = st.recursive(
    leaves | st.sampled_from(NAMES + KINDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys), inner, max_size=5),
    max_leaves=20,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(NAMES), "content": values},
    optional={"tool_calls": values, "tool_call_id": leaves, "usage_metadata": values, "name": leaves, "id": leaves},
)
STRANGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What the import takes for an unreadable record."""


def readable(found):
    return messages_from_dict([{"type": message["type"], "data": message} for message in found])


@given(st.lists(messages, max_size=4), values)
def test_what_comes_out_can_be_read(said, output):
    try:
        read, reply = messages_of(said, Counter()), reply_of(output, Counter())
    except STRANGE:
        return
    tools = tool_definitions(output)
    readable([message for message in (*read, reply) if message is not None])
    trace = Trace(
        id="t", source="s", models=[ModelSpan(id="m", input=read, output=reply, tools=tools)], every_turn=True
    )
    try:
        for trajectory in trajectories_of(trace):
            steps = steps_of(trajectory)
            assert all(step.round is not None for step in steps[:-1])
            assert steps[-1].round is None
    except InputError:
        return


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("2026-01-02T03:04:05.5Z", 1767323045.5), ("2026-01-02 03:04:05.500000", 1767323045.5),
        ("2026-01-02T04:04:05.5+01:00", 1767323045.5), (1767323045.5, 1767323045.5), (1767323045500, 1767323045.5),
        ("1767323045500000000", 1767323045.5), (1767323045500000, 1767323045.5), ("soon", None), (None, None),
        (-1, None), (float("inf"), None), (10**400, None), (True, None),
    ],
)  # fmt: skip
def test_times_in_any_unit(given, seconds):
    assert time_of(given) == pytest.approx(seconds) if seconds else time_of(given) is None


def test_tokens_as_everybody_counts_them():
    # Within the input: OpenAI, LangChain. Beside it: Anthropic (10 + 90), Langfuse (6 + 4).
    whole = {"input_tokens": 100, "output_tokens": 5, "total_tokens": 105, "input_cache_read": 90}
    openai = {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 90}}
    langchain = {"input_tokens": 100, "output_tokens": 5, "input_token_details": {"cache_read": 90}}
    anthropic = {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 90}
    langfuse = {"input": 10, "output": 5, "total": 105, "input_cache_read": 90}
    assert [usage_of(each) for each in (openai, langchain, anthropic, langfuse)] == [whole] * 4
    within = {"input": 10, "output": 4, "total": 14, "input_cached_tokens": 6}  # as Langfuse has OpenAI's
    assert usage_of(within) == {"input_tokens": 10, "output_tokens": 4, "total_tokens": 14, "input_cache_read": 6}
    assert usage_of("nothing") == usage_of(None) == usage_of({"input": -1}) == usage_of({"input": 10**400}) == {}


def test_the_clients_that_are_installed_are_of_versions_that_importers_were_written_for():
    clients = {"langsmith", "langfuse", "openai", "anthropic", "langchain-core"}
    checked = set()
    for name in importer_names():
        for client, newest in re.findall(r"([a-z-]+) [\d.]+ to ([\d.]+)", registry.importer(name).versions):
            if client in clients:
                parts = [int(part) for part in newest.split(".")]
                assert [int(part) for part in version(client).split(".")][: len(parts)] <= parts, client
                checked.add(client)
    assert checked == clients


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"type": "text", "text": "Yes."}], "Yes."),  # Anthropic's blocks without the message around them
        ({"generations": [[{"text": "Yes.", "type": "Generation"}]]}, "Yes."),  # a model that completes texts
        ({"text": "Yes."}, "Yes."),
    ],
)
def test_replies_without_a_message_around_them(given, said):
    assert reply_of(given, Counter())["content"] == said


def test_a_system_prompt_beside_the_messages_comes_first():
    asked = {"system": [{"type": "text", "text": "Be brief."}], "messages": [{"role": "user", "content": "Oslo?"}]}
    found = [(message["type"], message["content"]) for message in messages_of(asked, Counter())]
    assert found == [("system", "Be brief."), ("human", "Oslo?")]
