"""What the gallery's cold start learns from: rows of tokens with their pictures, token for token what an agent meets.

Between `questions`, `tokens` and `cold_start`. A row is a short lesson (read, read a crop, point) or a whole
trajectory; the pictures come from a pool that is renewed little by little.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metis_agent.models.checkpoint import StillsProcessor
from metis_agent.worlds.gallery.pictures import CANVAS, CELL, CONTENTS, SIZES, VIEW, Content, Exhibit, Size, draw
from metis_agent.worlds.gallery.questions import COLLECTION, PAINTING_FORMS, Painting, drawn_from, forms, photograph
from metis_agent.worlds.gallery.tokens import IMAGE, MERGE, PATCH, SEARCH, SHOWN, Told, crop_code, found_text, told_of

__all__ = [
    "IGNORE",
    "Lesson",
    "Row",
    "Rows",
    "Seen",
    "Task",
    "call_pieces",
    "patches_of",
    "pixels_of",
    "varied",
]  # fmt: skip

IGNORE = -100
"""The label of a token that is not learnt."""
Task = Literal["read", "read_crop", "point", "act"]
Lesson = tuple[Task, Content, Size] | Literal["painting"]

_IMAGE_TOKENS = (VIEW // PATCH // MERGE) ** 2
_MEAN, _STD = 0.5, 0.3
_LIT = 165
"""Brighter than any wall."""
_GRID = torch.arange((VIEW // PATCH) ** 2).view(4, 4, 2, 2).permute(0, 2, 1, 3).reshape(8, 8)
"""Which patch stands where: the processor hands them out token by token."""
_PLACE = IMAGE * _IMAGE_TOKENS
_SHOWN_IMAGE = f"<|vision_start|>{_PLACE}<|vision_end|>"


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """A picture as the model sees it, whole and through a crop: patches, shaped [64, 192], in levels of 0 to 255."""

    it: Exhibit
    view: Tensor
    crop: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One example."""

    ids: list[int]
    labels: list[int]
    """`IGNORE` where nothing is learnt."""
    images: list[Tensor]


