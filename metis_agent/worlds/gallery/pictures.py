"""The gallery's pictures: numbers and words on signs and labels, and bar charts, large or tiny, each from a seed.

A picture has 256 x 256 pixels and the model sees it at 64 x 64. Large text is legible then. Of tiny text, at most a
dozen pixels high, three to five rows are left; one cell of a 4 x 4 grid, cropped and enlarged, shows it at the size at
which it can be read. Numbers are drawn at a size of font, words to a width, so that tiny ones fill the cell that they
stand in; every size that a tiny one has, large ones have four times as large.

`write_sheet` shows what policies made of them: the picture, what the model sees of it, the call, the crop, the answer.
"""

from __future__ import annotations

import base64
import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from PIL import Image, ImageDraw, ImageFont

from metis_agent.messages import image_source
from metis_agent.tools.images import load_image
from metis_agent.types import Question, Trajectory

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import Measurement

__all__ = [
    "CANVAS",
    "CELL",
    "COLOURS",
    "CONTENTS",
    "FONTS",
    "GRID",
    "HELD_OUT_FONT",
    "NUMBERS",
    "SIZES",
    "VIEW",
    "WORDS",
    "Bar",
    "Colour",
    "Content",
    "Exhibit",
    "Look",
    "Size",
    "Tint",
    "as_png",
    "draw",
    "exhibit",
    "grey",
    "plate",
    "texts",
    "write_sheet",
]


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


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #222; }
section { display: grid; grid-template-columns: 16rem 1fr 1fr; gap: 1.5rem; padding: 1.5rem 0; }
section + section { border-top: 1px solid #ccc; }
h2, h3 { font-size: 1rem; margin: 0 0 .5rem; }
img { display: block; width: 128px; height: 128px; } figure { margin: 0 .5rem .5rem 0; display: inline-block; }
figcaption, code { font-size: .8rem; } .seen img { image-rendering: pixelated; }
code { display: block; overflow-wrap: anywhere; margin-bottom: .5rem; }
.right { color: #17622f; } .wrong { color: #9c1c1c; }
"""


def write_sheet(path: Path, before: Measurement, after: Measurement, *, of_each: int = 2) -> Path:
    """Write a page that needs nothing beside itself, with the first questions of each kind.

    Args:
        path: Of the page.
        before: The cold start.
        after: The trained policy, on the same questions.
        of_each: Questions of each kind.
    """
    later = {run.question.id: run for run in after.trajectories}
    shown: dict[str, list[str]] = {}
    for run in before.trajectories:
        parts = shown.setdefault(run.question.kind, [])
        if len(parts) < of_each:
            parts.append(_section(run, later[run.question.id]))
    body = "".join(part for parts in shown.values() for part in parts)
    title = "The same pictures, before and after HDPO"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{body}</html>\n",
        encoding="utf-8",
    )
    return path


def _section(before: Trajectory, after: Trajectory) -> str:
    question = before.question
    return (
        f"<section><div><h2>{escape(question.text)}</h2><p>{escape(question.kind)}</p>{_picture(question)}</div>"
        f"{_run('Cold start', before)}{_run('After HDPO', after)}</section>"
    )


def _picture(question: Question) -> str:
    source = question.metadata["images"][0]
    return (
        _figure(source, "the picture") + f'<span class="seen">{_figure(_seen(source), "as the model sees it")}</span>'
    )


def _run(title: str, run: Trajectory) -> str:
    calls = "".join(f"<code>{escape(_call(outcome.tool, outcome.arguments))}</code>" for outcome in run.outcomes)
    crops = "".join(_figure(_seen(source), "what it got to see") for source in _tool_images(run))
    right = run.answer == run.question.answer
    verdict = f'<p class="{"right" if right else "wrong"}">{escape(run.answer)} {"✓" if right else "✗"}</p>'
    return f'<div class="seen"><h3>{title}</h3>{calls or "<p>At a glance:</p>"}{crops}{verdict}</div>'


def _call(tool: str, arguments: Mapping[str, Any]) -> str:
    return f"{tool}({', '.join(map(str, arguments.values()))})"


def _tool_images(run: Trajectory) -> list[str | bytes]:
    contents = [message["data"]["content"] for message in run.messages if message["type"] == "tool"]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return [source for block in blocks if isinstance(block, dict) and (source := image_source(block)) is not None]


def _seen(source: str | bytes) -> str:
    """An image at the size at which the model sees it, as a data URI."""
    file = io.BytesIO()
    load_image(source).convert("RGB").resize((VIEW, VIEW), 3).save(file, "PNG")  # 3: BICUBIC, as the processor does
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _figure(uri: str, caption: str) -> str:
    return f'<figure><img src="{escape(uri)}" alt=""><figcaption>{caption}</figcaption></figure>'
