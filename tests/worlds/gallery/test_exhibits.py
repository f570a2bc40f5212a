"""Exhibits are all of a seed, and a chart holds its answer once."""

import random
from collections import Counter

from metis_agent.worlds.gallery.exhibits import (
    CONTENTS,
    FONTS,
    HELD_OUT_FONT,
    NUMBERS,
    SIZES,
    WORDS,
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
