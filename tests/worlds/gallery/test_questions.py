"""Splits by what is to be read; a question carries its picture."""

from itertools import combinations

import pytest

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.verifiers import verify
from metis_agent.tools.images import load_image
from metis_agent.worlds.gallery.pictures import Exhibit, draw
from metis_agent.worlds.gallery.questions import questions, texts

SPLITS = ("train", "validation", "test")


def test_no_text_is_in_two_splits_and_every_digit_is_learnt_in_both_places() -> None:
    every = [texts(split) for split in SPLITS]  # type: ignore[arg-type]
    assert sum(map(len, every)) == 100
    assert all(not set(one) & set(other) for one, other in combinations(every, 2))
    for place in (0, 1):
        assert {text[place] for text in every[0]} == set("0123456789")
    with pytest.raises(ConfigurationError, match="unknown split"):
        texts("all")  # type: ignore[arg-type]


def test_questions_are_repeatable_distinct_and_carry_their_picture() -> None:
    asked = questions("test", 20, seed=1)
    assert asked == questions("test", 20, seed=1)
    assert asked != questions("test", 20, seed=2)
    assert len({question.id for question in asked}) == 20
    assert [question.kind for question in asked[:4]] == ["large", "tiny", "large", "tiny"]
    for question in asked[:4]:
        assert question.answer in texts("test")
        picture = draw(Exhibit(**question.metadata["exhibit"]))
        assert load_image(question.metadata["images"][0]).tobytes() == picture.tobytes()
        assert verify(question, question.answer)


def test_a_leading_zero_counts() -> None:
    question = next(it for it in questions("validation", 60) if it.answer == "05")
    assert not verify(question, "5")
