"""The eyes first: the vision tower learns to tell digits, words and places before it has a language model behind it.

As in real VLMs, whose towers come trained. What is to be told of a picture is told by a linear map of its image
tokens, pooled over them; the map is thrown away afterwards. A step costs a third of one with the language model, and
what a picture shows reaches the tower directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metis_agent.worlds.gallery.pictures import COLOURS, GRID, WORDS, Exhibit

__all__ = ["SightHead", "Told", "told_of"]

Told = tuple[tuple[int, int], ...]
"""(first output, class) of everything that a picture tells."""

_DIGITS = 10
_WORDS = 2 * _DIGITS
_BARS = _WORDS + len(WORDS)
_CELLS = _BARS + 2 * _DIGITS * len(COLOURS)
_OUTPUTS = _CELLS + GRID * GRID
_SIZES = {
    0: _DIGITS, _DIGITS: _DIGITS, _WORDS: len(WORDS), _CELLS: GRID * GRID,
    **{_BARS + _DIGITS * place: _DIGITS for place in range(2 * len(COLOURS))},
}  # fmt: skip


def told_of(it: Exhibit, *, legible: bool) -> Told:
    """What a picture tells: what can be read in it, or else the cell where something stands."""
    if not legible:
        column, row = it.cell
        return ((_CELLS, row * GRID + column),)
    if it.content == "word":
        return ((_WORDS, WORDS.index(it.text)),)
    if it.content == "number":
        return (0, int(it.text[0])), (_DIGITS, int(it.text[1]))
    told: list[tuple[int, int]] = []
    for bar in it.bars:
        first = _BARS + 2 * _DIGITS * COLOURS.index(bar.colour)
        told += [(first, int(bar.value[0])), (first + _DIGITS, int(bar.value[1]))]
    return tuple(told)


class SightHead(nn.Module):
    """Tells a picture's classes from its image tokens.

    Args:
        width: Of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.told = nn.Linear(width, _OUTPUTS)

    def loss(self, tower: Any, pixels: dict[str, Tensor], told: Sequence[Told]) -> tuple[Tensor, float]:
        """Cross-entropy per picture, and the share of all that was told that is right.

        Args:
            tower: The vision model.
            pixels: `pixel_values` and `image_grid_thw` of the pictures.
            told: What each of them tells.
        """
        seen = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        outputs = self.told(seen.view(len(told), -1, seen.shape[-1])).logsumexp(1)
        total, right, count = outputs.new_zeros(()), 0, 0
        for first, size in _SIZES.items():
            pairs = [(place, cls) for place, each in enumerate(told) for start, cls in each if start == first]
            if not pairs:
                continue
            places, classes = torch.tensor(pairs).T
            logits = outputs[places, first : first + size]
            total = total + nn.functional.cross_entropy(logits, classes, reduction="sum")
            right, count = right + int((logits.argmax(1) == classes).sum()), count + len(pairs)
        return total / len(told), right / count
