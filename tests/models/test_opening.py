import json
from typing import Any

import pytest

from metis_agent.models.chat_tokenizer import ChatTokenizer
from metis_agent.models.opening import named_opening

from .conftest import PYTHON, build_tokenizer


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> ChatTokenizer:
    return ChatTokenizer(tokenizer, eos_ids=frozenset({tokenizer.eos_token_id}))


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
