"""The gallery's questions: what does the sign say, how high is the red bar, who painted this?

Large text can be read at once, tiny text only in a crop; who painted a picture stands beside it in the collection. The
splits hold pictures apart: a picture's seed, and a painting, belong to one split. What is read is the same in all, as
words and numbers are in any gallery. A painting is shapes of strong colours, drawn from its number. A visitor's
photograph of one is lighter or darker, a little tilted and cut; the collection, a folder of images with captions,
finds the painting again by its likeness.
"""

from __future__ import annotations

import base64
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageEnhance

from metis_agent.errors import ConfigurationError
from metis_agent.formats import atomic_write
from metis_agent.types import Question
from metis_agent.worlds.gallery.pictures import (
    CANVAS,
    COLOURS,
    CONTENTS,
    FONTS,
    SIZES,
    Content,
    Exhibit,
    Size,
    as_png,
    draw,
    exhibit,
)

__all__ = [
    "COLLECTION",
    "FIRST",
    "KINDS",
    "LAST",
    "LEGIBLE",
    "PAINTING",
    "PAINTING_FORMS",
    "Painting",
    "Split",
    "ask",
    "ask_painter",
    "drawn_from",
    "forms",
    "paint",
    "paintings",
    "photograph",
    "phrasings",
    "questions",
    "write_collection",
]


COLLECTION = 200
"""Paintings that the collection holds; those with higher numbers are in none."""
FIRST = (
    "Ada", "Bruno", "Carla", "Dora", "Emil", "Flora", "Gustav", "Hanna", "Igor", "Julia", "Karl", "Lena", "Mira",
    "Nora", "Otto", "Paula", "Rosa", "Stefan", "Tilda", "Viktor",
)  # fmt: skip
LAST = (
    "Abel", "Brandt", "Corven", "Dalin", "Ekman", "Falk", "Gruber", "Holm", "Ivers", "Jansen", "Keller", "Lund",
    "Moser", "Nolan", "Oster", "Perrin", "Quist", "Rohde", "Sander", "Vell",
)  # fmt: skip

_COLOURS = (
    (214, 60, 50), (235, 160, 40), (240, 220, 90), (70, 150, 80), (40, 120, 190), (90, 60, 150), (230, 230, 220),
    (30, 30, 40), (200, 110, 140),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Painting:
    """A painting, before it is painted."""

    number: int

    @property
    def painter(self) -> str:
        """First and last name."""
        rng = random.Random(f"painter {self.number}")
        return f"{rng.choice(FIRST)} {rng.choice(LAST)}"

    @property
    def file(self) -> str:
        """Its name in the collection."""
        return f"{self.number % 1000:03d}.png"

    @property
    def caption(self) -> str:
        """What is written beside it."""
        return f"Painted by {self.painter}."


def paint(it: Painting) -> Image.Image:
    """The painting, RGB, 256 x 256."""
    rng = random.Random(f"painting {it.number}")
    picture = Image.new("RGB", (CANVAS, CANVAS), rng.choice(_COLOURS))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(6, 10)):
        corners = [(rng.randint(-40, CANVAS + 40), rng.randint(-40, CANVAS + 40)) for _ in range(3)]
        (left, top), side = corners[0], rng.randint(60, 150)
        colour = rng.choice(_COLOURS)
        shape = rng.random()
        if shape < 0.4:
            pen.ellipse((left, top, left + side, top + side), fill=colour)
        elif shape < 0.7:
            pen.polygon(corners, fill=colour)
        else:
            pen.rectangle((left, top, left + side, top + rng.randint(30, 120)), fill=colour)
    return picture


def photograph(it: Painting, seed: int) -> Image.Image:
    """The painting as a visitor photographs it, RGB, 256 x 256."""
    rng = random.Random(f"photograph {it.number} {seed}")
    picture = paint(it).rotate(rng.uniform(-1.0, 1.0), resample=Image.Resampling.BICUBIC, expand=False)
    left, top, right, bottom = (rng.randint(3, 6) for _ in range(4))
    picture = picture.crop((left, top, CANVAS - right, CANVAS - bottom)).resize((CANVAS, CANVAS))
    return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.88, 1.1))


