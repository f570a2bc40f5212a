"""Images of trajectories, kept by the hash of their bytes.

The same picture in a thousand rollouts of one question is one file, and lines stay short. Written and read by the
store of trajectories; whoever has pictures of their own may keep them here, and record `sha256:<hex>` as their URL.

Between `schema` and the store. A picture of megabytes that stands in sixteen rollouts of a question, in the question
and in the messages of each, is one file. Read again, the record is what it was, to the byte: whatever block an image
stands in, only its base64 is exchanged, and only where the same base64 comes back. What is no image that the image
store knows by its first bytes stays where it is, broken images too: records are of what was.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from metis_agent.errors import InputError, StorageError
from metis_agent.recording.storage import Storage

__all__ = ["ImageStore", "externalise_images", "is_image", "restore_images"]

_REFERENCE = re.compile(r"sha256:([0-9a-f]{64})")
_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_WORTH = 80
"""Characters from which on an image is set aside: a reference takes as many."""
_PREFIX = rb'"(data:image/[\w.+-]+;base64,)?'
_IMAGE = re.compile(_PREFIX + rb'([A-Za-z0-9+/]{%d,}={0,2})"' % _WORTH)
_MARK = re.compile(_PREFIX + rb'image:(sha256:[0-9a-f]{64})"')


class ImageStore:
    """The folder `images` inside a store's folder; any process may write to it at any time.

    Args:
        url: the folder of the trajectory store, or any fsspec URL.
        storage_options: keywords for the fsspec file system, such as credentials.
    """

    def __init__(self, url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._storage = Storage(f"{os.fspath(url).rstrip('/')}/images", storage_options)

    def put_image(self, content: bytes) -> str:
        """Keep an image, once, and return its reference `sha256:<hex>`.

        Raises:
            StorageError: it could not be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        # A file of another size is what a crash of the machine left: write it anew.
        if self._storage.size(digest) != len(content):
            self._storage.put(digest, content)
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
        content = b"".join(self._storage.blocks(match[1]))
        if hashlib.sha256(content).hexdigest() != match[1]:
            raise StorageError(f"image {reference!r} in {self._storage.url!r} is damaged; put it again.")
        return content


def is_image(content: bytes) -> bool:
    """Whether it begins as a PNG, JPEG, GIF, WebP, BMP or TIFF does."""
    return content.startswith(_STARTS)


def externalise_images(line: bytes, put_image: Callable[[bytes], str]) -> bytes:
    """The line with references in place of its images.

    Args:
        line: A record as JSON.
        put_image: Keeps the bytes of an image and returns `sha256:<hex>`, such as `ImageStore.put_image`.

    Raises:
        StorageError: an image can't be written.
    """

    def kept(found: re.Match[bytes]) -> bytes:
        try:
            content = base64.b64decode(found[2], validate=True)
        except binascii.Error:
            return found[0]
        if not is_image(content) or base64.b64encode(content) != found[2]:
            return found[0]
        return b'"%simage:%s"' % (found[1] or b"", put_image(content).encode())

    return _IMAGE.sub(kept, line) if b"base64" in line else line


def restore_images(line: bytes, get_encoded: Callable[[str], bytes | None]) -> bytes:
    """The line with its images again.

    Args:
        line: What `externalise_images` returned.
        get_encoded: The base64 of a reference; `None` where the image is gone, and the reference stays.
    """

    def again(found: re.Match[bytes]) -> bytes:
        encoded = get_encoded(found[2].decode())
        return found[0] if encoded is None else b'"%s%s"' % (found[1] or b"", encoded)

    return _MARK.sub(again, line) if b"image:sha256:" in line else line
