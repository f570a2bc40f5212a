"""The same exhibit gives the same pixels, and a tiny number is wholly inside of the cell that shows it."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from metis_agent.worlds.gallery.pictures import CANVAS, CELL, FONTS, VIEW, Exhibit, draw, exhibit


def several(size: str, count: int = 40) -> list[Exhibit]:
    rng = random.Random(7)
    return [exhibit(f"{rng.randrange(100):02d}", size, rng) for _ in range(count)]  # type: ignore[arg-type]


def bright(picture: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is as bright as a plate."""
    rows, columns = np.nonzero(np.asarray(picture.convert("L")) > 175)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def test_an_exhibit_is_drawn_the_same_every_time() -> None:
    for it in (*several("large", 5), *several("tiny", 5)):
        picture = draw(it)
        assert picture.size == (CANVAS, CANVAS)
        assert picture.mode == "RGB"
        assert picture.tobytes() == draw(it).tobytes()
        assert picture.tobytes() != draw(Exhibit(text=it.text, look=it.look, size=it.size, seed=it.seed + 1)).tobytes()


def test_a_tiny_number_is_inside_of_its_cell_and_a_large_one_in_none() -> None:
    for it in several("tiny"):
        left, top, right, bottom = bright(draw(it))
        column, row = it.cell
        assert column * CELL <= left < right < (column + 1) * CELL
        assert row * CELL <= top < bottom < (row + 1) * CELL
    for it in several("large"):
        left, top, right, bottom = bright(draw(it))
        assert 0 <= left < right < CANVAS
        assert right - left > CELL or bottom - top > CELL


def test_tiny_numbers_are_in_every_cell_and_all_looks_and_fonts_occur() -> None:
    assert len({it.cell for it in several("tiny", 300)}) == 16
    assert set(Counter(it.look for it in several("large", 60))) == {"sign", "label", "chart"}
    assert len(set(FONTS)) == 4


@pytest.mark.parametrize(("size", "low", "high"), [("large", 12, 40), ("tiny", 3, 9)])
def test_how_large_a_plate_is_in_the_models_view(size: str, low: int, high: int) -> None:
    """Large plates are at least 12 pixels high in the 64 x 64 view; tiny ones 9 at most, of which the digits take 5."""
    for it in several(size):
        _, top, _, bottom = bright(draw(it))
        assert low <= (bottom - top) * VIEW / CANVAS <= high
