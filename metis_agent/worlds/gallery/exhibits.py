"""What hangs in the gallery: numbers and words on signs and labels, and bar charts, large or tiny, each from a seed.

Before `pictures`, which draws an exhibit, and `questions`, which asks about it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "COLOURS", "CONTENTS", "FONTS", "HELD_OUT_FONT", "NUMBERS", "SIZES", "WORDS", "Bar", "Colour", "Content",
    "Exhibit", "Look", "Size", "exhibit", "texts",
]  # fmt: skip

Content = Literal["number", "word", "chart"]
Look = Literal["sign", "label", "chart"]
Size = Literal["large", "tiny"]
Colour = Literal["red", "green", "blue"]

CONTENTS: tuple[Content, ...] = get_args(Content)
SIZES: tuple[Size, ...] = get_args(Size)
COLOURS: tuple[Colour, ...] = get_args(Colour)
NUMBERS = tuple(f"{number:02d}" for number in range(100))
WORDS = (
    "BANK", "BOOK", "CAFE", "DESK", "EAST", "EXIT", "FILM", "FIRE", "GATE", "HALL", "HELP", "LIFT",
    "MAPS", "OPEN", "PARK", "QUAY", "ROOM", "SALE", "SHOP", "STOP", "TAXI", "TOUR", "WEST", "ZONE",
)  # fmt: skip
"""All of four letters, so that not even the length of a blurred one tells."""
FONTS = (
    "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol", "cmb10",
)  # fmt: skip
"""They come with matplotlib, so every machine draws the same pictures."""
HELD_OUT_FONT = "DejaVuSerif-BoldItalic"
"""In no training picture: how a policy reads it is told apart."""

_GRID = 4


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a chart with the value beside it."""

    colour: Colour
    value: str


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One picture, before it is drawn; the same exhibit always gives the same pixels."""

    text: str
    """What is to be read: two digits, or a word; of a chart the value of the bar that is asked about."""
    content: Content
    look: Look
    size: Size
    font: str
    seed: int

    @property
    def cell(self) -> tuple[int, int]:
        """Column and row of the grid's cell that tiny text is in; of large text, which is in several, (1, 1)."""
        if self.size == "large":
            return 1, 1
        place = random.Random(f"cell {self.seed}").randrange(_GRID * _GRID)
        return place % _GRID, place // _GRID

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The bars of a chart from top to bottom, of which one holds the answer; none of anything else."""
        if self.content != "chart":
            return ()
        rng = random.Random(f"bars {self.seed}")
        asked, other = rng.sample(COLOURS, 2)
        value = rng.choice([number for number in NUMBERS if number != self.text])
        bars = [Bar(colour=asked, value=self.text), Bar(colour=other, value=value)]
        rng.shuffle(bars)
        return tuple(bars)

    @property
    def asked(self) -> Colour | None:
        """The colour of the bar that is asked about."""
        return next((bar.colour for bar in self.bars if bar.value == self.text), None)


def texts(content: Content) -> tuple[str, ...]:
    """All that can be read of a content."""
    return WORDS if content == "word" else NUMBERS


def exhibit(content: Content, size: Size, rng: random.Random, *, fonts: Sequence[str] = FONTS) -> Exhibit:
    """An exhibit, all but its content and size drawn from `rng`."""
    look: Look = "chart" if content == "chart" else rng.choice(("sign", "label"))
    return Exhibit(
        text=rng.choice(texts(content)), content=content, look=look, size=size, font=rng.choice(fonts),
        seed=rng.getrandbits(32),
    )  # fmt: skip
