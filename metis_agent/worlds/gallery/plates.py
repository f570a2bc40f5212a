"""The plate that holds an exhibit's text: a sign, a label or a chart, tilted, with nothing around it.

Between `exhibits` and `pictures`. Numbers are drawn at a size of font, words to a width, so that tiny ones fill the
cell that they stand in; every size that a tiny one has, large ones have four times as large.
"""

from __future__ import annotations

import math
import random
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from metis_agent.worlds.gallery.exhibits import Colour, Exhibit

__all__ = ["Tint", "grey", "plate"]

Tint = tuple[int, int, int]

_FONT_SIZES = {"large": (80, 92), "tiny": (20, 22)}
_WORD_WIDTHS = {"large": (156, 176), "tiny": (40, 44)}
_VALUE_SIZES = {"large": (76, 84), "tiny": (19, 21)}
"""Of the font of a chart's values."""
_TILT = {"number": 4.0, "word": 3.0, "chart": 3.0}
_BARS: dict[Colour, Tint] = {"red": (200, 40, 40), "green": (30, 130, 50), "blue": (45, 70, 200)}


def plate(it: Exhibit, rng: random.Random) -> Image.Image:
    """The plate of an exhibit, RGBA; paper, ink, size and tilt come from `rng`."""
    paper, ink = grey(rng.randint(195, 255), rng), grey(rng.randint(0, 80), rng)
    drawn = _chart(it, paper, ink, rng) if it.content == "chart" else _text(it, paper, ink, rng)
    tilt = rng.uniform(-_TILT[it.content], _TILT[it.content])
    return drawn.rotate(tilt, resample=Image.Resampling.BICUBIC, expand=True)


def grey(level: int, rng: random.Random) -> Tint:
    """A grey with a tint."""
    red, green, blue = (max(0, min(255, level + rng.randint(-12, 12))) for _ in range(3))
    return red, green, blue


def _text(it: Exhibit, paper: Tint, ink: Tint, rng: random.Random) -> Image.Image:
    """One line of text on a sign, which has corners and an edge, or on a label, which is round."""
    if it.content == "word":
        font = _fitting(it.font, it.text, rng.randint(*_WORD_WIDTHS[it.size]))
    else:
        font = _font(it.font, rng.randint(*_FONT_SIZES[it.size]))
    left, top, right, bottom = font.getbbox(it.text)
    edge = 0.2 * (bottom - top)
    width, height = math.ceil(right - left + 2 * edge), math.ceil(bottom - top + 2 * edge)
    drawn, pen = _empty(width, height)
    box = (0.0, 0.0, width - 1.0, height - 1.0)
    if it.look == "label":
        pen.rounded_rectangle(box, radius=height / 5, fill=paper)
    else:
        pen.rectangle(box, fill=paper, outline=ink if it.size == "large" else None)
    pen.text((edge - left, edge - top), it.text, font=font, fill=ink)
    return drawn


def _chart(it: Exhibit, paper: Tint, ink: Tint, rng: random.Random) -> Image.Image:
    """Rows, each in a light shade of its colour: the value, and beside it a bar of its length."""
    font = _font(it.font, rng.randint(*_VALUE_SIZES[it.size]))
    boxes = [font.getbbox(bar.value) for bar in it.bars]
    value_width = max(right - left for left, _, right, _ in boxes)
    value_height = max(bottom - top for _, top, _, bottom in boxes)
    edge, longest = 0.2 * value_height, 0.55 * value_width
    width, step = math.ceil(value_width + longest + 3 * edge), math.ceil(value_height + 2 * edge)
    drawn, pen = _empty(width, step * len(it.bars))
    for y, bar, (left, top, _, _) in zip(range(0, step * len(it.bars), step), it.bars, boxes, strict=True):
        full = _BARS[bar.colour]
        shade = (*(round(0.7 * light + 0.3 * dark) for light, dark in zip(paper, full, strict=True)),)
        pen.rectangle((0, y, width - 1, y + step - 1), fill=shade)
        start, length = value_width + 2 * edge, longest * (0.1 + 0.9 * int(bar.value) / 99)
        pen.rectangle((start, y + 0.2 * step, start + length, y + 0.8 * step), fill=full)
        pen.text((edge - left, y + edge - top), bar.value, font=font, fill=ink)
    return drawn


def _empty(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    drawn = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    return drawn, ImageDraw.Draw(drawn)


def _fitting(name: str, text: str, width: int) -> ImageFont.FreeTypeFont:
    """The font at the size at which the text is so wide."""
    left, _, right, _ = _font(name, 100).getbbox(text)
    return _font(name, max(6, round(100 * width / (right - left))))


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", size)