class Rows:
    """Draws rows.

    Args:
        processor: Of the model.
        rng: Of all that is drawn.
        pool: Pictures of each kind to draw from.
        fresh: How many of all of them are drawn anew each step.
        direct_large: Share of whole trajectories that answer directly where the text is large.
        direct_tiny: The same elsewhere.
        contents: What there are pictures of.
    """

    def __init__(
        self, processor: StillsProcessor, rng: random.Random, *, pool: int, fresh: int, direct_large: float,
        direct_tiny: float, contents: Sequence[Content] = CONTENTS,
    ) -> None:  # fmt: skip
        self._processor, self._rng, self._fresh = processor, rng, fresh
        self._tokenizer: Any = processor.tokenizer
        self._direct = {"large": direct_large, "tiny": direct_tiny}
        self._kinds = [(content, size) for content in contents for size in SIZES]
        self._photos: dict[int, tuple[Painting, Tensor]] = {}
        self._pool = {kind: [self._new(kind) for _ in range(pool)] for kind in self._kinds}

    def batches(self, lessons: Sequence[tuple[Lesson, int]]) -> list[dict[str, Tensor]]:
        """So many rows of each lesson, as the model's inputs with `labels`; rows of one length together."""
        self._renew()
        rows = [self._lesson(lesson) for lesson, count in lessons for _ in range(count)]
        by_images = [[row for row in rows if len(row.images) == count] for count in (1, 2)]
        return [self.batch(some) for some in by_images if some]

    def pictures(self, counts: Sequence[tuple[Content, int]]) -> tuple[dict[str, Tensor], list[Told]]:
        """Pictures of each content and what each tells: so many large ones, as many crops, half as many tiny ones."""
        self._renew()
        chosen: list[tuple[Tensor, Told]] = []
        for content, count in counts:
            large = [self._rng.choice(self._pool[content, "large"]) for _ in range(count)]
            tiny = [self._rng.choice(self._pool[content, "tiny"]) for _ in range(count)]
            chosen += [(varied(seen.view, self._rng), told_of(seen.it, legible=True)) for seen in large]
            chosen += [(varied(seen.crop, self._rng), told_of(seen.it, legible=True)) for seen in tiny]
            chosen += [(seen.view, told_of(seen.it, legible=False)) for seen in tiny[: count // 2]]
        return pixels_of([image for image, _ in chosen]), [told for _, told in chosen]

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as the model's inputs; padding goes on the right, where a causal model does not see it."""
        width, pad = max(len(row.ids) for row in rows), self._tokenizer.pad_token_id
        ids = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows])
        return {
            "input_ids": ids,
            "labels": torch.tensor([row.labels + [IGNORE] * (width - len(row.ids)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
            "mm_token_type_ids": (ids == self._processor.image_token_id).int(),
            **pixels_of([image for row in rows for image in row.images]),
        }

    def see(self, it: Exhibit) -> Seen:
        """An exhibit, and the cell that its crop shows."""
        picture, (left, top) = draw(it), (place * CELL for place in it.cell)
        crop = picture.crop((left, top, left + CELL, top + CELL)).resize((CANVAS, CANVAS))
        view, closer = (patches_of(image) for image in (picture, crop))
        return Seen(it=it, view=view, crop=closer)

    def painting_row(self, it: Painting, photo: Tensor) -> Row:
        """A trajectory about a painting: the search, and the name that it found."""
        asked = self._rng.choice(PAINTING_FORMS)
        pieces = [(f"<|user|>{_SHOWN_IMAGE}{asked}<|end|><|assistant|>", False)]
        if self._rng.random() >= self._direct["tiny"]:
            pieces += [
                (f"<tool_call>{SEARCH}</tool_call><|end|>", True),
                (f"<|tool|>{found_text(it.file, it.caption)}<|end|><|assistant|>", False),
            ]
        return self._encode([*pieces, (f"<answer>{it.painter}</answer><|end|>", True)], [photo])

    def row(self, task: Task, seen: Seen) -> Row:
        """One row about a picture."""
        asked = self._rng.choice(forms(seen.it))
        first = seen.crop if task == "read_crop" else seen.view
        if task == "read_crop" or (task == "read" and seen.it.size == "large"):
            first = varied(first, self._rng)
        pieces = [(f"<|user|>{_SHOWN_IMAGE}{asked}<|end|><|assistant|>", False)]
        answer = f"{seen.it.text}</answer><|end|>"
        if task == "point":
            return self._encode([*pieces, *call_pieces(seen.it, only_place=True)], [first])
        if task == "act" and self._rng.random() >= self._direct[seen.it.size]:
            pieces += [
                *call_pieces(seen.it),
                (f"<|tool|>{SHOWN}{_SHOWN_IMAGE}<|end|><|assistant|>", False),
                (f"<answer>{answer}", True),
            ]
            return self._encode(pieces, [first, seen.crop])
        # The decision is the first token of the answer: learnt where the row is about acting.
        return self._encode([*pieces, ("<answer>", task == "act"), (answer, True)], [first])

    def _renew(self) -> None:
        for _ in range(self._fresh):
            kind = self._rng.choice(self._kinds)
            self._pool[kind][self._rng.randrange(len(self._pool[kind]))] = self._new(kind)

    def _lesson(self, lesson: Lesson) -> Row:
        if lesson != "painting":
            task, content, size = lesson
            return self.row(task, self._rng.choice(self._pool[content, size]))
        if self._rng.random() < 0.1 or len(self._photos) < 100:
            # Paintings that the collection has not: a name must be read off the caption, it can't be known.
            it = Painting(number=self._rng.randrange(COLLECTION, 10**9))
            self._photos[it.number % 100] = it, patches_of(photograph(it, 0))
        return self.painting_row(*self._rng.choice(list(self._photos.values())))

    def _new(self, kind: tuple[Content, Size]) -> Seen:
        return self.see(drawn_from("train", *kind, self._rng))

    def _encode(self, pieces: Sequence[tuple[str, bool]], images: list[Tensor]) -> Row:
        ids: list[int] = []
        labels: list[int] = []
        encoded: Sequence[Sequence[int]] = self._tokenizer([text for text, _ in pieces], add_special_tokens=False)[
            "input_ids"
        ]
        for tokens, (_, learnt) in zip(encoded, pieces, strict=True):
            ids += tokens
            labels += tokens if learnt else [IGNORE] * len(tokens)
        return Row(ids=ids, labels=labels, images=images)


def patches_of(image: Image.Image) -> Tensor:
    """A picture as the processor cuts it up, shaped [64, 192], in levels.

    In a tenth of the processor's time, without its second, equal frame; `pixels_of` makes its numbers of it.
    """
    across = VIEW // PATCH // MERGE
    levels = torch.from_numpy(np.array(image.resize((VIEW, VIEW), Image.Resampling.BICUBIC)))
    parts = levels.view(across, MERGE, PATCH, across, MERGE, PATCH, 3)  # rows: (token, patch, pixel), columns: the same
    return parts.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH * PATCH)


def varied(levels: Tensor, rng: random.Random) -> Tensor:
    """The same picture on another hook and in another light, so that few pictures teach as many would."""
    grid = levels[_GRID]
    lit = grid.amax(-1) > _LIT  # where the plate is
    moves = [_room(lit.any(1 - axis), rng) for axis in (0, 1)]
    light = torch.tensor([[rng.uniform(0.88, 1.1)], [rng.uniform(0.88, 1.1)], [rng.uniform(0.88, 1.1)]])
    moved = grid.roll(moves, (0, 1)).view(64, 3, -1) * light + rng.uniform(-10, 10)
    back = torch.empty_like(levels)
    back[_GRID.flatten()] = moved.clamp(0, 255).to(torch.uint8).flatten(1)
    return back


def _room(taken: Tensor, rng: random.Random) -> int:
    """A random step that leaves what is taken within the picture."""
    places = taken.nonzero().flatten().tolist() or [0, len(taken) - 1]
    return rng.randint(-places[0], len(taken) - 1 - places[-1])


def pixels_of(images: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pictures in levels as the model's pixel arguments."""
    levels, side = torch.cat(list(images)), VIEW // PATCH
    pixels = ((levels / 255 - _MEAN) / _STD).view(-1, 3, 1, PATCH * PATCH).expand(-1, -1, 2, -1)
    return {
        "pixel_values": pixels.reshape(len(levels), -1),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(images)),
    }


def call_pieces(it: Exhibit, *, only_place: bool = False) -> list[tuple[str, bool]]:
    """The call that crops, as texts and whether they are learnt; of pointing, only the coordinates are."""
    code = crop_code(it.cell)
    name, arguments = '{"name": "python", "arguments": {"code": ', json.dumps(code)[1:-1]
    if not only_place:
        return [(f'<tool_call>{name}"{arguments}"}}}}</tool_call><|end|>', True)]
    start = code.index("((") + 1
    return [(f'<tool_call>{name}"{code[:start]}', False), (code[start : code.index(".resize")], True)]
