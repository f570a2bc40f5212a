"""Images of trajectories, kept by the hash of their bytes.

The same picture in a thousand rollouts of one question is one file, and lines stay short. Written and read by the
store of trajectories; whoever has pictures of their own may keep them here, and record `sha256:<hex>` as their URL.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

from metis_agent.errors import InputError, StorageError
from metis_agent.recording.storage import Place

__all__ = ["ImageStore", "is_image"]

_REFERENCE = re.compile(r"sha256:([0-9a-f]{64})")
_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


class ImageStore:
    """The folder `images` inside a store's folder; any process may write to it at any time.

    Args:
        url: the folder of the trajectory store, or any fsspec URL.
        storage_options: keywords for the fsspec file system, such as credentials.
    """

    def __init__(self, url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._place = Place(f"{os.fspath(url).rstrip('/')}/images", storage_options)

    def put_image(self, content: bytes) -> str:
        """Keep an image, once, and return its reference `sha256:<hex>`.

        Raises:
            StorageError: it could not be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        # A file of another size is what a crash of the machine left: write it anew.
        if self._place.size(digest) != len(content):
            self._place.put(digest, content)
        return f"sha256:{digest}"

    def get_image(self, reference: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            InputError: it is not a reference.
            StorageError: the image isn't there, or its bytes are not those that were put.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise InputError(f"{reference!r} is no image reference; put_image returns 'sha256:' and 64 hex digits.")
        content = b"".join(self._place.blocks(match[1]))
        if hashlib.sha256(content).hexdigest() != match[1]:
            raise StorageError(f"image {reference!r} in {self._place.url!r} is damaged; put it again.")
        return content


def is_image(content: bytes) -> bool:
    """Whether it begins as a PNG, JPEG, GIF, WebP, BMP or TIFF does."""
    return content.startswith(_STARTS)
