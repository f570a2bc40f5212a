"""What a picture tells the eyes: of legible text the text, of the rest its place."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metis_agent.worlds.gallery.pictures import COLOURS, CONTENTS, SIZES, WORDS, exhibit
from metis_agent.worlds.gallery.tokens import _OUTPUTS, _SIZES, SightHead, told_of


def test_outputs_are_apart_and_cover_all() -> None:
    ends = 0
    for first in sorted(_SIZES):
        assert first == ends
        ends += _SIZES[first]
    assert ends == _OUTPUTS


def test_a_picture_tells_its_text_or_its_place() -> None:
    rng = random.Random(0)
    for content in CONTENTS:
        for size in SIZES:
            it = exhibit(content, size, rng)
            told = dict(told_of(it, legible=True))
            assert all(0 <= cls < _SIZES[first] for first, cls in told.items())
            if content == "word":
                assert [WORDS[cls] for cls in told.values()] == [it.text]
            elif content == "number":
                assert f"{told[0]}{told[10]}" == it.text
            else:
                assert it.asked is not None
                first = 44 + 20 * COLOURS.index(it.asked)
                assert f"{told[first]}{told[first + 10]}" == it.text
                assert len(told) == 4
            ((first, cell),) = told_of(it, legible=False)
            assert first == max(_SIZES)
            assert (cell % 4, cell // 4) == it.cell


def test_the_loss_is_the_cross_entropy_of_what_was_told() -> None:
    """Two pictures of two tokens; the head's bias alone speaks: log(2) more for each output, which cancels."""
    head = SightHead(3)
    with torch.no_grad():
        head.told.weight.zero_()
        head.told.bias.zero_()
        head.told.bias[0] = 2.0  # the first digit is 0, and everything else is as likely as its neighbours

    def tower(pixels: torch.Tensor, grid_thw: torch.Tensor) -> Any:
        return SimpleNamespace(pooler_output=torch.ones(4, 3))

    pixels = {"pixel_values": torch.zeros(1), "image_grid_thw": torch.zeros(1)}
    loss, right = head.loss(tower, pixels, [((0, 0),), ((20, 5),)])
    e2 = torch.tensor(2.0).exp()
    first, word = torch.log((e2 + 9) / e2), torch.log(torch.tensor(24.0))
    assert loss.item() == pytest.approx(((first + word) / 2).item(), rel=1e-5)
    assert right in (0.5, 1.0)  # a tie among the words
