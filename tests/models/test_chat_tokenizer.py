from typing import Any

import pytest

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.models.chat_tokenizer import ChatTokenizer

from .conftest import STRIPS_THINKING, build_tokenizer


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
