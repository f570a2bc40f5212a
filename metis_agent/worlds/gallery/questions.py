"""The gallery's questions: what does the sign say? Of a large number, or of a tiny one; split by what is to be read.

A pair of digits that is held out never stands in a training picture, so a policy must read digits, not know pairs.
"""

from __future__ import annotations

import base64
import random
import zlib
from dataclasses import asdict
from typing import Any, Literal, get_args

from metis_agent.errors import ConfigurationError
from metis_agent.types import Question
from metis_agent.worlds.gallery.pictures import Exhibit, Look, Size, as_png, draw, exhibit

__all__ = ["FORMS", "SIZES", "Split", "ask", "questions", "texts"]

Split = Literal["train", "validation", "test"]
SIZES: tuple[Size, ...] = get_args(Size)

FORMS: dict[Look, tuple[str, ...]] = {
    "sign": ("What number is on the sign?", "What does the sign say?"),
    "label": ("What number is on the label?", "What does the label say?"),
    "chart": ("What value does the chart show?", "What number is above the bars?"),
}

_HELD_OUT: dict[Split, range] = {"train": range(0, 70), "validation": range(70, 80), "test": range(80, 100)}


def texts(split: Split) -> tuple[str, ...]:
    """The numbers of a split, each as two digits.

    Raises:
        ConfigurationError: an unknown split.
    """
    if split not in _HELD_OUT:
        raise ConfigurationError(f"unknown split {split!r}; choose one of {', '.join(_HELD_OUT)}")
    every = (f"{number:02d}" for number in range(100))
    return tuple(text for text in every if zlib.crc32(f"gallery {text}".encode()) % 100 in _HELD_OUT[split])


def questions(split: Split, count: int, *, seed: int = 0) -> tuple[Question, ...]:
    """`count` questions, half of them about large numbers, each with a picture of its own."""
    rng = random.Random(f"{split} {seed}")
    there = texts(split)
    return tuple(ask(exhibit(rng.choice(there), SIZES[place % 2], rng), rng) for place in range(count))


def ask(it: Exhibit, rng: random.Random) -> Question:
    """The question about a picture; the picture is in `metadata["images"]`, as a data URI."""
    uri = "data:image/png;base64," + base64.b64encode(as_png(draw(it))).decode()
    metadata: dict[str, Any] = {"images": [uri], "exhibit": asdict(it)}
    return Question(
        id=f"{it.size} {it.look} {it.text} {it.seed:08x}", text=rng.choice(FORMS[it.look]), answer=it.text,
        kind=it.size, metadata=metadata,
    )  # fmt: skip
