"""Takes the images out of a trajectory and keeps them by their hash: what stays is `sha256:<hex>`.

Between the recorder and the store, for whoever records pictures of megabytes many times over. A picture that stands
there as base64 of a broken kind is left as it is: records are of what was, not of what should have been.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any

from metis_agent.recording.images import ImageStore
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Trajectory

__all__ = ["PictureStore", "set_aside"]

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)


class PictureStore(TrajectoryStore):
    """A `TrajectoryStore` that keeps each image once, in the folder `images` beside its segments.

    Args:
        url: As of `TrajectoryStore`.
        **options: Likewise.
    """

    def __init__(self, url: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(url, **options)
        self._images = ImageStore(url, storage_options=options.get("storage_options"))
        self._reopen = partial(PictureStore, url, **options)  # type: ignore[assignment]

    def append(self, trajectory: Trajectory) -> None:
        """Add a trajectory, its images apart; from any thread.

        Raises:
            InputError, StorageError: as of `TrajectoryStore`.
        """
        super().append(set_aside(trajectory, self._images))


def set_aside(trajectory: Trajectory, images: ImageStore) -> Trajectory:
    """The trajectory with references in place of the images of its question and messages.

    Args:
        trajectory: Is left as it is.
        images: Keeps them.

    Raises:
        StorageError: an image can't be written.
    """
    question = replace(trajectory.question, metadata=_without(trajectory.question.metadata, images))
    messages = tuple(_without(message, images) for message in trajectory.messages)
    return replace(trajectory, question=question, messages=messages)


def _without(value: Any, images: ImageStore) -> Any:
    if is_dataclass(value) and not isinstance(value, type):  # what a tool left beside its message
        value = vars(value)
    if isinstance(value, Mapping):
        return _block(value, images) or {key: _without(inner, images) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without(inner, images) for inner in value]
    if isinstance(value, str) and _DATA_URI.match(value):
        return _kept(value.partition(",")[2], images) or value
    return value


def _block(value: Mapping[str, Any], images: ImageStore) -> dict[str, Any] | None:
    """An image by its reference; `None` of all else.

    A content block, LangChain's, OpenAI's or Anthropic's, or what a sandbox shows: `base64` with a `mime_type`.
    """
    shown = str(value.get("mime_type") or "").startswith("image/") and "base64" in value
    if not shown and value.get("type") not in ("image", "image_url"):
        return None
    inner = value.get("source") or value.get("image_url") or value
    inner = {"url": inner} if isinstance(inner, str) else inner
    if not isinstance(inner, Mapping):
        return None
    encoded = inner.get("base64") or inner.get("data")
    url = inner.get("url")
    if not isinstance(encoded, str) and isinstance(url, str) and _DATA_URI.match(url):
        encoded = url.partition(",")[2]
    reference = _kept(encoded, images) if isinstance(encoded, str) else ""
    return {"type": "image", "url": reference} if reference else None


def _kept(encoded: str, images: ImageStore) -> str:
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return images.put_image(content) if content else ""
