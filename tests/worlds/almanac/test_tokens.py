import random
import string
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from metis_agent.worlds.almanac.cold_start import build_tokenizer, natural_call
from metis_agent.worlds.almanac.facts import place
from metis_agent.worlds.almanac.questions import Kind, draw

TOKENIZER = build_tokenizer()


def tokens(text: str) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(TOKENIZER(text, add_special_tokens=False).input_ids)


@given(st.text(alphabet=string.printable[:95]))
def test_printable_ascii_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False).input_ids) == text


def test_popular_names_are_one_token_and_obscure_ones_are_syllables() -> None:
    assert "Reykjavik" in tokens("the capital is Reykjavik.")
    name = place(0).name
    assert tokens(name) == [name[0:2], name[2:4], name[4:6]]


def test_every_question_and_call_is_spelled_without_unknown_tokens() -> None:
    rng = random.Random(0)
    for kind in get_args(Kind):
        for _ in range(50):
            question = draw(kind, "test", rng)
            spelled = tokens(question.text) + tokens(natural_call(question).wire)
            assert "<|unk|>" not in spelled
            assert len(spelled) < 50


def test_the_template_writes_a_conversation_as_the_model_learnt_it() -> None:
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "4*7"}}}
    messages = [
        {"role": "user", "content": "4 * 7"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "28"},
    ]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        '<|user|>4 * 7<|end|><|assistant|><tool_call>{"name": "python", "arguments": {"code": "4*7"}}</tool_call>'
        "<|end|><|tool|>28<|end|><|assistant|>"
    )
