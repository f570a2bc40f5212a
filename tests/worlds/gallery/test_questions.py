"""Splits by picture; a question carries its picture."""

import random
from collections import Counter
from itertools import combinations

import pytest

from metis_agent.errors import ConfigurationError
from metis_agent.judging.verifiers import verify
from metis_agent.tools.images import load_image
from metis_agent.worlds.gallery.exhibits import HELD_OUT_FONT, Exhibit
from metis_agent.worlds.gallery.paintings import Painting
from metis_agent.worlds.gallery.pictures import draw
from metis_agent.worlds.gallery.questions import (
    KINDS,
    LEGIBLE,
    PAINTING,
    Split,
    drawn_from,
    paintings,
    questions,
)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def test_no_picture_is_in_two_splits() -> None:
    for one, other in combinations(SPLITS, 2):
        assert not set(paintings(one)) & set(paintings(other))
        drawn = [
            {drawn_from(split, "word", "tiny", rng).seed for _ in range(200)}
            for split, rng in ((one, random.Random(0)), (other, random.Random(0)))
        ]
        assert not drawn[0] & drawn[1]
    with pytest.raises(ConfigurationError, match="unknown split"):
        paintings("all")  # type: ignore[arg-type]


def test_questions_are_repeatable_distinct_and_carry_their_picture() -> None:
    asked = questions("test", 28, seed=1)
    assert asked == questions("test", 28, seed=1)
    assert asked != questions("test", 28, seed=2)
    assert len({question.id for question in asked}) == 28
    assert Counter(question.kind for question in asked) == dict.fromkeys(KINDS, 4)
    for question in asked[:7]:
        assert verify(question, question.answer or "")
        if question.kind == PAINTING:
            assert question.answer == Painting(number=question.metadata["painting"]).painter
            continue
        picture = draw(Exhibit(**question.metadata["exhibit"]))
        assert load_image(question.metadata["images"][0]).tobytes() == picture.tobytes()


def test_kinds_and_fonts_can_be_chosen() -> None:
    chosen = questions("test", 6, kinds=LEGIBLE, fonts=(HELD_OUT_FONT,))
    assert {question.kind for question in chosen} == set(LEGIBLE)
    assert {question.metadata["exhibit"]["font"] for question in chosen} == {HELD_OUT_FONT}
    with pytest.raises(ConfigurationError, match="unknown kinds"):
        questions("test", 5, kinds=("huge",))


def test_a_question_does_not_tell_how_large_the_text_is() -> None:
    asked = questions("train", 140)
    for content in ("number", "word"):
        large, tiny = ({it.text for it in asked if it.kind == f"{size} {content}"} for size in ("large", "tiny"))
        assert large == tiny


def test_a_leading_zero_counts() -> None:
    question = next(it for it in questions("validation", 60, kinds=["tiny number"]) if (it.answer or "")[0] == "0")
    assert not verify(question, (question.answer or "").lstrip("0"))
