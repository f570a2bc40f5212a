"""The gallery's pictures: a number on a sign, a label or a chart, large or tiny, drawn with Pillow.

A picture has 256 x 256 pixels and the model sees it at 64 x 64. A large number is legible then. Of a tiny one, 18 to
22 pixels high, 4 or 5 rows of pixels are left, which no reader can tell apart; one cell of a 4 x 4 grid, cropped and
enlarged, shows it at the size at which it can be read.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from PIL import Image, ImageDraw, ImageFont

__all__ = ["CANVAS", "CELL", "FONTS", "GRID", "VIEW", "Exhibit", "Look", "Size", "as_png", "draw", "exhibit"]

Look = Literal["sign", "label", "chart"]
Size = Literal["large", "tiny"]

CANVAS, VIEW, GRID = 256, 64, 4
CELL = CANVAS // GRID
FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol")
"""They come with matplotlib, so every machine draws the same pictures."""

_FONT_SIZES = {"large": (76, 111), "tiny": (18, 22)}
_TILT = 6.0

_Box = tuple[float, float, float, float]
_Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One picture, before it is drawn; the same exhibit always gives the same pixels."""

    text: str
    """Two digits."""
    look: Look
    size: Size
    seed: int

    @property
    def cell(self) -> tuple[int, int]:
        """Column and row of the grid's cell that a tiny number is in; of a large one, which is in several, (1, 1)."""
        if self.size == "large":
            return 1, 1
        place = random.Random(f"cell {self.seed}").randrange(GRID * GRID)
        return place % GRID, place // GRID


def exhibit(text: str, size: Size, rng: random.Random) -> Exhibit:
    """A picture of a text, in a look and with a seed drawn from `rng`."""
    return Exhibit(text=text, look=rng.choice(get_args(Look)), size=size, seed=rng.getrandbits(32))


def draw(it: Exhibit) -> Image.Image:
    """The picture, RGB, 256 x 256."""
    rng = random.Random(f"draw {it.seed} {it.text} {it.look} {it.size}")
    ground = _grey(rng.randint(50, 120), rng)
    picture = Image.new("RGB", (CANVAS, CANVAS), ground)
    _clutter(ImageDraw.Draw(picture), ground, rng)
    plate = _plate(it, rng)
    x, y = _place(it, plate.size, rng)
    picture.paste(plate, (x, y), plate)
    return picture


def as_png(picture: Image.Image) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _plate(it: Exhibit, rng: random.Random) -> Image.Image:
    """What holds the number, tilted, with nothing around it (RGBA)."""
    font = _font(rng.choice(FONTS), rng.randint(*_FONT_SIZES[it.size]))
    left, top, right, bottom = font.getbbox(it.text)
    wide, high = right - left, bottom - top
    edge = 0.16 * high
    below = 0.35 * high if it.look == "chart" else 0.0
    width, height = math.ceil(wide + 2.5 * edge), math.ceil(high + 2.5 * edge + below)
    paper, ink = _grey(rng.randint(205, 255), rng), _grey(rng.randint(0, 60), rng)
    plate = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen = ImageDraw.Draw(plate)
    box = (0.0, 0.0, width - 1.0, height - 1.0)
    if it.look == "label":
        pen.rounded_rectangle(box, radius=height / 5, fill=paper)
    else:
        pen.rectangle(box, fill=paper, outline=ink if it.look == "sign" and it.size == "large" else None)
    if below:
        _bars(pen, (0.0, height - below, width - 1.0, height - 1.0), ink, rng)
    pen.text((1.25 * edge - left, 1.25 * edge - top), it.text, font=font, fill=ink)
    return plate.rotate(rng.uniform(-_TILT, _TILT), resample=Image.Resampling.BICUBIC, expand=True)


def _bars(pen: ImageDraw.ImageDraw, box: _Box, ink: _Colour, rng: random.Random) -> None:
    """A small bar chart below its value: five bars on a line."""
    left, top, right, bottom = box
    step = (right - left) / 6
    for bar in range(5):
        x = left + (bar + 0.7) * step
        pen.rectangle((x, bottom - rng.uniform(0.3, 0.8) * (bottom - top), x + 0.6 * step, bottom), fill=(90, 90, 160))
    pen.line((left, bottom, right, bottom), fill=ink)


def _place(it: Exhibit, size: tuple[int, int], rng: random.Random) -> tuple[int, int]:
    """Where the plate's corner goes: wholly inside of the picture, a tiny one wholly inside of its cell."""
    column, row = it.cell if it.size == "tiny" else (0, 0)
    room = CELL if it.size == "tiny" else CANVAS
    x, y = (rng.randint(0, max(0, room - side)) for side in size)
    return column * CELL + x, row * CELL + y


def _clutter(pen: ImageDraw.ImageDraw, ground: _Colour, rng: random.Random) -> None:
    """Faint shapes behind: what a room has on its walls."""
    for _ in range(rng.randint(0, 4)):
        colour = _grey(max(20, min(140, ground[0] + rng.randint(-25, 25))), rng)
        x, y = rng.randint(0, CANVAS), rng.randint(0, CANVAS)
        box = (x, y, x + rng.randint(10, 120), y + rng.randint(10, 120))
        if rng.random() < 0.5:
            pen.ellipse(box, fill=colour)
        else:
            pen.line(box, fill=colour, width=rng.randint(1, 5))


def _grey(level: int, rng: random.Random) -> _Colour:
    """A grey with a tint."""
    red, green, blue = (max(0, min(255, level + rng.randint(-12, 12))) for _ in range(3))
    return red, green, blue


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", size)
