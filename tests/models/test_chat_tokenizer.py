"""Rendering, encoding and the forced opening; results are remembered in bounded memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.models import chat_tokenizer as chat_tokenizer_module
from metis_agent.models import prompt
from metis_agent.models.chat_tokenizer import ChatTokenizer, Recent, named_opening
from metis_agent.models.local import LocalChatModel

from .conftest import PYTHON, STRIPS_THINKING, build_tokenizer


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> ChatTokenizer:
    return ChatTokenizer(tokenizer, eos_ids=frozenset({tokenizer.eos_token_id}))


def test_encoding_turn_by_turn_changes_nothing(chat_tokenizer: ChatTokenizer, tokenizer: Any) -> None:
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_end|><|im_start|>assistant\n world"
    assert chat_tokenizer.splits_at_ends
    for _ in range(2):
        assert list(chat_tokenizer.encode(text)) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat_tokenizer.encode("") == ()


def test_decoding_drops_one_end_of_turn(chat_tokenizer: ChatTokenizer) -> None:
    assert chat_tokenizer.decode(chat_tokenizer.encode("Hello<|im_end|><|im_end|>")) == "Hello<|im_end|>"
    assert chat_tokenizer.decode([]) == ""


def test_hash_names_tokenizer_template_arguments_and_tools(chat_tokenizer: ChatTokenizer, tokenizer: Any) -> None:
    eos = frozenset({tokenizer.eos_token_id})
    other_template = ChatTokenizer(build_tokenizer(STRIPS_THINKING), eos_ids=eos)
    other_arguments = ChatTokenizer(tokenizer, eos_ids=eos, template_arguments={"enable_thinking": False})
    grown = build_tokenizer()
    grown.add_tokens(["<new>"])
    other_vocabulary = ChatTokenizer(grown, eos_ids=eos)
    hashes = [each.template_hash("[]") for each in (other_template, other_arguments, other_vocabulary)]
    hashes += [chat_tokenizer.template_hash("[]"), chat_tokenizer.template_hash('[{"name": "python"}]')]
    assert len(set(hashes)) == 5


def test_hash_is_the_same_in_another_process_and_whatever_was_padded(chat_tokenizer: ChatTokenizer) -> None:
    other = build_tokenizer()
    other(["Hello", "Hello world"], padding=True, truncation=True, max_length=5)
    again = ChatTokenizer(other, eos_ids=frozenset({other.eos_token_id}))
    assert again.template_hash("[]") == chat_tokenizer.template_hash("[]")


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any) -> None:
    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigurationError, match="no chat template"):
        ChatTokenizer(bare, eos_ids=frozenset())


def test_what_the_template_refuses_is_an_input_error(tokenizer: Any) -> None:
    strict = build_tokenizer("{{ raise_exception('roles must alternate') }}")
    chat_tokenizer = ChatTokenizer(strict, eos_ids=frozenset({strict.eos_token_id}))
    with pytest.raises(InputError, match=r"\['user'\].*roles must alternate"):
        chat_tokenizer.render([{"role": "user", "content": "Hello"}], [], reply=True)
    with pytest.raises(InputError, match="at least one message"):
        chat_tokenizer.render([], [], reply=True)


def test_opening_is_forced_through_the_name_where_tokens_allow(chat_tokenizer: ChatTokenizer, tokenizer: Any) -> None:
    named = tokenizer.decode(named_opening(chat_tokenizer, PYTHON))
    assert named.startswith('<tool_call>\n{"name": "python"')
    assert '"code"' not in named


def test_opening_stays_bare_where_the_name_is_joined_to_the_arguments() -> None:
    tokenizer = build_tokenizer()
    joined = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = joined["model"]["vocab"]
    for value in ("0", "a"):
        pieces[f'python", "arguments": {{"code": "{value}'] = len(pieces)
    pattern = joined["pre_tokenizer"]["pattern"]
    pattern["Regex"] = 'python", "arguments": \\{"code": "[0a]|' + pattern["Regex"]
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(joined))
    chat_tokenizer = ChatTokenizer(tokenizer, eos_ids=frozenset({tokenizer.eos_token_id}))
    assert tokenizer.decode(named_opening(chat_tokenizer, PYTHON)) == "<tool_call>"


def test_opening_stays_bare_where_the_template_writes_calls_in_another_way(tokenizer: Any) -> None:
    other = build_tokenizer("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    chat_tokenizer = ChatTokenizer(other, eos_ids=frozenset({other.eos_token_id}))
    assert other.decode(named_opening(chat_tokenizer, PYTHON)) == "<tool_call>"


def test_a_value_is_computed_once() -> None:
    recent: Recent[int] = Recent(2)
    values = iter([1, 2])
    assert [recent.get("a", lambda: next(values)) for _ in range(3)] == [1, 1, 1]


def test_the_least_recently_used_goes() -> None:
    recent: Recent[str] = Recent(2)
    for key in ("a", "b", "a", "c"):
        recent.get(key, lambda key=key: key.upper())  # type: ignore[misc]
    assert ["a" in recent, "b" in recent, "c" in recent] == [True, False, True]


def test_heavy_results_push_out_more_than_one() -> None:
    recent: Recent[str] = Recent(6, lambda _, value: len(value))
    for value in ("aa", "bb", "cc"):
        recent.get(value, lambda value=value: value)  # type: ignore[misc]
    assert all(value in recent for value in ("aa", "bb", "cc"))
    recent.get("ddd", lambda: "ddd")
    assert [value in recent for value in ("aa", "bb", "cc", "ddd")] == [False, False, True, True]
    recent.get("long", lambda: "far too long")
    assert [value in recent for value in ("cc", "ddd", "long")] == [False, False, True]


def test_long_conversations_are_not_remembered_without_end(
    policy: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "_REMEMBERED", 200_000)
    monkeypatch.setattr(chat_tokenizer_module, "_REMEMBERED", 200_000)
    chat = LocalChatModel(model=policy, tokenizer=tokenizer)
    for number in range(40):
        chat._prompts.build([HumanMessage("the answer is" * 500 + str(number))], [])
    rendered, built = chat._prompts._rendered._values, chat._prompts._built._values
    encoded = chat._tokens._encoded._values
    assert sum(map(len, rendered.values())) <= 200_000
    assert sum(len(text) + 40 * len(ids) for text, ids in encoded.items()) <= 200_000
    assert all(isinstance(key, bytes) for key in (*rendered, *built))