def write_collection(folder: Path) -> Path:
    """Paint the collection into a folder, with its captions; what is there already stays."""
    notes = folder / "metadata.jsonl"
    if notes.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    every = [Painting(number=number) for number in range(COLLECTION)]
    for it in every:
        paint(it).save(folder / it.file)
    lines = (json.dumps({"file_name": it.file, "caption": it.caption}) + "\n" for it in every)
    atomic_write(notes, "".join(lines).encode())
    return folder


Split = Literal["train", "validation", "test"]
PAINTING = "painting"
KINDS = (*(f"{size} {content}" for content in CONTENTS for size in SIZES), PAINTING)
LEGIBLE = tuple(kind for kind in KINDS if kind.startswith("large"))
"""The kinds that can be answered without a tool."""

_FORMS: dict[Content, tuple[str, ...]] = {
    "number": ("What number is on the {look}?", "Read the number on the {look}."),
    "word": ("What word is on the {look}?", "Read the word on the {look}."),
    "chart": ("What is the value of the {colour} bar?", "How long is the {colour} bar?"),
}
PAINTING_FORMS = ("Who painted this?", "Who painted this picture?")
_HELD_OUT: dict[Split, range] = {"train": range(0, 70), "validation": range(70, 80), "test": range(80, 100)}


def questions(
    split: Split, count: int, *, seed: int = 0, kinds: Sequence[str] = KINDS, fonts: Sequence[str] = FONTS
) -> tuple[Question, ...]:
    """`count` questions, the kinds in turn, each with a picture of its own.

    Raises:
        ConfigurationError: an unknown split or kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigurationError(f"unknown kinds {unknown!r}; choose from {', '.join(KINDS)}")
    rng = random.Random(f"{split} {seed}")
    shown = paintings(split)
    found: list[Question] = []
    for place in range(count):
        kind = kinds[place % len(kinds)]
        if kind == PAINTING:
            found.append(ask_painter(rng.choice(shown), rng))
        else:
            content, size = next((c, s) for c in CONTENTS for s in SIZES if f"{s} {c}" == kind)
            found.append(ask(drawn_from(split, content, size, rng, fonts=fonts), rng))
    return tuple(found)


def forms(it: Exhibit) -> tuple[str, ...]:
    """The ways in which one may ask about an exhibit; none tells how large its text is."""
    return tuple(form.format(look=it.look, colour=it.asked) for form in _FORMS[it.content])


def phrasings() -> tuple[str, ...]:
    """Every question of this world."""
    options = [{"look": look, "colour": colour} for look, colour in product(("sign", "label"), COLOURS)]
    shown = [form.format(**each) for group in _FORMS.values() for form in group for each in options]
    return tuple(dict.fromkeys([*shown, *PAINTING_FORMS]))


def drawn_from(
    split: Split, content: Content, size: Size, rng: random.Random, *, fonts: Sequence[str] = FONTS
) -> Exhibit:
    """An exhibit of a split."""
    while True:
        it = exhibit(content, size, rng, fonts=fonts)
        if _is_of(split, f"gallery {it.seed}"):
            return it


def paintings(split: Split) -> tuple[Painting, ...]:
    """The paintings of the collection that a split asks about."""
    every = (Painting(number=number) for number in range(COLLECTION))
    return tuple(it for it in every if _is_of(split, f"painting {it.number}"))


def ask(it: Exhibit, rng: random.Random) -> Question:
    """The question about a picture; the picture is in `metadata["images"]`, as a data URI."""
    return Question(
        id=f"{it.size} {it.content} {it.text} {it.seed:08x}", text=rng.choice(forms(it)), answer=it.text,
        kind=f"{it.size} {it.content}", metadata={"images": [_uri(draw(it))], "exhibit": asdict(it)},
    )  # fmt: skip


def ask_painter(it: Painting, rng: random.Random) -> Question:
    """The question about a photograph of a painting."""
    seed = rng.getrandbits(32)
    metadata: dict[str, Any] = {"images": [_uri(photograph(it, seed))], "painting": it.number}
    return Question(
        id=f"painting {it.number} {seed:08x}", text=rng.choice(PAINTING_FORMS), answer=it.painter, kind=PAINTING,
        metadata=metadata,
    )  # fmt: skip


def _is_of(split: Split, key: str) -> bool:
    if split not in _HELD_OUT:
        raise ConfigurationError(f"unknown split {split!r}; choose one of {', '.join(_HELD_OUT)}")
    return zlib.crc32(key.encode()) % 100 in _HELD_OUT[split]


def _uri(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(as_png(picture)).decode()
