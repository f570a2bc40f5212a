"""The pictures of a batch of token rows: what a model that sees needs beside the ids.

Between `policy_rows` and the trainer's forward pass. A rollout's pictures are in its messages, in their order; a row
holds the first so many of them, as many as its placeholder tokens account for: every prompt begins with the whole
history. Pixels are made by what made them for the rollout (`metis_agent.models.vision.ImageReader`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from langchain_core.messages import BaseMessage, messages_from_dict
from torch import Tensor

from metis_agent.hdpo.policy_rows import Row
from metis_agent.hdpo.segments import Segment
from metis_agent.types import Trajectory

__all__ = ["PIXELS", "RowImages", "SeesImages", "images_of"]

PIXELS = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")
"""What TRL's forward pass takes of pictures, for models whose pictures have a grid, such as Qwen's."""


class SeesImages(Protocol):
    """What reads the pictures; `ImageReader` is one."""

    placeholder: str
    """The token that stands for a part of a picture."""

    def of(self, message: BaseMessage) -> Sequence[Any]:
        """The pictures of a message, each with the `text` that stands for it in a prompt."""

    def inputs(self, ids_BP: Tensor, images: Sequence[Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's arguments for these ids and pictures."""


def images_of(trajectory: Trajectory, segments: Sequence[Segment], reader: SeesImages, token: int) -> list[list[Any]]:
    """The pictures of each segment.

    Args:
        trajectory: With its messages.
        segments: Its own.
        reader: Reads the pictures.
        token: The id of the placeholder.

    Returns:
        One list a segment; none at all where a segment's placeholders are not those of its pictures.
    """
    seen = [
        image
        for message in messages_from_dict([dict(each) for each in trajectory.messages])
        for image in reader.of(message)
    ]
    sizes = [image.text.count(reader.placeholder) for image in seen]
    found: list[list[Any]] = []
    for segment in segments:
        wanted = (*segment.prompt_ids, *segment.completion_ids).count(token)
        count = next((n for n in range(len(sizes) + 1) if sum(sizes[:n]) == wanted), None)
        if count is None:
            return []
        found.append(seen[:count])
    return found


class RowImages:
    """The pictures of the rows of one step.

    Args:
        layout: The rows, in order.
        images: The pictures of each row.
        reader: Makes the model's arguments of them.
        dtype: Of the model.
    """

    def __init__(
        self, layout: Sequence[Row], images: Sequence[Sequence[Any]], reader: SeesImages, dtype: torch.dtype
    ) -> None:
        assert len(layout) == len(images)
        self._images, self._reader, self._dtype = images, reader, dtype

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """The model's arguments for [R, P + T] ids, and how many pictures each row has; empty without a picture."""
        flat = [image for row in self._images for image in row]
        if not flat:
            return {}
        return {**self._reader.inputs(ids, flat, self._dtype), "num_images": [len(row) for row in self._images]}
