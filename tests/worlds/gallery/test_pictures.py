"""The same exhibit gives the same pixels, and tiny text is wholly inside of the cell that shows it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from metis_agent.worlds.gallery.pictures import (
    CANVAS,
    CELL,
    CONTENTS,
    FONTS,
    HELD_OUT_FONT,
    NUMBERS,
    SIZES,
    VIEW,
    WORDS,
    Content,
    Exhibit,
    Size,
    draw,
    exhibit,
    texts,
)


def test_the_same_generator_gives_the_same_exhibits_and_all_looks_fonts_and_cells_occur() -> None:
    def some(seed: int) -> list[object]:
        rng = random.Random(seed)
        return [exhibit(content, size, rng) for content in CONTENTS for size in SIZES]

    assert some(1) == some(1)
    assert some(1) != some(2)
    rng = random.Random(0)
    many = [exhibit("number", "tiny", rng) for _ in range(400)]
    assert {it.look for it in many} == {"sign", "label"}
    assert {it.font for it in many} == set(FONTS)
    assert len({it.cell for it in many}) == 16
    assert len({it.text for it in many}) > 90


def test_a_held_out_font_is_in_no_exhibit_unless_it_is_asked_for() -> None:
    rng = random.Random(0)
    assert HELD_OUT_FONT not in FONTS
    assert exhibit("word", "large", rng, fonts=(HELD_OUT_FONT,)).font == HELD_OUT_FONT


def test_a_chart_has_two_bars_of_two_colours_and_asks_for_one() -> None:
    rng = random.Random(0)
    charts = [exhibit("chart", "large", rng) for _ in range(200)]
    for it in charts:
        assert len({bar.colour for bar in it.bars}) == 2
        assert [bar.colour for bar in it.bars if bar.value == it.text] == [it.asked]
    first = Counter(it.bars[0].value == it.text for it in charts)
    assert 60 < first[True] < 140  # the answer may stand on either of them
    other = exhibit("word", "large", rng)
    assert other.bars == ()
    assert other.asked is None


def test_what_can_be_read_is_a_closed_list() -> None:
    assert texts("number") == texts("chart") == NUMBERS
    assert len(NUMBERS) == 100
    assert len(set(texts("word"))) == len(WORDS) == 24
    assert {len(word) for word in WORDS} == {4}


def several(content: Content, size: Size, count: int = 40) -> list[Exhibit]:
    rng = random.Random(7)
    return [exhibit(content, size, rng, fonts=(*FONTS, HELD_OUT_FONT)) for _ in range(count)]


def lit(picture: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is as bright as paper, in any of its colours."""
    rows, columns = np.nonzero(np.asarray(picture).max(axis=2) > 170)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


@pytest.mark.parametrize("content", CONTENTS)
def test_an_exhibit_is_drawn_the_same_every_time(content: Content) -> None:
    for it in (*several(content, "large", 4), *several(content, "tiny", 4)):
        picture = draw(it)
        assert picture.size == (CANVAS, CANVAS)
        assert picture.mode == "RGB"
        assert picture.tobytes() == draw(it).tobytes()
        assert picture.tobytes() != draw(replace(it, seed=it.seed + 1)).tobytes()


@pytest.mark.parametrize("content", CONTENTS)
def test_a_tiny_plate_is_inside_of_its_cell_and_a_large_one_in_none(content: Content) -> None:
    for it in several(content, "tiny"):
        left, top, right, bottom = lit(draw(it))
        column, row = it.cell
        assert column * CELL <= left < right < (column + 1) * CELL
        assert row * CELL <= top < bottom < (row + 1) * CELL
    for it in several(content, "large"):
        left, top, right, bottom = lit(draw(it))
        assert 0 <= left < right < CANVAS
        assert right - left > CELL or bottom - top > CELL


@pytest.mark.parametrize(
    ("content", "size", "low", "high"),
    [
        ("number", "large", 17, 36), ("word", "large", 7, 24), ("chart", "large", 30, 56),
        ("number", "tiny", 4, 9), ("word", "tiny", 2, 6), ("chart", "tiny", 7, 14),
    ],
)  # fmt: skip
def test_how_high_a_plate_is_in_the_models_view(content: Content, size: Size, low: int, high: int) -> None:
    """Of the 64 rows that the model sees; of a tiny plate's, tilt and edges included, text takes half."""
    for it in several(content, size):
        _, top, _, bottom = lit(draw(it))
        assert low <= (bottom - top) * VIEW / CANVAS <= high, it


def test_tiny_text_enlarged_is_as_large_as_large_text() -> None:
    for content in CONTENTS:
        large, tiny = (
            np.mean([right - left for left, _, right, _ in (lit(draw(it)) for it in several(content, size))])
            for size in ("large", "tiny")
        )
        assert 0.8 < 4 * tiny / large < 1.25
