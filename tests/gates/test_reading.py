"""Words of every script, and the conversation before a question."""

import random
import string

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, message_to_dict

from metis_agent.gates.features import context_features, draft_text_features, history_features, question_features
from metis_agent.gates.reading import (
    canonical,
    conversation_before,
    hashed_conversation,
    hashed_ngrams,
    tokens_of,
    words_and_numbers,
)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Wie groß ist Österreich?", ["Wie", "groß", "ist", "Österreich", "?"]),
        ("法国的首都是什么？", ["法", "国", "的", "首", "都", "是", "什", "么", "?"]),
        ("ما هي عاصمة فرنسا؟", ["ما", "هي", "عاصمة", "فرنسا", "?"]),
        ("फ्रांस की राजधानी क्या है।", ["फ्रांस", "की", "राजधानी", "क्या", "है", "."]),
        ("१२३ और ４５,६ ٤٨٫٢", ["123", "और", "45,6", "48.2"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("서울은 어디?", ["서울은", "어디", "?"]),
        ("le\u0301gume “x” it’s", ["légume", "“", "x", "”", "it", "’", "s"]),
        ("if (größe_1 != 0):", ["if", "(", "größe", "_", "1", "!", "=", "0", ")", ":"]),
        ("می\u200cخواهم", ["میخواهم"]),
    ],
)
def test_words_are_letters_with_their_marks(text: str, tokens: list[str]) -> None:
    assert tokens_of(text) == tokens


def test_text_in_ascii_is_read_as_before() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(string.printable, k=rng.randint(0, 60)))
        assert tokens_of(text) == tokens_of(text, 1)
        assert hashed_ngrams(text) == hashed_ngrams(text, reading=1)
        assert question_features(text) == question_features(text, 1)
        assert context_features(text, text[::-1]) == context_features(text, text[::-1], 1)
        assert draft_text_features(text, text[::2]) == draft_text_features(text, text[::2], 1)


def test_reading_1_stays_what_it_was() -> None:
    # Gates of format 1 were trained on letters outside ASCII one by one.
    assert tokens_of("Zürich 北京", 1) == ["Z", "ü", "rich", "北", "京"]
    assert words_and_numbers("Zürich 12", 1) == ["z", "rich", "12"]
    assert question_features("北京？", 1)[0] == 0
    assert question_features("北京？")[0] == 2
    assert not question_features("北京？", 1)[8]
    assert question_features("北京？")[8]


@pytest.mark.parametrize("text", ["\ud800", "", "ﷺ" * 300, "\u0301\u0301", "\u0e33" * 5, "𝔘𝔫𝔦 🎉"], ids=ascii)
def test_no_text_is_too_strange(text: str) -> None:
    hashed_ngrams(text)
    question_features(text)
    assert canonical(canonical(text)) == canonical(text)


def test_a_conversation_is_what_user_and_assistant_said() -> None:
    call = AIMessage("", tool_calls=[{"name": "search", "args": {}, "id": "1"}])
    messages = [
        SystemMessage("Be brief."), HumanMessage("When was\nBadoki founded?"), call,
        ToolMessage("Badoki was founded in 1200.", tool_call_id="1"), AIMessage([{"type": "text", "text": "1200."}]),
    ]  # fmt: skip
    expected = "user: When was Badoki founded?\nassistant: 1200."
    assert conversation_before(messages) == expected
    assert conversation_before(map(message_to_dict, messages)) == expected
    assert conversation_before([HumanMessage(str(n)) for n in range(9)]).count("\n") == 5
    assert conversation_before([]) == ""


def test_words_of_the_conversation_are_read_with_those_of_the_question() -> None:
    history = "user: When was Badoki founded?\nassistant: 1200."
    river, again = (hashed_conversation(text, history) for text in ("And the river?", "And the river?"))
    assert river == again
    assert not hashed_conversation("And the river?", "")
    other = hashed_conversation("And the money?", history)
    # What was said is in both; with what is asked, only in one.
    assert set(river) & set(other)
    assert set(river) - set(other)
    assert history_features("And Badoki's river?", history)[1:] == [4, 0, 0, 0.5]
