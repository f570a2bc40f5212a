"""What many trajectories share, kept once by the hash of its bytes: images, and the sets of tools that were offered.

The same picture in a thousand rollouts of one question is one file, and lines stay short. Written and read by the
store of trajectories; whoever has pictures of their own may keep them here, and record `sha256:<hex>` as their URL.

Read again, a record is what it was, to the byte: whatever block an image stands in, only its base64 is exchanged for
`image:sha256:<hex>`, and only where the same base64 comes back. What is no image that the image store knows by its
first bytes stays where it is, broken images too: records are of what was. A text that looks like a reference is none.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metis_agent.errors import InputError, StorageError
from metis_agent.formats import is_image
from metis_agent.recording import schema
from metis_agent.recording.shards import Storage

__all__ = ["MOST_RESTORED", "ImageStore", "RestoreImages", "ToolSets", "externalise_images", "may_hold_references"]

_REFERENCE = re.compile(r"sha256:([0-9a-f]{64})")
_WORTH = 80
"""Characters from which on an image is externalised: a reference takes as many."""
# A quote after a backslash opens no text of JSON.
_PREFIX = rb'(?<!\\)"(data:image/[\w.+-]+;base64,)?'
_IMAGE = re.compile(_PREFIX + rb'([A-Za-z0-9+/]{%d,}={0,2})"' % _WORTH)
_LOOKS_LIKE_ONE = re.compile(_PREFIX + rb'image:((?:text:)*)(sha256:[0-9a-f]{64})"')
_MARK = re.compile(r"(data:image/[\w.+-]+;base64,)?image:((?:text:)*)(sha256:[0-9a-f]{64})")
MOST_RESTORED = 512 * 2**20
"""Bytes of a record with its images: more is neither written nor read."""


class _ByHash:
    """A folder inside a store's, whose files are named by the hash of their bytes; any process may write to it."""

    def __init__(
        self, url: str | os.PathLike[str], folder: str, storage_options: Mapping[str, Any] | None, *,
        what: str, ending: str = "",
    ) -> None:  # fmt: skip
        self._storage = Storage(f"{os.fspath(url).rstrip('/')}/{folder}", storage_options)
        self._what, self._ending = what, ending

    def put(self, content: bytes, digest: str) -> None:
        """Keep the content, once."""
        # A file of another size is what a crash of the machine left: write it anew.
        if self.size(digest) != len(content):
            self._storage.put(digest + self._ending, content)

    def size(self, digest: str) -> int | None:
        """Return its size in bytes, without reading it; `None` where it isn't there."""
        return self._storage.size(digest + self._ending)

    def get(self, digest: str) -> bytes:
        """Return it; a `StorageError` says that it isn't there, or is damaged."""
        content = b"".join(self._storage.blocks(digest + self._ending))
        if hashlib.sha256(content).hexdigest() != digest:
            raise StorageError(f"{self._what} 'sha256:{digest}' in {self._storage.url!r} is damaged; put it again.")
        return content


