"""Questions of the gallery: splits hold apart, and a photograph of a painting finds it in the collection."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from metis_agent.errors import ConfigurationError
from metis_agent.judging.verifiers import verify
from metis_agent.tools.images import load_image
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.worlds.gallery.pictures import CANVAS, HELD_OUT_FONT, Exhibit, draw
from metis_agent.worlds.gallery.questions import (
    COLLECTION,
    FIRST,
    KINDS,
    LAST,
    LEGIBLE,
    PAINTING,
    Painting,
    Split,
    drawn_from,
    paint,
    paintings,
    photograph,
    questions,
    write_collection,
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


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("gallery") / "collection")


def test_every_photograph_finds_its_painting(collection: Path) -> None:
    folder = ImageFolder.build(collection)
    assert len(folder) == COLLECTION
    for number in range(0, COLLECTION, 5):
        it = Painting(number=number)
        (hit,) = folder.similar(photograph(it, seed=number + 3), 1)
        assert (hit.title, hit.text) == (it.file, it.caption)


def test_what_the_collection_has_not_is_not_found(collection: Path) -> None:
    folder = ImageFolder.build(collection)
    strangers = [folder.similar(photograph(Painting(number=number), 0), 1) for number in range(1000, 1040)]
    assert sum(map(bool, strangers)) <= 1


def test_a_painting_and_its_photographs_are_repeatable() -> None:
    it = Painting(number=7)
    first, last = it.painter.split()
    assert first in FIRST
    assert last in LAST
    assert paint(it).size == photograph(it, 1).size == (CANVAS, CANVAS)
    assert paint(it).tobytes() == paint(it).tobytes()
    assert photograph(it, 1).tobytes() == photograph(it, 1).tobytes()
    assert len({paint(it).tobytes(), photograph(it, 1).tobytes(), photograph(it, 2).tobytes()}) == 3


def test_a_collection_that_is_there_stays(collection: Path) -> None:
    before = (collection / "000.png").stat().st_mtime_ns
    assert write_collection(collection) == collection
    assert (collection / "000.png").stat().st_mtime_ns == before
