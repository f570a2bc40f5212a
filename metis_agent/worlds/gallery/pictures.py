"""The gallery's pictures: an exhibit on a wall, drawn with Pillow.

A picture has 256 x 256 pixels and the model sees it at 64 x 64. Large text is legible then. Of tiny text, at most a
dozen pixels high, three to five rows are left; one cell of a 4 x 4 grid, cropped and enlarged, shows it at the size at
which it can be read.
"""

from __future__ import annotations

import io
import random

from PIL import Image, ImageDraw

from metis_agent.worlds.gallery.exhibits import Exhibit
from metis_agent.worlds.gallery.plates import Tint, grey, plate

__all__ = ["CANVAS", "CELL", "GRID", "VIEW", "as_png", "draw"]

CANVAS, VIEW, GRID = 256, 64, 4
CELL = CANVAS // GRID

_HOOKS = 8
"""To a row. Plates hang on them with a little play: where text may be anywhere, so small a model learns far slower."""


def draw(it: Exhibit) -> Image.Image:
    """The picture, RGB, 256 x 256."""
    rng = random.Random(f"draw {it.seed} {it.text} {it.look} {it.size} {it.font}")
    ground = grey(rng.randint(40, 125), rng)
    picture = Image.new("RGB", (CANVAS, CANVAS), ground)
    _clutter(ImageDraw.Draw(picture), ground, rng)
    held = plate(it, rng)
    picture.paste(held, _place(it, held.size, rng), held)
    return picture


def as_png(picture: Image.Image) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _place(it: Exhibit, size: tuple[int, int], rng: random.Random) -> tuple[int, int]:
    """Where the plate's corner goes: near a hook, wholly inside of the picture, or of its cell where it is tiny."""
    column, row = it.cell if it.size == "tiny" else (0, 0)
    room = CELL if it.size == "tiny" else CANVAS
    pitch, play = room // _HOOKS, room // (2 * CELL)
    x, y = (_hung(room - side, pitch, play, rng) for side in size)
    return column * CELL + x, row * CELL + y


def _hung(most: int, pitch: int, play: int, rng: random.Random) -> int:
    return max(0, min(most, pitch * rng.randint(0, max(0, most) // pitch) + rng.randint(-play, play)))


def _clutter(pen: ImageDraw.ImageDraw, ground: Tint, rng: random.Random) -> None:
    """Faint shapes behind: what a room has on its walls."""
    for _ in range(rng.randint(0, 5)):
        colour = grey(max(20, min(145, ground[0] + rng.randint(-30, 30))), rng)
        x, y = rng.randint(0, CANVAS), rng.randint(0, CANVAS)
        box = (x, y, x + rng.randint(10, 120), y + rng.randint(10, 120))
        shape = rng.random()
        if shape < 0.4:
            pen.ellipse(box, fill=colour)
        elif shape < 0.6:
            pen.rectangle(box, fill=colour)
        else:
            pen.line(box, fill=colour, width=rng.randint(1, 5))