class ImageStore:
    """The folder `images` inside a store's folder; any process may write to it at any time.

    Args:
        url: the folder of the trajectory store, or any fsspec URL.
        storage_options: keywords for the fsspec file system, such as credentials.
    """

    def __init__(self, url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._files = _ByHash(url, "images", storage_options, what="image")

    def put_image(self, content: bytes) -> str:
        """Keep an image, once, and return its reference `sha256:<hex>`.

        Raises:
            StorageError: it could not be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        self._files.put(content, digest)
        return f"sha256:{digest}"

    def size(self, reference: str) -> int | None:
        """Return the size of an image in bytes, without reading it; `None` where it isn't there.

        Raises:
            InputError, StorageError: as `get_image`.
        """
        return self._files.size(_digest(reference))

    def get_image(self, reference: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            InputError: it is not a reference.
            StorageError: the image isn't there, or its bytes are not those that were put.
        """
        return self._files.get(_digest(reference))


def _digest(reference: str) -> str:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise InputError(f"{reference!r} is no image reference; put_image returns 'sha256:' and 64 hex digits.")
    return match[1]


def externalise_images(line: bytes, put_image: Callable[[bytes], str]) -> bytes:
    """The line with references in place of its images.

    A text that looks like a reference is escaped, `image:text:sha256:...`; one that looks escaped, once more.

    Args:
        line: A record as JSON.
        put_image: Keeps the bytes of an image and returns `sha256:<hex>`, such as `ImageStore.put_image`.

    Raises:
        StorageError: an image can't be written.
    """
    if b"image:" in line:
        line = _LOOKS_LIKE_ONE.sub(rb'"\1image:text:\2\3"', line)

    def kept(found: re.Match[bytes]) -> bytes:
        try:
            content = base64.b64decode(found[2], validate=True)
        except binascii.Error:
            return found[0]
        if not is_image(content) or base64.b64encode(content) != found[2]:
            return found[0]
        return b'"%simage:%s"' % (found[1] or b"", put_image(content).encode())

    return _IMAGE.sub(kept, line) if b"base64" in line else line


def may_hold_references(line: bytes) -> bool:
    """False where `restore_images` has nothing to do in a line."""
    return b"image:sha256:" in line or b"image:text:" in line


class RestoreImages:
    """Puts images back into what `externalise_images` wrote, once it is parsed.

    An image is one text, however often it stands in a record: what a line names a million times takes the memory of
    the line and the image.

    Args:
        get_encoded: The base64 of a reference; `None` where the image is gone, and the reference stays.
    """

    def __init__(self, get_encoded: Callable[[str], str | None]) -> None:
        self._get_encoded = get_encoded
        self._texts: dict[str, str] = {}
        self._size = 0

    def __call__(self, value: Any) -> Any:
        """The value, with its images again.

        Raises:
            InputError: With all of them it could not be written again.
        """
        if isinstance(value, str):
            return self._text(value) if value.startswith(("image:", "data:image/")) else value
        if isinstance(value, list):
            return [self(item) for item in value]
        return {self(key): self(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _text(self, text: str) -> str:
        restored = self._texts.get(text)
        if restored is None:
            restored = self._texts[text] = self._restored(text)
        self._size += len(restored)
        if self._size > MOST_RESTORED:
            raise InputError(f"with its images a record takes more than {MOST_RESTORED} bytes: it names too many.")
        return restored

    def _restored(self, text: str) -> str:
        found = _MARK.fullmatch(text)
        if found is None:
            return text
        prefix, escapes, reference = found[1] or "", found[2], found[3]
        if escapes:
            return f"{prefix}image:{escapes[len('text:') :]}{reference}"
        encoded = self._get_encoded(reference)
        return text if encoded is None else prefix + encoded


_MOST_SETS = 1000
"""Sets of tools that one process keeps apart: where each turn has a set of its own, it stays in its line."""
_SET = "tools"


class ToolSets:
    """The folder `tools` inside a store's folder: each distinct set of definitions once, whatever the number of turns.

    Args:
        url: the folder of the trajectory store, or any fsspec URL.
        storage_options: keywords for the fsspec file system, such as credentials.
    """

    def __init__(self, url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._files = _ByHash(url, _SET, storage_options, what="set of tools", ending=".json")
        self._read: dict[str, tuple[Mapping[str, Any], ...]] = {}
        self._written: set[str] = set()

    def put(self, tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """Keep a set, and return what stands for it in a record; none, and one too many, stand for themselves.

        Raises:
            InputError: it holds a value that JSON has no form for.
            StorageError: it could not be written.
        """
        if not tools:
            return ()
        content = schema.definitions_json(tools)
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._written:
            if len(self._written) >= _MOST_SETS:
                return tuple(tools)
            self._files.put(content, digest)
            self._written.add(digest)
        return ({_SET: f"sha256:{digest}"},)

    def get(self, tools: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
        """Return the set that stands in a record, or that what stands there names.

        Raises:
            StorageError: it isn't there, or is damaged.
        """
        found = _REFERENCE.fullmatch(str(tools[0].get(_SET))) if len(tools) == 1 and len(tools[0]) == 1 else None
        if found is None:
            return tools
        digest = found[1]
        if digest not in self._read:
            content = self._files.get(digest)
            if len(self._read) >= _MOST_SETS:
                self._read.clear()
            self._read[digest] = schema.definitions_of(content)
        return self._read[digest]
