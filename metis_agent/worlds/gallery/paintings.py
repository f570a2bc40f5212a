"""Paintings, who painted them, and the collection in which that is written beside each.

A painting is shapes of strong colours, drawn from its number. A visitor's photograph of one is lighter or darker, a
little tilted and cut; the collection, a folder of images with captions, finds the painting again by its likeness.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance

from metis_agent.formats import atomic_write
from metis_agent.worlds.gallery.pictures import CANVAS

__all__ = ["COLLECTION", "FIRST", "LAST", "Painting", "paint", "photograph", "write_collection"]

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
